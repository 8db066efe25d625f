"""Time, memory and bytes of simulating, of features and of training, against the number of sessions and of workers.

Claim: the time of each grows as N to a power of at most 1.1, and two workers on two cores take at most 0.65 of the time of one. Memory:
simulation and features take the same at any N; training does not (what grows with N is said in the results).

    python benchmarks/scaling.py --out FILE [--sessions 1000 3000 10000 100000] [--workers 1 2] [--part 10000] [--epochs 1] [--scene demo-v1] [--place DIR]

Recordings of seven receivers, 1 s at 12.5 kHz, in a folder: about 0.7 MB a session. Each stage runs in processes of its own; what is measured is
their wall time from start to end, imports included, and the highest resident memory of any one of them. Two workers simulate half of the sessions
each and compute the features of that half; they train together by torchrun at the same global batch. One run each.

What is measured and what is not: sizes up to --part are simulated, computed and trained as a whole, and powers are fitted to these alone. A larger
size is simulated and computed in parts of that many sessions, in catalogs of their own, whose recordings and features are deleted before the next
part begins: its time is that of all its parts, or of those that have been run times how many there are of them, and says nothing about what one
catalog of that size would add. It is trained as a whole, by one worker, from features whose recordings are never on the disk.

Disk: 1.1 MB for each session of --part, 11 GB at the default, or 0.17 MB for each of the largest size, 17 GB. Time on two idle cores, estimated from
the rates in simulation.json, features.json and loading.json: half an hour to an hour for the wholes, then a quarter of an hour for each of the ten
parts of 10⁵ (with one worker and with two), and an hour for its training.
Stopped or killed, the same command goes on: the file holds every piece that is finished, the small ones come first, and what the pieces so far say
is in it at any time.
"""
import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import yaml

import heimdall_train

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'tests'))
from servers import free_ports  # noqa: E402

STAGES = ('simulation', 'features', 'training')
COMMAND = [sys.executable, '-c', 'from heimdall_train.cli import main; main()']
SHARDS = '''
import sys
from heimdall_train.config import make_config
from heimdall_train.data import plan_shards, share_shard
config = make_config(catalog=sys.argv[1], store=sys.argv[2], cache=sys.argv[3])
key, missing, total = plan_shards(config)
for number in missing:
    share_shard(config, key, number)
'''
CACHE = '''
import sys
from heimdall_train.config import make_config
from heimdall_train.data import read_data
read_data(make_config(scene=sys.argv[1], cache=sys.argv[2]))
'''


