"""From store to training: sessions a second, beside a bare loop over the same files, and how much memory it takes.

Claim: a warm cache feeds at least 20 times what training on two cores takes; features fetched from S3 arrive at 80 % or more of the rate of a bare
parallel GET loop over the same objects; 100,000 sessions take less than 1.2 times the memory of 1,000, and a catalog of a million measurements is
streamed in the memory of a thousand.

    python benchmarks/loading.py [--sizes 100 1000 10000] [--latency 0 20 100] [--repeats 3] [--out FILE]

Features of 64 simulated sessions of `demo-v1` (7 receivers, 1 s, 12.5 kHz) are computed once and written again under other names, until there are as
many as asked for: a shard is a shard, whatever it holds. The S3 server is a SeaweedFS on the same two cores, so it and the client share them; a proxy
adds the latency to each request. The bare loop reads the same objects with as many threads, by boto3, and drops them: no digest is checked and
nothing is written. Recordings are read, checked and turned into features (`recordings`), beside a bare loop over their files or objects. Nothing is
done about the page cache: files that were written a moment ago are read from memory.

Each case runs in a process of its own; rates are wall-clock sessions a second (median and range over the repeats), CPU time is that process's alone.
For memory, 100,000 sessions are hard links to 1,000: 17 GB by name, and as much metadata as real ones.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'tests'))

import numpy as np  # noqa: E402

SEED, BATCH, KEY = 0, 64, 'benchmark'


def main() -> None:
    """Run all cases and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--sizes', type=int, nargs='+', default=[100, 1000, 10_000])
    parser.add_argument('--latency', type=int, nargs='+', default=[0, 20, 100], help='milliseconds')
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--catalogs', type=int, nargs='+', default=[143, 1_429, 14_286, 142_858], help='sessions in catalogs')
    parser.add_argument('--out', type=Path)
    parser.add_argument('--case', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(one_case(json.loads(options.case))))
        return
    from processor import processor

    summary = {'date': time.strftime('%Y-%m-%d'), 'hardware': f'{processor()}, {os.cpu_count()} cores', 'seed': SEED, 'repeats': options.repeats}
    summary |= measure(options)
    text = json.dumps(summary, indent=1)
    if options.out:
        options.out.write_text(text + '\n')
    print(text)
    print(markdown(summary))


def measure(options: argparse.Namespace) -> dict:
    """All cases."""
    from servers import ACCESS_KEY, SECRET_KEY, s3_server

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        endpoint = stack.enter_context(s3_server())
        os.environ |= {f'HEIMDALL_S3_{name}': value for name, value in (('ACCESS_KEY', ACCESS_KEY), ('SECRET_KEY', SECRET_KEY), ('ENDPOINT', endpoint))}
        prepare(folder, max(options.sizes))
        cases = []
        for count in options.sizes:
            for latency in options.latency:
                with delayed(endpoint, latency) as through:
                    cases += [repeated({'name': name, 'sessions': count, 'folder': str(folder), 'latency_ms': latency, 'endpoint': through}, options.repeats)
                              for name in ('features from S3', 'bare GET of features')]
            cases.append(repeated({'name': 'warm cache', 'sessions': count, 'folder': str(folder)}, options.repeats))
        for place in ('S3', 'disk'):
            cases += [repeated({'name': f'{name} {place}', 'sessions': 100, 'folder': str(folder), 'endpoint': endpoint}, options.repeats)
                      for name in ('recordings from', 'bare loop over recordings on')]
        memory = {str(count): run({'name': 'memory', 'sessions': count, 'folder': str(folder)})['peak_mb'] for count in (1_000, 100_000)}
        catalog = {str(7 * count): run({'name': 'catalog', 'sessions': count, 'folder': str(folder)}) for count in options.catalogs}
        training = run({'name': 'training', 'sessions': 600, 'folder': str(folder)})
    return {'cases': cases, 'training': training, 'peak_memory_mb': memory, 'catalog': catalog, 'met': met(cases, training, memory, catalog)}


