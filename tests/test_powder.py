"""The chain on measured levels: what a model that never saw a place says about transmissions from it."""
import csv
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from heimdall_train.cli import app
from heimdall_train.dataset import Split
from heimdall_train.metrics import Evaluation
from heimdall_train.pipeline import Config, evaluate, make_config, read_data

EVERY = 6  # a sixth of the sessions keeps this within two minutes on one core


def succeed(*arguments: object) -> None:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, f'{result.exception!r}\n{result.stderr}'


@pytest.fixture(scope='module')
def config(powder: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    "A model of one epoch, trained through the command line on every sixth session that `grid_test` leaves."
    folder = tmp_path_factory.mktemp('powder')
    drive = folder / 'drive'
    drive.mkdir()
    lines = (powder / 'levels.csv').read_text().splitlines()
    kept = [lines[0], *lines[1::EVERY]]
    (drive / 'levels.csv').write_text('\n'.join(kept) + '\n')
    (drive / 'receivers.csv').write_text((powder / 'receivers.csv').read_text())
    ids = {row['session_id'] for row in csv.DictReader(kept)}
    held_out = [session_id for session_id in (powder / 'splits' / 'grid_test.txt').read_text().split() if session_id in ids]
    (drive / 'grid_test.txt').write_text('\n'.join(held_out))
    catalog, out = folder / 'catalog.db', folder / 'runs' / 'grid'
    succeed('ingest', 'levels', drive / 'levels.csv', '--catalog', catalog, '--store', folder / 'store')
    succeed('train', '--catalog', catalog, '--out', out, '--epochs', 1, '--test-sessions', drive / 'grid_test.txt')
    return make_config(catalog=str(catalog), out=out, test_sessions=drive / 'grid_test.txt')


def test_no_place_is_trained_and_tested_on(config: Config):
    data, split = read_data(config), Split.load(config.out / 'split.json')
    split.check(data)
    tested = set(data.sources[data.rows(split.test)].tolist())
    for part in (split.train, split.validation):
        assert not tested & set(data.sources[data.rows(part)].tolist())
    assert sorted(split.test) == sorted(config.test_sessions.read_text().split())
    assert len(split.train) + len(split.validation) + len(split.test) + len(split.set_aside) == len(data)


def test_better_than_half_of_predicting_the_mean(config: Config):
    evaluation: Evaluation = evaluate(config, baselines=False)
    data, split = read_data(config), Split.load(config.out / 'split.json')
    frame = data.network.frame(data.latitude, data.longitude)
    positions = data.enu(frame)
    centre = positions[data.rows(split.train)].mean(axis=0)
    mean_error = np.linalg.norm(positions[data.rows(split.test)] - centre, axis=1).mean()
    assert evaluation.n == len(split.test) == len(config.test_sessions.read_text().split())
    assert evaluation.split == 'grid_test' and evaluation.baselines == {}
    assert evaluation.model.mean_m < 0.5 * mean_error, f'{evaluation.model.mean_m:.0f} m; predicting the mean gives {mean_error:.0f} m'
    assert 0.6 <= evaluation.model.coverage['90'] <= 1.0
