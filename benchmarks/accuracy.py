"""Simulated scenes with IQ: the model beside its anchor, all baselines and the bound.

Claim, to be shown: where the field is hard (`piedmont-field-v1`: fading, interference, slipped clocks) the model's median error is below 50 m, its mean at most
0.95 times and its 95th percentile at most 0.9 times that of `tdoa_kriged`, the best classical method, which has maps of the excess path from the
same training sources; its negative log-likelihood is at least 0.3 nat better, and its 90 % ellipse holds 87 to 93 %. On the clean
`piedmont-sync-v1`: median below 30 m, mean below 42 m, no worse than `tdoa_kriged`, 0.2 nat better.

    python benchmarks/accuracy.py SCENE --seeds 3 --first-seed 0 --out DIR [--scene-seed N] [--test-seed N] [--study STUDY]

One training a seed: simulation (the training draw varies with the seed, the test sources do not), features, maps, network, calibration; then the test
sessions, once. A seed that is finished is read, not repeated, if its settings are the same; so is each point of a study. `--study` works on the run of
the first seed (`road`, `cells` on all) and reads its test sessions again: a study describes, it must not choose. The studies: `missing` receivers, `snr`,
`size` of the training set, `zone` (sources outside it), `road` (a survey's two test sets, and kilometres driven along), `cells` (a map of the median
error), `repeats` (three recordings of each test source, fused), `faults` (a clock put wrong, and the scene's own bursts), `ablation`.
DIR/SCENE.json has the means over the seeds as `evaluate --json` prints them, beside `per_seed`; DIR/SCENE.md is the table.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import yaml

from heimdall_train.dataset import TimedData
from heimdall_train.metrics import Evaluation, evaluate_positions, pool_coverage
from heimdall_train.pipeline import evaluate, make_config, train

FIGURES = ('mean_m', 'median_m', 'rmse_m', 'p68_m', 'p90_m', 'p95_m', 'nees', 'nll', 'energy_score_m', 'ellipse90_km2')


def main() -> None:
    """Run the seeds, write the summary; then the study, if one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('scene', metavar='SCENE', help='name of a scene, or a YAML file')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--first-seed', type=int, default=0)
    parser.add_argument('--scene-seed', type=int, default=None)
    parser.add_argument('--test-seed', type=int, default=None)
    parser.add_argument('--epochs', type=int, default=6)
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--study', choices=sorted(STUDIES))
    parser.add_argument('--out', type=Path, default=Path('runs/accuracy'))
    options = parser.parse_args()
    seeds = list(range(options.first_seed, options.first_seed + options.seeds))
    name = name_of(options)
    if options.study:
        points = STUDIES[options.study](options, options.out / f'{name}-{seeds[0]}')
        of_seeds = seeds if options.study in ('road', 'cells') else seeds[:1]
        write(options.out / f'{name}-{options.study}.json', {**about(options, of_seeds), 'study': options.study, 'points': points})
        print(study_markdown(options.study, points))
        return
    runs = [run(options, seed, options.out / f'{name}-{seed}') for seed in seeds]
    summary = summarise(options, seeds, runs)
    write(options.out / f'{name}.json', summary)
    (options.out / f'{name}.md').write_text(markdown(summary))
    print(markdown(summary))


def name_of(options: argparse.Namespace) -> str:
    """Of the scene, with the seeds that make a sibling of it."""
    siblings = {'scene': options.scene_seed, 'test': options.test_seed}
    return '-'.join([Path(options.scene).stem, *(f'{what}{seed}' for what, seed in siblings.items() if seed is not None)])


