"""The tutorials, each by papermill as a user would run it: in a process of its own, from top to bottom, in under three minutes of one core."""
import os
import resource
from pathlib import Path

import nbformat
import papermill
import pytest

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = sorted((ROOT / 'nbs' / 'tutorials').glob('*.ipynb'))


@pytest.mark.parametrize('path', TUTORIALS, ids=lambda path: path.stem)
def test_tutorial(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv('HEIMDALL_DATA', str(Path(os.environ.get('HEIMDALL_DATA') or ROOT.parent / 'shared' / 'data').resolve()))
    monkeypatch.setenv('TMPDIR', str(tmp_path))  # a tutorial leaves its folder to its reader
    for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS'):
        monkeypatch.setenv(name, '1')
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    notebook = papermill.execute_notebook(str(path), str(tmp_path / path.name), progress_bar=False, cwd=str(ROOT))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    with capsys.disabled():
        print(f'\n{path.stem}: {after.ru_utime - before.ru_utime:.0f} s of CPU')
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == 'code')


@pytest.mark.parametrize('path', TUTORIALS, ids=lambda path: path.stem)
def test_tutorials_are_run_here_and_nowhere_else(path: Path):
    "`nbdev-test` and the site leave them out: once is enough."
    cells = nbformat.read(path, 4).cells
    assert cells[1].cell_type == 'raw' and 'skip_exec: true' in cells[1].source
    assert any(output for cell in cells if cell.cell_type == 'code' for output in cell.outputs), 'execute it before it is committed'
