"""Time, memory and bytes of simulating, of features and of training, against the number of sessions and of workers.

Claim: the time of each grows as N to a power of at most 1.1 from 10³ to 10⁵ sessions, and two workers on two cores take at most 0.65 of the
time of one. Memory: simulation and features take the same at any N; training does not (what grows with N is said in the results).

    python benchmarks/scaling.py [--sessions 1000 10000 100000] [--workers 1 2] [--epochs 1] [--scene demo-v1] [--place DIR] [--out FILE]

Recordings of seven receivers, 1 s at 12.5 kHz, in a folder (about 0.7 MB a session: 70 GB for 10⁵). Each stage runs in processes of its own; what
is measured is their wall time from start to end, imports included, and the highest resident memory of any one of them. Two workers simulate half
of the sessions each, compute every second shard each, and train together by torchrun at the same global batch. One run each: hours for 10⁵.
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
for number in missing[int(sys.argv[4])::int(sys.argv[5])]:
    share_shard(config, key, number)
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


def size(folder: Path) -> tuple[int, int]:
    """Files and bytes below a folder."""
    sizes = [path.stat().st_size for path in folder.rglob('*') if path.is_file()]
    return len(sizes), sum(sizes)


def scene_file(place: Path, name: str, sessions: int) -> Path:
    """A sibling of a scene with so many sessions."""
    values = yaml.safe_load((Path(heimdall_train.__file__).parent / 'scenes' / f'{name}.yaml').read_text())
    tenth = max(sessions // 10, 1)
    (path := place / 'scene.yaml').write_text(yaml.safe_dump({**values, 'name': 'scaling', 'sources': {
        'train': sessions - 2 * tenth, 'validation': tenth, 'test': tenth}}))
    return path


def measure(place: Path, scene: str, sessions: int, workers: int, epochs: int) -> dict:
    """All stages at one size."""
    place.mkdir(parents=True)
    log, stages = place / 'log', {}
    halves = [COMMAND + ['simulate', str(scene_file(place, scene, sessions // workers)), '--catalog', f'{place}/half-{number}.db',
                         '--store', f'{place}/half-{number}', '--seed', str(number)] for number in range(workers)]
    stages['simulation'] = run(halves, log)
    catalog, store = f'{place}/half-0.db', f'{place}/half-0'
    if workers > 1:  # the other stages read one dataset; it is made without being measured
        for number in range(workers):
            shutil.rmtree(place / f'half-{number}')
        catalog, store = f'{place}/whole.db', f'{place}/whole'
        run([COMMAND + ['simulate', str(scene_file(place, scene, sessions)), '--catalog', catalog, '--store', store]], log)
    files, bytes_ = size(Path(store))
    stages['simulation'] |= {'files': files, 'bytes': bytes_, 'catalog_bytes': Path(catalog).stat().st_size}
    stages['features'] = run([[sys.executable, '-c', SHARDS, catalog, store, f'{place}/cache-{number}', str(number), str(workers)]
                              for number in range(workers)], log)
    feature_files, feature_bytes = size(Path(store) / 'features')
    stages['features'] |= {'files': feature_files, 'bytes': feature_bytes}
    train = COMMAND + ['train', '--catalog', catalog, '--store', store, '--out', f'{place}/run', '--epochs', str(epochs), '--cache', f'{place}/cache']
    together = [str(Path(sys.executable).parent / 'torchrun'), '--no-python', f'--nproc-per-node={workers}', f'--master-port={free_ports(1)[0]}']
    stages['training'] = run([train if workers == 1 else together + train], log)
    record = json.loads((place / 'run' / 'metrics.json').read_text())['training']
    stages['training'] |= {'maps_seconds': round(record['seconds']['maps'], 1), 'epochs_seconds': round(record['seconds']['training'], 1), 'epochs': epochs}
    shutil.rmtree(place)
    return {'sessions': sessions, 'workers': workers, 'stages': stages}


def fits(rows: list[dict]) -> dict:
    """For each stage and number of workers: power of N in time, seconds a thousand sessions at the largest N, MB against N."""
    found = {}
    for workers in sorted({row['workers'] for row in rows}):
        some = sorted((row for row in rows if row['workers'] == workers), key=lambda row: row['sessions'])
        counts = np.array([row['sessions'] for row in some], dtype=float)
        for stage in STAGES:
            seconds = np.array([row['stages'][stage]['seconds'] for row in some])
            memory = np.array([row['stages'][stage]['memory_mb'] for row in some])
            if len(some) < 2:
                continue
            slope, start = np.polyfit(counts, seconds, 1, w=1 / seconds)  # relative errors count alike
            found[f'{stage}, {workers}'] = {
                'power': round(float(np.polyfit(np.log(counts), np.log(np.maximum(seconds - max(start, 0.0), 1e-3)), 1)[0]), 2),
                'seconds_at_start': round(float(start), 1), 'seconds_per_1000': round(float(1e3 * slope), 2),
                'mb_at_start': round(float(np.polyfit(counts, memory, 1)[1]), 0), 'mb_per_1000': round(float(1e3 * np.polyfit(counts, memory, 1)[0]), 2)}
    return found


def main() -> None:
    """Measure, fit, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--sessions', type=int, nargs='+', default=[1000, 10_000, 100_000])
    parser.add_argument('--workers', type=int, nargs='+', default=[1, 2])
    parser.add_argument('--epochs', type=int, default=1)
    parser.add_argument('--scene', default='demo-v1')
    parser.add_argument('--place', type=Path, help='folder on the disk that is measured')
    parser.add_argument('--out', type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=options.place) as folder:
        for sessions in options.sessions:
            for workers in options.workers:
                rows.append(measure(Path(folder) / f'{sessions}-{workers}', options.scene, sessions, workers, options.epochs))
                print(json.dumps(rows[-1]), flush=True)
                summary = {
                    'benchmark': 'scaling', 'scene': options.scene, 'rows': rows, 'fits': fits(rows), 'date': datetime.now(UTC).date().isoformat(),
                    'hardware': f'{platform.machine()}, {os.cpu_count()} cores, no GPU',
                    'versions': {name: version(name) for name in ('heimdall-train', 'torch', 'numpy')}}
                if options.out:  # after each size: the largest take hours
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    options.out.write_text(json.dumps(summary, indent=1) + '\n')
    print(json.dumps(summary['fits'], indent=1))


if __name__ == '__main__':
    main()
