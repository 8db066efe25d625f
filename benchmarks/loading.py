"""From store to training: sessions a second, beside a bare loop over the same files, and how much memory it takes.

Claim: a warm cache feeds at least 20 times what training on two cores takes; features fetched from S3 arrive at 80 % or more of the rate of a bare
parallel GET loop over the same objects; 100,000 sessions take less than 1.2 times the memory of 1,000, and a catalog of a million measurements is
streamed in the memory of a thousand.

    python benchmarks/loading.py --out FILE [--sizes 100 1000 10000 100000] [--latency 0 20 100] [--repeats 3]

About an hour on two idle cores and 6 GB of disk with these defaults. Each piece is written to FILE when it is done; a second start goes on with those
that are missing (and begins anew where the code that it measures has changed).

Features of 64 simulated sessions of `demo-v1` (7 receivers, 1 s, 12.5 kHz) are computed once and written again under other names, until there are as
many as asked for: a shard is a shard, whatever it holds. More than 10,000 sessions are rounds over 10,000, whose cache is thrown away in between (and
which are measured once). The S3 server is a SeaweedFS on the same two cores, so it and the client share them; with `cores` 1 the client is held to one
of them. A proxy, on the same cores too, adds the latency to each request. The bare loop reads the same objects with as many threads, by boto3, and
drops them: no digest is checked and nothing is written. A second one writes them to files. Recordings are read, checked and turned into features
(`recordings`), beside a bare loop over their files or objects. "Cold" files have been put out of the page cache (posix_fadvise); warm ones and those
of recordings have not.

Each case runs in a process of its own; rates are wall-clock sessions a second (median and range over the repeats), CPU time is that process's alone.
For memory and a warm cache, 100,000 sessions are hard links to 1,000: 17 GB by name, and as much metadata as real ones.
"""

import argparse
import hashlib
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

from heimdall_train.store import write_file  # noqa: E402

SEED, BATCH, KEY, ROUND = 0, 64, 'benchmark', 10_000
FROM_S3, BARE, BARE_FILES = 'features from S3', 'bare GET of features', 'bare GET of features into files'
COLD, BARE_COLD = 'cache from cold disk', 'bare loop over cold files'