def write(path: Path, values: dict) -> None:
    """JSON, written aside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix('.part')
    aside.write_text(json.dumps(values, indent=1) + '\n')
    aside.rename(path)


def about(options: argparse.Namespace, seeds: list[int]) -> dict:
    """What a reader must know to repeat it."""
    return {
        'benchmark': 'accuracy',
        'scene': options.scene,
        'scene_seed': options.scene_seed,
        'test_seed': options.test_seed,
        'seeds': seeds,
        'epochs': options.epochs,
        'batch_size': options.batch_size,
        'date': datetime.now(UTC).date().isoformat(),
        'hardware': f'{platform.machine()}, {os.cpu_count()} cores, no GPU',
        'versions': {name: version(name) for name in ('heimdall-train', 'torch', 'torchvision', 'fastai', 'scikit-learn', 'numpy')},
    }


def config_of(options: argparse.Namespace, seed: int, folder: Path, **other):
    """The configuration of one run."""
    seeds = {'scene_seed': options.scene_seed, 'test_seed': options.test_seed}
    settings = {'scene': options.scene, 'cache': options.out / 'features', 'out': folder, 'seed': seed, 'epochs': options.epochs, **seeds}
    return make_config(**{**settings, 'batch_size': options.batch_size, **other})


def run(options: argparse.Namespace, seed: int, folder: Path, **other) -> dict:
    """Metrics of one run, with the minutes that its steps took; one that is finished is read."""
    from heimdall_train.data import config_scene, part_counts, read_data
    from heimdall_train.recordings import simulate_sessions

    config, started = config_of(options, seed, folder, **other), time.perf_counter()
    finished, settings = folder / 'accuracy.json', config.model_dump(mode='json')
    if finished.exists():
        metrics = json.loads(finished.read_text())
        if metrics['settings'] != settings:
            changed = ', '.join(name for name, value in settings.items() if metrics['settings'].get(name) != value)
            sys.exit(f'{folder} was run with another {changed}: give another --out, or remove it')
        return metrics

    def say(line: str) -> None:
        print(f'[{folder.name} {(time.perf_counter() - started) / 60:5.1f} min] {line}', flush=True)

    minutes, scene = {}, config_scene(config)
    if scene.radio is not None:
        begun = time.perf_counter()
        sample = sum(1 for _ in simulate_sessions(scene, 'validation', seed, range(min(200, scene.sources['validation']))))
        minutes['simulate'] = (time.perf_counter() - begun) / 60 * sum(part_counts(scene, None).values()) / sample
    begun = time.perf_counter()
    read_data(config, say)
    minutes['features'] = max(0.0, (time.perf_counter() - begun) / 60 - minutes.get('simulate', 0.0))
    for name, step in (('train', train), ('evaluate', evaluate)):
        begun = time.perf_counter()
        step(config, say)
        minutes[name] = (time.perf_counter() - begun) / 60
    metrics = {**json.loads((folder / 'metrics.json').read_text()), 'minutes': minutes, 'settings': settings}
    write(finished, metrics)
    return metrics


def methods_of(evaluation: dict) -> dict[str, dict]:
    """The model, its anchor and the baselines by name."""
    return {'model': evaluation['model'], 'anchor': evaluation['anchor'], **evaluation['baselines']}


def summarise(options: argparse.Namespace, seeds: list[int], runs: list[dict]) -> dict:
    """Means and ranges over the seeds, coverage pooled over them."""
    evaluations = [metrics['evaluation'] for metrics in runs]
    names = list(methods_of(evaluations[0]))

    def over_seeds(statistic: Callable, name: str, figure: str) -> float | None:
        values = [methods_of(evaluation)[name][figure] for evaluation in evaluations]
        return None if values[0] is None else float(statistic(values))

    means, ranges = ({name: {figure: over_seeds(each, name, figure) for figure in FIGURES} for name in names} for each in (np.mean, np.ptp))
    pooled = {name: pool_coverage([Evaluation(**evaluation) for evaluation in evaluations], name) for name in names}
    for name in names:
        means[name]['coverage'] = {level: observed.fraction for level, observed in pooled[name].items()}
    bounds = [evaluation['bound_rmse_m'] for evaluation in evaluations]
    return {
        **about(options, seeds),
        'n': evaluations[0]['n'],
        'split': 'test',
        'dataset_digest': evaluations[0]['dataset_digest'],
        'model': means.pop('model'),
        'anchor': means.pop('anchor'),
        'baselines': means,
        'bound_rmse_m': None if None in bounds else float(np.mean(bounds)),
        **bounds_of(options, seeds[0]),
        'range_over_seeds': ranges,
        'coverage_intervals': {name: {level: observed._asdict() for level, observed in levels.items()} for name, levels in pooled.items()},
        'minutes': {step: float(np.mean([metrics['minutes'][step] for metrics in runs])) for step in runs[0]['minutes']},
        'minutes_by_seed': [metrics['minutes'] for metrics in runs],
        'training': [{name: metrics['training'][name] for name in ('epoch', 'variance_scale', 'anchor', 'seconds')} for metrics in runs],
        'per_seed': evaluations,
    }


def bounds_of(options: argparse.Namespace, seed: int) -> dict[str, dict | None]:
    """Bounds of the test sessions, excess paths known, mapped from the training sources, not known at all: RMSE, and NLL of honest Gaussians of that width."""
    from heimdall_train.bounds import rms_bound, scene_bounds
    from heimdall_train.scene import load_scene
    from heimdall_train.simulation import session_truth

    scene = load_scene(options.scene, options.scene_seed, options.test_seed)
    if scene.radio is None or scene.clock is None or not scene.clock.disciplined:
        return {'bounds_rmse_m': None, 'bounds_nll': None}
    bounds = scene_bounds(scene, session_truth(scene, 'test', seed), seed)._asdict()
    return {'bounds_rmse_m': {what: rms_bound(covariances) for what, covariances in bounds.items()},
            'bounds_nll': {what: honest_nll(covariances) for what, covariances in bounds.items()}}


def honest_nll(covariances: np.ndarray) -> float:
    """Mean negative log-likelihood, in nats, of errors that are as Gaussian and as wide as stated; sessions that nothing determines are left out."""
    determined = covariances[np.isfinite(covariances).all(axis=(1, 2))]
    return float(np.mean(1 + np.log(2 * np.pi) + np.linalg.slogdet(determined)[1] / 2))


def markdown(summary: dict) -> str:
    """A table of the methods, means over the seeds with half their range in brackets."""
    minutes = ', '.join(f'{step} {value:.1f}' for step, value in summary['minutes'].items())
    lines = [
        f'## {summary["scene"]}: {summary["n"]} test sessions, seeds {summary["seeds"]}, {summary["epochs"]} epochs',
        '',
        f'{summary["date"]}, {summary["hardware"]}, torch {summary["versions"]["torch"]}; minutes a seed: {minutes}',
        '',
        '| method | median m | mean m | RMSE m | p95 m | NLL nat | 50 % ellipse | 90 % ellipse (95 % interval) | NEES |',
        '|---|---:|---:|---:|---:|---:|---:|---:|---:|',
    ]
    for name, figures in methods_of(summary).items():
        half, observed = summary['range_over_seeds'][name]['mean_m'] / 2, summary['coverage_intervals'][name]
        shares = ['–', '–', '–', '–']
        if observed:
            ninety = observed['90']
            interval = f'{ninety["fraction"]:.3f} ({ninety["low"]:.3f}–{ninety["high"]:.3f})'
            shares = [f'{figures["nll"]:.2f}', f'{observed["50"]["fraction"]:.2f}', interval, f'{figures["nees"]:.2f}']
        distances = f'{figures["median_m"]:.1f} | {figures["mean_m"]:.1f} (±{half:.1f}) | {figures["rmse_m"]:.1f} | {figures["p95_m"]:.0f}'
        lines.append(f'| {name} | {distances} | {" | ".join(shares)} |')
    if bounds := summary['bounds_rmse_m']:
        values = ', '.join(f'{what} {value:.1f} m ({summary["bounds_nll"][what]:.2f} nat)' for what, value in bounds.items())
        share = (bounds['known'] / summary['model']['rmse_m']) ** 2
        lines += ['', 'Bounds by noise and clock alone (RMSE; NLL of an honest Gaussian), excess paths '
                  f'{values}; efficiency of the model against the first {share:.2f}.']
    return '\n'.join([*lines, ''])


# --- studies: each returns its points, `{label: {method: figures}}`, and keeps them one by one ---


def point(folder: Path, label: str, compute: Callable[[], dict]) -> dict:
    """A point of a study: read if it is there, else computed and kept."""
    path = folder / 'studies' / f'{label}.json'
    if not path.exists():
        print(f'--- {label}', flush=True)
        write(path, compute())
    return json.loads(path.read_text())


def figures(truth: np.ndarray, position: np.ndarray, covariance: np.ndarray | None) -> dict:
    """What a study keeps of a method."""
    return {'n': len(truth), **evaluate_positions(truth, position, covariance)}


def trained(options: argparse.Namespace, folder: Path, **other):
    """Configuration, model, data and split of the run of the first seed, trained if it has not been."""
    from heimdall_train.data import read_data
    from heimdall_train.dataset import Split
    from heimdall_train.model_files import load_model

    run(options, options.first_seed, folder, **other)
    config = config_of(options, options.first_seed, folder, **other)
    data = read_data(config)
    if not isinstance(data, TimedData):
        sys.exit(f'{options.scene} has no common clock: the studies are of time differences')
    return config, load_model(folder / 'model.safetensors'), data, Split.load(folder / 'split.json')


def all_estimates(model, data: TimedData, split, test: TimedData) -> dict[str, tuple]:
    """Positions and covariances of test sessions by model, anchor and the two TDOA baselines."""
    from heimdall_train.tdoa_baselines import run_tdoa_baselines
    from heimdall_train.training import estimate

    receivers = data.network.positions_enu(model.frame)
    position, covariance, anchor, anchor_covariance = estimate(model, test)
    known = [data.take(data.rows(ids)) for ids in (split.train, split.validation)]
    parts = [(each.delay, each.snr, each.timed, each.enu(model.frame)) for each in (*known, test)]
    results = run_tdoa_baselines(*parts, receivers, data.network.source_height)
    baselines = {name: (result.positions, result.covariance) for name, result in results.items()}
    return {'model': (position, covariance), 'anchor': (anchor, anchor_covariance), **baselines}


def all_methods(model, data: TimedData, split, test: TimedData) -> dict:
    """The figures of these estimates."""
    truth = test.enu(model.frame)
    return {name: figures(truth, *estimates) for name, estimates in all_estimates(model, data, split, test).items()}


def without(data: TimedData, gone: np.ndarray) -> TimedData:
    """The sessions without some of their recordings."""
    levels, snr = (np.where(gone, np.nan, values).astype(np.float32) for values in (data.levels, data.snr))
    return replace(data, timed=data.timed & ~gone, levels=levels, snr=snr, delay=np.where(gone, 0.0, data.delay))


def study_missing(options: argparse.Namespace, folder: Path) -> dict:
    """Receivers taken away at random, the reference never: delays and coherence are relative to it."""
    config, model, data, split = trained(options, folder)
    test = data.take(data.rows(split.test))

    def drawn(count: int) -> TimedData:
        draws = np.random.default_rng(count).uniform(size=test.timed.shape)
        draws[np.arange(len(test)), test.reference] = np.inf
        return without(test, draws.argsort(axis=1).argsort(axis=1) < count)

    return {str(count): point(folder, f'missing-{count}', lambda count=count: all_methods(model, data, split, drawn(count))) for count in range(5)}


def study_snr(options: argparse.Namespace, folder: Path) -> dict:
    """Test sessions by the SNR of their third strongest receiver: a fix takes three."""
    config, model, data, split = trained(options, folder)
    test = data.take(data.rows(split.test))
    third = np.sort(np.where(test.timed, test.snr, -np.inf), axis=1)[:, -3]
    edges = [-np.inf, *np.quantile(third, (0.1, 0.25, 0.5, 0.75, 0.9)), np.inf]
    points = {}
    for low, high in zip(edges, edges[1:]):
        chosen = np.flatnonzero((third > low) & (third <= high))
        label = f'{low:.0f} to {high:.0f} dB'
        points[label] = point(folder, f'snr-{label.replace(" ", "-")}', lambda rows=chosen: all_methods(model, data, split, test.take(rows)))
    return points


def study_size(options: argparse.Namespace, folder: Path) -> dict:
    """Fewer known sources, in a scene that is the same but for that: for each eight to learn from one for validation, as in the scene: final maps know both."""
    points = {}
    for count in (250, 500, 1000, 3000, 12_000):
        where, other = of_size(options, count, count // 8)
        points[str(count)] = methods_of(run(options, options.first_seed, where, **other)['evaluation'])
    return points


def of_size(options: argparse.Namespace, count: int, validation: int | None = None) -> tuple[Path, dict]:
    """Folder and settings of the first seed's run with so many training sources, and validation ones; the run itself where it has so many."""
    values = yaml.safe_load(yaml_of(options.scene).read_text())
    wanted = {**values['sources'], 'train': count, 'validation': validation or values['sources']['validation']}
    if values['sources'] == wanted:
        return options.out / f'{name_of(options)}-{options.first_seed}', {}
    name = f'{name_of(options)}-size-{count}' + (f'-{validation}' if validation else '')
    path = sibling(options, name, {**values, 'sources': wanted})
    return options.out / f'{name}-{options.first_seed}', {'scene': path, 'epochs': min(40, round(options.epochs * (12_000 / count) ** 0.5))}


