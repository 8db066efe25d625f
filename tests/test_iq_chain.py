"""Recordings from end to end on a tiny scene: commands, graph, cache, and what damaged recordings do."""
import csv
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from xml.etree import ElementTree

import cache_job
import jsonschema
import matplotlib.pyplot as plt
import numpy as np
import pyproj
import pytest
import yaml
from servers import ACCESS_KEY, SECRET_KEY
from typer.testing import CliRunner

from heimdall_train.bounds import scene_bound
from heimdall_train.bundle import read_sample
from heimdall_train.catalog import Catalog
from heimdall_train.cli import app
from heimdall_train.config import make_config
from heimdall_train.data import graph_inputs, ingest_samples, read_data, scene_split, simulate
from heimdall_train.dataset import TimedData, cached_features
from heimdall_train.explain import explain
from heimdall_train.export import OUTPUTS, described, hand_over, onnx_session, recording_inputs
from heimdall_train.fusion import fuse_sources
from heimdall_train.localizer import Localizer
from heimdall_train.metrics import evaluation_schema
from heimdall_train.model_files import load_model
from heimdall_train.network import HeimdallError, Receiver
from heimdall_train.object_store import S3Store
from heimdall_train.recordings import simulate_sessions
from heimdall_train.scene import load_scene, scene_world
from heimdall_train.store import Session, encode_iq, write_file
from heimdall_train.timed_model import TimedNet
from heimdall_train.training import new_learner
from heimdall_train.verification import spoilt_recordings, verify_graph

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


def test_every_export_is_verified(chain: Chain):
    "Batches, receivers missing, weak and noisy signals, shifted starts, clocks: the graph is the model, and the mean error the same."
    verification = json.loads(chain.exported.stdout)['verification']
    wanted = [f'batch of {size}' for size in (1, 2, 7, 32)] + ['1 receiver missing'] + [f'{count} receivers missing' for count in (2, 3, 4)]
    wanted += ['each receiver missing once', 'signals 60 dB weaker', 'noise 0 dB above the signals', 'noise 10 dB above the signals']
    wanted += ['recordings that start apart', 'undisciplined clocks', 'slipped clocks']
    assert list(verification['checks']) == wanted
    assert verification['checks']['each receiver missing once']['sessions'] == 7
    for check in verification['checks'].values():
        assert check['position_share'] < 1 and check['sigma_relative'] < 1e-3 and check['late_deviations'] < 0.01
    mean = json.loads(chain.evaluated.stdout)['model']['mean_m']
    assert verification['mean_error']['sessions'] == COUNTS['test']
    assert abs(verification['mean_error']['onnx_m'] - mean) < 0.1 and abs(verification['mean_error']['torch_m'] - mean) < 0.1
    for text in (json.dumps(described((chain.bundle / 'model.onnx').read_bytes())), (chain.bundle / 'model.json').read_text()):
        assert json.loads(text)['verification'] == verification
    assert f'{verification["mean_error"]["onnx_m"]:.2f} m by the graph' in (chain.bundle / 'MODEL_CARD.md').read_text()
    assert (chain.bundle / 'model.onnx').stat().st_size < 25e6
    int8 = json.loads((chain.bundle / 'model.json').read_text())['int8']
    assert int8['sessions'] == COUNTS['test'] and abs(int8['float_mean_m'] - mean) < 0.1
    decided = int8['validation']  # the first 16 validation sessions gave the scales
    assert decided['sessions'] == COUNTS['validation'] - 16 and decided['float_mean_m'] != int8['float_mean_m']
    assert int8['kept'] == (decided['int8_mean_m'] <= 1.02 * decided['float_mean_m']) == (chain.bundle / 'model.int8.onnx').exists()


def test_shifted_recordings_are_shifted_as_their_starts_say(chain: Chain):
    "The case of the verification is what a receiver that begins later would record: the fix stays where it was."
    inputs = chain.inputs(4)
    case = dict(spoilt_recordings(inputs, 12_500.0, np.random.default_rng(0)))['recordings that start apart']
    assert len({*(case['start_offset'] - inputs['start_offset']).ravel()}) > 10
    session = onnx_session(chain.bundle / 'model.onnx')
    before, after = (session.run(['position_enu'], each)[0] for each in (inputs, case))
    assert np.abs(before - after).max() < 5


