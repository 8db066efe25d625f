"""Trainings as jobs, with real brokers and stores that are killed under them, and a service that is asked for what it must refuse."""
import asyncio
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import requests
import schemathesis
import yaml
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings, strategies
from safetensors.numpy import load_file
from servers import BROKER_PASSWORD, REDIS_PASSWORD, RabbitServer, RedisServer, free_ports

from heimdall_train.config import make_config
from heimdall_train.data import ingest, share_features, simulate, write_scene_table
from heimdall_train.jobs import (
    GRACE_S,
    LOOK_S,
    QUEUE,
    TASK,
    Job,
    JobStore,
    RedisJobs,
    ServiceSettings,
    SqliteJobs,
    StoreAway,
    celery_app,
    claimed,
    ended,
    new_job,
    open_jobs,
    service_settings,
    spread_features,
    with_password,
    work,
)
from heimdall_train.network import HeimdallError
from heimdall_train.service import create_app, service_app

pytestmark = pytest.mark.jobs
ROOT = Path(__file__).resolve().parent.parent
KEY = 'canary-secret-key'
QUIET = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(Path(__file__).parent),
         'HEIMDALL_SERVICE_API_KEYS_SHA256': hashlib.sha256(KEY.encode()).hexdigest()}


def until(condition: Callable[[], object], what: str, seconds: float = 90) -> None:
    "Wait, however long it takes on a busy machine."
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f'waited in vain for {what}'
        time.sleep(0.1)


# --- trainings ---


@pytest.fixture(scope='module')
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Where service and workers are started: a catalog with a tiny dataset."
    folder = tmp_path_factory.mktemp('service')
    description = yaml.safe_load((ROOT / 'heimdall_train' / 'scenes' / 'testbed-v1.yaml').read_text())
    (folder / 'tiny.yaml').write_text(yaml.safe_dump({**description, 'name': 'tiny', 'receivers': 8}))
    table = write_scene_table(str(folder / 'tiny.yaml'), folder / 'scene', sources={'train': 60, 'validation': 30, 'test': 30})
    ingest(table, make_config(catalog=str(folder / 'catalog.db'), store=str(folder / 'store')))
    return folder


BODY = {'catalog': 'catalog.db', 'test_sessions': 'scene/test.txt', 'epochs': 2, 'batch_size': 8, 'seed': 3}


@contextmanager
def running(place: Path, *command: str, **environment: str) -> Iterator[subprocess.Popen]:
    "A heimdall-train command in a process of its own, killed at the end."
    with open(place / f'{command[0]}.log', 'ab') as log:
        program = [sys.executable, '-c', 'from heimdall_train.cli import main; main()', *command]
        process = subprocess.Popen(program, cwd=place, stdout=log, stderr=log, env={**QUIET, **environment})
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def service(place: Path, **environment: str) -> Iterator[httpx.Client]:
    "A served service, and who asks it."
    port = free_ports(1)[0]
    with running(place, 'serve', '--port', str(port), **environment), httpx.Client(
            base_url=f'http://127.0.0.1:{port}', headers={'X-API-Key': KEY}, timeout=60) as client:
        def answers() -> bool:
            try:
                return client.get('/ready').status_code == 200
            except httpx.TransportError:
                return False
        until(answers, 'the service')
        yield client


@pytest.fixture(scope='module')
def undisturbed(place: Path) -> Path:
    "The run folder of a job that a service without a broker ran itself."
    with service(place) as client:
        answer = client.post('/v1/training/jobs', json=BODY)
        assert answer.status_code == 202, answer.text
        where, seen = answer.headers['location'], []
        with client.stream('GET', f'{where}/events') as events:
            for line in events.iter_lines():
                if line.startswith('data: '):
                    seen.append(json.loads(line.removeprefix('data: ')))
        last = client.get(where).json()
        metrics = client.get('/metrics').text
    assert seen[-1] == last and last['status'] == 'succeeded', last
    batches = {(job['progress']['epoch'], job['progress']['batch']) for job in seen if job['progress']['batch']}
    assert len(batches) >= 2 and last['progress']['epoch'] == 2 and last['progress']['mean_error_m'] > 0
    assert last['result']['validation']['model']['mean_m'] > 0 and last['attempts'] == 1
    assert 'heimdall_request_seconds_count{request="POST /v1/training/jobs",status="202"} 1.0' in metrics
    folder = place / last['result']['out']
    assert folder == place / 'runs' / 'service' / 'jobs' / last['id']
    assert yaml.safe_load((folder / 'config.yaml').read_text())['seed'] == 3
    return folder


