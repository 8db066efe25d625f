"""What tools/ promises: README.md is the index notebook, and a fault in the site is found; and pages say nothing that is not so."""
import json
import re
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest
import typer
from execnb.shell import CaptureShell

from heimdall_train.cli import app

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def docs() -> ModuleType:
    "tools/docs as a module."
    loader = SourceFileLoader('site_builder', str(ROOT / 'tools' / 'docs'))
    module = module_from_spec(spec_from_loader('site_builder', loader))
    loader.exec_module(module)
    return module


def test_readme_is_the_index_notebook():
    check = subprocess.run([sys.executable, ROOT / 'tools' / 'readme', '--check'], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


def test_sidebar_lists_every_page_once(docs: ModuleType):
    sidebar = docs.yaml.safe_load((ROOT / 'nbs' / 'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']
    pages = [page for section in sidebar['contents'] for page in section['contents']]
    assert sorted(pages) == sorted(path.as_posix() for path in docs.sources()), 'run make export'


def test_dead_links_are_found(docs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(docs, 'SITE', tmp_path)
    texts = {'index.html': '<h1>Home</h1><a href="a/page.html#here">x</a><a href="https://example.org/gone">x</a><img src="missing.png">',
             'a/page.html': '<h2 id="here">x</h2><a href="../index.html">x</a><a href="#nowhere">x</a><a href="/index.html">x</a>'}
    (tmp_path / 'a').mkdir()
    pages = {tmp_path / name: docs.Page(text) for name, text in texts.items()}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert pages[tmp_path / 'index.html'].headings == 'Home'
    assert docs.dead_links(pages) == ['a/page.html: dead link #nowhere', 'index.html: dead link missing.png']


def test_pages_have_no_numbers(docs: ModuleType):
    cell = {'cell_type': 'markdown', 'source': ['See [geodesy](../00_geodesy.ipynb#frames), `00_geodesy.ipynb`, [that](index.ipynb)']}
    assert docs.site_notebook({'cells': [cell]})['cells'][0]['source'] == (
        'See [geodesy](../geodesy.ipynb#frames), `00_geodesy.ipynb`, [that](index.ipynb)')


def test_warnings_are_not_on_pages(docs: ModuleType):
    printed = {'output_type': 'stream', 'name': 'stdout', 'text': '1'}
    cell = {'cell_type': 'code', 'source': 'f()', 'outputs': [{'output_type': 'stream', 'name': 'stderr', 'text': '/a/b.py:1: UserWarning: x'}, printed]}
    assert docs.site_notebook({'cells': [cell]})['cells'][0]['outputs'] == [printed]


def test_signatures_are_short(docs: ModuleType):
    shown = '```python\ndef f(\n    one:__main__.Network, # of receivers\n    two:int=1\n)->__main__.Fix: # metres\n```\n'
    assert docs.site_signature(shown) == shown.replace('__main__.', '')
    inherited = ('```python\ndef Shown(\n    size:float=1, # This can be\n    # \n    # - a tuple\n'
                 '    *, dpi:NoneType=None, # Dots per inch.\n    **kwargs\n):\n```\n')
    assert docs.site_signature(inherited) == '```python\ndef Shown(\n    size:float=1,\n    *, dpi:NoneType=None,\n    **kwargs\n):\n```\n'


def page_text(path: Path) -> str:
    "What a page says, without code cells."
    text = path.read_text(encoding='utf-8')
    if path.suffix == '.md':
        return text
    return '\n\n'.join(''.join(cell['source']) for cell in json.loads(text)['cells'] if cell['cell_type'] == 'markdown')


def test_commands_on_pages_exist_with_their_options(docs: ModuleType):
    root, count = typer.main.get_command(app), 0
    for path in docs.sources():
        for found in re.finditer(r'(?m)(?:^|`)heimdall-train ([a-z][^`\n#|&;]*)', page_text(docs.NBS / path)):
            command, words = root, found[1].split()
            while words and words[0] in getattr(command, 'commands', {}):
                command = command.commands[words.pop(0)]
            known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {'--help'}
            assert command is not root, f'{path}: no such command: heimdall-train {found[1]}'
            unknown = [word for word in words if word.startswith('--') and word.split('=')[0].rstrip('.,:)') not in known]
            assert not unknown, f'{path}: heimdall-train {found[1]}: no option {unknown[0]}'
            count += 1
    assert count > 80


@pytest.mark.parametrize('name', ['index', 'results'])
def test_figures_on_pages_are_those_of_the_results(name: str):
    "Pages whose tables are made of benchmarks/results/*.json were executed after these were written."
    path = ROOT / 'nbs' / f'{name}.ipynb'
    shell, compared = CaptureShell(path), 0
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        if cell['cell_type'] == 'code' and 'echo: false' in ''.join(cell['source']):
            said, made = ([''.join(output.get('data', {}).get('text/markdown', [])) for output in outputs]
                          for outputs in (cell['outputs'], shell.run(''.join(cell['source']))))
            assert shell.exc is None and made == said, f'execute nbs/{name}.ipynb again: benchmarks/results/ has changed'
            compared += bool(said)
    assert compared > 1


def test_badges_are_true():
    badges = (ROOT / 'nbs' / 'images' / 'badges.svg').read_text(encoding='utf-8')
    settings, makefile = (ROOT / 'settings.ini').read_text(encoding='utf-8'), (ROOT / 'Makefile').read_text(encoding='utf-8')
    assert f'>{re.search(r"min_python = (.+)", settings)[1]} or newer<' in badges
    assert '>Apache-2.0<' in badges and 'license = apache2' in settings
    assert f'>{re.search(r"--cov-fail-under=([0-9]+)", makefile)[1]} % or the tests fail<' in badges