@pytest.mark.parametrize(('name', 'condition'), [
    ('batch of 2', lambda inputs: len(inputs['heard']) == 2),
    ('undisciplined clocks', lambda inputs: np.isnan(inputs['clock_error']).any()),
])
def test_a_graph_that_is_wrong_in_one_case_is_refused_and_the_case_named(chain: Chain, monkeypatch: pytest.MonkeyPatch, name: str, condition: Callable):
    model, inputs, session = load_model(chain.run / 'model.safetensors'), chain.inputs(4), onnx_session(chain.bundle / 'model.onnx')

    class Faulty:
        def run(self, names, given):
            answers = session.run(names, given)
            return [answer + 1 if output == 'position_enu' and condition(given) else answer for output, answer in zip(names, answers, strict=True)]

    monkeypatch.setattr('heimdall_train.verification.onnx_session', lambda serialised: Faulty())
    with pytest.raises(HeimdallError, match=f'^verification of the graph, {name}: it differs from the model by 1.0'):
        verify_graph(model, (chain.bundle / 'model.onnx').read_bytes(), inputs, np.zeros((4, 2)))


def test_the_bundle_answers_without_python(chain: Chain, by_node: Callable[..., subprocess.CompletedProcess[str]]):
    done = by_node(chain.bundle)
    assert done.returncode == 0, done.stderr
    fix, (_, expected) = json.loads(done.stdout), read_sample(chain.bundle)
    assert np.abs(np.array([[fix['east_m'], fix['north_m']]]) - expected['position_enu']).max() < 0.1
    assert [fix['latitude'], fix['longitude']] == pytest.approx(expected['position'][0], abs=1e-6)
    assert fix['sigma_east_m'] == pytest.approx(expected['sigma'][0, 0], rel=1e-3)


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


def test_five_lines_locate_what_is_in_memory(chain: Chain, tmp_path: Path):
    "Like the same recordings in files, in a manifest that knows nothing of positions; each fix says from what it follows."
    localizer = Localizer(chain.bundle)
    sessions = list(simulate_sessions(load_scene(chain.scene), 'test', numbers=range(3)))
    fixes = localizer.locate(sessions)
    manifest = write_manifest(tmp_path / 'field', chain.scene, range(3))
    unplaced = ('lat', 'lon', 'source', 'error_m')
    write_rows(manifest, [{name: value for name, value in row.items() if name not in unplaced} for row in csv.DictReader(manifest.read_text().splitlines())])
    assert [fix.row() for fix in localizer.locate(localizer.read([manifest])[0])] == [fix.row() for fix in fixes]
    assert [fix.started_at for fix in fixes] == [session.started_at for session in sessions]
    assert [set(fix.receivers) for fix in fixes] == [{recording.receiver for recording in session.recordings} for session in sessions]
    stored = sorted(Catalog(chain.config.catalog).sessions(ids=[session.id for session in sessions]), key=lambda session: session.id)
    assert [fix.row() for fix in localizer.locate(stored)] == [fix.row() for fix in fixes]
    inputs = recording_inputs(sessions, localizer.answerer.network)
    fed = b''.join(inputs[name][1].tobytes() for name in json.loads((chain.bundle / 'model.json').read_text())['inputs'])
    assert fixes[1].inputs_sha256 == hashlib.sha256(fed).hexdigest()

    def spoilt(**change: object) -> list[Session]:
        first, *rest = sessions[0].recordings
        return [replace(sessions[0], recordings=(replace(first, **change), *rest))]
    for change, words in (({'sample_rate': 8000.0}, '12500 samples at 8000 Hz; the model takes 12500 at 12500 Hz'),
                          ({'iq': np.ones(100, np.complex64)}, '100 samples at 12500 Hz; the model takes 12500 at 12500 Hz'),
                          ({'receiver': 'attic'}, 'receiver attic is not one of the model'), ({'iq': None}, 'no samples, and the model takes recordings')):
        with pytest.raises(HeimdallError, match=words) as refused:
            localizer.locate(spoilt(**change))
        assert 'session test-00000, receiver' in str(refused.value) and '\n' not in str(refused.value)


