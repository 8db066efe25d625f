"""A trained model where it was not trained: outside its zone, without receivers, over other terrain, with a slipped clock, in another month.

Claim, to be shown: sessions that the maps do not fit are known by how badly their measurements agree, without a look at where the answer lies: AUROC above
0.9 against the run's own test sessions for another terrain and for a clock that is 1 µs off, at most 5 % flagged in the zone; the 90 % ellipses of what is not
flagged hold the truth in 80 % or more. A receiver whose time no other can check (the fix of the others is too wide) can slip by 1 µs unseen: that is geometry.

    python benchmarks/shift.py RUN [RUN …] [--test-sessions FILE …] [--sessions 300] [--out DIR]

RUN is a finished run folder of `train` or of `benchmarks/accuracy.py` (DIR/SCENE-SEED), with what its sessions come from still there; runs of the same scene
or dataset are seeds of one another and are pooled: counts of the ellipses added, AUROC and share flagged averaged. A run that is judged is kept in DIR/runs
and read the next time, if neither its model nor the options have changed. A run of before models had conformal
radii and typicality gets them here, from its best checkpoint and the half of its validation sessions that the pipeline would keep for it (its epoch was
chosen on both halves then). Simulated sets: `ring` (sources 0.5 to 3 km outside the zone), `missing 2` (receivers taken away, never the reference),
`other terrain` (the scene with another scene seed: maps of another country), `clock 1 µs` (of one receiver, never the reference's, in every session). FILE
names sessions of the run's dataset that it neither learnt nor was calibrated on; those of a FILE are taken out of `test` here. For POWDER's `april`:

    cat grid_test.txt april.txt > both.txt       # in $HEIMDALL_DATA/powder_frs/splits
    heimdall-train train … --test-sessions both.txt --out RUN
    python benchmarks/shift.py RUN … --test-sessions april.txt

Seconds to minutes a run on two cores. DIR/shift.json has the figures, DIR/shift.md the tables.
"""

import argparse
import hashlib
import json
import os
import platform
import sys
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import yaml
from accuracy import simulated, without, write

from heimdall_train.calibration import conformal_interval
from heimdall_train.dataset import Split, TimedData, block_folds
from heimdall_train.features import LevelData
from heimdall_train.metrics import COVERAGE_LEVELS, clopper_pearson, evaluate_positions, mahalanobis_squared
from heimdall_train.typicality import auroc

SLIPPED = 'clock 1 µs'
AIMS = {'test': {'flagged': 0.05}, SLIPPED: {'auroc': 0.9}, 'other terrain': {'auroc': 0.9}}  # flagged at most, AUROC at least
COVERED = 0.80  # share of the 90 % ellipses of what is not flagged that hold the truth, at least, on every set


