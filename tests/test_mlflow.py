"""Tracking on MLflow's own server, with PostgreSQL and S3 behind it and a password before it; and what happens when it goes away."""
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from onnx import TensorProto, helper
from servers import MLFLOW_PASSWORD, MLFLOW_USER, MlflowServer, PostgresServer, mlflow_server

from heimdall_train.config import make_config
from heimdall_train.network import HeimdallError
from heimdall_train.pipeline import ingest, train, write_scene_table
from heimdall_train.registry import Limits, Registry, register_bundle
from heimdall_train.tracking import CHALLENGER, REGISTERED_MODEL, WAITING, Run, tracked_run

pytestmark = [pytest.mark.postgres, pytest.mark.s3]


@pytest.fixture(scope='module')
def server(postgres: PostgresServer, s3: str) -> Iterator[MlflowServer]:
    postgres.sql('CREATE DATABASE mlflow')
    with mlflow_server(postgres.uri('mlflow'), 's3://heimdall-mlflow/artifacts', s3) as running:
        yield running


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    "The client has a password for the tracking server, and none for what is behind it."
    monkeypatch.setenv('MLFLOW_TRACKING_USERNAME', MLFLOW_USER)
    monkeypatch.setenv('MLFLOW_TRACKING_PASSWORD', MLFLOW_PASSWORD)
    for name in [name for name in os.environ if name.startswith(('AWS_', 'HEIMDALL_S3_', 'PG'))]:
        monkeypatch.delenv(name)


def history(run: Run, name: str) -> list[tuple[int, float]]:
    return [(entry.step, entry.value) for entry in run.client.get_metric_history(run.run_id, name)]


def fails(action: Callable, *words: str) -> None:
    with pytest.raises(HeimdallError) as caught:
        action()
    assert all(word in str(caught.value) for word in words), caught.value
    assert '\n' not in str(caught.value) and 'canary' not in str(caught.value)


def test_a_run_its_artifacts_and_its_model(server: MlflowServer, tmp_path: Path):
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ['batch', 2]) for name in 'xy']
    graph = helper.make_graph([helper.make_node('Identity', ['x'], ['y'])], 'identity', values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=10)
    (tmp_path / 'model.onnx').write_bytes(model.SerializeToString())
    (tmp_path / 'large.bin').write_bytes(content := np.random.default_rng(0).bytes(3_000_000))
    with tracked_run(server.uri, tmp_path, {'dataset_digest': 'abc'}) as run:
        run.log_parameters({'epochs': 2})
        for epoch in range(3):
            run.log_metrics({'validation': {'nll': 10.0 - epoch}}, epoch)
        run.log_artifact(tmp_path / 'large.bin', 'files')
        version = run.register(tmp_path / 'model.onnx', {'x': np.zeros((1, 2), dtype=np.float32)})
    stored = run.client.get_run(run.run_id)
    assert stored.data.params == {'epochs': '2'} and stored.data.tags['dataset_digest'] == 'abc' and stored.info.status == 'FINISHED'
    assert history(run, 'validation.nll') == [(0, 10.0), (1, 9.0), (2, 8.0)]
    assert stored.info.artifact_uri.startswith('mlflow-artifacts:')
    assert Path(run.client.download_artifacts(run.run_id, 'files/large.bin', str(tmp_path))).read_bytes() == content
    assert int(run.client.get_model_version_by_alias(REGISTERED_MODEL, CHALLENGER).version) == version == 1


def test_a_champion_comes_through_the_server(server: MlflowServer, tmp_path: Path):
    "Its bundle by the server's proxy, into a cache; an artifact that was exchanged is refused."
    digests = {}
    for name, content in {**identity_bundle(), 'evaluation.parquet': evaluation().to_parquet(index=False)}.items():
        (tmp_path / name).write_bytes(content)
        digests[name] = hashlib.sha256(content).hexdigest()
    (tmp_path / 'SHA256SUMS').write_text(''.join(f'{digest}  {name}\n' for name, digest in digests.items()))
    with tracked_run(server.uri, tmp_path) as run:
        number = register_bundle(run, tmp_path, {'levels': np.ones((1, 2), np.float32)})
    registry = Registry(server.uri, cache=tmp_path / 'cache')
    fails(lambda: registry.find('models:/localization_model@champion'), 'has no version champion')
    assert registry.promote('challenger', limits=Limits(latency_ms=float('inf'))).candidate == number
    champion = registry.find('models:/localization_model@champion')
    assert champion.number == number and champion.measured('size_mb') is not None and 'calibration' in champion.tags['gate']
    bundle = registry.bundle(champion)
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in bundle.iterdir() if path.name != 'SHA256SUMS'} == digests
    (tmp_path / 'model.json').write_text('{}')
    run.log_artifact(tmp_path / 'model.json', champion.tags['bundle'])
    assert registry.bundle(champion) == bundle  # whole in the cache
    fails(lambda: Registry(server.uri, cache=tmp_path / 'other').bundle(champion), 'model.json of the bundle is not what its SHA256SUMS says')