def test_hyperbolae_have_the_measured_range_difference(chain: Chain, tmp_path: Path):
    "In the KML file, by another library's coordinates; and the differences are those of the places, but for the detours."
    scene = load_scene(chain.scene)
    manifest = write_manifest(tmp_path / 'field', chain.scene, range(3))
    succeed('predict', manifest, '--model', chain.bundle, '--out', tmp_path / 'fixes.kml')
    localizer = Localizer(chain.bundle)
    sessions = list(simulate_sessions(scene, 'test', numbers=range(3)))
    fixes = localizer.locate(sessions, differences=True)
    drawn = [folder for folder in ElementTree.parse(tmp_path / 'fixes.kml').iterfind('.//{*}Folder')]
    to_ecef = pyproj.Transformer.from_crs('EPSG:4979', 'EPSG:4978', always_xy=True)

    def distance(longitude: np.ndarray, latitude: np.ndarray, height: float, receiver: Receiver) -> np.ndarray:
        there = np.stack(to_ecef.transform(longitude, latitude, np.full_like(longitude, height)), axis=-1)
        return np.linalg.norm(there - np.array(to_ecef.transform(receiver.longitude, receiver.latitude, receiver.altitude)), axis=-1)
    detours = []
    for folder, fix, session in zip(drawn, fixes, sessions, strict=True):
        lines = [np.array([[float(value) for value in point.split(',')] for point in (line.findtext('{*}coordinates') or '').split()])
                 for line in folder.iterfind('.//{*}LineString')]
        measured = [difference for difference, _ in fix.hyperbolae()]
        assert len(lines) == len(measured) > 3 and len(folder.findall('.//{*}Polygon')) == 2
        for line, (receiver, reference, metres) in zip(lines, measured, strict=True):
            assert np.abs(distance(*line.T, fix.height, receiver) - distance(*line.T, fix.height, reference) - metres).max() < 1
            assert session.source is not None
            place = np.array([session.source.longitude]), np.array([session.source.latitude]), fix.height
            detours.append(metres - float(distance(*place, receiver)[0] - distance(*place, reference)[0]))
    assert np.median(np.abs(detours)) < 400 and np.abs(detours).max() < 3000  # the scene's mean detour is 200 m


def test_recordings_of_one_transmitter_are_fused(chain: Chain, tmp_path: Path):
    "As `fuse_sources` does it; a bundle does not know what persists, and states an upper bound; two transmitters are refused."
    scene = load_scene(chain.scene)
    sessions = [replace(next(iter(simulate_sessions(scene, 'test', numbers=[5], repeat=repeat))), id=f'call-{repeat}') for repeat in range(3)]
    by_run, by_bundle = Localizer(chain.run), Localizer(chain.bundle)
    fused, careful, alone = by_run.fuse(sessions), by_bundle.fuse(sessions), by_run.locate(sessions)
    model = load_model(chain.run / 'model.safetensors')
    assert isinstance(model, TimedNet)
    data = cached_features(tmp_path, 'three', model.network, lambda rows: iter(sessions), 3)
    expected = fuse_sources(model, data)
    np.testing.assert_allclose(fused.position, expected.positions[0], atol=0.1)
    np.testing.assert_allclose(fused.covariance, expected.covariances[0], rtol=0.01)
    sizes = [np.sqrt(np.linalg.det(fix.covariance)) for fix in (fused, careful, *alone)]
    independent = np.sqrt(np.linalg.det(np.linalg.inv(sum(np.linalg.inv(fix.covariance) for fix in alone))))
    assert independent < sizes[0] < sizes[1]
    np.testing.assert_allclose(sizes[1], 3 * independent, rtol=0.01)
    assert fused.session_id == 'call-0+call-1+call-2' and fused.note == 'fused from 3 recordings'
    assert careful.note.endswith('so the covariance is an upper bound')
    assert fused.started_at == sessions[0].started_at and fused.inputs_sha256 == careful.inputs_sha256
    manifest = write_manifest(tmp_path / 'field', chain.scene, range(2))
    refused = CliRunner().invoke(app, ['predict', str(manifest), '--model', str(chain.bundle), '--fuse'])
    assert refused.exit_code == 2 and refused.stderr.count('\n') == 1 and 'are not of one transmitter in one place: chi-square' in refused.stderr