def met(cases: list[dict], training: dict, memory: dict, catalog: dict) -> dict:
    """The four claims, with the figure that decides each."""
    rates = {(case['name'], case['sessions'], case.get('latency_ms')): case['sessions_per_second'] for case in cases}
    warm = min(rate for (name, _, _), rate in rates.items() if name == 'warm cache')
    shares = {f'{count} at {latency} ms': round(rate / rates['bare GET of features', count, latency], 2)
              for (name, count, latency), rate in rates.items() if name == 'features from S3'}
    growth, peaks = memory['100000'] / memory['1000'], [case['peak_mb'] for case in catalog.values()]
    streamed = peaks[-1] / peaks[0]
    return {'warm cache / training': [round(warm / training['sessions_per_second'], 1), warm >= 20 * training['sessions_per_second']],
            'S3 / bare GET loop': [shares, min(shares.values()) >= 0.8], 'memory of 100,000 / 1,000': [round(growth, 2), growth < 1.2],
            'catalog of a million / a thousand': [round(streamed, 2), streamed < 1.2]}


def repeated(case: dict, repeats: int) -> dict:
    """Median and range of a case."""
    results = [run(case) for _ in range(repeats)]
    rates = [result['sessions_per_second'] for result in results]
    kept = {name: value for name, value in case.items() if name in ('name', 'sessions', 'latency_ms')}
    return {**kept, 'sessions_per_second': round(statistics.median(rates), 1), 'range': [round(min(rates), 1), round(max(rates), 1)],
            **{name: round(statistics.median(result[name] for result in results), 2) for name in ('cpu_ms', 'kb', 'peak_mb')}}


def run(case: dict) -> dict:
    """One case in a process of its own."""
    begun = time.monotonic()
    done = subprocess.run([sys.executable, __file__, '--case', json.dumps(case)], capture_output=True, text=True, check=False)
    print(f'{case["name"]}, {case["sessions"]} sessions: {time.monotonic() - begun:.0f} s', file=sys.stderr, flush=True)
    if done.returncode:
        raise SystemExit(f'{case}: {done.stderr[-2000:]}')
    return json.loads(done.stdout.splitlines()[-1])