def identity_bundle() -> dict[str, bytes]:
    "Files of a bundle whose graph hands on what it gets."
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ['batch', 2]) for name in ('levels', 'position')]
    graph = helper.make_graph([helper.make_node('Identity', ['levels'], ['position'])], 'identity', values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=10)
    description = {'origin': {'latitude': 45.06, 'longitude': 7.60, 'height': 0.0}, 'source_height': 300.0,
                   'dataset_digest': 'abc', 'metrics': {'mean_m': 100.0}}
    return {'model.onnx': model.SerializeToString(), 'model.json': json.dumps(description).encode()}


def evaluation() -> pd.DataFrame:
    "Of a calibrated model: 90 of 100 ellipses hold the truth."
    north = np.where(np.arange(100) < 90, 50.0, 500.0) / 111_132
    return pd.DataFrame({
        'session_id': [f's{number}' for number in range(100)], 'latitude': 45.06, 'longitude': 7.6, 'estimated_latitude': 45.06 + north,
        'estimated_longitude': 7.6, 'error_m': north * 111_132, 'covariance_east_m2': 1e4, 'covariance_east_north_m2': 0.0,
        'covariance_north_m2': 1e4, 'heard': 7})


def test_who_may_not_is_told_so(server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv('MLFLOW_TRACKING_PASSWORD', 'canary-wrong')
    fails(tracked_run(server.uri, tmp_path).__enter__, 'cannot be tracked at http://127.0.0.1', 'check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD')
    fails(tracked_run('http://127.0.0.1:9', tmp_path).__enter__, 'check the tracking URI')


A_MINUTE = pytest.param(60, marks=[pytest.mark.slow, pytest.mark.skipif(not os.environ.get('HEIMDALL_SLOW'), reason='set HEIMDALL_SLOW=1')])


@pytest.mark.fault
@pytest.mark.parametrize('away', [5, A_MINUTE])
def test_a_server_that_is_away_for_a_while_loses_nothing(server: MlflowServer, tmp_path: Path, away: int):
    lines: list[str] = []
    (tmp_path / 'metrics.json').write_text('{}')
    with tracked_run(server.uri, tmp_path, progress=lines.append) as run:
        run.log_metrics({'loss': 10.0}, 0)
        server.crash()
        began = time.time()
        for epoch in range(1, 4):
            run.log_metrics({'loss': 10.0 - epoch}, epoch)
        run.log_artifact(tmp_path / 'metrics.json')
        assert len((tmp_path / WAITING).read_text().splitlines()) == 4
        ended = time.time()
        starting = threading.Timer(away, server.start)
        starting.start()
    returned = time.time()
    starting.join()
    print(f'away for {returned - began:.0f} s with its start, and nothing lost')
    assert lines == ['the tracking server does not answer: figures are kept, and sent when it is back']
    assert history(run, 'loss') == [(epoch, 10.0 - epoch) for epoch in range(4)] and not (tmp_path / WAITING).exists()
    times = [entry.timestamp / 1000 for entry in run.client.get_metric_history(run.run_id, 'loss')]
    assert all(began - 1 < at < ended + 1 for at in times[1:])
    assert [entry.path for entry in run.client.list_artifacts(run.run_id)] == ['metrics.json']
    assert run.client.get_run(run.run_id).info.status == 'FINISHED'


@pytest.mark.fault
def test_a_training_does_not_need_its_server(server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "It goes away in the second epoch and comes back after the training: nothing is lost, and whoever opens the run next tells it."
    monkeypatch.setenv('HEIMDALL_TRACKING_DEADLINE_S', '1')
    table = write_scene_table('testbed-v1', tmp_path / 'scene', 0, {'train': 80, 'validation': 30, 'test': 20})
    config = make_config(
        catalog=str(tmp_path / 'catalog.db'), store=str(tmp_path / 'store'), out=tmp_path / 'run', epochs=3, tracking=server.uri,
        test_sessions=table.parent / 'test.txt', validation_sessions=table.parent / 'validation.txt')
    ingest(table, config)
    lines: list[str] = []

    def progress(line: str) -> None:
        lines.append(line)
        if line.startswith('epoch 1/3'):
            server.crash()
    try:
        out = train(config, progress)
    finally:
        server.start()
    assert any('still away' in line for line in lines) and (out / 'model.safetensors').exists()
    waiting = [json.loads(line) for line in (out / WAITING).read_text().splitlines()]
    assert [entry['step'] for entry in waiting if 'metrics' in entry] == [1, 2, 0]
    record = json.loads((out / 'metrics.json').read_text())['training']
    with tracked_run(server.uri, out, run_id=record['mlflow_run_id']) as run:
        pass
    assert history(run, 'validation_loss') == [(epoch, row['validation_loss']) for epoch, row in enumerate(record['history'])]
    stored = run.client.get_run(run.run_id)
    assert stored.data.metrics['validation.model.mean_m'] == record['validation']['model']['mean_m']
    assert {'model.safetensors', 'split.json', 'config.yaml'} <= {entry.path for entry in run.client.list_artifacts(run.run_id)}
    assert not (out / WAITING).exists()
    everything = json.dumps([stored.data.params, stored.data.tags]) + '\n'.join(lines)
    for file in (path for path in out.rglob('*') if path.is_file()):
        everything += file.read_bytes().decode('latin-1')
    assert 'canary' not in everything
