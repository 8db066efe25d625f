"""Trainings that are killed at random times and resumed, beside one that nobody disturbs.

Claim: after 100 kills at random times (four in five by SIGKILL, the rest by SIGTERM; in training, in validation, while checkpoints are written;
data loaders with no workers and with two), every training ends on the very bytes of the undisturbed one: best.safetensors, every tensor of the
last state, the history of every epoch, learning rate and loss of every step.

    python benchmarks/kill_resume.py [--kills 100] [--seed 0] [--backbone resnet18|small] [--out FILE]

48 simulated sessions, four epochs, one thread, seconds a training. A training is killed and resumed until it ends; then the next begins.
`small` takes a convolution and BatchNorm in the place of ResNet-18: a tenth of the time, and checkpoints of a hundredth of the size.
"""
import os

os.environ.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1')  # before numpy and torch: a fork would lose their threads

import argparse
import json
import multiprocessing
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'tests'))
from resume_job import EPOCHS, Job, prepare, train  # noqa: E402  (before fastai: it hides a warning of its)

from fastai.basics import Callback  # noqa: E402  isort: skip

PHASES = ('starting', 'training', 'validation', 'writing')


class Phase(Callback):
    """Tell the parent what is going on."""

    order = 59  # before anything is written

    def __init__(self, shared):
        self.shared = shared

    def before_train(self):
        self.shared.value = 1

    def before_validate(self):
        self.shared.value = 2

    def after_epoch(self):
        self.shared.value = 3


class Trial:
    """Processes that train in one folder."""

    def __init__(self, job: Job, folder: Path):
        self.job, self.folder, self.context = job, folder, multiprocessing.get_context('fork')
        self.phase = self.context.RawValue('i', 0)
        folder.mkdir(parents=True)

    def run(self, resume: bool, workers: int, after: float | None = None, number: int = signal.SIGKILL) -> str | None:
        """Train until the end, or until a signal is sent some seconds after the beginning; the phase that it fell in, or None."""
        self.phase.value, killed = 0, None
        process = self.context.Process(target=self._train, args=(resume, workers))
        process.start()
        process.join(after)
        if process.exitcode is None:
            killed = PHASES[self.phase.value]
            os.kill(process.pid, number)
            process.join()
        if process.exitcode not in ((0,) if killed is None else (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM, 0)):
            sys.exit(f'a training ended with {process.exitcode}: {(self.folder / "errors.txt").read_text()}')
        return killed if process.exitcode else None  # it may have ended before the signal came

    def _train(self, resume: bool, workers: int) -> None:
        """In the fork; workers that lose their parent complain, which is none of the reader's business."""
        os.dup2(os.open(self.folder / 'errors.txt', os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        train(self.job, self.folder, resume, workers, (Phase(self.phase),))

    def outcome(self) -> str:
        """What a training leaves."""
        return (self.folder / 'outcome.json').read_text()


def main() -> None:
    """Kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, default=100)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--backbone', choices=('resnet18', 'small'), default='resnet18')
    parser.add_argument('--out', type=Path)
    options = parser.parse_args()
    generator, job, began = np.random.default_rng(options.seed), prepare(small=options.backbone == 'small'), time.perf_counter()
    kills: Counter = Counter()
    differ = 0
    trainings = 0
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = Trial(job, Path(folder) / 'undisturbed')
        undisturbed.run(False, 0)
        seconds = time.perf_counter() - began
        print(f'undisturbed: {EPOCHS} epochs in {seconds:.1f} s')
        while kills.total() < options.kills:
            trial, resume, trainings = Trial(job, Path(folder) / 'killed'), False, trainings + 1
            while not (trial.folder / 'outcome.json').exists():
                number = signal.SIGTERM if generator.random() < 0.2 else signal.SIGKILL
                workers, after = int(generator.choice([0, 2])), generator.uniform(0, seconds)
                phase = trial.run(resume, workers, after if kills.total() < options.kills else None, number)
                if phase:
                    kills[phase, number.name] += 1
                resume = True
            same = trial.outcome() == undisturbed.outcome()
            differ += not same
            print(f'training {trainings}: {kills.total()} kills so far; {"the same bytes" if same else "DIFFERS"}', flush=True)
            shutil.rmtree(trial.folder)
    by_phase = {phase: sum(count for (where, _), count in kills.items() if where == phase) for phase in PHASES}
    by_signal = {name: sum(count for (_, what), count in kills.items() if what == name) for name in ('SIGKILL', 'SIGTERM')}
    summary = {
        'benchmark': 'kill_resume',
        'kills': kills.total(),
        'kills_by_phase': by_phase,
        'kills_by_signal': by_signal,
        'trainings': trainings,
        'trainings_that_differ': differ,
        'backbone': options.backbone,
        'epochs': EPOCHS,
        'seed': options.seed,
        'seconds_undisturbed': round(seconds, 2),
        'seconds': round(time.perf_counter() - began, 1),
        'date': datetime.now(UTC).date().isoformat(),
        'hardware': f'{platform.machine()}, {os.cpu_count()} cores, no GPU',
        'versions': {name: version(name) for name in ('heimdall-train', 'torch', 'fastai', 'safetensors')},
    }
    print(f'{kills.total()} kills ({", ".join(f"{count} {phase}" for phase, count in by_phase.items())}) in {trainings} trainings: '
          f'{differ} ended on other bytes than the undisturbed one; {summary["seconds"]:.0f} s')
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(summary, indent=1) + '\n')
    sys.exit(1 if differ else 0)


if __name__ == '__main__':
    main()