def test_without_a_broker(undisturbed: Path):
    assert (undisturbed / 'model.safetensors').stat().st_size > 0
    assert KEY not in ''.join(path.read_text(errors='replace') for path in undisturbed.parent.parent.parent.parent.glob('*.log'))


@pytest.fixture(scope='module')
def where(rabbit: RabbitServer, redis: RedisServer) -> dict[str, str]:
    "The environment that names the servers."
    return {'HEIMDALL_BROKER': rabbit.uri, 'RABBITMQ_PASSWORD': BROKER_PASSWORD, 'HEIMDALL_REDIS': redis.uri, 'REDIS_PASSWORD': REDIS_PASSWORD}


@pytest.mark.fault
def test_a_worker_is_killed_and_another_goes_on_to_the_same_bits(place: Path, undisturbed: Path, where: dict[str, str]):
    with service(place, **where) as client:
        with running(place, 'worker', **where):
            answer = client.post('/v1/training/jobs', json=BODY)
            location = answer.headers['location']
            until(lambda: (client.get(location).json()['progress']['epoch'] or 0) >= 2, 'the second epoch')
        # the worker was killed, its training knows nothing of it but that nobody holds its standard input
        with running(place, 'worker', **where):
            until(lambda: client.get(location).json()['status'] == 'succeeded', 'the resumed training')
        job = client.get(location).json()
    folder = place / job['result']['out']
    assert job['attempts'] == 2 and 'going on after epoch' in (folder / 'log.txt').read_text()
    first, second = (load_file(path / 'model.safetensors') for path in (undisturbed, folder))
    assert [name for name in first if not np.array_equal(first[name], second[name], equal_nan=True)] == []


# --- faults, with a process that trains nothing ---

STAND_IN = '''
import json, os, signal, sys, threading, time
from pathlib import Path
folder = Path(sys.argv[1])
def end_with_parent():  # as a training does, without importing it
    while os.read(0, 1024):
        pass
    os._exit(1)
threading.Thread(target=end_with_parent, daemon=True).start()
what = json.loads((folder / 'job.json').read_text())['dataset']
if what == 'stubborn':
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
with open(folder / 'begun', 'a') as file:
    file.write(f'{os.getpid()}\\n')
(folder / 'progress.json').write_text(json.dumps({'epoch': 1, 'epochs': 2, 'batch': 3, 'batches': 7}))
while what in ('held', 'stubborn') and not (folder / 'release').exists():
    time.sleep(0.05)
if what == 'dies':
    os.kill(os.getpid(), signal.SIGKILL)
(folder / 'metrics.json').write_text(json.dumps({'training': {'epoch': 2}}))
'''


def stand_in(folder: Path) -> list[str]:
    "A command that waits for a file `release`."
    return [sys.executable, '-c', STAND_IN, str(folder)]


def stand_in_worker() -> None:
    "In a process of its own: a worker whose trainings train nothing."
    work(service_settings(), stand_in)


