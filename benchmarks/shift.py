"""A trained model where it was not trained: outside its zone, without receivers, over other terrain, with a slipped clock, in another month.

Claim, to be shown: sessions that the maps do not fit are known by how badly their measurements agree, without a look at where the answer lies: AUROC above
0.9 against the run's own test sessions for another terrain and for a clock that is 1 µs off, at most 5 % flagged in the zone; the 90 % ellipses of what is not
flagged hold the truth in 80 % or more. A receiver whose time no other can check (the fix of the others is too wide) can slip by 1 µs unseen: that is geometry.

    python benchmarks/shift.py RUN [RUN …] [--test-sessions FILE …] [--sessions 300] [--out DIR]

RUN is a finished run folder of `train` (or of `benchmarks/accuracy.py`), with what its sessions come from still there. A run of before models had conformal
radii and typicality gets them here, from its best checkpoint and the half of its validation sessions that the pipeline would keep for it (its epoch was
chosen on both halves then). Simulated sets: `ring` (sources 0.5 to 3 km outside the zone), `missing 2` (receivers taken away, never the reference),
`other terrain` (the scene with another scene seed: maps of another country), `clock 1 µs` (of one receiver, never the reference's, in every session). FILE
names sessions of the run's dataset that it neither learnt nor was calibrated on, such as POWDER's `april` (train with a test file that has both: those of
a FILE are taken out of `test` here). Seconds to minutes a run on two cores. DIR/shift.json has the figures, DIR/shift.md the table.
"""

import argparse
import platform
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
from accuracy import simulated, without, write

from heimdall_train.calibration import conformal_interval
from heimdall_train.dataset import Split, TimedData, block_folds
from heimdall_train.metrics import COVERAGE_LEVELS, clopper_pearson, evaluate_positions, mahalanobis_squared
from heimdall_train.typicality import auroc


