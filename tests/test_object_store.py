"""The same store on a disk and in a bucket; and a bucket behind a network that fails in every way we know of."""
import hashlib
import logging
import os
import secrets
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import botocore.auth
import numpy as np
import pytest
from servers import ACCESS_KEY, SECRET_KEY

from heimdall_train import data, dataset
from heimdall_train.catalog import Catalog
from heimdall_train.config import Config, make_config
from heimdall_train.data import read_data, share_features, simulate
from heimdall_train.dataset import TimedData, with_samples
from heimdall_train.ingest import read_split_file
from heimdall_train.network import HeimdallError
from heimdall_train.object_store import PART, S3Settings, S3Store, open_store, read_uri
from heimdall_train.recordings import simulate_sessions
from heimdall_train.scene import load_scene
from heimdall_train.store import Store, StoreUnreachable, split_uri

TONE = np.exp(2j * np.pi * 0.08 * np.arange(12_500)).astype(np.complex64)


def settings(endpoint: str, **other) -> S3Settings:
    return S3Settings(endpoint=endpoint, region='eu-south-1', access_key=ACCESS_KEY, secret_key=SECRET_KEY, **other)


def bucket(endpoint: str, **other) -> S3Store:
    "A store with a prefix of its own."
    store = S3Store(f's3://heimdall-raw-iq/piedmont/{secrets.token_hex(6)}', settings(endpoint, **other))
    with suppress(store.client.exceptions.BucketAlreadyOwnedByYou, store.client.exceptions.BucketAlreadyExists):
        store.client.create_bucket(Bucket=store.bucket)
    return store


def fails(call: Callable, *words: str) -> str:
    with pytest.raises(HeimdallError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), caught.value
    assert '\n' not in str(caught.value) and SECRET_KEY not in str(caught.value)
    return str(caught.value)


