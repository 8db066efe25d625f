"""The project's files agree with one another, and the notebooks keep the project's rules."""
import ast
import configparser
import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import heimdall_train

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))
NOTEBOOKS = sorted(path for path in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in path.parts)
NUMBERED = [path for path in NOTEBOOKS if re.match(r'\d+_', path.name)]
MODULES = sorted(path for path in (ROOT / 'heimdall_train').rglob('*.py') if path.name != '_modidx.py')
MACHINE_PATH = re.compile(r'(?<![\w.:/~])(/(root|home|work|Users)/|[A-Z]:\\Users)')
MACHINE_PATH_IN_OUTPUT = re.compile(r'(?<![\w.:/~])(/(root|home|work|Users|tmp|usr|opt|var)/|[A-Z]:\\Users)')


def settings() -> configparser.SectionProxy:
    "The one place for metadata and requirements."
    parser = configparser.ConfigParser(delimiters=['='])
    parser.read(ROOT / 'settings.ini', encoding='utf-8')
    return parser['DEFAULT']


def cells(path: Path, kind: str = 'code') -> list[dict]:
    "The notebook's cells of one kind, each with its source as one text."
    notebook = json.loads(path.read_text(encoding='utf-8'))
    return [{**cell, 'source': ''.join(cell['source'])} for cell in notebook['cells'] if cell['cell_type'] == kind]


def parse(cell: dict) -> ast.Module:
    "A code cell's syntax tree, without IPython's own lines."
    return ast.parse(re.sub(r'(?m)^\s*[%!].*$', '', cell['source']))


def text_outputs(cell: dict) -> str:
    "All text that a cell has printed or shown."
    found = []
    for output in cell.get('outputs', []):
        found += [output.get('text', ''), output.get('traceback', '')]
        found += [value for kind, value in output.get('data', {}).items() if kind.startswith('text/')]
    return '\n'.join(''.join(text) for text in found)


def imported(tree: ast.AST) -> set[str]:
    "The dotted names of the modules that a syntax tree imports, wherever it does; relative ones begin with a dot."
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add('.' * node.level + (node.module or ''))
    return names


def imported_at_once(tree: ast.Module) -> set[str]:
    "The first parts of the names that a module imports when it is imported itself."
    return {name.split('.')[0] for statement in tree.body if isinstance(statement, ast.Import | ast.ImportFrom) for name in imported(statement)}


@cache
def distributions() -> dict[str, list[str]]:
    "The installed distributions that each top-level name comes from."
    return dict(packages_distributions())


def required(text: str) -> set[str]:
    "The distributions named in a requirements line of settings.ini."
    return {canonicalize_name(Requirement(word).name) for word in text.split()}


def test_one_version_and_one_layout():
    ini, nbdev = settings(), PROJECT['tool']['nbdev']
    assert heimdall_train.__version__ == ini['version']
    assert PROJECT['project']['name'] == ini['lib_name']
    assert {key: nbdev[key] for key in ('title', 'lib_path', 'nbs_path', 'doc_path', 'branch')} == {
        key: ini[key] for key in ('title', 'lib_path', 'nbs_path', 'doc_path', 'branch')}
    assert f'description: {ini["description"]}' in (ROOT / '_quarto.yml').read_text(encoding='utf-8')
    assert PROJECT['tool']['ruff']['target-version'] == 'py' + ini['min_python'].replace('.', '')
    assert PROJECT['tool']['mypy']['python_version'] == ini['min_python']


