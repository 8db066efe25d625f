"""The package as others install it: built, put into an empty environment, and used far from the checkout."""
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEEDED = {'heimdall_train/py.typed', 'heimdall_train/train.ipynb', 'heimdall_train/scenes/demo-v1.yaml', 'heimdall_train/scenes/piedmont-wide-v1.yaml'}
SMOKE = """
import importlib, json, pkgutil
import heimdall_train
assert 'site-packages' in heimdall_train.__file__, heimdall_train.__file__
for module in pkgutil.iter_modules(heimdall_train.__path__):
    importlib.import_module(f'heimdall_train.{module.name}')
from heimdall_train.scene import load_scene, scene_world
from heimdall_train.sweep import Sweep, run_notebook_path
assert len(scene_world(load_scene('demo-v1')).network) == 7
cells = json.loads(run_notebook_path(Sweep(grid={'seed': [0]})).read_text())['cells']
assert any('parameters' in cell['metadata'].get('tags', []) for cell in cells)
print('all there')
"""


def run(*command: object, **settings: object) -> str:
    "What a program prints; it must end well."
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, **settings)
    assert done.returncode == 0, f'{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}'
    return done.stdout


@pytest.fixture(scope='module')
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder with an sdist of the checkout, and the wheel made from that sdist."
    folder = tmp_path_factory.mktemp('package')
    tracked = run('git', 'ls-files', cwd=ROOT).splitlines() if (ROOT / '.git').exists() else [path.relative_to(ROOT) for path in ROOT.rglob('*')]
    for name in tracked:
        if (ROOT / name).is_file() or (ROOT / name).is_symlink():
            (folder / 'source' / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / 'source' / name, follow_symlinks=False)
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', folder / 'dist', folder / 'source')
    return folder / 'dist'


def test_sdist_and_wheel_have_what_is_no_module(built: Path):
    with zipfile.ZipFile(next(built.glob('*.whl'))) as wheel, tarfile.open(next(built.glob('*.tar.gz'))) as sdist:
        names = {name.partition('/')[2] for name in sdist.getnames()}
        assert set(wheel.namelist()) >= NEEDED and names >= NEEDED | {'settings.ini', 'LICENSE', 'README.md'}
        assert not [name for name in wheel.namelist() if not name.startswith('heimdall_train')]
        described = wheel.read(next(name for name in wheel.namelist() if name.endswith('/METADATA'))).decode()
    assert re.search(r'^License(-Expression)?: Apache-2.0$', described, re.M) and 'Provides-Extra: jobs' in described


def test_the_wheel_works_in_an_empty_environment(built: Path, tmp_path: Path):
    "Its requirements are those of this environment; the package is only what the wheel holds."
    venv.create(tmp_path / 'venv', symlinks=True)
    python, packages = tmp_path / 'venv' / 'bin' / 'python', next((tmp_path / 'venv' / 'lib').glob('python*/site-packages'))
    requirements = {str(Path(shutil.__file__).parent), *site.getsitepackages(), *(entry for entry in sys.path if entry.endswith('site-packages'))}
    (packages / 'requirements.pth').write_text('\n'.join(sorted(requirements)))  # no .pth file in those is read, so no checkout is found
    run(sys.executable, '-m', 'pip', '--python', python, 'install', '--no-deps', '--no-index', '--ignore-installed', next(built.glob('*.whl')))
    clean = {name: value for name, value in os.environ.items() if not name.startswith(('PYTHON', 'COV'))}
    assert run(python, '-c', SMOKE, cwd=tmp_path, env=clean).endswith('all there\n')
    program = tmp_path / 'venv' / 'bin' / 'heimdall-train'
    assert 'simulate' in run(program, '--help', cwd=tmp_path, env=clean)
    run(program, 'simulate', 'demo-v1', '--sessions', 3, '--catalog', 'catalog.db', '--store', 'store', cwd=tmp_path, env=clean)
    assert len(list((tmp_path / 'store' / 'sessions').iterdir())) == 3


def test_importing_the_package_is_cheap():
    "Nothing heavy comes with the package itself, nor with the command line's help."
    heavy = 'torch', 'fastai', 'mlflow', 'numpy', 'pandas', 'scipy', 'sklearn', 'matplotlib', 'onnx', 'onnxruntime', 'boto3', 'sqlalchemy', 'fastapi', 'celery'
    loaded = "import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    assert not set(run(sys.executable, '-c', f'import heimdall_train; {loaded}').split()) & set(heavy)
    helped = f"""
import sys
from heimdall_train.cli import main
sys.argv = ['heimdall-train', '--help']
try:
    main()
except SystemExit:
    pass
{loaded}"""
    assert not set(run(sys.executable, '-c', helped).splitlines()[-1].split()) & set(heavy)


def test_every_requirement_has_its_licence_listed():
    settings = ConfigParser(delimiters=['='])
    settings.read(ROOT / 'settings.ini', encoding='utf-8')
    requirements = [each for part, value in settings['DEFAULT'].items() if part.endswith('requirements') for each in value.split()]
    names = [re.split(r'[<>=!~\[;]', each)[0] for each in requirements]
    page = (ROOT / 'nbs' / 'licences.md').read_text()
    listed = dict(re.findall(r'^\| (\S+) \| (.+) \|$', page, re.M))
    assert set(listed) - {'package'} == set(names), 'run tools/licences'
    unfit = r'(?<!Lesser )General Public License|\bA?GPL|not installed|see its files'
    assert [name for name, licence in listed.items() if re.search(unfit, licence)] == []