def study_road(options: argparse.Namespace, folder: Path) -> dict:
    """A survey's test sets, all over the zone and along road that was never driven: as the scene is, then with ever less road driven along, as densely.

    Means over the seeds.
    """
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    return averaged([road_of_seed(argparse.Namespace(**{**vars(options), 'first_seed': seed})) for seed in seeds])


def averaged(values: list):
    """Means of what several seeds have under the same names."""
    if isinstance(values[0], dict):
        return {name: averaged([each[name] for each in values]) for name in values[0]}
    return values[0] if values.count(values[0]) == len(values) else float(np.mean(values))


def road_of_seed(options: argparse.Namespace) -> dict:
    """The points of one seed."""
    scene = yaml.safe_load(yaml_of(options.scene).read_text())
    if 'survey' not in scene:
        sys.exit(f'{options.scene} has no survey: the study of the road needs one')
    survey, points = scene['survey'], {}
    whole = survey['road_m'] // survey['section_m'] - survey['validation_sections'] - survey['test_sections']
    for share in (1, 2, 4, 8):
        driven, other, where = whole // share, {}, options.out / f'{name_of(options)}-{options.first_seed}'
        kilometres = driven * survey['section_m'] / 1000
        if share > 1:
            name = f'{name_of(options)}-road-{kilometres:.0f}'
            sections = {'test_sections': survey['test_sections'] + whole - driven}
            sources = {'train': round(scene['sources']['train'] * driven / whole)}
            path = sibling(options, name, {**scene, 'sources': {**scene['sources'], **sources}, 'survey': {**survey, **sections}})
            other, where = {'scene': path}, options.out / f'{name}-{options.first_seed}'
        for label, methods in survey_sets(where, *trained(options, where, **other)).items():
            points[f'{kilometres:.0f} km, {label}'] = methods
    return points


