"""Recordings from end to end on a tiny scene: commands, graph, cache, and what damaged recordings do."""
import csv
import json
import multiprocessing
import os
import shutil
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from heimdall_train.bounds import scene_bound
from heimdall_train.catalog import Catalog
from heimdall_train.cli import app
from heimdall_train.config import make_config
from heimdall_train.data import graph_inputs, ingest_samples, read_data, scene_split, simulate
from heimdall_train.dataset import TimedData, cached_features
from heimdall_train.explain import explain
from heimdall_train.export import OUTPUTS, agree, hand_over, onnx_session, parity
from heimdall_train.metrics import evaluation_schema
from heimdall_train.model_files import load_model
from heimdall_train.network import HeimdallError
from heimdall_train.recordings import simulate_sessions
from heimdall_train.scene import load_scene, scene_world
from heimdall_train.store import encode_iq, write_file

ROOT = Path(__file__).resolve().parent.parent
COUNTS = {'train': 72, 'validation': 24, 'test': 32}


def succeed(*arguments: object):
    "Run the command; it must end well."
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, f'{arguments}: {result.exception!r}\n{result.stderr}'
    return result


class Chain:
    "A tiny scene with recordings, simulated into store and catalog, and what each command said."

    def __init__(self, folder: Path):
        self.folder, self.scene, self.run = folder, folder / 'tiny.yaml', folder / 'runs' / 'first'
        description = yaml.safe_load((ROOT / 'heimdall_train' / 'scenes' / 'demo-v1.yaml').read_text())
        self.scene.write_text(yaml.safe_dump({**description, 'name': 'tiny', 'sources': COUNTS}))
        self.where = ['--catalog', folder / 'catalog.db', '--store', folder / 'store']
        self.simulated = succeed('simulate', self.scene, *self.where, '--json')
        self.trained = succeed(
            'train', *self.where, '--cache', folder / 'features', '--out', self.run, '--epochs', 2, '--json',
            '--test-sessions', folder / 'store' / 'scenes' / 'tiny' / 'test.txt',
            '--validation-sessions', folder / 'store' / 'scenes' / 'tiny' / 'validation.txt',
        )
        self.evaluated = succeed('evaluate', '--model', self.run, '--json')
        self.exported = succeed('export', '--model', self.run, '--json')
        self.bundle = self.run / 'bundle'
        self.config = make_config(catalog=str(folder / 'catalog.db'), store=str(folder / 'store'), cache=folder / 'features')

    def inputs(self, count: int) -> dict[str, np.ndarray]:
        data = read_data(self.config)
        return graph_inputs(self.config, data, scene_split(data, 'test')[:count])


@pytest.fixture(scope='module')
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(tmp_path_factory.mktemp('iq'))


def test_simulate_says_what_it_made_and_what_comes_next(chain: Chain):
    assert json.loads(chain.simulated.stdout) == {'dataset': 'tiny', **COUNTS}
    assert '--test-sessions' in chain.simulated.stderr
    assert len(list((chain.folder / 'store' / 'sessions').iterdir())) == sum(COUNTS.values())


def test_evaluation_stands_beside_all_baselines(chain: Chain):
    evaluation = json.loads(chain.evaluated.stdout)
    jsonschema.validate(evaluation, evaluation_schema())
    assert evaluation['n'] == COUNTS['test']
    wanted = {'mean', 'centroid', 'knn', 'extra_trees', 'logdistance', 'levels_kriged', 'tdoa', 'tdoa_kriged'}
    assert set(evaluation['baselines']) == wanted
    assert evaluation['model']['mean_m'] < evaluation['baselines']['tdoa']['mean_m'] < evaluation['baselines']['knn']['mean_m']


def test_scene_on_the_way_gives_the_same_data_and_a_bound(chain: Chain):
    read = read_data(chain.config)
    streamed = read_data(make_config(scene=str(chain.scene), cache=chain.folder / 'streamed'))
    assert isinstance(read, TimedData) and isinstance(streamed, TimedData)
    rows = streamed.rows(read.ids.tolist())
    np.testing.assert_array_equal(read.delay, streamed.delay[rows])
    np.testing.assert_array_equal(read.levels, streamed.levels[rows])
    np.testing.assert_array_equal(read.maps[read.row[:9]], streamed.maps[streamed.row[rows[:9]]])
    bound = scene_bound(load_scene(chain.scene), read.ids[[name.startswith('test') for name in read.ids]], 0)
    assert 5 < bound < json.loads(chain.evaluated.stdout)['model']['rmse_m']