def test_setup_reads_settings():
    keys = ['name', 'version', 'description', 'author', 'author-email', 'license']
    words = [f'--{key}' for key in keys]
    shown = subprocess.run([sys.executable, 'setup.py', '--quiet', *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    ini = settings()
    expected = [ini['lib_name'], ini['version'], ini['description'], ini['author'], ini['author_email'], 'Apache-2.0']
    assert shown.splitlines()[-len(keys):] == expected
    assert set(PROJECT['project']) == {'name', 'dynamic'}, 'metadata belongs in settings.ini'


EXTRAS = {'jobs': 'jobs', 'service': 'jobs', 'lightning_module': 'lightning'}  # modules that work with an extra only: what it names is imported late


@pytest.mark.parametrize('path', MODULES, ids=lambda path: path.stem)
def test_imports_are_required(path: Path):
    extra = required(settings()[f'{EXTRAS[path.stem]}_requirements']) if path.stem in EXTRAS else set()
    extra |= {'kombu', 'starlette'} if extra else set()  # parts of celery and of fastapi with packages of their own
    allowed = required(settings()['requirements']) | extra
    tops = {name.split('.')[0] for name in imported(ast.parse(path.read_text(encoding='utf-8'))) if not name.startswith('.')}
    for top in sorted(tops - sys.stdlib_module_names - {'heimdall_train'}):
        owners = {canonicalize_name(name) for name in distributions().get(top, [])}
        assert owners & allowed, f'{path.name} imports {top}: add {" or ".join(owners) or "its package"} to requirements in settings.ini'
    at_once = imported_at_once(ast.parse(path.read_text(encoding='utf-8')))
    assert not {top for top in at_once if {canonicalize_name(name) for name in distributions().get(top, [])} & extra}, 'import an extra late'


def test_lightning_is_pinned_by_version_and_hash():
    lines = [line for line in (ROOT / 'requirements-lightning.txt').read_text().splitlines() if not line.startswith('#')]
    pins = {match[1]: match[2] for line in lines if (match := re.fullmatch(r'([\w-]+)==([\d.]+) --hash=sha256:[0-9a-f]{64}', line))}
    assert set(pins) == {'lightning', 'pytorch-lightning'} and len(lines) == 2
    module = (ROOT / 'heimdall_train' / 'lightning_module.py').read_text()
    [pinned, *compromised] = re.findall(r"'([\d.]+)'", next(line for line in module.splitlines() if line.startswith('PINNED, COMPROMISED =')))
    assert set(pins.values()) == {pinned} and settings()['lightning_requirements'] == f'lightning=={pinned}'
    assert compromised == ['2.6.2', '2.6.3'] and pinned not in compromised


@pytest.mark.parametrize('path', [*MODULES, *sorted((ROOT / 'tests').glob('*.py'))], ids=lambda path: path.stem)
def test_no_star_imports_in_modules(path: Path):
    assert not re.search(r'(?m)^\s*from .+ import \*', path.read_text(encoding='utf-8'))


def test_markers_are_registered():
    markers = {line.split(':')[0] for line in PROJECT['tool']['pytest']['ini_options']['markers']}
    assert markers == {'postgres', 's3', 'fault', 'resume', 'jobs', 'slow'}
    assert '--strict-markers' in PROJECT['tool']['pytest']['ini_options']['addopts']


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_rules(path: Path):
    assert path.stat().st_size < 300_000, 'figures at a lower resolution, please'
    code = cells(path)
    for cell in code:
        assert not re.search(r'(?m)^\s*from .+ import \*', cell['source']), cell['source']
        for text, pattern in ((cell['source'], MACHINE_PATH), (text_outputs(cell), MACHINE_PATH_IN_OUTPUT)):
            assert not (found := pattern.search(text)), f'a path of one machine: {text[max(0, found.start() - 40):found.end() + 80]}'
        assert not any(output['output_type'] == 'error' for output in cell['outputs']), f'an error was saved:\n{cell["source"]}'
    for cell in cells(path, 'markdown'):
        assert not MACHINE_PATH.search(cell['source']), cell['source']
    first = cells(path, 'markdown')[0]['source']
    assert re.fullmatch(r'# \S.*\n+> \S.*\s*', first), 'the first cell: "# Title", "> what it is", a line each; the site drops the rest'


@pytest.mark.parametrize('path', NUMBERED, ids=lambda path: path.stem)
def test_numbered_notebook(path: Path):
    number = {re.sub(r'^\d+_', '', other.stem): int(other.stem.split('_')[0]) for other in NUMBERED}
    code = cells(path)
    assert len(code) + len(cells(path, 'markdown')) <= 60, 'too long: what lives here is two things'
    module = path.stem.split('_', 1)[1]
    assert any(re.search(rf'(?m)^#\|\s*default_exp {module}$', cell['source']) for cell in code), f'no "#| default_exp {module}"'
    for cell in code:
        for name in imported(parse(cell)):
            if name.startswith('heimdall_train.'):
                other = name.split('.')[1]
                assert other in number and number[other] < number[module], f'{path.name} imports {name}, which is not of a lower number'


def test_modules_and_notebooks_match():
    exported = {path.stem for path in MODULES} - {'__init__'}
    assert exported == {path.stem.split('_', 1)[1] for path in NUMBERED}


def test_a_new_file_of_the_package_is_shipped():
    manifest = (ROOT / 'MANIFEST.in').read_text(encoding='utf-8')
    assert 'settings.ini' in manifest and 'py.typed' in manifest
    assert (ROOT / 'heimdall_train' / 'py.typed').exists()
