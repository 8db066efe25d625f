"""Metadata and requirements live in settings.ini; this reads them for setuptools."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here / 'settings.ini', encoding='utf-8')
settings = parser['DEFAULT']

setup(
    name=settings['lib_name'],
    version=settings['version'],
    description=settings['description'],
    long_description=(here / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=settings['author'],
    author_email=settings['author_email'],
    license='Apache-2.0',
    keywords=settings['keywords'],
    python_requires=f">={settings['min_python']}",
    packages=find_packages(include=['heimdall_train', 'heimdall_train.*']),
    package_data={'heimdall_train': ['scenes/*.yaml', 'train.ipynb', 'py.typed']},
    install_requires=settings['requirements'].split(),
    extras_require={extra: settings[f'{extra}_requirements'].split() for extra in ('jobs', 'sign', 'lightning', 'dev')},
    entry_points={
        'console_scripts': settings['console_scripts'].split(),
        'nbdev': ['heimdall_train=heimdall_train._modidx:d'],
    },
)