@pytest.mark.parametrize('batch', [1, 2, 7, 32])
def test_graph_agrees_with_torch_with_receivers_missing(chain: Chain, batch: int):
    model, session = load_model(chain.run / 'model.safetensors'), onnx_session(chain.bundle / 'model.onnx')
    inputs, generator = chain.inputs(batch), np.random.default_rng(batch)
    for missing in range(5):
        heard = inputs['heard'].copy()
        for row in range(batch):
            present = np.flatnonzero(heard[row])
            heard[row, generator.choice(present, min(missing, len(present)), replace=False)] = 0
        differences = parity(model, session, {**inputs, 'heard': heard})
        assert agree(differences), (missing, differences)


def test_graph_ignores_what_was_not_heard(chain: Chain):
    session, inputs = onnx_session(chain.bundle / 'model.onnx'), chain.inputs(4)
    inputs['heard'][:, 2] = 0
    answers = []
    for junk in (0.0, 7.0, np.nan):
        iq = inputs['iq'].copy()
        iq[:, 2] = junk
        answers.append(session.run(list(OUTPUTS), {**inputs, 'iq': iq}))
    for answer in answers[1:]:
        for one, other in zip(answers[0], answer, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_slipped_clock_is_named_by_the_graph(chain: Chain):
    session, inputs = onnx_session(chain.bundle / 'model.onnx'), chain.inputs(4)
    inputs['clock_error'][:, 3] -= 50e-6  # its stamps are 50 µs later than it says
    late, sigma = session.run(['late', 'late_sigma'], inputs)
    assert inputs['heard'][:, 3].all() and (np.abs(late / sigma).argmax(axis=1) == 3).all()
    np.testing.assert_allclose(late[:, 3], 50e-6, atol=3e-6)


def test_a_common_time_axis_is_all_that_matters(chain: Chain):
    import torch

    model, inputs = load_model(chain.run / 'model.safetensors'), chain.inputs(6)
    plain, moved = ({name: torch.from_numpy(value) for name, value in inputs.items()} for _ in range(2))
    error = torch.linspace(-3e-4, 3e-4, len(model.network), dtype=torch.float64)
    moved['start_offset'], moved['clock_error'] = plain['start_offset'] + 2.0 + error, plain['clock_error'] + error
    with torch.inference_mode():
        before, after = hand_over(model)(**plain)[1], hand_over(model)(**moved)[1]
    assert (before - after).abs().max() < 0.5


def test_predict_from_files_by_run_and_bundle(chain: Chain, tmp_path: Path):
    manifest = write_manifest(tmp_path / 'field', chain.scene, range(5))
    by_run, by_bundle = (json.loads(succeed('predict', manifest, '--model', model, '--json').stdout) for model in (chain.run, chain.bundle))
    evaluation = {row['session_id']: row for row in evaluated_rows(chain)}
    for one, other in zip(by_run, by_bundle, strict=True):
        assert one['latitude'] == pytest.approx(other['latitude'], abs=1e-6)
        assert one['latitude'] == pytest.approx(evaluation[one['session_id']]['estimated_latitude'], abs=1e-5)
        assert one['note'] == ''


def test_sigmf_recordings_are_located_like_npy(chain: Chain, tmp_path: Path):
    "With the same samples and the same start, to the nanosecond that a stamp has."
    manifest = write_manifest(tmp_path / 'field', chain.scene, range(2))
    expected = json.loads(succeed('predict', manifest, '--model', chain.run, '--json').stdout)
    rows = list(csv.DictReader(manifest.read_text().splitlines()))
    for row in rows:
        path = (tmp_path / 'field' / row['file']).with_suffix('.sigmf-meta')
        np.load(tmp_path / 'field' / row['file']).astype(np.complex64).tofile(path.with_suffix('.sigmf-data'))
        start, offset = datetime.fromisoformat(row['started_at']), float(row['start_offset'])
        assert start.microsecond == 0 and 0 <= offset < 1
        described = {'core:datatype': 'cf32_le', 'core:sample_rate': float(row['sample_rate']), 'core:version': '1.2.0'}
        capture = {'core:sample_start': 0, 'core:datetime': f'{start:%Y-%m-%dT%H:%M:%S}.{round(offset * 1e9):09d}Z'}
        path.write_text(json.dumps({'global': described, 'captures': [capture], 'annotations': []}))
        row['file'], row['duration_s'] = path.name, '1.0'
    write_rows(manifest, rows)
    for one, other in zip(json.loads(succeed('predict', manifest, '--model', chain.run, '--json').stdout), expected, strict=True):
        assert (one['latitude'], one['longitude']) == pytest.approx((other['latitude'], other['longitude']), abs=1e-5)


def test_what_is_odd_about_the_clocks_is_said(chain: Chain, tmp_path: Path):
    "Two clocks are too few for times of arrival, and one that is 50 µs wrong is named; by the run folder and by the bundle."
    manifest = write_manifest(tmp_path / 'field', chain.scene, range(3))
    rows = list(csv.DictReader(manifest.read_text().splitlines()))
    sessions = list(dict.fromkeys(row['session_id'] for row in rows))
    for row in rows:
        place = int(row['file'].rpartition('-')[2].removesuffix('.npy'))
        if row['session_id'] == sessions[1] and place >= 2:
            row['clock_error_s'] = ''
        if row['session_id'] == sessions[2] and place == 1:
            row['clock_error_s'] = '-5e-5'
    write_rows(manifest, rows)
    for model in (chain.run, chain.bundle):
        notes = [answer['note'] for answer in json.loads(succeed('predict', manifest, '--model', model, '--json').stdout)]
        assert notes[0] == '' and notes[1].startswith('2 receiver')
        assert notes[2].startswith('Montanaro is ') and 'late' in notes[2]


def test_damaged_recordings_are_set_aside_and_the_rest_is_located(chain: Chain, tmp_path: Path):
    manifest = write_manifest(tmp_path / 'field', chain.scene, range(4))
    cut = tmp_path / 'field' / 'test-00001-3.npy'
    cut.write_bytes(cut.read_bytes()[:2000])
    result = succeed('predict', manifest, '--model', chain.bundle, '--json')
    answers = json.loads(result.stdout)
    assert len(answers) == 4 and answers[1]['heard'] == answers[0]['heard'] - 1
    assert 'set aside' in result.stderr and 'test-00001-3.npy' in result.stderr


def test_recordings_of_another_length_are_refused_in_one_line(chain: Chain, tmp_path: Path):
    manifest = write_manifest(tmp_path / 'field', chain.scene, range(3), samples=8000)
    result = CliRunner().invoke(app, ['predict', str(manifest), '--model', str(chain.bundle)])
    assert result.exit_code == 2 and '8000 samples at 12500 Hz; the model takes 12500' in result.stderr


def test_ingested_recordings_train_like_simulated_ones(chain: Chain, tmp_path: Path):
    write_manifest(tmp_path / 'field', chain.scene, range(6))
    scene_world(load_scene(chain.scene)).network.to_yaml(tmp_path / 'network.yaml')
    config = make_config(catalog=str(tmp_path / 'catalog.db'), store=str(tmp_path / 'store'), cache=tmp_path / 'features')
    report = ingest_samples(tmp_path / 'field', config, tmp_path / 'network.yaml')
    assert report.sessions == 6 and not report.rejects
    data, simulated = read_data(config), read_data(chain.config)
    rows = simulated.rows(data.ids.tolist())
    np.testing.assert_array_equal(data.delay, simulated.delay[rows])
    assert next(Catalog(config.catalog).sessions()).recordings[0].level_db is not None


def test_two_writers_of_one_cache(chain: Chain, tmp_path: Path):
    scene = load_scene(chain.scene)
    network = scene_world(scene).network
    context = multiprocessing.get_context('spawn')
    writers = [context.Process(target=write_cache, args=(chain.scene, tmp_path)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ['key']
    data = cached_features(tmp_path, 'key', network, lambda: [][1], 12)
    alone = cached_features(tmp_path, 'other', network, lambda: simulate_sessions(scene, 'train', numbers=range(12)), 12)
    np.testing.assert_array_equal(data.maps, alone.maps)


def test_another_scene_of_the_same_name_is_refused(chain: Chain, tmp_path: Path):
    description = yaml.safe_load(chain.scene.read_text())
    (tmp_path / 'tiny.yaml').write_text(yaml.safe_dump({**description, 'repeatability_db': 9.0}))
    with pytest.raises(HeimdallError, match='does not hold scene tiny, seed 0'):
        simulate(str(tmp_path / 'tiny.yaml'), chain.config)


def test_recordings_of_two_rates_do_not_mix(chain: Chain, tmp_path: Path):
    scene = load_scene(chain.scene)
    sessions = list(simulate_sessions(scene, 'train', numbers=range(6)))
    other = [replace(sessions[5], recordings=tuple(replace(each, sample_rate=25_000.0) for each in sessions[5].recordings))]
    with pytest.raises(HeimdallError, match='train-00005.*12500 samples at 25000 Hz where others have 12500 at 12500 Hz'):
        cached_features(tmp_path, 'key', scene_world(scene).network, lambda: sessions[:5] + other, 6)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('spoilt', [np.zeros(12_500, np.complex64), np.full(12_500, np.nan, np.complex64), np.ones(9_000, np.complex64)])
def test_recordings_that_came_into_the_store_otherwise_are_checked(chain: Chain, tmp_path: Path, spoilt: np.ndarray):
    victim = next((chain.folder / 'store' / 'sessions' / 'train-00009').iterdir())
    whole = victim.read_bytes()
    try:
        victim.write_bytes(encode_iq(spoilt))
        lines: list[str] = []
        config = chain.config.model_copy(update={'cache': tmp_path})
        read_data(config, lines.append)
        told = [line for line in lines if 'train-00009' in line and 'left out' in line]
        lines.clear()
        read_data(config, lines.append)  # from the cache, and still told
    finally:
        victim.write_bytes(whole)
    assert len(told) == 1 and told[0] in lines


@pytest.mark.fault
def test_a_full_disk_leaves_no_cache(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scene = load_scene(chain.scene)

    def full(*_, **__):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'posix_fallocate', full)
    with pytest.raises(HeimdallError, match='No space left on device: free some space'):
        cached_features(tmp_path, 'key', scene_world(scene).network, lambda: simulate_sessions(scene, 'train', numbers=range(4)), 4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault
def test_a_damaged_recording_in_the_store_is_left_out_of_training(chain: Chain, tmp_path: Path):
    shutil.copytree(chain.folder / 'store', tmp_path / 'store')
    shutil.copy(chain.folder / 'catalog.db', tmp_path / 'catalog.db')
    damaged = make_config(catalog=str(tmp_path / 'catalog.db'), store=str(chain.folder / 'store'), cache=tmp_path / 'features')
    victim = next((chain.folder / 'store' / 'sessions' / 'train-00007').iterdir())
    whole = victim.read_bytes()
    try:
        victim.write_bytes(whole[:777])
        lines: list[str] = []
        data = read_data(damaged, lines.append)
    finally:
        victim.write_bytes(whole)
    assert any('train-00007' in line and 'left out' in line for line in lines)
    assert len(data) == sum(COUNTS.values())


def write_cache(scene_file: Path, folder: Path) -> None:
    "Compute a cache of twelve sessions."
    scene = load_scene(scene_file)
    cached_features(folder, 'key', scene_world(scene).network, lambda: simulate_sessions(scene, 'train', numbers=range(12)), 12)


def test_the_report_shows_the_worst_cases(chain: Chain):
    page, errors = (chain.run / 'report' / 'report.html').read_text(), [row['error_m'] for row in evaluated_rows(chain)]
    assert page.count('<figure id="figure-worst-') == 12 and 'http://' not in page.replace('http://www.w3.org/2000/svg', '')
    with np.load(chain.run / 'worst.npz') as worst:
        assert worst['maps'].shape == (12, 21, 128, 32)
        assert worst['session_id'][0] == evaluated_rows(chain)[int(np.argmax(errors))]['session_id']


def test_one_answer_is_taken_apart(chain: Chain):
    data, row = read_data(chain.config), evaluated_rows(chain)[0]
    found = explain(load_model(chain.run / 'model.safetensors'), data, row['session_id'])
    assert np.hypot(*(found.position - found.truth)) == pytest.approx(row['error_m'], abs=0.01)
    assert found.heard.sum() == row['heard'] and np.isfinite(found.pull[found.heard]).all()
    assert np.isnan(found.typicality) and row['typical']  # half of 24 validation sessions are too few for a threshold: 19 are needed


def test_a_finished_training_has_nothing_left_to_do(chain: Chain):
    "The last test here: a training makes the bundle of the run invalid."
    before = (chain.run / 'checkpoints' / 'best.safetensors').read_bytes()
    succeed('train', '--resume', '--out', chain.run)
    assert (chain.run / 'checkpoints' / 'best.safetensors').read_bytes() == before
    refused = CliRunner().invoke(app, ['train', '--resume', '--out', str(chain.run), '--epochs', '5'])
    assert refused.exit_code == 2 and 'belong to another training' in refused.stderr


def write_rows(manifest: Path, rows: list[dict]) -> None:
    "Rows of a manifest, all with the same columns."
    with open(manifest, 'w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_manifest(folder: Path, scene_file: Path, numbers: range, samples: int | None = None) -> Path:
    "Test sessions of a scene as somebody else's files."
    rows = []
    for session in simulate_sessions(load_scene(scene_file), 'test', numbers=numbers):
        assert session.source is not None
        for place, recording in enumerate(session.recordings):
            name = f'{session.id}-{place}.npy'
            assert recording.iq is not None
            write_file(folder / name, encode_iq(recording.iq[:samples]))
            rows.append({
                'session_id': session.id, 'receiver': recording.receiver, 'started_at': session.started_at.isoformat(),
                'frequency_hz': session.frequency_hz, 'sample_rate': recording.sample_rate, 'start_offset': recording.start_offset,
                'clock_error_s': recording.clock_error_s, 'lat': session.source.latitude, 'lon': session.source.longitude,
                'source': session.source.name, 'error_m': session.source.error_m, 'file': name,
            })
    write_rows(folder / 'recordings.csv', rows)
    return folder / 'recordings.csv'


def evaluated_rows(chain: Chain) -> list[dict]:
    "Rows of the evaluation's table."
    import pandas as pd

    return pd.read_parquet(chain.run / 'evaluation.parquet').to_dict('records')