def main() -> None:
    """Judge each run on each set; write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('runs', metavar='RUN', type=Path, nargs='+')
    parser.add_argument('--test-sessions', metavar='FILE', type=Path, nargs='*', default=[])
    parser.add_argument('--sessions', type=int, default=300, help='of each simulated set, at most')
    parser.add_argument('--out', type=Path, default=Path('runs/shift'))
    options = parser.parse_args()
    runs = {str(run): judge(run, options) for run in options.runs}
    about = {
        'benchmark': 'shift',
        'date': datetime.now(UTC).date().isoformat(),
        'hardware': platform.machine(),
        'versions': {name: version(name) for name in ('heimdall-train', 'torch', 'numpy')},
    }
    write(options.out / 'shift.json', {**about, 'sessions': options.sessions, 'runs': runs})
    (options.out / 'shift.md').write_text(markdown(runs))
    print(markdown(runs))


def judge(folder: Path, options: argparse.Namespace) -> dict:
    """What a run says of each set."""
    from heimdall_train.config import make_config
    from heimdall_train.data import read_data
    from heimdall_train.ingest import read_split_file
    from heimdall_train.model_files import load_model
    from heimdall_train.pipeline import _fitting, _of_run, _refuse_known
    from heimdall_train.training import estimate, typicality

    config = _of_run(make_config(model=folder, out=folder))
    model, split = load_model(folder / 'model.safetensors'), Split.load(folder / 'split.json')
    data = _fitting(model, read_data(config, print), folder)
    if not np.isfinite(float(model.typicality.threshold)):
        print(f'{folder}: no typicality yet: calibrated anew')
        model = calibrated_anew(config, data, split, folder)
    files = {path.stem: read_split_file(path, data.ids.tolist()) for path in options.test_sessions}
    elsewhere = {identifier for ids in files.values() for identifier in ids}
    test = data.take(data.rows([identifier for identifier in split.test if identifier not in elsewhere]))
    sets = {'test': test}
    if isinstance(data, TimedData):
        sets |= shifted(config, data, test, min(options.sessions, len(test)))
    sets |= {name: _refuse_known(data, split, ids) for name, ids in files.items()}
    usual, found = typicality(model, test), {}
    threshold, radii = float(model.typicality.threshold), dict(zip(COVERAGE_LEVELS, model.conformal_radii.tolist(), strict=True))
    held_out = len(data.take(data.rows(split.validation))) // 2
    for name, sessions in sets.items():
        position, covariance, _, _ = estimate(model, sessions)
        truth, scores = sessions.enu(model.frame), typicality(model, sessions)
        typical, distance = scores <= threshold, np.sqrt(mahalanobis_squared(truth, position, covariance))

        def share(rows: np.ndarray, radius: float, distance: np.ndarray = distance) -> dict | None:
            if not rows.any() or not np.isfinite(radius):
                return None
            inside = int((distance[rows] <= radius).sum())
            return {'share': inside / int(rows.sum()), 'interval': clopper_pearson(inside, int(rows.sum())), 'n': int(rows.sum())}

        everybody, gaussian = np.ones(len(truth), bool), float(np.sqrt(-2 * np.log(0.1)))
        found[name] = {
            'n': len(truth),
            'model': evaluate_positions(truth, position, covariance),
            'auroc': auroc(usual, scores),
            'flagged': float(1 - typical.mean()),
            'gaussian_90': {'all': share(everybody, gaussian), 'typical': share(typical, gaussian)},
            'conformal_90': {'all': share(everybody, radii['90']), 'typical': share(typical, radii['90'])},
            'conformal_90_if_exchangeable': conformal_interval(held_out, len(truth), 0.9),
        }
    return found


def calibrated_anew(config, data, split: Split, folder: Path):
    """The best checkpoint of a run, finished as the pipeline does now."""
    from heimdall_train.model_files import load_model
    from heimdall_train.pipeline import BLOCK_M, FOLDS, _conclude, _frame, _halves, _prepare_levels, _prepare_timed

    training, validation = data.take(data.rows(split.train)), data.take(data.rows(split.validation))
    frame = _frame(data, split.test)
    folds = block_folds(training.enu(frame), BLOCK_M, FOLDS, config.seed)
    prepare = _prepare_timed if isinstance(data, TimedData) else _prepare_levels
    _, anchors, validation, _, refit = prepare(config, training, validation, frame, folds, print)
    model = load_model(folder / 'checkpoints' / 'best.safetensors')
    tuning, held_out = _halves(validation, frame, config.seed)
    _conclude(model, data, training, anchors, folds, tuning, held_out, refit)
    return model


def shifted(config, data: TimedData, test: TimedData, count: int) -> dict[str, TimedData]:
    """The simulated sets."""
    from heimdall_train.data import config_scene
    from heimdall_train.recordings import simulate_sessions
    from heimdall_train.scene import load_scene

    some = test.take(np.arange(count))
    own = np.arange(some.timed.shape[1]) == some.reference[:, None]
    generator = np.random.default_rng(0)
    order = np.where(own | ~some.timed, np.inf, generator.random(own.shape)).argsort(axis=1).argsort(axis=1)
    enough = some.timed.sum(axis=1) >= 2 + 3
    late = np.where(generator.random((count, 1)) < 0.5, -1e-6, 1e-6) * ((order == 0) & some.timed & ~own)
    sets = {'missing 2': without(some, (order < 2) & some.timed & ~own).take(np.flatnonzero(enough)), 'clock 1 µs': replace(some, delay=some.delay + late)}
    if config.scene is None:
        return sets
    scene = config_scene(config)
    half, places = np.array([scene.zone.width_m, scene.zone.height_m]) / 2, []
    while len(places) < count:
        place = generator.uniform(-half - 3000, half + 3000)
        if 500 < np.linalg.norm(np.maximum(np.abs(place) - half, 0)) <= 3000:
            places.append(place)
    other = load_scene(config.scene, scene.seed + 1, config.test_seed)
    sets['ring'] = simulated(config, data, f'shift: ring {count}', count,
                             lambda rows: simulate_sessions(scene, 'test', numbers=rows, at=np.array(places)[rows]))
    sets['other terrain'] = simulated(config, data, f'shift: terrain {scene.seed + 1} {count}', count,
                                      lambda rows: simulate_sessions(other, 'test', config.seed, rows))
    return sets


def markdown(runs: dict[str, dict]) -> str:
    """A row a set."""
    lines = ['| run | set | n | median m | p95 m | AUROC | flagged | 90 % ellipse: all | not flagged | conformal 90 %: all | not flagged |',
             '|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|']

    def told(value: dict | None) -> str:
        return '–' if value is None else f'{value["share"]:.3f} ({value["interval"][0]:.2f}–{value["interval"][1]:.2f})'

    for run, sets in runs.items():
        for name, found in sets.items():
            shares = [told(found[kind][part]) for kind in ('gaussian_90', 'conformal_90') for part in ('all', 'typical')]
            errors = f'{found["model"]["median_m"]:.0f} | {found["model"]["p95_m"]:.0f}'
            lines.append(f'| {Path(run).name} | {name} | {found["n"]} | {errors} | {found["auroc"]:.3f} | {found["flagged"]:.3f} | {" | ".join(shares)} |')
    return '\n'.join([*lines, ''])


if __name__ == '__main__':
    main()