def main() -> None:
    """Judge each run on each set; write and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('runs', metavar='RUN', type=Path, nargs='+')
    parser.add_argument('--test-sessions', metavar='FILE', type=Path, nargs='*', default=[])
    parser.add_argument('--sessions', type=int, default=300, help='of each simulated set, at most')
    parser.add_argument('--out', type=Path, default=Path('runs/shift'))
    options = parser.parse_args()
    print(__doc__.split('\n\n')[1])
    runs: dict[str, dict] = {}
    for run in options.runs:
        runs[str(run)] = kept(run, options)
    about = {
        'benchmark': 'shift',
        'date': datetime.now(UTC).date().isoformat(),
        'hardware': f'{platform.machine()}, {os.cpu_count()} cores, no GPU',
        'versions': {name: version(name) for name in ('heimdall-train', 'torch', 'numpy')},
    }
    pooled = pool(runs)
    write(options.out / 'shift.json', {**about, 'sessions': options.sessions, 'pooled': pooled, 'runs': runs})
    text = f'{markdown({name: found["sets"] for name, found in runs.items()})}\n{pooled_markdown(pooled)}'
    (options.out / 'shift.md').write_text(text)
    print(text)


def kept(run: Path, options: argparse.Namespace) -> dict:
    """What was found for a run before, or is now."""
    if not (run / 'model.safetensors').is_file():
        sys.exit(f'{run}: no finished run here: train first (benchmarks/accuracy.py leaves them as DIR/SCENE-SEED)')
    settings = {'model': hashlib.sha256((run / 'model.safetensors').read_bytes()).hexdigest(), 'sessions': options.sessions}
    settings['files'] = {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in options.test_sessions}
    path = options.out / 'runs' / f'{run.name}-{settings["model"][:8]}.json'
    if path.exists() and (found := json.loads(path.read_text()))['settings'] == settings:
        print(f'{run}: read from {path}')
        return found
    print(f'{run}: judging', flush=True)
    of_run = yaml.safe_load((run / 'config.yaml').read_text())
    about = {name: of_run.get(name) for name in ('scene', 'scene_seed', 'test_seed', 'dataset', 'gain_drift', 'heads')}
    write(path, {'settings': settings, 'of': about, 'seed': of_run.get('seed'), 'sets': judge(run, options)})
    return json.loads(path.read_text())


def pool(runs: dict[str, dict]) -> dict[str, dict]:
    """Seeds of the same scene or dataset together, by set, with what was aimed at."""
    alike: dict[str, list[dict]] = {}
    for found in runs.values():
        about = found['of']
        others = {name: about[name] for name in ('scene_seed', 'test_seed', 'gain_drift', 'heads') if about[name] not in (None, 0.0, 1)}
        label = ', '.join([str(about['scene'] or about['dataset']), *(f'{name} {value}' for name, value in others.items())])
        alike.setdefault(label, []).append(found)

    def share(every: list[dict], kind: str, part: str) -> dict | None:
        values = [one[kind][part] for one in every if one[kind][part] is not None]
        total, inside = sum(value['n'] for value in values), sum(round(value['share'] * value['n']) for value in values)
        return {'share': inside / total, 'interval': clopper_pearson(inside, total), 'n': total} if total else None

    result: dict[str, dict] = {}
    for label, found in alike.items():
        result[label] = {'seeds': [one['seed'] for one in found], 'sets': {}}
        for name in found[0]['sets']:
            every = [one['sets'][name] for one in found if name in one['sets']]
            aucs, flagged = [one['auroc'] for one in every], [one['flagged'] for one in every]
            typical = share(every, 'gaussian_90', 'typical')
            met = {'coverage of what is not flagged': None if typical is None else typical['interval'][1] >= COVERED}
            met |= {what: np.mean(flagged) <= aim if what == 'flagged' else np.mean(aucs) > aim for what, aim in AIMS.get(name, {}).items()}
            result[label]['sets'][name] = {
                'n': sum(one['n'] for one in every),
                'auroc': float(np.mean(aucs)),
                'auroc_range': [min(aucs), max(aucs)],
                'flagged': float(np.mean(flagged)),
                **{kind: {part: share(every, kind, part) for part in ('all', 'typical')} for kind in ('gaussian_90', 'conformal_90')},
                'met': {what: None if value is None else bool(value) for what, value in met.items()},
            }
            if residuals := [one['auroc_of_deletion_residuals'] for one in every if 'auroc_of_deletion_residuals' in one]:
                result[label]['sets'][name]['auroc_of_deletion_residuals'] = {what: float(np.mean([one[what] for one in residuals])) for what in residuals[0]}
    return result


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
    else:
        sets['missing 2'] = fewer(test)
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
    if SLIPPED in sets:
        found[SLIPPED]['auroc_of_deletion_residuals'] = slips(model, test.take(np.arange(len(sets[SLIPPED]))), sets[SLIPPED])
    return found


def slips(model, clean: TimedData, faulty: TimedData) -> dict[str, float]:
    """How well a slipped clock can be told by the deletion residuals of the anchor: by the largest, and by a judge who is told more than a service can know."""
    import torch

    from heimdall_train.disagreement import disagreement

    def standardised(sessions: TimedData) -> np.ndarray:
        arrays = np.nan_to_num(sessions.delay), np.nan_to_num(sessions.snr), sessions.timed.astype(np.float32)
        with torch.inference_mode():
            found = disagreement(model.anchor.times(*(torch.from_numpy(array) for array in arrays)))
        return (found.late / torch.where(found.deviation > 0, found.deviation, 1.0)).numpy()

    rows, receivers = np.nonzero(faulty.delay - clean.delay)
    sign = np.sign((faulty.delay - clean.delay)[rows, receivers])
    before, after = standardised(clean)[rows], standardised(faulty)[rows]
    own = [values[np.arange(len(rows)), receivers] for values in (before, after)]
    return {
        'largest': auroc(np.abs(before).max(axis=1), np.abs(after).max(axis=1)),
        'told the receiver': auroc(np.abs(own[0]), np.abs(own[1])),
        'told the receiver and the sign': auroc(sign * own[0], sign * own[1]),
    }


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


def fewer(test: LevelData) -> LevelData:
    """Level sessions that five receivers or more heard, without two of them."""
    draws = np.where(test.heard, np.random.default_rng(0).random(test.heard.shape), np.inf)
    gone = test.heard & (draws.argsort(axis=1).argsort(axis=1) < 2)
    return replace(test, levels=np.where(gone, np.nan, test.levels).astype(np.float32)).take(np.flatnonzero(test.heard.sum(axis=1) >= 2 + 3))


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
    sets = {'missing 2': without(some, (order < 2) & some.timed & ~own).take(np.flatnonzero(enough)), SLIPPED: replace(some, delay=some.delay + late)}
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


def pooled_markdown(pooled: dict[str, dict]) -> str:
    """A row a set, seeds pooled, with the aims that are met and missed."""
    lines = ['| scene or dataset | seeds | set | n | AUROC (range) | flagged | 90 % ellipse: all | not flagged (95 % interval) | aims |',
             '|---|---:|---|---:|---:|---:|---:|---:|---|']

    def told(value: dict | None) -> str:
        return '–' if value is None else f'{value["share"]:.3f} ({value["interval"][0]:.2f}–{value["interval"][1]:.2f})'

    words = {True: 'met', False: 'MISSED', None: 'nothing left to judge'}
    for label, found in pooled.items():
        for name, values in found['sets'].items():
            auroc = f'{values["auroc"]:.3f} ({values["auroc_range"][0]:.2f}–{values["auroc_range"][1]:.2f})'
            shares = [told(values['gaussian_90'][part]) for part in ('all', 'typical')]
            aims = ', '.join(f'{what} {words[met]}' for what, met in values['met'].items())
            lines.append(f'| {label} | {len(found["seeds"])} | {name} | {values["n"]} | {auroc} | {values["flagged"]:.3f} | {" | ".join(shares)} | {aims} |')
    for label, found in pooled.items():
        for name, values in found['sets'].items():
            for what, value in values.get('auroc_of_deletion_residuals', {}).items():
                lines.append(f'\n{label}, {name}: AUROC of the deletion residuals, {what}: {value:.3f}')
    return '\n'.join([*lines, ''])


if __name__ == '__main__':
    main()