def survey_sets(folder: Path, config, model, data: TimedData, split) -> dict:
    """A survey's two test sets, each by itself."""
    from heimdall_train.data import config_scene

    test = data.take(data.rows(split.test))
    on_road = np.array([int(identifier.rsplit('-', 1)[1]) for identifier in test.ids]) >= config_scene(config).sources['test']
    rows = {'zone': np.flatnonzero(~on_road), 'road': np.flatnonzero(on_road)}
    return {label: point(folder, f'road-{label}', lambda label=label: all_methods(model, data, split, test.take(rows[label]))) for label in rows}


def study_cells(options: argparse.Namespace, folder: Path) -> dict:
    """Median errors in cells of 15 km with 20 test sources at least, named by their south-western corners: kilometres east and north of the zone's centre.

    Means over the seeds, which share their test sources.
    """
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    medians = [cells_of_seed(argparse.Namespace(**{**vars(options), 'first_seed': seed})) for seed in seeds]
    for seed, cells in zip(seeds, medians, strict=True):
        better = float(np.mean([cell['model'] < cell['tdoa'] for cell in cells.values()]))
        print(f'seed {seed}: {len(cells)} cells; the model has a better median than tdoa in {better:.1%}', flush=True)
    return averaged(medians)


def cells_of_seed(options: argparse.Namespace) -> dict:
    """The cells of one seed."""
    folder = options.out / f'{name_of(options)}-{options.first_seed}'
    _, model, data, split = trained(options, folder)
    test = data.take(data.rows(split.test))
    truth = test.enu(model.frame)

    def all_cells() -> dict:
        errors = {name: np.linalg.norm(position - truth, axis=1) for name, (position, _) in all_estimates(model, data, split, test).items()}
        cells, cell_of, counts = np.unique(np.floor(truth / 15_000).astype(int), axis=0, return_inverse=True, return_counts=True)
        return {
            f'{15 * cells[cell][0]:+d} {15 * cells[cell][1]:+d}': {name: float(np.median(error[cell_of == cell])) for name, error in errors.items()}
            for cell in np.flatnonzero(counts >= 20)
        }

    return point(folder, 'cells', all_cells)


