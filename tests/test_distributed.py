"""Two processes that torchrun starts train what one trains at the same global batch: the loss curve, and the whole command."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from servers import free_ports

# Float32 sums in another order: the curves of 1 and of 2 processes part slowly. Nats; a seed's change is a hundred times as large.
TOLERANCE = 2e-3


def curve(folder: Path) -> None:
    "In each process: train the small bed; the first one writes the curve."
    from resume_job import build, prepare

    from heimdall_train.checkpoints import Checkpoint
    from heimdall_train.distributed import group, joined, leads
    from heimdall_train.training import fit
    torch.set_num_threads(1)
    job = prepare()
    with joined():
        learner = build(job, seed=0, workers=0)
        fit(learner, 4, folder / 'checkpoints', callbacks=[Checkpoint(folder / 'checkpoints', say=lambda line: None)])
        if leads():
            (folder / 'curve.json').write_text(json.dumps({
                'processes': group()[1], 'losses': [float(loss) for loss in learner.recorder.losses], 'history': [list(row) for row in learner.recorder.values],
                'state': float(sum(value.double().abs().sum() for value in learner.model.state_dict().values() if value.is_floating_point()
                                   and torch.isfinite(value).all()))}))


def torchrun(processes: int, *command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    "A command in so many processes."
    program = [str(Path(sys.executable).parent / 'torchrun'), '--no-python', f'--nproc-per-node={processes}', f'--master-port={free_ports(1)[0]}', *command]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(Path(__file__).parent), **variables}
    done = subprocess.run(program, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope='module')
def curves(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folders = [tmp_path_factory.mktemp(f'by_{processes}') for processes in (1, 2)]
    for processes, folder in zip((1, 2), folders, strict=True):
        torchrun(processes, sys.executable, '-c', f'from pathlib import Path; from test_distributed import curve; curve(Path({str(folder)!r}))', cwd=folder)
        assert (folder / 'checkpoints' / 'best.safetensors').exists() and len(list((folder / 'checkpoints').glob('epoch-*.sha256'))) == 2
    return [json.loads((folder / 'curve.json').read_text()) for folder in folders]


def test_two_processes_have_the_loss_curve_of_one(curves: list[dict]):
    one, two = curves
    assert (one['processes'], two['processes']) == (1, 2)
    assert len(one['losses']) == len(two['losses']) > 16
    np.testing.assert_allclose(two['losses'], one['losses'], rtol=0, atol=TOLERANCE)
    losses = np.array([row[:2] for row in one['history']]), np.array([row[:2] for row in two['history']])
    np.testing.assert_allclose(*losses, rtol=0, atol=TOLERANCE)
    assert np.ptp(one['losses']) > 100 * TOLERANCE, 'the curve says nothing at this tolerance'


def test_the_command(tmp_path: Path):
    from heimdall_train.config import make_config
    from heimdall_train.data import ingest, write_scene_table
    table = write_scene_table('testbed-v1', tmp_path / 'scene', sources={'train': 40, 'validation': 24, 'test': 12})
    ingest(table, make_config(catalog=str(tmp_path / 'catalog.db'), store=str(tmp_path / 'store')))
    command = [sys.executable, '-c', 'from heimdall_train.cli import main; main()', 'train', '--catalog', 'catalog.db', '--out', 'runs/two', '--epochs', '1']
    done = torchrun(2, *command, '--json', cwd=tmp_path, HEIMDALL_BATCH_SIZE='16')
    assert done.stderr.count('epoch 1/1: validation loss') == 1, 'both processes speak'
    record = json.loads((tmp_path / 'runs' / 'two' / 'metrics.json').read_text())['training']
    assert json.loads(done.stdout) == record
    assert record['epoch'] == 1 and load_file(tmp_path / 'runs' / 'two' / 'model.safetensors')