def prepare(folder: Path, count: int) -> None:
    """Recordings of 100 sessions and shards of features for `count`, on the disk and in the bucket."""
    from safetensors.numpy import load_file, save

    from heimdall_train.config import make_config
    from heimdall_train.data import read_data, simulate
    from heimdall_train.object_store import S3Store
    from heimdall_train.store import ahead

    for name, store in (('disk', str(folder / 'store')), ('S3', 's3://heimdall-raw-iq/benchmark')):
        config = make_config(catalog=str(folder / f'{name}.db'), store=store, cache=folder / 'computed')
        simulate('demo-v1', config, 100)
    read_data(config)
    first = sorted((folder / 'computed').rglob('*.safetensors'))[0]
    arrays, store = load_file(first), S3Store('s3://heimdall-raw-iq/features')
    index = json.loads(json.loads(first.read_bytes()[8:8 + int.from_bytes(first.read_bytes()[:8], 'little')])['__metadata__']['index'])
    (folder / 'shards' / KEY).mkdir(parents=True)

    def shard(number: int) -> None:
        ids = [f'{number}-{place}' for place in range(len(index['ids']))]
        content = save(arrays, {'index': json.dumps({**index, 'ids': ids})})
        (folder / 'shards' / KEY / f'{number:06d}.safetensors').write_bytes(content)
        store.write(f'features/{KEY}/{number:06d}.safetensors', content)

    for _ in ahead(shard, range(-(-count // BATCH)), 4):
        pass
    (folder / 'many' / KEY).mkdir(parents=True)
    there = sorted((folder / 'shards' / KEY).iterdir())
    for number in range(-(-100_000 // BATCH)):
        os.link(there[number % min(len(there), 16)], folder / 'many' / KEY / f'{number:06d}.safetensors')


@contextmanager
def delayed(endpoint: str, latency_ms: int):
    """The endpoint, with a delay before each answer begins."""
    if not latency_ms:
        yield endpoint
        return
    address = ('127.0.0.1', int(endpoint.rpartition(':')[2]))
    listener = socket.create_server(('127.0.0.1', 0))

    def serve(client: socket.socket) -> None:
        with client, socket.create_connection(address) as server:
            back = threading.Thread(target=forward, args=(server, client, 0.0), daemon=True)
            back.start()
            forward(client, server, latency_ms / 1000)
            back.join()

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f'http://127.0.0.1:{listener.getsockname()[1]}'
    listener.close()


def forward(source: socket.socket, target: socket.socket, delay_s: float) -> None:
    """Pass on what comes; a request waits first."""
    try:
        while data := source.recv(2**18):
            time.sleep(delay_s)
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def one_case(case: dict) -> dict:
    """Time one case; its imports and connections are made before the clock starts."""
    if 'endpoint' in case:
        os.environ['HEIMDALL_S3_ENDPOINT'] = case['endpoint']
    if case['name'] == 'training':
        return training_rate(Path(case['folder']))
    action, kb = CASES[case['name']](case)
    cpu, begun = time.process_time(), time.perf_counter()
    done = action()
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    return {'sessions_per_second': done / seconds, 'cpu_ms': 1000 * cpu / done, 'kb': kb, 'peak_mb': peak_mb()}


def peak_mb() -> float:
    """Largest resident memory of this process, which getrusage would mix with that of the one that started it."""
    line = next(line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmHWM'))
    return int(line.split()[1]) / 1024


def _network():
    from heimdall_train.scene import load_scene, scene_world

    return scene_world(load_scene('demo-v1')).network


def features_from_s3(case: dict):
    """A cache that has nothing yet, filled from the bucket."""
    from heimdall_train.dataset import cached_features
    from heimdall_train.object_store import S3Store

    network, store, count = _network(), S3Store('s3://heimdall-raw-iq/features'), -(-case['sessions'] // BATCH) * BATCH
    store.exists('warm')
    cache = tempfile.TemporaryDirectory(dir=case['folder'])

    def action() -> int:
        with cache as place:
            return len(cached_features(place, KEY, network, lambda rows: 1 / 0, count, store=store))

    return action, 11_000 / BATCH


def bare_get_of_features(case: dict):
    """The same objects by boto3, with as many threads."""
    from heimdall_train.object_store import S3Settings, s3_client

    client, shards = s3_client(S3Settings()), -(-case['sessions'] // BATCH)
    names = [f'features/features/{KEY}/{number:06d}.safetensors' for number in range(shards)]
    client.list_objects_v2(Bucket='heimdall-raw-iq', MaxKeys=1)

    def action() -> int:
        with ThreadPoolExecutor(4) as pool:
            return sum(pool.map(lambda name: len(client.get_object(Bucket='heimdall-raw-iq', Key=name)['Body'].read()) > 0, names)) * BATCH

    return action, 11_000 / BATCH


def warm_cache(case: dict):
    """Batches as training asks for them, in random order."""
    from heimdall_train.dataset import cached_features
    from heimdall_train.training import DataLoader, Sessions

    network, count = _network(), -(-case['sessions'] // BATCH) * BATCH
    data = cached_features(Path(case['folder']) / case.get('cache', 'shards'), KEY, network, lambda rows: 1 / 0, count)
    sessions = Sessions(data, SimpleNamespace(frame=network.frame()))
    order = np.random.default_rng(SEED).permutation(len(data))[:2000].tolist()
    loader = DataLoader(sessions, bs=BATCH, num_workers=0)

    def action() -> int:
        return sum(len(loader.create_batch([sessions[row] for row in order[at:at + BATCH]])[0]) for at in range(0, len(order), BATCH))

    return action, data.maps[0].nbytes / 1000


def memory(case: dict):
    """The metadata of all sessions, and the maps of 2,000 of them."""
    return warm_cache({**case, 'cache': 'many'})


def catalog_stream(case: dict):
    """All sessions of an SQLite catalog with seven measurements each, looked at one by one; it was filled by another process."""
    from heimdall_train.catalog import Catalog

    path = Path(case['folder']) / f'{case["sessions"]}.db'
    if not path.exists():
        subprocess.run([sys.executable, __file__, '--case', json.dumps({**case, 'name': 'fill', 'path': str(path)})], check=True, capture_output=True)

    def action() -> int:
        return sum(len(session.recordings) == 7 for session in Catalog(str(path)).sessions())

    return action, path.stat().st_size / 1000 / case['sessions']


def fill(case: dict):
    """A catalog of so many sessions."""
    from datetime import UTC, datetime, timedelta

    from heimdall_train.catalog import Catalog
    from heimdall_train.store import Recording, Session, Source

    network, catalog, begun = _network(), Catalog(case['path']), datetime(2026, 1, 1, tzinfo=UTC)

    def session(number: int) -> Session:
        heard = tuple(Recording(name, -60.0, 20.0, 12_500.0, 0.0, 0.0, f's3://heimdall-raw-iq/sessions/{number}.npz#{name}') for name in network.names)
        return Session(f'session-{number:07d}', begun + timedelta(seconds=number), Source(f'source-{number}', 45.0, 7.6), heard)

    def action() -> int:
        for start in range(0, case['sessions'], 5000):
            catalog.add_sessions([session(number) for number in range(start, min(start + 5000, case['sessions']))], 'many', network=network)
        return case['sessions']

    return action, 0.0


def recordings(place: str):
    """Catalog, samples and features."""
    def prepared(case: dict):
        from heimdall_train.config import make_config
        from heimdall_train.data import read_data

        store = 's3://heimdall-raw-iq/benchmark' if place == 'S3' else str(Path(case['folder']) / 'store')
        cache = tempfile.TemporaryDirectory(dir=case['folder'])
        config = make_config(catalog=str(Path(case['folder']) / f'{place}.db'), store=store, cache=cache.name)

        def action() -> int:
            with cache:
                return len(read_data(config))

        return action, 700

    return prepared


def bare_recordings(place: str):
    """The same files or objects, read and dropped."""
    def prepared(case: dict):
        from heimdall_train.object_store import open_store

        store = open_store('s3://heimdall-raw-iq/benchmark' if place == 'S3' else Path(case['folder']) / 'store')
        keys = list(store.keys('sessions/'))

        def action() -> int:
            if place == 'disk':
                return sum(len((store.folder / key).read_bytes()) > 0 for key in keys)
            with ThreadPoolExecutor(store.threads) as pool:
                return sum(pool.map(lambda key: len(store.client.get_object(Bucket=store.bucket, Key=f'benchmark/{key}')['Body'].read()) > 0, keys))

        return action, 700

    return prepared


CASES = {'catalog': catalog_stream, 'fill': fill,
         'features from S3': features_from_s3, 'bare GET of features': bare_get_of_features, 'warm cache': warm_cache, 'memory': memory,
         'recordings from S3': recordings('S3'), 'recordings from disk': recordings('disk'),
         'bare loop over recordings on S3': bare_recordings('S3'), 'bare loop over recordings on disk': bare_recordings('disk')}


def training_rate(folder: Path) -> dict:
    """What a training on `demo-v1` takes, one epoch on all cores."""
    from heimdall_train.config import make_config
    from heimdall_train.pipeline import train

    out = train(make_config(scene='demo-v1', out=folder / 'run', cache=folder / 'features', epochs=1))
    return {'sessions_per_second': json.loads((out / 'metrics.json').read_text())['training']['seconds']['samples_per_second']}


def markdown(summary: dict) -> str:
    """The summary as a table."""
    header = '| | sessions | latency, ms | sessions/s | range | CPU ms a session | kB a session | peak MB |'
    lines = [summary['hardware'], '', header, '|---|---|---|---|---|---|---|---|']
    for case in summary['cases']:
        low, high = case['range']
        cells = (case['name'], case['sessions'], case.get('latency_ms', ''), case['sessions_per_second'], f'{low}–{high}', case['cpu_ms'],
                 round(case['kb']), round(case['peak_mb']))
        lines.append('| ' + ' | '.join(str(cell) for cell in cells) + ' |')
    training, peaks = summary['training']['sessions_per_second'], summary['peak_memory_mb']
    streamed = {count: f'{round(case["sessions_per_second"])} sessions/s, {round(case["peak_mb"])} MB' for count, case in summary['catalog'].items()}
    lines += ['', f'training: {training:.0f} sessions/s; peak memory, MB: {peaks}', f'catalog, by measurements: {streamed}']
    return '\n'.join([*lines, f'claims: {summary["met"]}'])


if __name__ == '__main__':
    main()
