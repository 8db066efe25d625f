"""Bundles on their way to where services look for them: killed at every step, published by several at once, on a disk and in a bucket."""
import hashlib
import json
import os
import secrets
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from servers import ACCESS_KEY, SECRET_KEY

from heimdall_train import publication
from heimdall_train.network import HeimdallError
from heimdall_train.object_store import S3Settings, S3Store, open_store
from heimdall_train.publication import CLAIM, publish
from heimdall_train.store import Store

FILES = {'MODEL_CARD.md': 900, 'model.json': 4000, 'model.onnx': 3_000_000, 'sample.json': 5000}
STEPS = [CLAIM, *FILES, 'SHA256SUMS']


def write_bundle(folder: Path, seed: int = 0) -> Path:
    "Files with the sums of a bundle; that they are one is not what is tested here."
    folder.mkdir()
    generator = np.random.default_rng(seed)
    contents = {name: generator.bytes(size) for name, size in FILES.items()}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / 'SHA256SUMS').write_text(''.join(f'{hashlib.sha256(content).hexdigest()}  {name}\n' for name, content in contents.items()))
    return folder


@pytest.fixture(autouse=True)
def _any_files_are_a_bundle(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(publication, 'check_bundle', lambda folder: {})


@pytest.fixture(params=['disk', pytest.param('bucket', marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    if request.param == 'disk':
        return open_store(tmp_path / 'models')
    for name, value in (('ENDPOINT', request.getfixturevalue('s3')), ('ACCESS_KEY', ACCESS_KEY), ('SECRET_KEY', SECRET_KEY)):
        monkeypatch.setenv(f'HEIMDALL_S3_{name}', value)
    made = S3Store(f's3://heimdall-models/{secrets.token_hex(6)}', S3Settings())
    with suppress(made.client.exceptions.BucketAlreadyOwnedByYou, made.client.exceptions.BucketAlreadyExists):
        made.client.create_bucket(Bucket=made.bucket)
    return made


def held(store: Store, version: int) -> dict[str, bytes]:
    "What lies under a version, but its claim."
    keys = [key for key in store.keys(f'v{version}/') if not key.endswith(CLAIM)]
    return {key.rpartition('/')[2]: store.read(key) for key in keys}


def test_versions_count_up_and_the_same_content_makes_no_second_one(store: Store, tmp_path: Path):
    one, other = write_bundle(tmp_path / 'one', 1), write_bundle(tmp_path / 'other', 2)
    said: list[str] = []
    assert [publish(bundle, store.root, said.append).version for bundle in (one, other, one, other)] == [1, 2, 1, 2]
    assert len(said) == 2 * (len(FILES) + 1) and 'v2/SHA256SUMS' in said[-1]
    for version, bundle in ((1, one), (2, other)):
        assert held(store, version) == {path.name: path.read_bytes() for path in bundle.iterdir()}


def test_several_publish_at_once(store: Store, tmp_path: Path):
    "Four bundles, each twice: four versions, each whole."
    bundles = [write_bundle(tmp_path / str(number), number) for number in range(4)]
    with ThreadPoolExecutor(8) as several:
        versions = list(several.map(lambda bundle: publish(bundle, store.root).version, bundles * 2))
    assert sorted(versions[:4]) == [1, 2, 3, 4] and versions[4:] == versions[:4]
    for version, bundle in zip(versions[:4], bundles, strict=True):
        assert held(store, version) == {path.name: path.read_bytes() for path in bundle.iterdir()}


def test_what_somebody_else_wrote_there_is_neither_overwritten_nor_called_finished(store: Store, tmp_path: Path):
    bundle = write_bundle(tmp_path / 'bundle')
    store.write('v1/model.onnx', b'not yours')
    with pytest.raises(HeimdallError, match='v1/model.onnx is not the file of this bundle'):
        publish(bundle, store.root)
    assert store.read('v1/model.onnx') == b'not yours' and not store.exists('v1/SHA256SUMS')


# One process forks a publisher for each step, which kills itself there: before its file, in the middle of it, or after it.
KILLED = '''
import http.client, json, os, signal, sys
from heimdall_train import publication
from heimdall_train.publication import publish
from heimdall_train.store import Store, write_file
from heimdall_train.object_store import S3Store

publication.check_bundle = lambda folder: {}
where, jobs = sys.argv[1], json.loads(sys.argv[2])


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(step, moment):
    for kind in (Store, S3Store):
        def create(self, key, content, create=kind.create):
            if not key.endswith('/' + step):
                return create(self, key, content)
            if moment == 'before':
                die()
            if moment == 'within':
                send = http.client.HTTPConnection.send

                def half(self, data):
                    if isinstance(data, bytes) and data in content:  # a piece of the body
                        send(self, data[:len(data) // 2])
                        die()
                    send(self, data)

                http.client.HTTPConnection.send, os.fsync = half, lambda descriptor: die()
            create(self, key, content)
            die()
        kind.create = create


statuses = []
for bundle, step, moment in jobs:
    child = os.fork()
    if child == 0:
        killed_at(step, moment)
        publish(bundle, where)
        os._exit(0)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(statuses))
'''


@pytest.mark.fault
def test_a_publication_that_is_killed_is_finished_by_the_next(store: Store, tmp_path: Path):
    moments = [(step, moment) for step in STEPS for moment in ('before', 'within', 'after')]
    bundles = [write_bundle(tmp_path / f'{step}-{moment}', number) for number, (step, moment) in enumerate(moments)]
    jobs = [[str(bundle), *moment] for bundle, moment in zip(bundles, moments, strict=True)]
    done = subprocess.run([sys.executable, '-c', KILLED, store.root, json.dumps(jobs)], capture_output=True, text=True, env={**os.environ}, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [-9] * len(jobs)
    finished = {key.partition('/')[0] for key in store.keys() if key.endswith('SHA256SUMS')}
    assert len(finished) == 1  # the one that was killed after its manifest
    for bundle, (step, moment) in zip(bundles, moments, strict=True):
        published, there = publish(bundle, store.root), max(0, STEPS.index(step) - 1 + (moment == 'after' and step != CLAIM))
        assert published.files == len(STEPS) - 1 - there, (step, moment)  # no file is sent twice, and half a file is no file
        assert held(store, published.version) == {path.name: path.read_bytes() for path in bundle.iterdir()}
    versions = {key.partition('/')[0] for key in store.keys()}
    assert versions == {f'v{number}' for number in range(1, len(bundles) + 1)}  # no version for a second time, no hole