class Cluster:
    "Workers over a broker and Redis, and who asks them for jobs."

    def __init__(self, folder: Path, where: dict[str, str]):
        self.folder, self.environment = folder / 'jobs', {**QUIET, **where, 'HEIMDALL_SERVICE_FOLDER': str(folder)}
        self.settings = ServiceSettings(folder=folder, broker=where['HEIMDALL_BROKER'], broker_password=BROKER_PASSWORD, redis=where['HEIMDALL_REDIS'],
                                        redis_password=REDIS_PASSWORD, jobs_per_minute=6000)
        self.log, self.store, self.workers = folder / 'workers.log', open_jobs(self.settings), [self.start(folder), self.start(folder)]
        self.client, self.app = TestClient(service_app(self.settings)), celery_app(self.settings)
        self.client.__enter__()  # so that its outbox works

    def start(self, folder: Path) -> subprocess.Popen:
        with open(folder / 'workers.log', 'ab') as log:
            command = [sys.executable, '-c', 'from test_jobs import stand_in_worker; stand_in_worker()']
            return subprocess.Popen(command, stdout=log, stderr=log, env=self.environment, cwd=folder)

    def ask(self, dataset: str) -> str:
        answer = self.client.post('/v1/training/jobs', json={'dataset': dataset})
        assert answer.status_code == 202, answer.text
        return answer.json()['id']

    def begun(self, id: str) -> list[int]:
        "Process ids of those who have trained this job."
        path = self.folder / id / 'begun'
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def get(self, id: str) -> Job:
        job = self.store.get(id)
        assert job is not None
        return job

    def until(self, id: str, status: str) -> Job:
        until(lambda: self.get(id).status == status, f'{status} of {self.get(id)}; {self.log.read_text()[-2000:]}')
        return self.get(id)

    def queued(self) -> int:
        "Messages that wait in the broker."
        with self.app.connection_for_read() as connection:
            return connection.default_channel.queue_declare(QUEUE, passive=True).message_count


@pytest.fixture(scope='module')
def cluster(tmp_path_factory: pytest.TempPathFactory, where: dict[str, str]) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp('cluster'), where)
    try:
        yield cluster
        assert 'canary' not in cluster.log.read_text()
    finally:
        cluster.client.__exit__(None, None, None)
        for worker in cluster.workers:
            worker.kill()
            worker.wait()


def alive(pid: int) -> bool:
    "Whether a process runs; one that has ended and was not waited for does not."
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False


@pytest.mark.fault
@pytest.mark.parametrize('dataset', ['held', 'stubborn'])
def test_cancelled_while_it_runs(cluster: Cluster, dataset: str):
    id = cluster.ask(dataset)
    until(lambda: cluster.begun(id) and cluster.get(id).progress.batch == 3, 'its beginning')
    assert cluster.client.delete(f'/v1/training/jobs/{id}').json()['cancel']
    assert cluster.until(id, 'cancelled').result is None and not alive(cluster.begun(id)[0])
    assert GRACE_S + 2 * LOOK_S < 5, 'a training must end within five seconds'
    assert cluster.client.delete(f'/v1/training/jobs/{id}').json()['status'] == 'cancelled'


@pytest.mark.fault
def test_delivered_three_times_trained_once(cluster: Cluster):
    id = cluster.ask('held')
    for _ in range(2):
        cluster.app.tasks[TASK].apply_async(args=[id], task_id=id)
    until(lambda: cluster.begun(id), 'its beginning')
    time.sleep(2)  # for the second worker to find it taken
    (cluster.folder / id / 'release').touch()
    assert cluster.until(id, 'succeeded').attempts == 1
    other = cluster.ask('quick')  # behind the duplicates
    cluster.until(other, 'succeeded')
    assert len(cluster.begun(id)) == 1


@pytest.mark.fault
def test_a_training_that_kills_its_process_is_given_up(cluster: Cluster):
    job = cluster.until(cluster.ask('dies'), 'failed')
    assert job.error == 'given up after 5 attempts: see log.txt in its run folder' and len(cluster.begun(job.id)) == 5
    assert cluster.until(cluster.ask('quick'), 'succeeded')