def main() -> None:
    """Run all cases that FILE does not have yet and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--sizes', type=int, nargs='+', default=[100, 1000, 10_000, 100_000])
    parser.add_argument('--latency', type=int, nargs='+', default=[0, 20, 100], help='milliseconds')
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--catalogs', type=int, nargs='+', default=[143, 1_429, 14_286, 142_858], help='sessions in catalogs')
    parser.add_argument('--memory', type=int, nargs='+', default=[1_000, 100_000], help='sessions for peak memory')
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--case', help=argparse.SUPPRESS)
    if '--case' in sys.argv:
        print(json.dumps(one_case(json.loads(sys.argv[-1]))))
        return
    options = parser.parse_args()
    summary = begun(options)
    missing = [case for case in pieces(options) if identity(case) not in {identity(done) for done in summary['cases']}]
    print(f'{len(missing)} pieces to do', file=sys.stderr, flush=True)
    if missing:
        measure(missing, options, summary)
    print(markdown(summary))


def begun(options: argparse.Namespace) -> dict:
    """What an earlier start has measured with this code; nothing where there is none."""
    from processor import processor

    package = Path(__file__).resolve().parent.parent / 'heimdall_train'
    code = hashlib.sha256(b''.join((package / f'{name}.py').read_bytes() for name in ('store', 'object_store', 'dataset', 'catalog'))).hexdigest()[:12]
    fresh = {'date': time.strftime('%Y-%m-%d'), 'hardware': f'{processor()}, {os.cpu_count()} cores', 'code': code, 'seed': SEED, 'repeats': options.repeats}
    if options.out.exists():
        found = json.loads(options.out.read_text())
        if {**found, 'date': fresh['date']} == {**found, **fresh}:
            return found
        print(f'{options.out} is of other code, hardware or repeats: beginning anew', file=sys.stderr)
    return {**fresh, 'cases': []}


def pieces(options: argparse.Namespace) -> list[dict]:
    """All cases, the small ones first."""
    cases: list[dict] = []
    for count in sorted(options.sizes):
        for latency, cores in [(latency, 2) for latency in options.latency] + [(0, 1)]:
            cases += [{'name': name, 'sessions': count, 'latency_ms': latency, 'cores': cores} for name in (FROM_S3, BARE, BARE_FILES)]
        cases += [{'name': name, 'sessions': count} for name in ('warm cache', COLD, BARE_COLD)]
    for place in ('S3', 'disk'):
        cases += [{'name': f'{name} {place}', 'sessions': 100} for name in ('recordings from', 'bare loop over recordings on')]
    cases += [{'name': 'memory', 'sessions': count} for count in options.memory]
    cases += [{'name': 'catalog', 'sessions': count} for count in options.catalogs]
    return [*cases, {'name': 'training', 'sessions': 600}]


def identity(case: dict) -> tuple:
    """What tells a case from all others."""
    return case['name'], case['sessions'], case.get('latency_ms'), case.get('cores')


def measure(missing: list[dict], options: argparse.Namespace, summary: dict) -> None:
    """The cases that are missing; each is written when it is done."""
    from servers import ACCESS_KEY, SECRET_KEY, s3_server

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        endpoint = stack.enter_context(s3_server())
        os.environ |= {f'HEIMDALL_S3_{name}': value for name, value in (('ACCESS_KEY', ACCESS_KEY), ('SECRET_KEY', SECRET_KEY), ('ENDPOINT', endpoint))}
        prepare(folder, min(max(case['sessions'] for case in missing), ROUND))
        for case in missing:
            single = case['name'] in ('memory', 'catalog', 'training') or case['sessions'] > ROUND
            with delayed(endpoint, case.get('latency_ms', 0)) as through:
                found = repeated({**case, 'folder': str(folder), 'endpoint': through}, 1 if single else options.repeats)
            summary['cases'].append(case | found)
            summary['met'] = met(summary['cases'])
            write_file(options.out, json.dumps(summary, indent=1).encode() + b'\n')


def met(cases: list[dict]) -> dict:
    """The four claims, with the figure that decides each, as far as they have been measured."""
    rates, peaks = {identity(case): case['sessions_per_second'] for case in cases}, {identity(case)[:2]: case.get('peak_mb') for case in cases}
    claims = {}
    warm = [rate for (name, *_), rate in rates.items() if name == 'warm cache']
    training = next((rate for (name, *_), rate in rates.items() if name == 'training'), None)
    if warm and training:
        claims['warm cache / training'] = [round(min(warm) / training, 1), min(warm) >= 20 * training]
    for other in (BARE, BARE_FILES):
        shares = {f'{count} at {latency} ms, {cores} cores': round(rate / rates[other, count, latency, cores], 2)
                  for (name, count, latency, cores), rate in rates.items() if name == FROM_S3 and (other, count, latency, cores) in rates}
        if shares:
            claims[f'S3 / {other}'] = [shares, min(shares.values()) >= 0.8]
    for name, claim in (('memory', 'memory of 100,000 / 1,000'), ('catalog', 'catalog of a million / a thousand')):
        sizes = sorted(count for measured, count in peaks if measured == name)
        if len(sizes) > 1:
            growth = peaks[name, sizes[-1]] / peaks[name, sizes[0]]
            claims[claim] = [round(growth, 2), growth < 1.2]
    return claims


def repeated(case: dict, repeats: int) -> dict:
    """Median and range of a case."""
    results = [run(case) for _ in range(repeats)]
    rates = [result['sessions_per_second'] for result in results]
    return {'sessions_per_second': round(statistics.median(rates), 1), 'range': [round(min(rates), 1), round(max(rates), 1)],
            **{name: round(statistics.median(result[name] for result in results), 2) for name in ('cpu_ms', 'kb', 'peak_mb') if name in results[0]}}


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
    if case.get('cores') == 1:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
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


def rounds(sessions: int) -> list[int]:
    """Shards of each round."""
    shards, most = -(-sessions // BATCH), ROUND // BATCH
    return [min(most, shards - at) for at in range(0, shards, most)]


def features_from_s3(case: dict):
    """A cache that has nothing yet, filled from the bucket."""
    import safetensors.numpy  # noqa: F401

    from heimdall_train.dataset import cached_features
    from heimdall_train.object_store import S3Store

    network, store = _network(), S3Store('s3://heimdall-raw-iq/features')
    store.exists('warm')

    def action() -> int:
        done = 0
        for shards in rounds(case['sessions']):
            with tempfile.TemporaryDirectory(dir=case['folder']) as place:
                done += len(cached_features(place, KEY, network, lambda rows: 1 / 0, shards * BATCH, store=store))
        return done

    return action, 11_000 / BATCH


def bare_get_of_features(into_files: bool):
    """The same objects by boto3, with as many threads."""
    def prepared(case: dict):
        from heimdall_train.object_store import S3Settings, s3_client

        client = s3_client(S3Settings())
        client.list_objects_v2(Bucket='heimdall-raw-iq', MaxKeys=1)

        def get(place: str, number: int) -> int:
            content = client.get_object(Bucket='heimdall-raw-iq', Key=f'features/features/{KEY}/{number:06d}.safetensors')['Body'].read()
            return Path(place, str(number)).write_bytes(content) if into_files else len(content)

        def action() -> int:
            done = 0
            for shards in rounds(case['sessions']):
                with tempfile.TemporaryDirectory(dir=case['folder']) as place, ThreadPoolExecutor(4) as pool:
                    done += sum(pool.map(lambda number, place=place: get(place, number) > 0, range(shards))) * BATCH
            return done

        return action, 11_000 / BATCH

    return prepared


def cold_cache(bare: bool):
    """All maps of a cache whose files are on the disk and nowhere else, batch by batch; or the files alone."""
    def prepared(case: dict):
        from heimdall_train.dataset import cached_features

        network = _network()
        files = sorted((Path(case['folder']) / 'shards' / KEY).iterdir())

        def forget(wanted: list[Path]) -> None:
            for path in wanted:
                with open(path, 'rb') as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        forget(files)

        def action() -> int:
            done = 0
            for shards in rounds(case['sessions']):
                if bare:
                    done += sum(len(path.read_bytes()) > 0 for path in files[:shards]) * BATCH
                else:
                    data = cached_features(Path(case['folder']) / 'shards', KEY, network, lambda rows: 1 / 0, shards * BATCH)
                    done += sum(len(data.maps[at:at + BATCH]) for at in range(0, len(data), BATCH))
                forget(files[:shards])
            return done

        return action, 11_000 / BATCH

    return prepared


def warm_cache(case: dict):
    """Batches as training asks for them, in random order."""
    from heimdall_train.dataset import cached_features
    from heimdall_train.training import DataLoader, Sessions

    network, count = _network(), -(-case['sessions'] // BATCH) * BATCH
    cache = case.get('cache', 'shards' if case['sessions'] <= ROUND else 'many')
    data = cached_features(Path(case['folder']) / cache, KEY, network, lambda rows: 1 / 0, count)
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
         FROM_S3: features_from_s3, BARE: bare_get_of_features(False), BARE_FILES: bare_get_of_features(True), 'warm cache': warm_cache, 'memory': memory,
         COLD: cold_cache(False), BARE_COLD: cold_cache(True),
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
    header = '| | sessions | latency, ms | cores | sessions/s | range | CPU ms a session | kB a session | peak MB |'
    lines = [summary['hardware'], '', header, '|---|---|---|---|---|---|---|---|---|']
    for case in summary['cases']:
        low, high = case['range']
        cells = (case['name'], case['sessions'], case.get('latency_ms', ''), case.get('cores', ''), case['sessions_per_second'], f'{low}–{high}',
                 case.get('cpu_ms', ''), round(case['kb']) if 'kb' in case else '', round(case['peak_mb']) if 'peak_mb' in case else '')
        lines.append('| ' + ' | '.join(str(cell) for cell in cells) + ' |')
    return '\n'.join([*lines, '', f'claims: {summary["met"]}'])


if __name__ == '__main__':
    main()
