"""A sweep that is killed and started again, a search that does not depend on how often it was stopped, and the notebook that they run."""
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml

from heimdall_train.config import make_config
from heimdall_train.network import HeimdallError
from heimdall_train.sweep import Sweep, _open_study, _search, read_sweep, run_sweep
from heimdall_train.tracking import tracked_run

# in the place of nbs/runs/train.ipynb: notes that it has begun, waits where it is told to, and says how it was called
NOTEBOOK = '''
import json, time
from pathlib import Path
from heimdall_train.tracking import tracked_run
folder = Path(out)
(folder / 'config.yaml').write_text('begun: true')
with open(folder.parent / 'begun.txt', 'a') as file:
    file.write(f'{seed} {resume}\\n')
while seed == 1 and not resume:
    time.sleep(0.1)
with tracked_run(tracking, folder) as run:
    run.log_parameters({'seed': seed})
record = {'mlflow_run_id': run.run_id, 'validation': {'model': {'mean_m': 100.0 - seed}}}
(folder / 'metrics.json').write_text(json.dumps({'training': record}))
'''


def sweep_file(folder: Path, **values: object) -> Path:
    notebook = nbformat.v4.new_notebook(metadata={'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}})
    notebook.cells = [nbformat.v4.new_code_cell("seed = 0\nresume = False\nout = ''\ntracking = ''", metadata={'tags': ['parameters']}),
                      nbformat.v4.new_code_cell(NOTEBOOK)]
    nbformat.write(notebook, folder / 'quick.ipynb')
    (folder / 'sweep.yml').write_text(yaml.safe_dump({'notebook': str(folder / 'quick.ipynb'), **values}))
    return folder / 'sweep.yml'


@pytest.mark.resume
def test_a_sweep_is_killed_and_goes_on(tmp_path: Path):
    file, out = sweep_file(tmp_path, grid={'seed': [0, 1]}), tmp_path / 'out'
    command = [sys.executable, '-c', 'from heimdall_train.cli import main; main()', 'sweep', str(file), '--out', str(out), '--json']
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    end = time.monotonic() + 120
    while not (out / 'begun.txt').exists() or len((out / 'begun.txt').read_text().splitlines()) < 2:
        assert time.monotonic() < end and first.poll() is None
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    points = json.loads(again.stdout)
    assert [point['parameters'] for point in points] == [{'seed': 1}, {'seed': 0}] and [point['figure'] for point in points] == [99.0, 100.0]
    assert (out / 'begun.txt').read_text().splitlines() == ['0 False', '1 False', '1 True']
    assert f'heimdall-train evaluate --model {points[0]["folder"]}' in again.stderr
    assert all((Path(point['folder']) / 'train.ipynb').stat().st_size for point in points)
    nested_in(out, {point['mlflow_run_id'] for point in points})
    third = run_sweep(read_sweep(file), make_config(out=out))
    assert third == points and len((out / 'begun.txt').read_text().splitlines()) == 3


def nested_in(out: Path, ids: set[str]) -> None:
    "Assert that these MLflow runs, each with its notebook, are below the sweep's."
    import mlflow
    client = mlflow.MlflowClient(f'sqlite:///{out / "mlflow.db"}')
    parent = json.loads((out / 'sweep.json').read_text())['mlflow_run_id']
    below = client.search_runs([client.get_run(parent).info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert {run.info.run_id for run in below} == ids
    assert all([entry.path for entry in client.list_artifacts(id)] == ['train.ipynb'] for id in ids)


def search(out: Path, stop_after: int | None = None) -> list[float]:
    "Learning rates that a search tries, of which it may be stopped in one."
    sweep, tried = Sweep(search={'learning_rate': {'low': 1e-4, 'high': 1e-2, 'log': True}}, trials=14), []

    def at(parameters: dict, number: int, count: int) -> float:
        tried.append(parameters['learning_rate'])
        if number == stop_after:
            raise KeyboardInterrupt
        return abs(parameters['learning_rate'] - 0.003)

    out.mkdir(exist_ok=True)
    _search(sweep, _open_study(sweep, out), at)
    return tried


@pytest.mark.resume
def test_a_search_that_is_stopped_looks_where_it_would_have_looked(tmp_path: Path):
    undisturbed = search(tmp_path / 'undisturbed')
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / 'stopped', 12)
    assert search(tmp_path / 'stopped') == undisturbed
    assert search(tmp_path / 'stopped') == undisturbed
    best = sorted(undisturbed, key=lambda rate: abs(rate - 0.003))[0]
    assert 0.0015 < best < 0.006 and len(set(undisturbed)) == 14


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    "Seeds that were run, by what stands in for papermill; those in `unlucky` fail."
    seeds: list[int] = []

    def execute(notebook: str, output: str, parameters: dict, **_: object) -> None:
        seeds.append(parameters['seed'])
        if parameters['seed'] in unlucky:
            raise papermill.PapermillExecutionError(0, 0, '', 'ValueError', 'no luck', [])
        folder = Path(parameters['out'])
        Path(output).write_text('{}')
        with tracked_run(parameters['tracking'], folder) as run:
            pass
        figures = {'mean_m': float(parameters['seed']), 'median_m': -float(parameters['seed']), 'p90_m': float('nan')}
        (folder / 'metrics.json').write_text(json.dumps({'training': {'mlflow_run_id': run.run_id, 'validation': {'model': figures}}}))

    unlucky.clear()
    monkeypatch.setenv('HEIMDALL_TRACKING', f'sqlite:///{tmp_path_factory.getbasetemp() / "mlflow.db"}')  # a new file each would take long
    monkeypatch.setattr(papermill, 'execute_notebook', execute)
    return seeds


unlucky: set[int] = set()


def swept(folder: Path, **values: object) -> list[dict]:
    "Points of a sweep."
    return run_sweep(read_sweep(sweep_file(folder, **values)), make_config(out=folder / 'out'))


SEARCH = {'seed': {'low': 0, 'high': 1_000_000}}


def test_a_search_that_goes_on_ranks_all_of_its_points(tmp_path: Path, trained: list[int]):
    assert len(swept(tmp_path, search=SEARCH, trials=2)) == 2
    points = swept(tmp_path, search=SEARCH, trials=4)
    assert [point['figure'] for point in points] == sorted(trained) and len(set(trained)) == 4
    assert swept(tmp_path, search=SEARCH, trials=4) == points and len(trained) == 4
    import mlflow
    run = mlflow.MlflowClient(make_config().tracking).get_run(json.loads((tmp_path / 'out' / 'sweep.json').read_text())['mlflow_run_id'])
    assert (run.data.metrics['lowest'], run.data.metrics['points']) == (min(trained), 4)


def test_a_point_of_a_search_that_failed_is_tried_again(tmp_path: Path, trained: list[int]):
    undisturbed = [point['parameters']['seed'] for point in swept(tmp_path, search=SEARCH, trials=3)]
    trained.clear()
    (again := tmp_path / 'again').mkdir()
    unlucky.update(undisturbed[:1])
    for _ in range(2):
        with pytest.raises(HeimdallError, match='1 of 3 points failed, the same command tries them again; the first: .*no luck'):
            swept(again, search=SEARCH, trials=3)
    assert sorted(trained) == sorted([*undisturbed, undisturbed[0]])
    unlucky.clear()
    assert [point['parameters']['seed'] for point in swept(again, search=SEARCH, trials=3)] == undisturbed
    assert len(trained) == 5 and trained[-1] == undisturbed[0]
    assert len(swept(again, search=SEARCH, trials=3)) == 3 and len(trained) == 5  # Optuna was told


def test_another_figure(tmp_path: Path, trained: list[int]):
    "Ranks the points of a grid anew; a search, whose figures Optuna remembers, is refused."
    grid = {'seed': [0, 1, 2]}
    assert [point['figure'] for point in swept(tmp_path, grid=grid)] == [0, 1, 2]
    points = swept(tmp_path, grid=grid, minimise='validation.model.median_m')
    assert [(point['parameters']['seed'], point['figure']) for point in points] == [(2, -2), (1, -1), (0, 0)] and len(trained) == 3
    for wrong, words in (('validation.model.mean', 'no such figure'), ('validation.model', 'not a number'), ('validation.model.p90_m', 'not a number')):
        with pytest.raises(HeimdallError, match=f'3 of 3 points failed.*minimise {wrong}: {words}'):
            swept(tmp_path, grid=grid, minimise=wrong)
    (searched := tmp_path / 'searched').mkdir()
    points, before = swept(searched, search=SEARCH, trials=2), (searched / 'out' / 'sweep.json').read_text()
    for changed in ({'minimise': 'validation.model.median_m'}, {'parameters': {'epochs': 3}}):
        with pytest.raises(HeimdallError, match=r'optuna.db: this search was begun with .*model.mean_m.*: leave minimise and parameters as they were'):
            swept(searched, search=SEARCH, trials=2, **changed)
    assert (searched / 'out' / 'sweep.json').read_text() == before and swept(searched, search=SEARCH, trials=2) == points and len(trained) == 5


@pytest.mark.parametrize('given', [{}, {'catalog': 'mine.db'}, {'scene': 'demo-v1'}])
def test_the_run_notebook_takes_a_catalog_or_a_scene(given: dict[str, str]):
    cells = [cell for cell in nbformat.read(Path(__file__).parent.parent / 'nbs' / 'runs' / 'train.ipynb', 4).cells if cell.cell_type == 'code']
    number, = (number for number, cell in enumerate(cells) if 'parameters' in cell.metadata.get('tags', []))
    names: dict = {}
    for source in (cell.source for cell in cells[:number + 1]):
        exec(source, names)
    names.update(given)  # as papermill does, below the parameters
    exec(cells[number + 1].source, names)
    assert (names['config'].catalog, names['config'].scene) == (given.get('catalog', 'runs/catalog.db'), given.get('scene'))


def test_a_notebook_that_is_not_there(tmp_path: Path):
    (tmp_path / 'sweep.yml').write_text(yaml.safe_dump({'notebook': str(tmp_path / 'none.ipynb'), 'grid': {'seed': [0]}}))
    with pytest.raises(HeimdallError, match='none.ipynb is not there'):
        run_sweep(read_sweep(tmp_path / 'sweep.yml'), make_config(out=tmp_path / 'out'))
    assert not (tmp_path / 'out').exists()