def sibling(options: argparse.Namespace, name: str, values: dict) -> str:
    """Path of a scene with other values, written beside the runs."""
    path = options.out / 'scenes' / f'{name}.yaml'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return str(path)


def yaml_of(scene: str) -> Path:
    """The YAML file of a scene that ships with the package, or the file itself."""
    import heimdall_train.scene

    return Path(scene) if scene.endswith(('.yaml', '.yml')) else Path(heimdall_train.scene.__file__).parent / 'scenes' / f'{scene}.yaml'


def simulated(config, data: TimedData, label: str, count: int, sessions: Callable) -> TimedData:
    """Features of further sessions of the scene, kept in the cache of the run."""
    from heimdall_train.data import config_scene
    from heimdall_train.dataset import cached_features, features_digest

    return cached_features(config.cache, features_digest(data.network, [config_scene(config), label]), data.network, sessions, count)


def study_zone(options: argparse.Namespace, folder: Path) -> dict:
    """Sources outside the zone, in five rings about it."""
    from heimdall_train.data import config_scene
    from heimdall_train.recordings import simulate_sessions

    config, model, data, split = trained(options, folder)
    scene, points = config_scene(config), {}
    half, count = np.array([scene.zone.width_m, scene.zone.height_m]) / 2, min(300, scene.sources['test'])

    def of_ring(ring: int, low: float, high: float) -> dict:
        generator, places = np.random.default_rng([scene.seed, ring]), []
        while len(places) < count:
            place = generator.uniform(-half - high, half + high)
            if low < np.linalg.norm(np.maximum(np.abs(place) - half, 0)) <= high:
                places.append(place)
        test = simulated(config, data, f'ring {ring}', count, lambda rows: simulate_sessions(scene, 'test', numbers=rows, at=np.array(places)[rows]))
        return all_methods(model, data, split, test)

    for ring, (low, high) in enumerate(((0, 500), (500, 1000), (1000, 2000), (2000, 4000), (4000, 8000))):
        label = f'{low / 1000:g} to {high / 1000:g} km outside'
        points[label] = point(folder, f'zone-{ring}', lambda ring=ring, low=low, high=high: of_ring(ring, low, high))
    return points