@pytest.mark.s3
def test_recordings_in_a_bucket_are_located(chain: Chain, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "The manifest and the files that it names, and nothing outside the folder; a missing one is set aside."
    for name, value in (('ENDPOINT', s3), ('ACCESS_KEY', ACCESS_KEY), ('SECRET_KEY', SECRET_KEY)):
        monkeypatch.setenv(f'HEIMDALL_S3_{name}', value)
    manifest = write_manifest(tmp_path / 'field', chain.scene, range(3))
    store = S3Store('s3://heimdall-raw-iq/friday')
    with suppress(store.client.exceptions.BucketAlreadyOwnedByYou, store.client.exceptions.BucketAlreadyExists):
        store.client.create_bucket(Bucket=store.bucket)
    for path in manifest.parent.iterdir():
        store.write(path.name, path.read_bytes())
    here = succeed('predict', manifest, '--model', chain.bundle, '--json').stdout
    assert succeed('predict', 's3://heimdall-raw-iq/friday/recordings.csv', '--model', chain.bundle, '--json').stdout == here
    store.delete('test-00001-2.npy')
    less = succeed('predict', 's3://heimdall-raw-iq/friday', '--model', chain.bundle, '--json')
    assert json.loads(less.stdout)[1]['heard'] == json.loads(here)[1]['heard'] - 1 and 'test-00001-2.npy' in less.stderr
    store.write('recordings.csv', manifest.read_text().replace('test-00000-0.npy', '../outside.npy').encode())
    outside = CliRunner().invoke(app, ['predict', 's3://heimdall-raw-iq/friday', '--model', str(chain.bundle)])
    assert outside.exit_code == 2 and "'../outside.npy' is not a key" in outside.stderr


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
    writers = [context.Process(target=cache_job.write_cache, args=(chain.scene, tmp_path)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ['key']
    data = cached_features(tmp_path, 'key', network, lambda rows: [][1], 12)
    alone = cached_features(tmp_path, 'other', network, lambda rows: simulate_sessions(scene, 'train', numbers=rows), 12)
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
    lines: list[str] = []
    data = cached_features(tmp_path, 'key', scene_world(scene).network, lambda rows: sessions[:5] + other, 6, report=lines.append)
    assert data.ids.tolist() == [session.id for session in sessions[:5]]
    assert len(lines) == len(other[0].recordings)
    assert all('train-00005' in line and '12500 samples at 25000.0 Hz, the first has 12500 at 12500.0 Hz' in line for line in lines)


@pytest.mark.parametrize('spoilt', [np.zeros(12_500, np.complex64), np.full(12_500, np.nan, np.complex64), np.ones(9_000, np.complex64)])
def test_recordings_that_came_into_the_store_otherwise_are_checked(chain: Chain, tmp_path: Path, spoilt: np.ndarray):
    victim = next((chain.folder / 'store' / 'sessions').glob('*-train-00009.npz'))
    whole = victim.read_bytes()
    samples = dict(np.load(victim))
    first = next(iter(samples))
    try:
        np.savez(victim, **{**samples, first: spoilt})
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

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(HeimdallError, match='No space left on device: free some space'):
        cached_features(tmp_path, 'key', scene_world(scene).network, lambda rows: simulate_sessions(scene, 'train', numbers=rows), 4)
    assert list((tmp_path / 'key').iterdir()) == []


@pytest.mark.fault
def test_a_damaged_recording_in_the_store_is_left_out_of_training(chain: Chain, tmp_path: Path):
    shutil.copytree(chain.folder / 'store', tmp_path / 'store')
    shutil.copy(chain.folder / 'catalog.db', tmp_path / 'catalog.db')
    damaged = make_config(catalog=str(tmp_path / 'catalog.db'), store=str(chain.folder / 'store'), cache=tmp_path / 'features')
    victim = next((chain.folder / 'store' / 'sessions').glob('*-train-00007.npz'))
    whole = victim.read_bytes()
    try:
        victim.write_bytes(whole[:777])
        lines: list[str] = []
        data = read_data(damaged, lines.append)
    finally:
        victim.write_bytes(whole)
    assert any('train-00007' in line and 'left out' in line for line in lines)
    assert len(data) == sum(COUNTS.values()) - 1 and 'train-00007' not in data.ids


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


def test_a_learner_of_recordings_shows_maps_and_places(chain: Chain):
    data = read_data(chain.config)
    assert isinstance(data, TimedData)
    training, validation = (data.take(data.rows(scene_split(data, part))) for part in ('train', 'validation'))
    model = load_model(chain.run / 'model.safetensors')
    learner = new_learner(model, [model.anchor], training, np.zeros(len(training), int), validation)
    axes = learner.dls.show_batch(2)
    assert axes.shape == (2, len(data.network)) and [axis.get_title() for axis in axes[0]] == data.network.names
    assert [len(axis.images) for axis in axes[0]] == training.heard[0].astype(int).tolist()
    lines = {line.get_label(): line.get_xydata() for line in learner.show_results(max_n=5).lines}
    shown = np.linspace(0, len(validation) - 1, 5).astype(int)
    np.testing.assert_allclose(lines['truth'] * 1000, validation.enu(model.frame)[shown, :2], atol=0.1)
    assert np.linalg.norm(lines['estimate'] - lines['truth'], axis=1).max() < 5  # kilometres
    plt.close('all')


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