def run(commands: list[list[str]], log: Path) -> dict[str, float]:
    """Processes beside one another: seconds until the last has ended, and the highest resident memory of any, in MB."""
    begun = time.perf_counter()
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'PASSIVE', 'HEIMDALL_BATCH_SIZE': '64'}
    with open(log, 'ab') as output:
        processes = [subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=log.parent) for command in commands]
        waited: list[tuple[int, float]] = []
        threads = [threading.Thread(target=lambda process=process: waited.append(_waited(process))) for process in processes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if any(status for status, _ in waited):
        sys.exit(f'a process failed: {log.read_text(errors="replace")[-2000:]}')
    return {'seconds': round(time.perf_counter() - begun, 1), 'memory_mb': round(max(peak for _, peak in waited), 1)}


def _waited(process: subprocess.Popen) -> tuple[int, float]:
    """Exit status, and the highest resident memory in MB of the process or one that it has waited for."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss / 1e3


def size(*folders: Path) -> dict[str, int]:
    """Files and bytes below folders."""
    sizes = [path.stat().st_size for folder in folders for path in folder.rglob('*') if path.is_file()]
    return {'files': len(sizes), 'bytes': sum(sizes)}


def scene_file(place: Path, name: str, sessions: int) -> Path:
    """A sibling of a scene with so many sessions."""
    values = yaml.safe_load((Path(heimdall_train.__file__).parent / 'scenes' / f'{name}.yaml').read_text())
    tenth = max(sessions // 10, 1)
    (path := place / f'scene-{sessions}.yaml').write_text(yaml.safe_dump({**values, 'name': 'scaling', 'sources': {
        'train': sessions - 2 * tenth, 'validation': tenth, 'test': tenth}}))
    return path


def recorded(place: Path, scene: str, sessions: int, workers: int, part: int) -> dict[str, dict]:
    """Simulate some sessions into a store, and compute their features: each worker its share. Nothing of it is kept."""
    file = scene_file(place, scene, sessions // workers)
    names = [(f'{place}/{number}.db', f'{place}/{number}') for number in range(workers)]
    simulated = run([[*COMMAND, 'simulate', str(file), '--catalog', catalog, '--store', store, '--seed', str(part * workers + number)]
                     for number, (catalog, store) in enumerate(names)], place / 'log')
    simulated |= {**size(*(Path(store) for _, store in names)), 'catalog_bytes': sum(Path(catalog).stat().st_size for catalog, _ in names)}
    computed = run([[sys.executable, '-c', SHARDS, catalog, store, f'{store}-cache'] for catalog, store in names], place / 'log')
    computed |= size(*(Path(store) / 'features' for _, store in names))
    return {'simulation': simulated, 'features': computed}


def trained(place: Path, scene: str, sessions: int, workers: int, epochs: int, cache: Path) -> dict[str, dict]:
    """Train on the features of as many sessions, which are in the cache already."""
    file = str(scene_file(place, scene, sessions))
    train = [*COMMAND, 'train', '--scene', file, '--out', f'{place}/run', '--epochs', str(epochs), '--cache', str(cache)]
    together = [str(Path(sys.executable).parent / 'torchrun'), '--no-python', f'--nproc-per-node={workers}', f'--master-port={free_ports(1)[0]}']
    measured = run([train if workers == 1 else together + train], place / 'log')
    seconds = json.loads((place / 'run' / 'metrics.json').read_text())['training']['seconds']
    return {'training': {**measured, 'maps_seconds': round(seconds['maps'], 1), 'epochs_seconds': round(seconds['training'], 1), 'epochs': epochs}}


def wanted(sizes: list[int], workers: list[int], part: int) -> list[dict]:
    """The pieces, the small ones first."""
    whole = [count for count in sorted(sizes) if count <= part]
    pieces = [{'what': what, 'sessions': count, 'workers': number, 'part': 0} for count in whole for what in ('recorded', 'trained') for number in workers]
    large = [count for count in sorted(sizes) if count > part]
    pieces += [{'what': 'trained', 'sessions': count, 'workers': 1, 'part': 0} for count in large]
    return pieces + [{'what': 'recorded', 'sessions': count, 'workers': number, 'part': each}
                     for count in large for each in range(-(-count // part)) for number in workers]


def rows_of(pieces: list[dict], part: int) -> list[dict]:
    """A row for each size and number of workers: its stages, drawn on to the whole where parts are missing."""
    rows = []
    for sessions, workers in sorted({(piece['sessions'], piece['workers']) for piece in pieces}):
        stages = {}
        for stage in STAGES:
            parts = 1 if stage == 'training' else -(-sessions // part)
            found = [piece['stages'][stage] for piece in pieces if (piece['sessions'], piece['workers']) == (sessions, workers) and stage in piece['stages']]
            if found:
                share = parts / len(found)
                stages[stage] = {name: max(each[name] for each in found) if name in ('memory_mb', 'epochs') else
                                 round(share * sum(each[name] for each in found), 1) for name in found[0]} | {'parts': parts, 'parts_measured': len(found)}
        rows.append({'sessions': sessions, 'workers': workers, 'stages': stages})
    return rows


def fits(rows: list[dict]) -> dict:
    """For each stage and number of workers, over what was measured as a whole: power of N in time, a line of seconds and one of MB against N."""
    found = {}
    for workers in sorted({row['workers'] for row in rows}):
        for stage in STAGES:
            some = [(row['sessions'], row['stages'][stage]) for row in rows
                    if row['workers'] == workers and row['stages'].get(stage, {}).get('parts') == 1]
            if len(some) < 2:
                continue
            counts = np.array([sessions for sessions, _ in some], dtype=float)
            seconds = np.array([each['seconds'] for _, each in some])
            slope, start = np.polyfit(counts, seconds, 1, w=1 / seconds)  # relative errors count alike
            grow, base = np.polyfit(counts, [each['memory_mb'] for _, each in some], 1)
            start = float(np.clip(start, 0.0, 0.9 * seconds.min()))  # imports: the rest is what grows
            found[f'{stage}, {workers}'] = {
                'sizes': [int(count) for count in counts], 'power': round(float(np.polyfit(np.log(counts), np.log(seconds - start), 1)[0]), 2),
                'seconds_at_start': round(start, 1), 'seconds_per_1000': round(float(1e3 * slope), 2),
                'seconds_at_largest': float(seconds[-1]), 'mb_at_start': round(float(base), 0), 'mb_per_1000': round(float(1e3 * grow), 2)}
    return found


def ratios(rows: list[dict]) -> dict:
    """For each stage, at the largest size that was measured as a whole with one worker and with two: time of two by time of one."""
    found = {}
    for stage in STAGES:
        times = {(row['sessions'], row['workers']): row['stages'][stage]['seconds'] for row in rows if row['stages'].get(stage, {}).get('parts') == 1}
        both = [sessions for sessions, workers in times if workers == 2 and (sessions, 1) in times]
        if both:
            found[stage] = {'sessions': max(both), 'ratio': round(times[max(both), 2] / times[max(both), 1], 2)}
    return found


def write(out: Path, same: dict, pieces: list[dict]) -> dict:
    """Write the pieces, and what they say, in one go."""
    rows = rows_of(pieces, same['part'])
    summary = {**same, 'date': max(piece['date'] for piece in pieces), 'versions': {name: version(name) for name in ('heimdall-train', 'torch', 'numpy')},
               'fits': fits(rows), 'two_workers_by_one': ratios(rows), 'rows': rows, 'pieces': pieces}
    out.parent.mkdir(parents=True, exist_ok=True)
    (half := out.with_suffix('.part')).write_text(json.dumps(summary, indent=1) + '\n')
    half.replace(out)
    return summary


def main() -> None:
    """Measure what is missing, piece by piece; fit; write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--sessions', type=int, nargs='+', default=[1000, 3000, 10_000, 100_000])
    parser.add_argument('--workers', type=int, nargs='+', default=[1, 2])
    parser.add_argument('--part', type=int, default=10_000, help='sessions that are on the disk at the same time')
    parser.add_argument('--epochs', type=int, default=1)
    parser.add_argument('--scene', default='demo-v1')
    parser.add_argument('--place', type=Path, help='folder on the disk that is measured')
    parser.add_argument('--out', type=Path, required=True)
    options = parser.parse_args()
    if uneven := [count for count in options.sessions if count > options.part and count % options.part]:
        sys.exit(f'--sessions {uneven[0]} cannot be had in parts of {options.part}')
    same = {'benchmark': 'scaling', 'scene': options.scene, 'epochs': options.epochs, 'part': options.part,
            'hardware': f'{platform.machine()}, {os.cpu_count()} cores, no GPU'}
    before = json.loads(options.out.read_text()) if options.out.exists() else {**same, 'pieces': []}
    if different := [name for name in same if before.get(name) != same[name]]:
        sys.exit(f'{options.out} was measured with another {", ".join(different)}: give another --out')
    pieces = before['pieces']
    known = {(piece['what'], piece['sessions'], piece['workers'], piece['part']) for piece in pieces}
    missing = [piece for piece in wanted(options.sessions, options.workers, options.part) if tuple(piece.values()) not in known]
    print(f'{len(known)} pieces are there, {len(missing)} to do', flush=True)
    with tempfile.TemporaryDirectory(dir=options.place) as folder:
        caches: dict[int, Path] = {}
        for number, piece in enumerate(missing):
            place = Path(folder) / 'piece'
            count = piece['sessions'] if piece['what'] == 'trained' else min(piece['sessions'], options.part)
            place.mkdir()
            if piece['what'] == 'recorded':
                stages = recorded(place, options.scene, count, piece['workers'], piece['part'])
            else:
                if count not in caches:  # made without being measured, and without recordings on the disk
                    for cache in caches.values():
                        shutil.rmtree(cache)
                    caches = {count: Path(folder) / f'cache-{count}'}
                    run([[sys.executable, '-c', CACHE, str(scene_file(place, options.scene, count)), str(caches[count])]], place / 'log')
                stages = trained(place, options.scene, count, piece['workers'], options.epochs, caches[count])
            shutil.rmtree(place)
            pieces.append({**piece, 'stages': stages, 'date': datetime.now(UTC).date().isoformat()})
            print(f'{number + 1}/{len(missing)}', json.dumps(pieces[-1]), flush=True)
            write(options.out, same, pieces)
    summary = write(options.out, same, pieces)
    print(json.dumps({name: summary[name] for name in ('fits', 'two_workers_by_one')}, indent=1))
    late = [name for name, fit in summary['fits'].items() if fit['power'] > 1.1]
    late += [f'{name} by two workers' for name, each in summary['two_workers_by_one'].items() if each['ratio'] > 0.65]
    sys.exit(f'the claim does not hold for {"; ".join(late)}' if late else 0)


if __name__ == '__main__':
    main()
