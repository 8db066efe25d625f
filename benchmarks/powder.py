"""Measured levels (POWDER FRS): the model beside its anchor and all tuned baselines, on the authors' splits.

Claim: on `grid_test` (whole cells of the area held out) the model's mean error is at most 135 m, its median at most 103 m, its mean at least
10 % below the best of tuned kNN and ExtraTrees, and its 90 % ellipse covers 85 to 95 %; on `april` (another month, a third of the receivers)
its mean is below 350 m.

    python benchmarks/powder.py [SPLIT …] --seeds 3 --first-seed 0 --out DIR [--validation random]

The data are not part of this repository: put them under $HEIMDALL_DATA/powder_frs (Zenodo 10.5281/zenodo.7259895). Validation is 15 % of the
training sessions in blocks of 200 m, drawn by seed (with `--validation random` by position, as the test sessions of `random_test` are); every choice
is made on it; the test sessions are read once a seed. `april` is trained with a
gain drift of 4 dB, since its receivers are those of another campaign. A run that is interrupted goes on where it stopped.
"""

import argparse
import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

from heimdall_train.metrics import Evaluation, pool_coverage
from heimdall_train.pipeline import evaluate, ingest, make_config, train

SPLITS = ('random_test', 'grid_test', 'april')
GAIN_DRIFT = {'april': 4.0}
FIGURES = ('mean_m', 'median_m', 'rmse_m', 'p68_m', 'p90_m', 'p95_m', 'nees', 'nll', 'energy_score_m', 'ellipse90_km2')