def study_repeats(options: argparse.Namespace, folder: Path) -> dict:
    """One, two and three recordings of each test source, fused; `independent` is what a reader would say who takes the maps' errors for independent too."""
    from heimdall_train.data import config_scene
    from heimdall_train.fusion import fuse, fuse_sources
    from heimdall_train.recordings import simulate_sessions
    from heimdall_train.training import estimate

    config, model, data, split = trained(options, folder)
    scene = config_scene(config)
    count = scene.sources['test']

    def sessions(rows: list[int]):
        for repeat in range(3):
            yield from simulate_sessions(scene, 'test', numbers=[row - repeat * count for row in rows if row // count == repeat], repeat=repeat)

    repeated = simulated(config, data, 'three recordings', 3 * count, sessions)

    def fused(recordings: int) -> dict:
        test = repeated.take(np.flatnonzero([identifier.count('-') == 1 or int(identifier.rsplit('-', 1)[1]) < recordings for identifier in repeated.ids]))
        position, covariance, _, _ = estimate(model, test)
        together, places = fuse_sources(model, test), test.enu(model.frame)
        truth, positions, covariances = [], [], []
        for source in together.sources:
            rows = np.flatnonzero(test.sources == source)
            truth.append(places[rows[0]])
            answer, belief = fuse(position[rows], covariance[rows], np.zeros((len(rows), 2, 1)))
            positions.append(answer)
            covariances.append(belief)
        known = np.array(truth)
        return {
            'model': figures(known, together.positions, together.covariances),
            'independent': figures(known, np.array(positions), np.array(covariances)),
        }

    return {str(recordings): point(folder, f'repeats-{recordings}', lambda recordings=recordings: fused(recordings)) for recordings in (1, 2, 3)}


def study_faults(options: argparse.Namespace, folder: Path) -> dict:
    """The clock of one receiver put wrong in each test session, never the reference's; then the scene's own bursts, with and without the receivers they hit."""
    import torch

    from heimdall_train.data import config_scene
    from heimdall_train.disagreement import disagreement, suspect
    from heimdall_train.simulation import session_truth
    from heimdall_train.training import Sessions

    config, model, data, split = trained(options, folder)
    scene, test = config_scene(config), data.take(data.rows(split.test))
    truth = session_truth(scene, 'test', numbers=[int(identifier.rsplit('-', 1)[1]) for identifier in test.ids])
    own = np.arange(test.timed.shape[1]) == test.reference[:, None]
    sound = (truth.clock_fault_s == 0).all(axis=1) & (test.timed.sum(axis=1) >= 5)
    generator = np.random.default_rng(0)
    chosen = np.arange(test.timed.shape[1]) == np.where(test.timed & ~own, generator.random(own.shape), -1.0).argmax(axis=1)[:, None]
    sign = np.where(generator.random((len(test), 1)) < 0.5, -1.0, 1.0)

    def with_fault(size: float) -> dict:
        part = replace(test, delay=test.delay + 1e-6 * size * sign * chosen).take(np.flatnonzero(sound))
        samples, named = Sessions(part, model), []
        with torch.inference_mode():
            for start in range(0, len(samples), 64):
                session = samples.take(slice(start, start + 64))
                named.append(suspect(disagreement(model.locate(model.anchor, session))).numpy())
        which, faulty = np.concatenate(named), chosen.argmax(axis=1)[sound]
        shares = {'named': float((which == faulty).mean()), 'another_named': float(((which >= 0) & (which != faulty)).mean())}
        return {method: {**values, **shares} for method, values in all_methods(model, data, split, part).items()}

    points = {f'{size:g} µs': point(folder, f'faults-{size:g}', lambda size=size: with_fault(size)) for size in (0, 0.3, 1, 3, 10, 30, 100)}
    clean = test.take(np.flatnonzero(sound))
    points['without that receiver'] = point(folder, 'faults-without', lambda: all_methods(model, data, split, without(clean, chosen[sound])))
    hit = (truth.interference_share > 0) & test.timed & ~own
    rows = np.flatnonzero(sound & hit.any(axis=1) & ((test.timed & ~hit).sum(axis=1) >= 4))
    if len(rows):
        points['bursts'] = point(folder, 'faults-bursts', lambda: all_methods(model, data, split, test.take(rows)))
        points['bursts, without the receivers hit'] = point(
            folder, 'faults-bursts-without', lambda: all_methods(model, data, split, without(test.take(rows), hit[rows]))
        )
    return points


def study_ablation(options: argparse.Namespace, folder: Path) -> dict:
    """The network with something taken away, trained anew on the same sessions: 3,000 training sources. Without any network: the anchor."""
    where, other = of_size(options, 3000)
    config, model, data, split = trained(options, where, **other)
    test = data.take(data.rows(split.test))
    points = {'all': point(where, 'ablation-all', lambda: all_methods(model, data, split, test))}
    for label, variant in variants().items():
        points[label] = point(where, f'ablation-{label.replace(" ", "-")}', lambda kind=variant: train_variant(config, data, split, kind, where))
    return points


def variants() -> dict[str, type]:
    """Networks that lack something, by what they lack."""
    import torch

    from heimdall_train.geodesy import SPEED_OF_LIGHT
    from heimdall_train.model import LocalizationNet
    from heimdall_train.timed_model import TimedNet

    class WithoutBackbone(TimedNet):
        def see(self, maps, counts, heard):
            return torch.zeros(len(maps), 512)

    class ScalarsOnly(WithoutBackbone):
        def correct(self, inputs, fix):
            return super().correct((0 * inputs[0], *inputs[1:]), fix)

    class MapsOnly(TimedNet):
        def judge(self, inputs, fix):
            maps, scalars, timed = inputs
            level, snr, delay, heard = scalars.unbind(dim=2)
            nothing = {name: 0 * getattr(fix, name) for name in ('residual', 'departure', 'departure_deviation', 'session')}
            return super().judge((maps, torch.stack([level, 0 * snr + self.snr_mean, delay, heard], dim=2), timed), fix._replace(**nothing))

    class WithoutCoherence(TimedNet):
        def correct(self, inputs, fix):
            receivers = len(self.network)
            maps = torch.cat([inputs[0][:, :receivers], 0 * inputs[0][:, receivers:]], dim=1)
            return super().correct((maps, *inputs[1:]), fix)

    class WithoutExpectedLevels(TimedNet):
        def locate(self, anchor, inputs, working=None):
            fix = super().locate(anchor, inputs, working)
            session = torch.cat([fix.session[:, :3], 0 * fix.session[:, 3:]], dim=1)
            return fix._replace(departure=0 * fix.departure, departure_deviation=0 * fix.departure_deviation, session=session)

    class WithoutAnchor(TimedNet):
        """Delays and levels go in, a position comes out, in units of the zone."""

        def locate(self, anchor, inputs, working=None):
            fix, (_, snr, delay, _) = super().locate(anchor, inputs, working), inputs[1].unbind(dim=2)
            counts, square = (fix.weight > 0).double(), 10_000.0**2 + 0 * fix.weight
            area = (self.extent.double() ** 2 / 12) * torch.eye(2, dtype=torch.float64) + 0 * fix.covariance
            measured = {'residual': SPEED_OF_LIGHT * delay * counts, 'departure': (snr - self.snr_mean) * counts}
            nothing = {name: 0 * getattr(fix, name) for name in ('position', 'deviation', 'jacobian', 'departure_deviation', 'session')}
            return fix._replace(covariance=area, variance=square, weight=counts / square, **measured, **nothing)

        def correct(self, inputs, fix):
            return self.conclude(self.judge(inputs, fix)[2], fix.position, fix.covariance)

    class WithoutExcessMaps(TimedNet):
        """One excess path a receiver, wherever the source is."""

        change = staticmethod(flattened)

    return {
        'without the ResNet': WithoutBackbone,
        'maps of the recordings only': MapsOnly,
        'scalars only': ScalarsOnly,
        'without coherence': WithoutCoherence,
        'without expected levels': WithoutExpectedLevels,
        'without maps of the excess path': WithoutExcessMaps,
        'without an anchor': WithoutAnchor,
        'levels only': LocalizationNet,
    }


def train_variant(config, data: TimedData, split, kind: type, folder: Path) -> dict:
    """Train, calibrate and evaluate one variant, as the pipeline does."""
    from heimdall_train.dataset import block_folds
    from heimdall_train.features import LevelData
    from heimdall_train.model import LocalizationNet
    from heimdall_train.pipeline import BLOCK_M, FOLDS, _frame, _prepare_levels, _prepare_timed
    from heimdall_train.training import estimate, finish, fit, new_learner

    def of(ids):
        part = data.take(data.rows(ids))
        return LevelData(**{field.name: getattr(part, field.name) for field in fields(LevelData)}) if prepare is _prepare_levels else part

    prepare: Callable = _prepare_levels if kind is LocalizationNet else _prepare_timed
    change: Callable = getattr(kind, 'change', lambda anchor, data: anchor)
    training, validation, test, frame = of(split.train), of(split.validation), of(split.test), _frame(data, split.test)
    folds = block_folds(training.enu(frame), BLOCK_M, FOLDS, config.seed)
    model, anchors, validation, _, refit = prepare(config, training, validation, frame, folds, print)
    model.__class__, model.anchor = kind, change(model.anchor, data)
    learner = new_learner(model, [change(anchor, data) for anchor in anchors], training, folds, validation, config.batch_size, config.seed)
    best = fit(learner, config.epochs, folder / 'variants' / kind.__name__, config.learning_rate)
    best.__class__ = kind
    finish(best, validation)
    refit(best, of([*split.train, *split.validation]))
    best.anchor = change(best.anchor, data)
    position, covariance, anchor, anchor_covariance = estimate(best, test)
    truth = test.enu(frame)
    return {'model': figures(truth, position, covariance), 'anchor': figures(truth, anchor, anchor_covariance)}


def flattened(anchor, data: TimedData):
    """The anchor with the mean of each receiver's map everywhere, and all of its scatter as deviation."""
    from heimdall_train.expected_levels import Surveyed
    from heimdall_train.tdoa import DelayNoise, ExcessKriging, ExcessMaps, TdoaAnchor

    times, network = anchor.times, data.network
    mean, deviation = times.maps.double().numpy().transpose(3, 0, 1, 2)
    spread = np.sqrt((deviation**2 + (mean - mean.mean(axis=(1, 2), keepdims=True)) ** 2).mean(axis=(1, 2), keepdims=True))
    average, scatter = (np.broadcast_to(values, mean.shape) for values in (mean.mean(axis=(1, 2), keepdims=True), spread))
    kriging = ExcessKriging(nugget=float(times.constants[3]))
    maps = ExcessMaps(times.origin.numpy(), float(times.pitch), average, scatter, times.known.numpy() > 0, kriging)
    noise = DelayNoise(bandwidth=data.sample_rate, duration=data.samples / data.sample_rate)
    return Surveyed(TdoaAnchor(network.positions_enu(network.frame()), maps, noise, network.source_height), anchor.levels)


STUDIES: dict[str, Callable[[argparse.Namespace, Path], dict]] = {
    'missing': study_missing,
    'snr': study_snr,
    'size': study_size,
    'zone': study_zone,
    'road': study_road,
    'cells': study_cells,
    'repeats': study_repeats,
    'faults': study_faults,
    'ablation': study_ablation,
}


def study_markdown(study: str, points: dict) -> str:
    """A row a point and method."""
    lines = [f'\n## {study}', '', '| point | method | n | median m | mean m | p95 m | NLL nat | 90 % ellipse |', '|---|---|---:|---:|---:|---:|---:|---:|']
    if study == 'faults':
        lines[2:] = [f'{line} {more} |' for line, more in zip(lines[2:], ('faulty one named / another', '---:'))]
    for label, methods in points.items():
        for name, values in methods.items():
            if not isinstance(values, dict):
                lines.append(f'| {label} | {name} | | {values:.0f} | | | | |')
                continue
            belief = [f'{values["nll"]:.2f}', f'{values["coverage"]["90"]:.3f}'] if values.get('nll') is not None else ['–', '–']
            distances = [f'{values[key]:.1f}' for key in ('median_m', 'mean_m', 'p95_m')]
            shares = [f'{values["named"]:.3f} / {values["another_named"]:.3f}'] if 'named' in values else []
            lines.append(f'| {label} | {name} | {values.get("n", "")} | {" | ".join([*distances, *belief, *shares])} |')
    return '\n'.join(lines)


if __name__ == '__main__':
    main()
