"""Two processes that torchrun starts train what one trains at the same global batch: the loss curve, and the whole command."""
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from servers import free_ports

ROOT = Path(__file__).resolve().parent.parent
# Float32 sums in another order: the curves of 1 and of 2 processes part slowly. Nats; a seed's change is a hundred times as large.
TOLERANCE = 2e-3


def curve(folder: Path) -> None:
    "In each process: train the small bed; the first one writes the curve."
    from resume_job import build, prepare

    from heimdall_train import model
    from heimdall_train.checkpoints import Checkpoint
    from heimdall_train.distributed import group, joined, leads
    from heimdall_train.training import fit
    torch.set_num_threads(1)
    with patch.object(model, 'backbone', model.backbone), joined():  # `prepare` puts a small one in its place
        job = prepare()
        learner = build(job, seed=0, workers=0)
        fit(learner, 4, folder / 'checkpoints', callbacks=[Checkpoint(folder / 'checkpoints', say=lambda line: None)])
        if leads():
            (folder / 'curve.json').write_text(json.dumps({
                'processes': group()[1], 'losses': [float(loss) for loss in learner.recorder.losses], 'history': [list(row) for row in learner.recorder.values],
                'state': float(sum(value.double().abs().sum() for value in learner.model.state_dict().values() if value.is_floating_point()
                                   and torch.isfinite(value).all()))}))


def both(folder: Path) -> None:
    "In each process that torchrun has started: the curve, then the whole command, in one group."
    from heimdall_train.cli import main
    from heimdall_train.distributed import joined
    command = ['heimdall-train', 'train', '--catalog', 'catalog.db', '--out', 'runs/two', '--epochs', '1', '--json']
    with joined():
        curve(folder / 'two')
        with patch.object(sys, 'argv', command):
            main()


@pytest.fixture(scope='module')
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    "A folder in which one process has trained, and then two that torchrun started; and what the two said."
    from heimdall_train.config import make_config
    from heimdall_train.data import ingest, write_scene_table
    folder = tmp_path_factory.mktemp('trained')
    (folder / 'one').mkdir()
    (folder / 'two').mkdir()
    threads = torch.get_num_threads()
    with patch.dict(os.environ, {'RANK': '0', 'WORLD_SIZE': '1', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_ports(1)[0])}):  # a group of one
        curve(folder / 'one')
    torch.set_num_threads(threads)
    description = yaml.safe_load((ROOT / 'heimdall_train' / 'scenes' / 'testbed-v1.yaml').read_text())
    (folder / 'tiny.yaml').write_text(yaml.safe_dump({**description, 'name': 'tiny', 'receivers': 8}))
    table = write_scene_table(str(folder / 'tiny.yaml'), folder / 'scene', sources={'train': 40, 'validation': 24, 'test': 12})
    ingest(table, make_config(catalog=str(folder / 'catalog.db'), store=str(folder / 'store')))
    command = [sys.executable, '-c', f'from pathlib import Path; from test_distributed import both; both(Path({str(folder)!r}))']
    program = [str(Path(sys.executable).parent / 'torchrun'), '--no-python', '--nproc-per-node=2', f'--master-port={free_ports(1)[0]}', *command]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(Path(__file__).parent), 'HEIMDALL_BATCH_SIZE': '16'}
    done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    for by in ('one', 'two'):
        assert (folder / by / 'checkpoints' / 'best.safetensors').exists() and len(list((folder / by / 'checkpoints').glob('epoch-*.sha256'))) == 2
    return folder, done


def test_two_processes_have_the_loss_curve_of_one(trained: tuple):
    one, two = (json.loads((trained[0] / by / 'curve.json').read_text()) for by in ('one', 'two'))
    assert (one['processes'], two['processes']) == (1, 2)
    assert len(one['losses']) == len(two['losses']) > 16
    np.testing.assert_allclose(two['losses'], one['losses'], rtol=0, atol=TOLERANCE)
    losses = np.array([row[:2] for row in one['history']]), np.array([row[:2] for row in two['history']])
    np.testing.assert_allclose(*losses, rtol=0, atol=TOLERANCE)
    assert np.ptp(one['losses']) > 100 * TOLERANCE, 'the curve says nothing at this tolerance'


def test_the_command(trained: tuple):
    folder, done = trained
    assert done.stderr.count('epoch 1/1: validation loss') == 1, 'both processes speak'
    record = json.loads((folder / 'runs' / 'two' / 'metrics.json').read_text())['training']
    assert json.loads(done.stdout) == record
    assert record['epoch'] == 1 and load_file(folder / 'runs' / 'two' / 'model.safetensors')
