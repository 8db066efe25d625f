"""What tools/ promises: README.md is the index notebook, and a fault in the site is found."""
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

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