@pytest.fixture(params=['disk', pytest.param('bucket', marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(tmp_path / 'store') if request.param == 'disk' else bucket(request.getfixturevalue('s3'))


def test_bytes_by_key(store: Store):
    assert list(store.keys()) == [] and not store.exists('tables/a.csv')
    uri = store.write('tables/a.csv', b'1,2')
    for key, content in (('tables/b.csv', b'3,4'), ('models/m.onnx', b''), ("it's; a name/é ü.npy", b'5')):
        assert store.key(store.write(key, content)) == key
        assert store.read(key) == content
    assert uri == store.uri('tables/a.csv') and store.read(store.key(uri)) == b'1,2'
    assert list(store.keys()) == sorted(["it's; a name/é ü.npy", 'models/m.onnx', 'tables/a.csv', 'tables/b.csv'])
    assert list(store.keys('tables/')) == ['tables/a.csv', 'tables/b.csv']
    store.write('tables/a.csv', b'5,6,7')
    assert store.read('tables/a.csv') == b'5,6,7'
    store.delete('tables/a.csv')
    store.delete('tables/a.csv')
    assert not store.exists('tables/a.csv')
    fails(lambda: store.read('tables/a.csv'), 'cannot read tables/a.csv')
    fails(lambda: store.key('file:///elsewhere/a.csv'), 'is not in the store')


def test_what_is_created_is_never_overwritten(store: Store):
    assert store.create('v1/CLAIM', b'mine') and not store.create('v1/CLAIM', b'yours')
    assert store.read('v1/CLAIM') == b'mine'
    with ThreadPoolExecutor(8) as several:
        made = list(several.map(lambda number: store.create('v2/CLAIM', bytes([number]) * 1000), range(8)))
    assert made.count(True) == 1 and store.read('v2/CLAIM') == bytes([made.index(True)]) * 1000
    assert list(store.keys()) == ['v1/CLAIM', 'v2/CLAIM']


@pytest.mark.parametrize('key', ['', '/etc/passwd', '../up', 'a/../../b', 'a//b', 'a/.hidden', 'tail/', 'a\\b', 'a\0b'])
def test_a_key_that_leaves_the_store_is_refused(store: Store, key: str):
    for call in (store.read, store.exists, store.delete, store.uri, lambda key: store.write(key, b''), lambda key: store.create(key, b'')):
        fails(lambda call=call: call(key), 'is not a key')


def test_recordings_come_back_and_a_change_shows(store: Store):
    uris = [store.write_session(f'night-{number}', {'Passo dei Giovi': number * TONE})['Passo dei Giovi'] for number in range(5)]
    np.testing.assert_array_equal(store.read_recording(uris[3]), 3 * TONE)
    before = store.fingerprints([*uris, store.uri('sessions/none/none.npy')])
    assert len(set(before.values())) == 6 and before[store.uri('sessions/none/none.npy')] == ''
    store.write_session('night-2', {'Passo dei Giovi': -TONE})
    after = store.fingerprints(uris)
    assert [uri for uri in uris if after[uri] != before[uri]] == [uris[2]]


def test_sessions_are_read_in_order_and_what_is_missing_is_reported(store: Store):
    simulated = list(simulate_sessions(load_scene('demo-v1'), 'test', numbers=range(20)))
    kept = []
    for session in simulated:
        uris = store.write_session(session.id, {each.receiver: each.iq for each in session.recordings})
        kept.append(replace(session, recordings=tuple(replace(each, iq=None, iq_uri=uris[each.receiver]) for each in session.recordings)))
    lines: list[str] = []
    for read, session in zip(with_samples(kept, store, lines.append), simulated, strict=True):
        assert read.id == session.id
        for one, other in zip(read.recordings, session.recordings, strict=True):
            np.testing.assert_array_equal(one.iq, other.iq)
    assert not lines
    store.delete(store.key(kept[7].recordings[0].iq_uri))
    assert len(list(with_samples(kept, store, lines.append))) == 20
    assert len(lines) == len(kept[7].recordings) and all(kept[7].id in line for line in lines)


@pytest.mark.s3
def test_a_large_object_travels_in_parts(s3: str):
    store, content = bucket(s3), np.random.default_rng(0).bytes(2 * PART + 12_345)
    store.write('large', content)
    assert store.read('large') == content


@pytest.mark.s3
def test_settings_come_from_the_environment(s3: str, monkeypatch: pytest.MonkeyPatch):
    store = bucket(s3)
    store.write('test.txt', b'test-1\n')
    for name, value in (('ENDPOINT_URL_S3', s3), ('ACCESS_KEY_ID', ACCESS_KEY), ('SECRET_ACCESS_KEY', SECRET_KEY)):
        monkeypatch.setenv(f'AWS_{name}', value)
    assert open_store(store.root).read('test.txt') == b'test-1\n' == read_uri(store.uri('test.txt'), 'split file')
    monkeypatch.setenv('HEIMDALL_S3_ACCESS_KEY', 'nobody')
    monkeypatch.setenv('HEIMDALL_S3_SECRET_KEY', SECRET_KEY)
    fails(lambda: open_store(store.root).read('test.txt'), 'does not know this access key')


def test_the_region_is_found_as_boto3_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "Ours, the environment's, the profile's, and us-east-1."
    for name in ('HEIMDALL_S3_REGION', 'AWS_REGION', 'AWS_DEFAULT_REGION', 'AWS_PROFILE'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('AWS_CONFIG_FILE', str(tmp_path / 'config'))
    keys = {'access_key': ACCESS_KEY, 'secret_key': SECRET_KEY}

    def region() -> str:
        return S3Store('s3://heimdall-raw-iq', S3Settings(**keys)).client.meta.region_name

    assert region() == 'us-east-1'
    (tmp_path / 'config').write_text('[default]\nregion = eu-south-1\n')
    assert region() == 'eu-south-1'
    for name, value in (('AWS_DEFAULT_REGION', 'eu-west-1'), ('AWS_REGION', 'eu-west-2'), ('HEIMDALL_S3_REGION', 'eu-west-3')):
        monkeypatch.setenv(name, value)
        assert region() == value


@pytest.mark.parametrize(('variables', 'words'), [
    ({'HEIMDALL_S3_ACCESS_KEY': ACCESS_KEY}, 'an access key without its secret key'),
    ({'HEIMDALL_S3_SECRET_KEY': SECRET_KEY}, 'an access key without its secret key'),
    ({'HEIMDALL_S3_ENDPOINT': 'localhost:9000'}, 'check the endpoint'),
    ({'HEIMDALL_S3_ENDPOINT': f'http://someone:{SECRET_KEY}@'}, 'check the endpoint'),
    ({'HEIMDALL_S3_REGION': 'eu south'}, 'check the endpoint (http://… or https://…), the region'),
    ({'AWS_PROFILE': 'nope'}, 'there is no such profile'),
    ({'HEIMDALL_S3_DEADLINE_S': 'abc'}, 'HEIMDALL_S3_DEADLINE_S in the environment: '),
    ({'HEIMDALL_S3_TIMEOUT_S': '0'}, 'HEIMDALL_S3_TIMEOUT_S in the environment: '),
])
def test_settings_that_cannot_be_right_are_one_line(variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch):
    import boto3

    for name in ('HEIMDALL_S3_ACCESS_KEY', 'HEIMDALL_S3_SECRET_KEY', 'AWS_REGION', 'AWS_DEFAULT_REGION'):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(boto3, 'DEFAULT_SESSION', None)  # which remembers the environment of the first client
    fails(lambda: open_store('s3://heimdall-raw-iq'), 'cannot ask an S3 server: ', words)


@pytest.mark.s3
def test_what_cannot_pass_is_said_at_once(s3: str, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    store = bucket(s3)
    store.write('a', b'1')
    wrong = store.settings.model_copy(update={'secret_key': store.settings.access_key})
    said = [fails(lambda: S3Store('s3://nowhere-at-all', store.settings).read('a'), 'there is no such'),
            fails(lambda: S3Store(store.root, wrong).read('a'), 'the secret key is not the one')]
    assert not any('tried for' in line for line in said)
    assert SECRET_KEY not in caplog.text and SECRET_KEY not in repr((store, store.settings, vars(store)))


@pytest.mark.s3
def test_the_same_commands_with_another_uri(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in (('ENDPOINT', s3), ('ACCESS_KEY', ACCESS_KEY), ('SECRET_KEY', SECRET_KEY)):
        monkeypatch.setenv(f'HEIMDALL_S3_{name}', value)
    read = []
    for place in (str(tmp_path / 'store'), bucket(s3).root):
        config = make_config(catalog=str(tmp_path / f'{len(read)}.db'), store=place, cache=tmp_path / 'features')
        assert simulate('demo-v1', config, 12)['test'] == 3
        read.append(read_data(config))
        tests = read_split_file(f'{place}/scenes/demo-v1/test.txt', read[-1].ids.tolist())
        assert tests == [name for name in read[-1].ids if name.startswith('test')]
    disk, s3_data = read
    assert isinstance(disk, TimedData) and isinstance(s3_data, TimedData)
    np.testing.assert_array_equal(disk.delay, s3_data.delay)
    np.testing.assert_array_equal(disk.maps[disk.row], s3_data.maps[s3_data.row])


# --- a network that fails ---


class Faults:
    "What the proxy does to the next answers, and how often it has done it."

    def __init__(self):
        self.waiting: list[str] = []
        self.done: Counter[str] = Counter()
        self.lock = threading.Lock()

    def next(self) -> str:
        with self.lock:
            fault = self.waiting.pop(0) if self.waiting else ''
            self.done[fault] += 1
            return fault


@contextmanager
def failing_network(endpoint: str) -> Iterator[tuple[str, Faults]]:
    "A proxy before a server, that damages answers as it is told."
    faults, address = Faults(), endpoint.removeprefix('http://')

    class Handler(BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'

        def log_message(self, *arguments):
            pass

        def forward(self):
            body, fault = self.rfile.read(int(self.headers.get('Content-Length') or 0)), faults.next()
            if fault.isdigit():
                self.send_response(int(fault))
                self.send_header('Content-Length', '0')
                self.end_headers()
                return
            upstream = HTTPConnection(address, timeout=30)
            upstream.request(self.command, self.path, body, dict(self.headers))
            answer = upstream.getresponse()
            content = answer.read()
            upstream.close()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ('content-length', 'transfer-encoding', 'connection'):
                    self.send_header(name, value)
            if fault == 'short':  # and nothing but the digest tells
                content = content[:len(content) // 2]
            length = None if fault == 'short' else answer.getheader('Content-Length')
            self.send_header('Content-Length', length or str(len(content)))
            self.end_headers()
            if fault == 'garble':
                content = content[:-3] + b'   '  # of an XML document: its last tag is not closed
            if fault == 'flip':
                content = content[:50] + bytes([content[50] ^ 1]) + content[51:]
            if fault in ('cut', 'stall'):
                self.wfile.write(content[:len(content) // 2])
                self.wfile.flush()
                time.sleep(3 if fault == 'stall' else 0)
                self.close_connection = True
            elif fault == 'trickle':
                for start in range(0, len(content), 1000):
                    self.wfile.write(content[start:start + 1000])
                    time.sleep(0.1)
            else:
                self.wfile.write(content)

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = forward

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f'http://127.0.0.1:{server.server_address[1]}', faults
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope='module')
def network(s3: str) -> Iterator[tuple[str, Faults]]:
    with failing_network(s3) as found:
        yield found


@pytest.mark.s3
@pytest.mark.fault
@pytest.mark.parametrize('fault', ['500', '503', '429', 'cut', 'short', 'stall', 'flip'])
def test_what_may_pass_is_tried_again(network: tuple[str, Faults], fault: str, tmp_path: Path):
    endpoint, faults = network
    store = bucket(endpoint, timeout_s=1)
    uri = store.write_session('night', {'Torino': TONE})['Torino']
    faults.waiting[:], faults.done = [fault] * 2, Counter()
    np.testing.assert_array_equal(store.read_recording(uri), TONE)
    assert faults.done == {fault: 2, '': 1}
    faults.waiting[:] = [fault]
    store.fetch(store.key(split_uri(uri)[0]), tmp_path / 'copy')
    assert (tmp_path / 'copy').read_bytes() == store.read(store.key(split_uri(uri)[0])) and os.listdir(tmp_path) == ['copy']


@pytest.mark.s3
@pytest.mark.fault
def test_a_storm_loses_nothing(network: tuple[str, Faults]):
    endpoint, faults = network
    store = bucket(endpoint, timeout_s=1)
    faults.waiting[:] = list(np.random.default_rng(0).choice(['500', '503', 'cut', ''], 24))
    contents = {f'sessions/{number}/Torino.npy': hashlib.sha256(bytes([number])).digest() * 50 for number in range(12)}
    for key, content in contents.items():
        store.write(key, content)
    faults.waiting[:] = list(np.random.default_rng(1).choice(['500', '503', 'cut', 'flip', '', ''], 20))
    assert {key: store.read(key) for key in contents} == contents
    assert sorted(store.keys()) == sorted(contents)


@pytest.mark.s3
@pytest.mark.fault
def test_a_listing_that_arrives_damaged_is_asked_for_again(network: tuple[str, Faults]):
    endpoint, faults = network
    store = bucket(endpoint)
    store.write('a', b'1')
    faults.waiting[:], faults.done = ['garble'] * 2, Counter()
    assert list(store.keys()) == ['a'] and faults.done == {'garble': 2, '': 1}
    faults.waiting[:] = ['garble'] * 100
    fails(lambda: list(S3Store(store.root, settings(endpoint, deadline_s=1)).keys()), 'the server answers 500')  # which is what botocore makes of it
    faults.waiting[:] = []


@pytest.mark.s3
@pytest.mark.fault
def test_a_clock_that_is_wrong_is_named(s3: str, monkeypatch: pytest.MonkeyPatch):
    store = bucket(s3)
    store.write('a', b'1')
    now = botocore.auth.get_current_datetime
    monkeypatch.setattr(botocore.auth, 'get_current_datetime', lambda: now() - timedelta(hours=1))
    said = fails(lambda: store.read('a'), 'the clocks of this machine and the server differ by too much')
    assert 'tried for' not in said


@pytest.mark.s3
@pytest.mark.fault
def test_a_store_that_does_not_answer_is_no_reason_to_leave_recordings_out(network: tuple[str, Faults]):
    endpoint, faults = network
    store = bucket(endpoint, deadline_s=1)
    session, = simulate_sessions(load_scene('demo-v1'), 'test', numbers=[0])
    uris = store.write_session(session.id, {each.receiver: each.iq for each in session.recordings})
    kept = replace(session, recordings=tuple(replace(each, iq=None, iq_uri=uris[each.receiver]) for each in session.recordings))
    lines: list[str] = []
    faults.waiting[:] = ['503'] * 100
    with pytest.raises(StoreUnreachable, match='the server answers'):
        list(with_samples([kept], store, lines.append))
    faults.waiting[:] = []
    assert not lines
    read, = with_samples([kept], store, lines.append)
    assert len(read.recordings) == len(session.recordings) and not lines


@pytest.mark.s3
@pytest.mark.fault
def test_patience_ends(network: tuple[str, Faults]):
    endpoint, faults = network
    store = bucket(endpoint)
    uri = store.write_session('night', {'Torino': TONE})['Torino']
    hasty = S3Store(store.root, settings(endpoint, deadline_s=1, timeout_s=1))
    for fault, words in (('503', 'the server answers'), ('trickle', 'the server stalls'), ('flip', 'not those that were written')):
        faults.waiting[:] = [fault] * 100
        fails(lambda: (store if fault == 'flip' else hasty).read_recording(uri), words)  # noqa: B023
        faults.waiting[:] = []
    fails(lambda: S3Store(store.root, settings('http://127.0.0.1:9', deadline_s=1)).read('a'), 'the server does not answer', 'tried for')


# --- a process that is killed ---

KILLED = """
import os, signal, sys
from heimdall_train import data, dataset, object_store
from heimdall_train.config import make_config
dataset.SHARD = 4
places = {'features': (dataset, 'write_file'), 'fetch': (object_store.S3Store, '_receive')}
place, name = places.get(sys.argv[1], (object_store.S3Store, 'write'))
calls, original = 0, getattr(place, name)
def dying(*arguments):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        if sys.argv[1] == 'fetch':
            arguments[2](b'half of a shard')
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
setattr(place, name, dying)
config = make_config(catalog=sys.argv[3], store=sys.argv[4], cache=sys.argv[5])
actions = {'simulate': lambda: data.simulate('demo-v1', config, 12), 'features': lambda: data.read_data(config),
           'fetch': lambda: data.read_data(config), 'share': lambda: data.share_features(config)}
actions[sys.argv[1]]()
"""


@pytest.mark.s3
@pytest.mark.fault
def test_what_is_killed_goes_on_and_ends_with_the_same_bytes(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "Upload of recordings, making of a feature cache, upload and download of features: each is killed -9 half way, and repeated."
    for name, value in (('ENDPOINT', s3), ('ACCESS_KEY', ACCESS_KEY), ('SECRET_KEY', SECRET_KEY)):
        monkeypatch.setenv(f'HEIMDALL_S3_{name}', value)
    monkeypatch.setattr(dataset, 'SHARD', 4)

    def kill(action: str, call: int, config: Config) -> None:
        where = config.catalog, config.store, str(config.cache)
        done = subprocess.run([sys.executable, '-c', KILLED, action, str(call), *where], capture_output=True, text=True, timeout=120, env=dict(os.environ))
        assert done.returncode == -signal.SIGKILL, done.stderr

    def of(name: str) -> Config:
        return make_config(catalog=str(tmp_path / f'{name}.db'), store=bucket(s3).root, cache=tmp_path / name)

    def content(store: Store, prefix: str) -> dict[str, str]:
        return {key: hashlib.sha256(store.read(key)).hexdigest() for key in store.keys(prefix)}

    undisturbed, disturbed = of('undisturbed'), of('disturbed')
    stores = open_store(undisturbed.store), open_store(disturbed.store)
    simulate('demo-v1', undisturbed, 12)
    kill('simulate', 7, disturbed)
    assert 0 < len(content(stores[1], 'sessions/')) < 12
    simulate('demo-v1', disturbed, 12)
    assert content(stores[0], 'sessions/') == content(stores[1], 'sessions/') != {}

    kill('features', 3, disturbed)
    assert len(list((tmp_path / 'disturbed').rglob('*.safetensors'))) == 2
    assert read_data(disturbed).digest == read_data(undisturbed).digest
    shards = [sorted((path.name, path.read_bytes()) for path in (tmp_path / name).rglob('*.safetensors')) for name in ('undisturbed', 'disturbed')]
    assert len(shards[0]) == 3 and shards[0] == shards[1]

    kill('share', 3, disturbed)  # four travel at a time
    half = content(stores[1], 'features/')
    assert len(half) < 3 and not any('manifest' in key for key in half)
    assert share_features(disturbed)['sent'] == 3 - len(half) and share_features(undisturbed)['sent'] == 3
    assert sorted(content(stores[0], 'features/').values()) == sorted(content(stores[1], 'features/').values())

    elsewhere = disturbed.model_copy(update={'cache': tmp_path / 'elsewhere'})
    kill('fetch', 2, elsewhere)
    assert list(elsewhere.cache.rglob('.*.part'))  # what was half there, under a name that nobody reads
    monkeypatch.setattr(data, 'compute_shards', None)
    assert read_data(elsewhere).digest == read_data(undisturbed).digest
    assert sorted((path.name, path.read_bytes()) for path in elsewhere.cache.rglob('*.safetensors')) == shards[0]


def test_a_session_that_changes_while_its_features_are_computed_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dataset, 'SHARD', 4)
    config = make_config(catalog=str(tmp_path / 'catalog.db'), store=str(tmp_path / 'store'), cache=tmp_path / 'cache')
    simulate('demo-v1', config, 12)
    compute, last = dataset.cached_features, sorted(session.id for session in Catalog(config.catalog).sessions())[-1]

    def changed(*arguments):
        with sqlite3.connect(config.catalog) as catalog:
            statement = 'UPDATE known_sources SET latitude = latitude + 1 WHERE id = (SELECT known_source_id FROM recording_sessions WHERE session_name = ?)'
            assert catalog.execute(statement, [last]).rowcount == 1
        return compute(*arguments)

    monkeypatch.setattr(data, 'cached_features', changed)
    fails(lambda: read_data(config), f'session {last} was changed in the catalog while its features were computed')
    assert all(last.encode() not in path.read_bytes() for path in config.cache.rglob('*.safetensors'))
    monkeypatch.setattr(data, 'cached_features', compute)
    after = read_data(config)
    assert len(after) == 12 and after.latitude[after.rows([last])] > 46