@pytest.mark.fault
def test_the_broker_is_away_while_a_training_ends(cluster: Cluster, rabbit: RabbitServer):
    id = cluster.ask('held')
    until(lambda: cluster.begun(id), 'its beginning')
    rabbit.crash()
    with TestClient(service_app(cluster.settings)) as dying:  # takes a job, and is gone before the broker is back
        left = dying.post('/v1/training/jobs', json={'dataset': 'quick'}).json()['id']
        kept = cluster.ask('quick')
        assert cluster.client.get('/ready').status_code == 503 and cluster.client.get('/health').status_code == 200
        (cluster.folder / id / 'release').touch()  # the workers have noticed that the broker is away
        assert cluster.until(id, 'succeeded').attempts == 1
    assert [(cluster.get(each).status, cluster.get(each).handed_on) for each in (left, kept)] == [('queued', False)] * 2
    rabbit.start()
    assert [cluster.until(each, 'succeeded').attempts for each in (left, kept)] == [1, 1]
    assert cluster.client.get('/ready').status_code == 200
    until(lambda: cluster.queued() == 0, 'an empty queue')
    assert [len(cluster.begun(each)) for each in (id, left, kept)] == [1, 1, 1] and [job.id for job in cluster.store.unfinished()] == []


@pytest.mark.fault
def test_redis_is_away_while_a_training_ends(cluster: Cluster, redis: RedisServer):
    id = cluster.ask('held')
    until(lambda: cluster.begun(id), 'its beginning')
    redis.crash()
    assert cluster.client.get(f'/v1/training/jobs/{id}').status_code == 503
    assert cluster.client.get('/ready').status_code == 503 and 'heimdall_store_up 0.0' in cluster.client.get('/metrics').text
    (cluster.folder / id / 'release').touch()
    until(lambda: not alive(cluster.begun(id)[0]), 'the end of its process')
    time.sleep(2)
    redis.start()
    job = cluster.until(id, 'succeeded')
    assert (job.attempts, job.result) == (1, {'out': str(cluster.folder / id), 'epoch': 2})


@pytest.mark.fault
def test_a_worker_that_is_asked_to_end_gives_its_job_back(cluster: Cluster):
    id = cluster.ask('held')
    until(lambda: cluster.begun(id), 'its beginning')
    until(lambda: cluster.get(id).progress.batch == 3, 'its progress')
    parent = int(Path(f'/proc/{cluster.begun(id)[0]}/stat').read_text().rpartition(')')[2].split()[1])
    its = next(worker for worker in cluster.workers if worker.pid == parent)
    its.send_signal(signal.SIGTERM)
    until(lambda: len(cluster.begun(id)) == 2, 'the other worker')
    assert not alive(cluster.begun(id)[0]) and its.wait(30) == 0
    (cluster.folder / id / 'release').touch()
    assert cluster.until(id, 'succeeded').attempts == 1
    cluster.workers[cluster.workers.index(its)] = cluster.start(cluster.folder.parent)


if os.environ.get('HEIMDALL_SLOW') == '1':  # a minute each, in which nothing happens
    @pytest.mark.fault
    @pytest.mark.slow
    @pytest.mark.parametrize('which', ['rabbit', 'redis'])
    def test_a_server_is_away_for_a_minute(cluster: Cluster, which: str, request: pytest.FixtureRequest):
        server, id = request.getfixturevalue(which), cluster.ask('held')
        until(lambda: cluster.begun(id), 'its beginning')
        server.crash()
        time.sleep(30)
        assert alive(cluster.begun(id)[0])
        (cluster.folder / id / 'release').touch()
        time.sleep(30)
        server.start()
        assert cluster.until(id, 'succeeded').attempts == 1
        until(lambda: cluster.client.get('/ready').status_code == 200, 'both servers')
        cluster.until(cluster.ask('quick'), 'succeeded')
        assert len(cluster.begun(id)) == 1


# --- stores ---


@pytest.fixture(params=['sqlite', 'redis'])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> JobStore:
    if request.param == 'sqlite':
        return SqliteJobs(tmp_path / 'jobs.db')
    return RedisJobs(with_password(request.getfixturevalue('redis').uri.replace('/0', '/1'), service_settings(redis_password=REDIS_PASSWORD).redis_password))