def main() -> None:
    """Train and evaluate each split with each seed, then write the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('splits', nargs='*', default=SPLITS, metavar='SPLIT', help=', '.join(SPLITS))
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--first-seed', type=int, default=0)
    parser.add_argument('--epochs', type=int, default=4)
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--validation', choices=('blocks', 'random'), default='blocks')
    parser.add_argument('--out', type=Path, default=Path('runs/powder'))
    options = parser.parse_args()
    data = Path(os.environ.get('HEIMDALL_DATA', Path(__file__).resolve().parents[2] / 'shared' / 'data')) / 'powder_frs'
    if not data.is_dir():
        sys.exit(f'no measured data at {data}: get them from Zenodo, 10.5281/zenodo.7259895, and set HEIMDALL_DATA')
    catalog = options.out / 'catalog.db'
    if not catalog.exists():
        print(ingest(data / 'levels.csv', make_config(catalog=str(catalog), store=str(options.out / 'store'))))
    for split in options.splits:
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        runs = [run(split, seed, data, catalog, options) for seed in seeds]
        summary = summarise(split, list(seeds), runs, options)
        (options.out / f'{name_of(split, options)}.json').write_text(json.dumps(summary, indent=1) + '\n')
        print(markdown(summary), flush=True)


def name_of(split: str, options: argparse.Namespace) -> str:
    """Of the split, and of how validation is drawn where not in blocks."""
    return split if options.validation == 'blocks' else f'{split}_{options.validation}_validation'


def drawn(split: str, seed: int, data: Path, path: Path) -> Path:
    """A file with the sessions at 15 % of the training positions, drawn one by one."""
    test = set((data / 'splits' / f'{split}.txt').read_text().split())
    table = pd.read_csv(data / 'levels.csv', usecols=['session_id', 'lat', 'lon'], dtype={'session_id': str})
    table = table[~table.session_id.isin(test)]
    position = table.groupby(['lat', 'lon']).ngroup().to_numpy()
    chosen = np.random.default_rng(seed).permutation(position.max() + 1)[: round(0.15 * (position.max() + 1))]
    path.write_text('\n'.join(table.session_id[np.isin(position, chosen)]) + '\n')
    return path


def run(split: str, seed: int, data: Path, catalog: Path, options: argparse.Namespace) -> dict:
    """Metrics of one run; one that is finished is read, not repeated."""
    folder = options.out / f'{name_of(split, options)}-{seed}'
    validation = None if options.validation == 'blocks' else drawn(split, seed, data, folder.with_suffix('.validation.txt'))
    config = make_config(
        catalog=str(catalog),
        out=folder,
        seed=seed,
        epochs=options.epochs,
        batch_size=options.batch_size,
        test_sessions=data / 'splits' / f'{split}.txt',
        validation_sessions=validation,
        gain_drift=GAIN_DRIFT.get(split, 0.0),
    )
    finished = folder / 'metrics.json'
    if not (finished.exists() and 'evaluation' in json.loads(finished.read_text())):
        print(f'--- {split}, seed {seed}', flush=True)
        train(config, print)
        evaluate(config, print)
    return json.loads(finished.read_text())


def summarise(split: str, seeds: list[int], runs: list[dict], options: argparse.Namespace) -> dict:
    """Means and spreads over the seeds, and coverage pooled over them."""
    evaluations = [Evaluation(**metrics['evaluation']) for metrics in runs]
    methods = {name: [metrics['evaluation'][name] for metrics in runs] for name in ('model', 'anchor')}
    methods |= {name: [metrics['evaluation']['baselines'][name] for metrics in runs] for name in runs[0]['evaluation']['baselines']}
    means = {
        name: {figure: None if rows[0][figure] is None else float(np.mean([row[figure] for row in rows])) for figure in FIGURES}
        for name, rows in methods.items()
    }
    spread = {
        name: {figure: None if rows[0][figure] is None else float(np.ptp([row[figure] for row in rows])) for figure in FIGURES}
        for name, rows in methods.items()
    }
    return {
        'benchmark': 'powder_frs',
        'split': split,
        'validation_drawn': options.validation,
        'n': evaluations[0].n,
        'seeds': seeds,
        'epochs': options.epochs,
        'batch_size': options.batch_size,
        'gain_drift_db': GAIN_DRIFT.get(split, 0.0),
        'date': datetime.now(UTC).date().isoformat(),
        'hardware': f'{platform.machine()}, {os.cpu_count()} cores, no GPU',
        'versions': {name: version(name) for name in ('heimdall-train', 'torch', 'fastai', 'scikit-learn', 'numpy')},
        'dataset_digest': evaluations[0].dataset_digest,
        'mean': means,
        'range_over_seeds': spread,
        'coverage': {name: {level: observed._asdict() for level, observed in pool_coverage(evaluations, name).items()} for name in methods},
        'samples_per_second': [metrics['training']['seconds']['samples_per_second'] for metrics in runs],
        'seconds_maps': [metrics['training']['seconds']['maps'] for metrics in runs],
        'seconds_training': [metrics['training']['seconds']['training'] for metrics in runs],
        'validation': [{name: metrics['training']['validation'][name]['mean_m'] for name in ('model', 'anchor')} for metrics in runs],
        'per_seed': [metrics['evaluation'] for metrics in runs],
    }


def markdown(summary: dict) -> str:
    """A table of the methods, means over the seeds with half the range in brackets."""
    lines = [
        f'\n## {summary["split"]}: {summary["n"]} test sessions, seeds {summary["seeds"]}, {summary["epochs"]} epochs, {summary["hardware"]}',
        f'{np.mean(summary["samples_per_second"]):.0f} samples/s; '
        f'maps {np.mean(summary["seconds_maps"]):.0f} s, training {np.mean(summary["seconds_training"]):.0f} s',
        '',
        '| method | mean m | median m | RMSE m | p90 m | p95 m | 50 % ellipse | 90 % ellipse (95 % interval) | NEES |',
        '|---|---:|---:|---:|---:|---:|---:|---:|---:|',
    ]
    for name, figures in summary['mean'].items():
        half = summary['range_over_seeds'][name]['mean_m'] / 2
        coverage = summary['coverage'][name]
        shares = (
            [
                f'{coverage["50"]["fraction"]:.2f}',
                f'{coverage["90"]["fraction"]:.2f} ({coverage["90"]["low"]:.2f}–{coverage["90"]["high"]:.2f})',
                f'{figures["nees"]:.2f}',
            ]
            if coverage
            else ['–', '–', '–']
        )
        lines.append(
            f'| {name} | {figures["mean_m"]:.0f} (±{half:.0f}) | '
            + ' | '.join([*(f'{figures[key]:.0f}' for key in ('median_m', 'rmse_m', 'p90_m', 'p95_m')), *shares])
            + ' |'
        )
    return '\n'.join(lines)


if __name__ == '__main__':
    main()
