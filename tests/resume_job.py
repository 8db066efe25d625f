"""A training of seconds that can be killed at a chosen place, for tests/test_resume.py and benchmarks/kill_resume.py."""
import hashlib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from heimdall_train import model as model_module
from heimdall_train.anchor import Kriging, LevelAnchor, cross_fit, fit_level_anchor, position_grid
from heimdall_train.checkpoints import Checkpoint, ResumableLearner, load_latest
from heimdall_train.dataset import block_folds
from heimdall_train.features import LevelData, level_data, level_statistics
from heimdall_train.model import LocalizationNet
from heimdall_train.network import HeimdallError
from heimdall_train.scene import load_scene, scene_world
from heimdall_train.simulation import simulate_levels
from heimdall_train.training import fit, new_learner, seed_everything

EPOCHS = 4


def small_backbone(channels: int, *arguments: object) -> nn.Module:
    "In place of ResNet-18: one convolution, BatchNorm, 512 features."
    return nn.Sequential(nn.Conv2d(channels, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 512))


@dataclass(frozen=True)
class Job:
    "What is trained: data and anchors."
    training: LevelData
    validation: LevelData
    anchor: LevelAnchor
    anchors: list[LevelAnchor]
    folds: object


def prepare(train: int = 48, validation: int = 80, small: bool = True) -> Job:
    "Simulate sessions and fit the anchors; `small` replaces the backbone in this process."
    if small:
        model_module.backbone = small_backbone
    scene = replace(load_scene('testbed-v1'), sources={'train': train, 'validation': validation, 'test': 1})
    network = scene_world(scene).network
    parts = [level_data(simulate_levels(scene, part), network) for part in ('train', 'validation')]
    positions, receivers = parts[0].enu(network.frame()), network.positions_enu(network.frame())[:, :2]
    grid, folds = position_grid(positions, 150), block_folds(positions, 200.0, 3, seed=0)
    anchor = fit_level_anchor(positions, parts[0].levels, receivers, grid, Kriging())
    return Job(*parts, anchor, cross_fit(positions, parts[0].levels, receivers, grid, Kriging(), folds), folds)


def train(job: Job, folder: Path, resume: bool = False, workers: int = 0, callbacks: tuple = (), seed: int = 0, poison: int | None = None,
          threads: int = 1, heads: int = 1) -> None:
    """Train, from the beginning or from the last checkpoint; the outcome is in outcome.json, what was said in said.txt.

    The targets of the training session with the number `poison` are spoilt. Like the command, this ends with code 2 where there is an error.
    """
    def say(line: str) -> None:
        with open(folder / 'said.txt', 'a') as file:
            file.write(line + '\n')
    torch.set_num_threads(threads)
    identity = {'epochs': EPOCHS, 'seed': seed, 'data': job.training.digest}
    try:
        saved = load_latest(folder / 'checkpoints', identity, say) if resume else None
        learner = build(job, seed, workers, heads)
        if poison is not None:
            learner.dls.train_ds.targets[poison] = float('nan')
        fit(learner, EPOCHS, folder / 'checkpoints', callbacks=[
            *callbacks, Checkpoint(folder / 'checkpoints', identity, saved, say=say, advice='go on with --resume')])
    except HeimdallError as error:
        say(str(error))
        sys.exit(2)
    (folder / 'outcome.json').write_text(json.dumps({
        'best.safetensors': hashlib.sha256((folder / 'checkpoints' / 'best.safetensors').read_bytes()).hexdigest(),
        'last state': {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in learner.model.state_dict().items()},
        'history': [list(row) for row in learner.recorder.values],
        'rates': [float(rate) for rate in learner.recorder.lrs],
        'losses': [float(loss) for loss in learner.recorder.losses],
    }))


def build(job: Job, seed: int, workers: int, heads: int = 1) -> ResumableLearner:
    "A learner as `heimdall-train train` makes it, with workers."
    seed_everything(seed)
    network = job.training.network
    model = LocalizationNet(network, network.frame(), job.anchor, level_statistics(job.training.levels), heads=heads)
    learner = new_learner(model, job.anchors, job.training, job.folds, job.validation, batch_size=8, seed=seed)
    for loader in learner.dls.loaders:
        loader.fake_l.num_workers = workers
    return learner