def test_both_stores_are_the_same_to_jobs(store: JobStore):
    jobs = [new_job({'seed': number}) for number in range(20)]
    for job in jobs:
        store.add(job)
    assert [job.id for job in store.unfinished()] == [job.id for job in jobs] and store.get(jobs[4].id) == jobs[4]
    with ThreadPoolExecutor(8) as pool:
        for job in jobs:
            claims = list(pool.map(lambda owner, id=job.id: store.change(id, lambda each: claimed(each, owner, store.now())), 'abcdefgh'))
            assert sum(claim is not None for claim in claims) == 1
    for job in jobs:
        store.change(job.id, lambda each: ended(each, each.owner, 'succeeded', {'mean_m': 1.5}))
    assert store.unfinished() == [] and store.get(jobs[0].id).result == {'mean_m': 1.5}
    assert store.get('nobody') is None and store.change('nobody', lambda each: each) is None


def test_a_password_in_the_query_is_not_said():
    with pytest.raises(StoreAway, match=r'Redis at 127.0.0.1:9/0 does not answer') as caught:
        RedisJobs('redis://127.0.0.1:9/0?password=can@ary').now()
    assert 'ary' not in str(caught.value)


def test_wrong_passwords_are_said_in_one_line(rabbit: RabbitServer, redis: RedisServer, where: dict[str, str], tmp_path: Path):
    wrong = {**QUIET, **where, 'REDIS_PASSWORD': 'canary-wrong'}
    with pytest.raises(HeimdallError, match=r'Redis at 127.0.0.1:\d+/0 does not answer \(AuthenticationError\): check') as caught:
        open_jobs(service_settings(broker=rabbit.uri, redis=redis.uri, redis_password='canary-wrong')).now()
    assert 'canary' not in str(caught.value)
    done = subprocess.run([sys.executable, '-c', 'from heimdall_train.cli import main; main()', 'serve', '--host', '0.0.0.0', '--port', str(free_ports(1)[0])],
                          env={**{name: value for name, value in wrong.items() if 'SHA256' not in name}}, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and 'without a key anybody' in done.stderr.splitlines()[-1] and 'canary' not in done.stderr + done.stdout


# --- what people send ---


@pytest.fixture(scope='module')
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, list[str]]:
    "An application that nobody works for."
    settings = ServiceSettings(folder=tmp_path_factory.mktemp('asked'), requests_per_second=1e6, jobs_per_minute=1e6)
    handed: list[str] = []
    return create_app(settings, open_jobs(settings), handed.append), handed


def test_a_thousand_malformed_requests(asked: tuple):
    "From the schema: bodies, paths and headers that break it. None may end in a fault of ours."
    app, _ = asked
    operations = [result.ok() for result in schemathesis.openapi.from_asgi('/openapi.json', app).get_all_operations()]
    prepared: list[tuple[str, requests.PreparedRequest]] = []
    for operation in operations:
        if not operation.path.startswith('/v1') or operation.method not in ('get', 'post') or operation.path.endswith('/events'):
            continue

        @settings(max_examples=300, deadline=None, database=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE))
        def prepare(case):
            request = requests.Request(**case.as_transport_kwargs(base_url='http://service')).prepare()
            if request.method == 'POST':
                prepared.append((request.url, request))
            else:  # DELETE and the events have the same parameters
                path, question, query = request.url.partition('?')
                prepared.extend([(request.url, request), (f'{path}/events{question}{query}', request)])
                (deletion := request.copy()).method = 'DELETE'
                prepared.append((request.url, deletion))
        prepare()

    async def send() -> list[tuple[str, int]]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), timeout=60) as client:
            return [(request.method, (await client.request(
                request.method, url, content=request.body, headers=[(name.encode('latin-1'), str(value).encode('latin-1'))
                                                                    for name, value in request.headers.items()])).status_code) for url, request in prepared]
    answers = asyncio.run(send())
    assert [answer for answer in answers if answer[1] >= 500] == []
    assert sum(400 <= status < 500 for _, status in answers) >= 1000  # of some only a needless header is odd
    assert {('POST', 422), ('GET', 404), ('DELETE', 404)} <= set(answers)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=strategies.binary(max_size=200) | strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.floats() | strategies.text(), lambda inner: strategies.lists(inner) | strategies.dictionaries(
        strategies.sampled_from(['catalog', 'epochs', 'scene', 'x']), inner)).map(lambda value: json.dumps(value).encode()))
def test_any_body(asked: tuple, body: bytes):
    answer = TestClient(asked[0], raise_server_exceptions=False).post('/v1/training/jobs', content=body, headers={'Content-Type': 'application/json'})
    assert answer.status_code in (202, 400, 422), answer.text


def test_many_ask_at_once(asked: tuple):
    app, handed = asked
    before = len(handed)
    with TestClient(app) as client, ExitStack() as stack:
        pool, barrier = stack.enter_context(ThreadPoolExecutor(16)), threading.Barrier(16)

        def ask(number: int) -> str:
            barrier.wait()
            return client.post('/v1/training/jobs', json={'seed': number}).json()['id']
        ids = list(pool.map(ask, range(16)))
    assert len(set(ids)) == 16 and sorted(handed[before:]) == sorted(ids)


def test_the_description_has_examples_that_work(asked: tuple):
    app, _ = asked
    with TestClient(app) as client:
        schema = client.get('/openapi.json').json()
        for example in schema['components']['schemas']['JobRequest']['examples']:
            assert client.post('/v1/training/jobs', json=example).status_code == 202
    assert schema['components']['securitySchemes'] == {'APIKeyHeader': {'type': 'apiKey', 'in': 'header', 'name': 'X-API-Key'}}


# --- features by many workers ---


@pytest.fixture(scope='module')
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A store and a catalog with recordings in three shards."
    folder = tmp_path_factory.mktemp('recorded')
    values = yaml.safe_load((ROOT / 'heimdall_train' / 'scenes' / 'demo-v1.yaml').read_text())
    (folder / 'small.yaml').write_text(yaml.safe_dump({**values, 'name': 'small', 'sources': {'train': 140, 'validation': 4, 'test': 4}}))
    simulate(str(folder / 'small.yaml'), make_config(catalog=str(folder / 'catalog.db'), store=str(folder / 'store')))
    return folder


@pytest.mark.fault
def test_features_by_workers_are_those_of_one_machine(cluster: Cluster, recorded: Path, tmp_path: Path):
    where = {'catalog': str(recorded / 'catalog.db'), 'store': str(recorded / 'store')}
    lines: list[str] = []
    done = spread_features({**where, 'cache': str(tmp_path / 'workers')}, cluster.settings, lines.append)
    assert (done['shards'], done['sent']) == (3, 3) and lines[-1] == '3 of 3 shards', lines
    config = make_config(**where, cache=tmp_path / 'alone', dataset='small')
    shutil.copytree(recorded / 'store' / done['key'], tmp_path / 'kept')
    shutil.rmtree(recorded / 'store' / 'features')
    alone = share_features(config)
    assert alone['key'] == done['key'] and alone['sent'] == 3
    for path in sorted((tmp_path / 'kept').iterdir()):
        assert path.read_bytes() == (recorded / 'store' / done['key'] / path.name).read_bytes(), path.name
    # what is missing is handed out again, and nothing else
    (recorded / 'store' / done['key'] / '000001.safetensors').unlink()
    again = spread_features({**where, 'cache': str(tmp_path / 'other')}, cluster.settings)
    assert again['sent'] == 1 and len(list((tmp_path / 'other').rglob('*.safetensors'))) == 2  # the first one was fetched for its form
    assert spread_features({**where, 'cache': str(tmp_path / 'other')}, cluster.settings)['sent'] == 0


def test_features_that_cannot_be_computed_are_said(cluster: Cluster, recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    where = {'catalog': str(recorded / 'catalog.db'), 'store': str(recorded / 'store')}
    monkeypatch.setattr('heimdall_train.data.plan_shards', lambda config: ('of-other-code', [1], 3))
    with pytest.raises(HeimdallError, match='1 of 3 shards failed, the same command tries them again; the first: the dataset, its recordings or the code'):
        spread_features({**where, 'cache': str(tmp_path)}, cluster.settings)
