"""The command line on a tiny network: what it promises to programs that call it, the whole chain, and every fault in one line."""
import csv
import hashlib
import io
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import typer
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat, PublicFormat
from safetensors.numpy import load_file
from servers import ACCESS_KEY, SECRET_KEY
from typer.testing import CliRunner

from heimdall_train.bundle import model_schema, read_sample
from heimdall_train.catalog import Catalog
from heimdall_train.cli import app
from heimdall_train.config import Config, make_config
from heimdall_train.data import watch
from heimdall_train.ingest import IngestReport
from heimdall_train.jobs import CHOSEN
from heimdall_train.localizer import Localizer
from heimdall_train.metrics import clopper_pearson, evaluation_schema
from heimdall_train.network import HeimdallError
from heimdall_train.object_store import S3Settings, S3Store
from heimdall_train.pipeline import write_scene_table
from heimdall_train.registry import register_bundle
from heimdall_train.tracking import tracked_run

ROOT = Path(__file__).resolve().parent.parent
RUN_NOTEBOOK = ROOT / 'nbs' / 'runs' / 'train.ipynb'
SESSIONS = {'train': 120, 'validation': 40, 'test': 40}

# What other people's scripts may rely on: a change here is a change of the interface, and belongs into CHANGELOG.md.
OPTIONS = {
    'catalog init': ['--catalog', '--debug', '--json', '--quiet'],
    'catalog upgrade': ['--catalog', '--debug', '--json', '--quiet'],
    'demo': ['--debug', '--epochs', '--json', '--out', '--quiet', '--scene', '--seed'],
    'doctor': ['--catalog', '--debug', '--json', '--out', '--quiet', '--store', '--tracking'],
    'evaluate': ['--catalog', '--dataset', '--debug', '--json', '--model', '--quiet', '--seed', '--test-sessions', '--tracking'],
    'export': ['--catalog', '--dataset', '--debug', '--json', '--model', '--quiet', '--tracking'],
    'features': ['--allow-rejects', '--cache', '--catalog', '--celery', '--dataset', '--debug', '--json', '--quiet', '--store'],
    'ingest levels': ['--allow-rejects', '--catalog', '--dataset', '--debug', '--json', '--quiet', '--store'],
    'ingest recordings': ['--allow-rejects', '--catalog', '--dataset', '--debug', '--json', '--network', '--quiet', '--store'],
    'publish': ['--debug', '--json', '--quiet', '--to'],
    'sign': ['--debug', '--json', '--key', '--quiet'],
    'verify': ['--debug', '--json', '--key', '--quiet'],
    'serve': ['--debug', '--host', '--port', '--quiet'],
    'report': ['--debug', '--json', '--out', '--quiet'],
    'models compare': ['--debug', '--json', '--quiet', '--tracking'],
    'models list': ['--debug', '--json', '--quiet', '--tracking'],
    'models promote': ['--catalog', '--debug', '--force', '--json', '--quiet', '--tracking'],
    'models rollback': ['--catalog', '--debug', '--json', '--quiet', '--tracking'],
    'predict': ['--allow-rejects', '--debug', '--format', '--fuse', '--json', '--model', '--out', '--quiet', '--tracking'],
    'simulate': ['--catalog', '--dataset', '--debug', '--json', '--quiet', '--seed', '--sessions', '--store'],
    'sweep': ['--debug', '--json', '--out', '--quiet', '--tracking'],
    'train': ['--allow-rejects', '--cache', '--catalog', '--dataset', '--debug', '--epochs', '--gain-drift', '--json', '--out', '--quiet',
              '--resume', '--scene', '--scene-seed', '--seed', '--store', '--test-seed', '--test-sessions', '--tracking', '--validation-sessions'],
    'worker': ['--debug', '--quiet'],
}
FIELDS = ['allow_rejects', 'batch_size', 'cache', 'catalog', 'dataset', 'epochs', 'gain_drift', 'heads', 'learning_rate', 'model', 'out', 'resume',
          'scene', 'scene_seed', 'seed', 'store', 'test_seed', 'test_sessions', 'tracking', 'validation_sessions']


def commands(command, name: str = '') -> Iterator[tuple[str, list[str]]]:
    "Each command that does something, with the names of its options, sorted."
    if hasattr(command, 'commands'):
        for part, below in command.commands.items():
            yield from commands(below, f'{name} {part}'.strip())
    else:
        options = [param for param in command.params if param.param_type_name == 'option']
        yield name, sorted(option for param in options for option in param.opts + param.secondary_opts)


def test_options_are_frozen():
    assert dict(commands(typer.main.get_command(app))) == OPTIONS


def test_fields_are_frozen():
    assert sorted(Config.model_fields) == FIELDS


def test_options_are_fields():
    options = {option.removeprefix('--').replace('-', '_') for names in OPTIONS.values() for option in names}
    own = {'json', 'debug', 'quiet', 'sessions', 'network', 'host', 'port', 'celery', 'key', 'to', 'format', 'fuse', 'force'}  # of a command, not of a run
    assert options - own <= set(FIELDS)


def test_the_same_names_everywhere():
    "A field that is added is to be set by papermill and by a job as well, or it is said here why not."
    cells = nbformat.read(RUN_NOTEBOOK, 4).cells
    parameters, = (cell.source for cell in cells if 'parameters' in cell.metadata.get('tags', []))
    assert {line.split(' = ')[0] for line in parameters.splitlines()} == set(FIELDS) - {'model', 'resume', 'allow_rejects'}  # of other commands
    assert set(CHOSEN) == set(FIELDS) - {'model', 'resume', 'out', 'cache', 'tracking'}  # the service decides on these


def call(*arguments: object):
    "Run the command in this process."
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: object):
    "Run the command; it must end well."
    result = call(*arguments)
    assert result.exit_code == 0, f'{arguments}: {result.exception!r}\n{result.stderr}'
    return result


class Chain:
    "A tiny network, and what each command said about it."

    def __init__(self, folder: Path):
        self.folder, self.scene = folder, folder / 'scene'
        self.catalog, self.store, self.run = folder / 'catalog.db', folder / 'store', folder / 'runs' / 'first'
        description = yaml.safe_load((ROOT / 'heimdall_train' / 'scenes' / 'testbed-v1.yaml').read_text())
        (folder / 'tiny.yaml').write_text(yaml.safe_dump({**description, 'name': 'tiny', 'receivers': 8}))
        self.table = write_scene_table(str(folder / 'tiny.yaml'), self.scene, sources=SESSIONS)
        self.ingested = succeed('ingest', 'levels', self.table, '--catalog', self.catalog, '--store', self.store, '--json')
        self.trained = self.train(self.run)
        self.evaluated = succeed('evaluate', '--model', self.run, '--catalog', self.catalog, '--json')
        self.exported = succeed('export', '--model', self.run, '--catalog', self.catalog, '--json')
        self.bundle = self.run / 'bundle'

    def train(self, out: Path):
        return succeed(*self.to_train(out), '--json')

    def to_train(self, out: Path) -> list[object]:
        return ['train', '--catalog', self.catalog, '--out', out, '--epochs', 1, '--test-sessions', self.scene / 'test.txt']

    def ids(self) -> list[str]:
        with open(self.table, newline='') as file:
            return [row['session_id'] for row in csv.DictReader(file)]


@pytest.fixture(scope='module')
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(tmp_path_factory.mktemp('chain'))


def test_ingest(chain: Chain):
    report = json.loads(chain.ingested.stdout)
    assert (report['dataset'], report['sessions'], report['unchanged'], report['rejects']) == ('scene', len(chain.ids()), 0, [])
    again = succeed('ingest', 'levels', chain.table, '--catalog', chain.catalog, '--store', chain.store)
    assert again.stdout == f'dataset scene already holds these {len(chain.ids())} sessions; nothing changed\n'
    assert f'heimdall-train train --catalog {chain.catalog}' in again.stderr


def test_train(chain: Chain):
    record = json.loads(chain.trained.stdout)
    assert record['epoch'] == 1 and record['variance_scale'] > 0 and record['seconds']['samples_per_second'] > 0
    assert 'epoch 1/1: validation loss' in chain.trained.stderr
    written = yaml.safe_load((chain.run / 'config.yaml').read_text())
    assert written['epochs'] == 1 and written['catalog'] == str(chain.catalog)
    split = json.loads((chain.run / 'split.json').read_text())
    assert split['test'] == (chain.scene / 'test.txt').read_text().split()
    assert (chain.run.parent / 'mlflow.db').exists()


def test_evaluate(chain: Chain):
    evaluation = json.loads(chain.evaluated.stdout)
    jsonschema.validate(evaluation, evaluation_schema())
    assert evaluation['n'] == len((chain.scene / 'test.txt').read_text().split())
    assert {'mean', 'centroid', 'knn', 'extra_trees', 'logdistance', 'levels_kriged'} == set(evaluation['baselines'])
    assert evaluation['model']['mean_m'] < evaluation['baselines']['mean']['mean_m']
    kept = json.loads((chain.run / 'metrics.json').read_text())['evaluation']
    assert kept == evaluation
    for name in ('report/report.html', 'report/map.png', 'report/errors.svg', 'report/calibration.png', 'evaluation.parquet', 'metrics.json'):
        assert (chain.run / name).stat().st_size > 0


def test_a_report_needs_only_what_was_kept(chain: Chain, tmp_path: Path):
    for source in (chain.run, chain.bundle):
        page = Path(json.loads(succeed('report', source, '--out', tmp_path / source.name, '--json').stdout)['report'])
        assert page.read_bytes() == (chain.run / 'report' / 'report.html').read_bytes()
    fail('run heimdall-train evaluate first', 'report', tmp_path / 'nowhere', '--out', tmp_path / 'out')
    (tmp_path / 'evaluation.parquet').write_bytes((chain.run / 'evaluation.parquet').read_bytes()[:5000])
    fail('run heimdall-train evaluate again', 'report', tmp_path, '--out', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_other_sessions_stand_beside_the_runs_own(chain: Chain, tmp_path: Path):
    own = (chain.run / 'evaluation.parquet').read_bytes()
    (tmp_path / 'few.txt').write_text('\n'.join(json.loads((chain.run / 'split.json').read_text())['test'][:15]))
    other = json.loads(succeed('evaluate', '--model', chain.run, '--catalog', chain.catalog, '--test-sessions', tmp_path / 'few.txt', '--json').stdout)
    assert (other['n'], other['split']) == (15, 'few') and (chain.run / 'evaluation.parquet').read_bytes() == own
    metrics = json.loads((chain.run / 'metrics.json').read_text())
    assert metrics['evaluation'] == json.loads(chain.evaluated.stdout) and metrics['other_sessions']['few']['evaluation'] == other
    assert (chain.run / 'report-few' / 'report.html').exists() and (chain.run / 'evaluation-few.parquet').exists()


def test_what_the_model_promises_is_kept_with_it(chain: Chain):
    record, found = json.loads(chain.trained.stdout), json.loads((chain.run / 'metrics.json').read_text())['uncertainty']
    radii = record['conformal']['radii']
    described = json.loads((chain.bundle / 'model.json').read_text())['calibration']
    assert described['conformal_radii'] == radii == found['conformal']['radii']
    told = [radius for radius in radii.values() if radius is not None]
    assert told == sorted(told) and told[0] > 0 and record['conformal']['sessions'] >= 10
    assert 0 <= found['typicality']['flagged'] <= 1 and found['model']['nees_if_honest'][0] < 2 < found['model']['nees_if_honest'][1]


def test_export(chain: Chain):
    answer = json.loads(chain.exported.stdout)
    assert answer['bundle'] == str(chain.bundle)
    checks, mean = answer['verification']['checks'], answer['verification']['mean_error']
    assert {'batch of 32', '1 receiver missing', 'each receiver missing once', 'levels 60 dB lower'} <= set(checks)
    assert all(check['position_share'] < 1 and check['sigma_relative'] < 1e-3 for check in checks.values())
    assert abs(mean['onnx_m'] - json.loads(chain.evaluated.stdout)['model']['mean_m']) < 0.1
    assert f'heimdall-train predict TABLE.csv --model {chain.bundle}' in chain.exported.stderr


def test_the_description_fits_its_schema_and_the_card_says_what_it_should(chain: Chain):
    description = json.loads((chain.bundle / 'model.json').read_text())
    jsonschema.validate(description, model_schema())
    assert description['tensors']['levels'] == {'type': 'float32', 'shape': ['batch', 8], 'meaning': 'received level, dB; anything where not heard'}
    card = (chain.bundle / 'MODEL_CARD.md').read_text()
    for section in ('Trained on', 'Where it holds', 'Where it does not', 'Errors', 'Calibration', 'The graph beside the model', 'Physics', 'Licence'):
        assert f'\n## {section}' in card
    count = round(description['metrics']['coverage']['90'] * len((chain.scene / 'test.txt').read_text().split()))
    low, high = clopper_pearson(count, 40)
    assert f'| 90% | {count / 40:.1%} | {low:.1%} to {high:.1%} |' in card


def test_the_bundle_answers_without_python(chain: Chain, by_node: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path):
    done = by_node(chain.bundle)
    assert done.returncode == 0, done.stderr
    fix, (inputs, expected) = json.loads(done.stdout), read_sample(chain.bundle)
    assert np.abs(np.array([[fix['east_m'], fix['north_m']]]) - expected['position_enu']).max() < 0.1
    inputs['levels'][inputs['heard'] == 0] = np.nan
    (tmp_path / 'own.json').write_text(json.dumps({name: values.tolist() for name, values in inputs.items()}).replace('NaN', 'null'))
    assert json.loads(by_node(chain.bundle, tmp_path / 'own.json').stdout) == fix
    altered = shutil.copytree(chain.bundle, tmp_path / 'bundle')
    (altered / 'model.json').write_bytes((altered / 'model.json').read_bytes().replace(b'45', b'46', 1))
    refused = by_node(altered)
    assert refused.returncode == 2 and refused.stdout == '' and 'model.json was altered' in refused.stderr


def test_a_published_bundle_is_the_bundle(chain: Chain, tmp_path: Path):
    published = json.loads(succeed('publish', chain.bundle, '--to', tmp_path / 'models', '--json').stdout)
    assert published['version'] == 1 and published['files'] == len(list(chain.bundle.iterdir()))
    there = tmp_path / 'models' / 'v1'
    assert {path.name: path.read_bytes() for path in there.iterdir() if path.name != 'CLAIM'} == {
        path.name: path.read_bytes() for path in chain.bundle.iterdir()}
    assert json.loads(succeed('verify', there, '--json').stdout)['sample_m'] < 0.1
    assert succeed('publish', chain.bundle, '--to', tmp_path / 'models').stdout.endswith('v1: was there already\n')
    (there / 'MODEL_CARD.md').write_text('perfect')
    fail('altered', 'verify', there)
    fail('altered', 'publish', there, '--to', tmp_path / 'models')


def write_keys(folder: Path, passphrase: bytes | None = None) -> tuple[Path, Path]:
    "Files of a private and a public key."
    key = ec.generate_private_key(ec.SECP256R1())
    encryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    folder.mkdir()
    (folder / 'private.pem').write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    (folder / 'public.pem').write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return folder / 'private.pem', folder / 'public.pem'


def test_a_signature_holds_for_one_bundle_and_one_key(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bundle = shutil.copytree(chain.bundle, tmp_path / 'bundle')
    (private, public), (locked, its_public) = write_keys(tmp_path / 'one'), write_keys(tmp_path / 'locked', b'canary-passphrase')
    fail('nobody has signed', 'verify', bundle, '--key', public)
    assert succeed('sign', bundle, '--key', private).stdout == f'{bundle / "model.sig"}\n'
    assert json.loads(succeed('verify', bundle, '--key', public, '--json').stdout)['signature'] is True
    fail('not the signature of this bundle by the key', 'verify', bundle, '--key', its_public)
    whole = (bundle / 'model.sig').read_bytes()
    for damaged in (whole[:-40], b'', b'{}', whole.replace(b'sig', b'gis', 1)):
        (bundle / 'model.sig').write_bytes(damaged)
        fail('not the signature of this bundle by the key', 'verify', bundle, '--key', public)
    (bundle / 'model.sig').write_bytes(whole)
    (bundle / 'MODEL_CARD.md').write_text('perfect')  # and its sum made right by whoever wrote it
    lines = (bundle / 'SHA256SUMS').read_text().splitlines()
    digest = hashlib.sha256(b'perfect').hexdigest()
    (bundle / 'SHA256SUMS').write_text(''.join(f'{digest}  MODEL_CARD.md\n' if line.endswith('MODEL_CARD.md') else f'{line}\n' for line in lines))
    succeed('verify', bundle)
    fail('not the signature of this bundle by the key', 'verify', bundle, '--key', public)
    for key, words in ((tmp_path / 'missing.pem', 'No such file'), (chain.table, 'no public elliptic-curve key'), (private, 'no public elliptic-curve key')):
        fail(words, 'verify', bundle, '--key', key)
    for key in (locked, chain.table, public):
        fail('HEIMDALL_SIGN_PASSPHRASE', 'sign', bundle, '--key', key)
    monkeypatch.setenv('HEIMDALL_SIGN_PASSPHRASE', 'canary-passphrase')
    signed = succeed('sign', bundle, '--key', locked)
    assert 'canary' not in signed.stdout + signed.stderr
    succeed('verify', bundle, '--key', its_public)


@pytest.mark.s3
def test_a_signature_is_asked_for_wherever_the_bundle_comes_from(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: str):
    for name, value in (('ENDPOINT', s3), ('ACCESS_KEY', ACCESS_KEY), ('SECRET_KEY', SECRET_KEY)):
        monkeypatch.setenv(f'HEIMDALL_S3_{name}', value)
    store = S3Store('s3://signed-models/localization', S3Settings())
    store.client.create_bucket(Bucket=store.bucket)
    (private, public), (_, another) = write_keys(tmp_path / 'one'), write_keys(tmp_path / 'other')
    bundle, cache = shutil.copytree(chain.bundle, tmp_path / 'bundle'), tmp_path / 'cache'
    for name in bundle.iterdir():
        store.write(f'v1/{name.name}', name.read_bytes())
    with pytest.raises(HeimdallError, match=r'model\.sig'):
        Localizer(f'{store.root}/v1', cache=cache, key=public)
    succeed('sign', bundle, '--key', private)
    store.write('v1/model.sig', (bundle / 'model.sig').read_bytes())
    for model in (bundle, f'{store.root}/v1'):
        assert Localizer(model, cache=cache, key=public).answerer.identity.sha256 == hashlib.sha256((bundle / 'model.onnx').read_bytes()).hexdigest()
        with pytest.raises(HeimdallError, match='not the signature of this bundle by the key'):
            Localizer(model, cache=cache, key=another)
    with pytest.raises(HeimdallError, match='a run folder is not signed'):
        Localizer(chain.run, key=public)


def test_signatures_without_the_extra_are_one_line(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.startswith('model_signing')]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'model_signing', None)
    fail("pip install '.[sign]'", 'verify', chain.bundle, '--key', tmp_path / 'public.pem')
    fail("pip install '.[sign]'", 'sign', chain.bundle, '--key', tmp_path / 'private.pem')


@pytest.mark.fault
def test_what_the_sums_cannot_see_is_refused(chain: Chain, tmp_path: Path):
    "A bundle whose sums are right, but which is not one: a weight elsewhere, a description of another format, a wrong answer, a file outside."
    import onnx

    def altered(name: str, content: bytes) -> Path:
        bundle = shutil.copytree(chain.bundle, tmp_path / secrets.token_hex(4))
        (bundle / name).write_bytes(content)
        names = [line.partition('  ')[2] for line in (bundle / 'SHA256SUMS').read_text().splitlines()]
        (bundle / 'SHA256SUMS').write_text(''.join(f'{hashlib.sha256((bundle / each).read_bytes()).hexdigest()}  {each}\n' for each in names))
        return bundle

    proto = onnx.load(chain.bundle / 'model.onnx')
    proto.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    fail('external data', 'verify', altered('model.onnx', proto.SerializeToString()))
    description, sample = (json.loads((chain.bundle / name).read_text()) for name in ('model.json', 'sample.json'))
    fail('model.json: format', 'verify', altered('model.json', json.dumps({**description, 'format': 2}).encode()))
    fail('receivers[0]', 'verify', altered('model.json', json.dumps({**description, 'receivers': [{'name': 'Torino'}]}).encode()))
    sample['position_enu'][0][0] += 30
    fail('answers its sample 30.00 m off', 'verify', altered('sample.json', json.dumps(sample).encode()))
    bundle = shutil.copytree(chain.bundle, tmp_path / 'outside')
    with (bundle / 'SHA256SUMS').open('a') as sums:
        sums.write(f'{"0" * 64}  ../table.csv\n')
    fail('SHA256SUMS is not whole', 'verify', bundle)


def test_predict_the_same_from_run_and_bundle(chain: Chain, tmp_path: Path):
    both = [succeed('predict', chain.table, '--model', model, '--json') for model in (chain.run, chain.bundle)]
    from_run, from_bundle = (json.loads(result.stdout) for result in both)
    assert [answer['session_id'] for answer in from_run] == [answer['session_id'] for answer in from_bundle] == chain.ids()
    for name, tolerance in (('latitude', 1e-6), ('longitude', 1e-6), ('sigma_east_m', 0.1), ('sigma_north_m', 0.1), ('heard', 0)):
        assert np.allclose([answer[name] for answer in from_run], [answer[name] for answer in from_bundle], rtol=0, atol=tolerance)
    shown = succeed('predict', chain.table, '--model', chain.bundle).stdout
    rows = list(csv.DictReader(io.StringIO(shown)))
    assert [float(row['latitude']) for row in rows] == [answer['latitude'] for answer in from_bundle]
    assert succeed('predict', chain.table, '--model', chain.bundle, '--out', tmp_path / 'answers.csv').stdout == ''
    assert list(csv.DictReader((tmp_path / 'answers.csv').read_text().splitlines())) == rows


def test_formats_of_predict(chain: Chain, tmp_path: Path):
    "The same fixes for a table, a map and a globe; the ending of the file or --format says which."
    rows = json.loads(succeed('predict', chain.table, '--model', chain.bundle, '--json', '--out', tmp_path / 'fixes.geojson').stdout)
    features = json.loads((tmp_path / 'fixes.geojson').read_text())['features']
    points = [feature for feature in features if feature['geometry']['type'] == 'Point']
    assert [point['geometry']['coordinates'] for point in points] == [pytest.approx([row['longitude'], row['latitude']], abs=1e-8) for row in rows]
    assert points[3]['properties'] == {**rows[3], 'shape': 'position'} and len(features) == 3 * len(rows)
    shown = ElementTree.fromstring(succeed('predict', chain.table, '--model', chain.bundle, '--format', 'kml').stdout)
    assert len(shown.findall('.//{*}Polygon')) == 2 * len(rows) and not shown.findall('.//{*}LineString')  # levels have no hyperbolae
    network = json.loads((chain.bundle / 'model.json').read_text())['receivers']
    heard = {row['session_id']: row['receivers'] for row in rows}
    with open(chain.table, newline='') as file:
        assert all(heard[row['session_id']] == [each['name'] for each in network if row[each['name']]] for row in csv.DictReader(file))
    digest = hashlib.sha256((chain.bundle / 'model.onnx').read_bytes()).hexdigest()
    assert {(row['model_name'], row['model_version'], row['model_sha256']) for row in rows} == {(str(chain.bundle), None, digest)}
    fail("'txt' is not a format of locations: choose csv, geojson, kml", 'predict', chain.table, '--model', chain.bundle, '--out', tmp_path / 'fixes.txt')
    fail('--json and --format both', 'predict', chain.table, '--model', chain.bundle, '--json', '--format', 'csv')
    fail('not of one transmitter in one place', 'predict', chain.table, '--model', chain.bundle, '--fuse')
    fail('is in another table too', 'predict', chain.table, chain.table, '--model', chain.bundle)


def test_a_table_to_locate_needs_no_positions(chain: Chain, tmp_path: Path):
    with open(chain.table, newline='') as file:
        rows = list(csv.reader(file))[:5]
    (tmp_path / 'unknown.csv').write_text('\n'.join(','.join(row[:2] + row[4:]) for row in rows))
    located = json.loads(succeed('predict', tmp_path / 'unknown.csv', '--model', chain.bundle, '--json').stdout)
    assert [answer['session_id'] for answer in located] == [row[0] for row in rows[1:]]


def test_the_way_to_the_champion_and_back(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "Two versions of a model: the gate, a forced promotion, the champion's answers, and back."
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    shutil.copytree(chain.run.parent, runs := tmp_path / 'runs', ignore=shutil.ignore_patterns('again', 'papermill'))
    registry = ['--tracking', f'sqlite:///{runs / "mlflow.db"}']
    first, = json.loads(succeed('models', 'list', *registry, '--json').stdout)
    assert (first['version'], first['aliases'], first['promoted_at'], first['forced']) == (1, ['challenger'], None, None)
    assert first['mean_m'] == pytest.approx(json.loads(chain.evaluated.stdout)['model']['mean_m'])
    assert first['model_sha256'] == hashlib.sha256((chain.bundle / 'model.onnx').read_bytes()).hexdigest()
    fail('has no version champion', 'predict', chain.table, '--model', 'models:/localization_model@champion', *registry)
    fail('had no champion before', 'models', 'rollback', *registry)
    catalog = shutil.copy(chain.catalog, tmp_path / 'catalog.db')
    crowning = succeed('models', 'promote', *registry, '--catalog', catalog, '--force', 'one epoch, and nothing better yet')
    assert 'version 1 is the champion' in crowning.stderr
    assert [model['mlflow_run_id'] for model in Catalog(str(catalog)).models() if model['is_production']] == [first['run_id']]
    fail('is the champion already', 'models', 'promote', 'challenger', *registry)
    worse = shutil.copytree(chain.bundle, tmp_path / 'worse')
    evaluation = pd.read_parquet(worse / 'evaluation.parquet')
    evaluation['error_m'] *= 1.5
    evaluation.to_parquet(worse / 'evaluation.parquet', index=False)
    names = [line.partition('  ')[2] for line in (worse / 'SHA256SUMS').read_text().splitlines()]
    (worse / 'SHA256SUMS').write_text(''.join(f'{hashlib.sha256((worse / name).read_bytes()).hexdigest()}  {name}\n' for name in names))
    with tracked_run(registry[1], worse, run_id=first['run_id']) as run:
        assert register_bundle(run, worse, {'levels': np.full((1, 8), -70, np.float32), 'heard': np.ones((1, 8), np.float32)}) == 2
    compared = json.loads(succeed('models', 'compare', '2', 'champion', *registry, '--json').stdout)
    checks = {check['name']: check['passed'] for check in compared['checks']}
    assert checks['test set'] and not checks['error'] and checks['size'] and not compared['passed']
    assert compared['difference_m'] == pytest.approx(evaluation['error_m'].mean() / 3) and 0 < compared['interval_m'][0] < compared['difference_m']
    assert 'error: mean' in fail('does not pass the gate', 'models', 'promote', '2', *registry)
    succeed('models', 'promote', '2', *registry, '--force', 'a demonstration')
    listed = json.loads(succeed('models', 'list', *registry, '--json').stdout)
    assert (listed[0]['version'], listed[0]['forced'], listed[0]['aliases']) == (2, 'a demonstration', ['challenger', 'champion'])
    assert 'forced: a demonstration' in succeed('models', 'list', *registry).stdout
    assert 'version 1 is the champion again' in succeed('models', 'rollback', *registry).stdout
    champion = json.loads(succeed('predict', chain.table, '--model', 'models:/localization_model@champion', *registry, '--json').stdout)
    by_bundle = json.loads(succeed('predict', chain.table, '--model', chain.bundle, '--json').stdout)
    assert {(row.pop('model_name'), row.pop('model_version')) for row in champion} == {('localization_model', '1')}
    assert champion == [{name: value for name, value in row.items() if name not in ('model_name', 'model_version')} for row in by_bundle]


def test_a_registered_model_has_its_signature_and_an_example(chain: Chain):
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f'sqlite:///{chain.run.parent / "mlflow.db"}')
    version = client.get_model_version('localization_model', '1')
    folder = Path(client.download_artifacts(version.run_id, version.tags['bundle'], str(chain.folder)))
    assert (folder / 'SHA256SUMS').read_bytes() == (chain.bundle / 'SHA256SUMS').read_bytes()
    described, = (path.parent for path in (chain.run.parent / 'mlartifacts').rglob('MLmodel') if version.source.rpartition('/')[2] in path.parts)
    model, sample = mlflow.models.Model.load(str(described)), json.loads((chain.bundle / 'sample.json').read_text())
    assert set(model.signature.inputs.input_names()) == {'levels', 'heard'} and {'position', 'covariance'} <= set(model.signature.outputs.input_names())
    np.testing.assert_allclose(model.load_input_example(str(described))['levels'], sample['levels'], rtol=1e-6)
    answer = mlflow.pyfunc.load_model(str(described)).predict(model.load_input_example(str(described)))
    np.testing.assert_allclose(answer['position'], sample['position'], rtol=0, atol=1e-6)


@pytest.mark.s3
def test_a_bundle_and_a_table_in_a_bucket(chain: Chain, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "Fetched once, checked against its digests, and refused where a file was altered."
    for name, value in (('ENDPOINT', s3), ('ACCESS_KEY', ACCESS_KEY), ('SECRET_KEY', SECRET_KEY)):
        monkeypatch.setenv(f'HEIMDALL_S3_{name}', value)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    store = S3Store('s3://heimdall-models/localization/v7')
    with suppress(store.client.exceptions.BucketAlreadyOwnedByYou, store.client.exceptions.BucketAlreadyExists):
        store.client.create_bucket(Bucket=store.bucket)
    for path in chain.bundle.iterdir():
        store.write(path.name, path.read_bytes())
    S3Store('s3://heimdall-models/monday').write('levels.csv', chain.table.read_bytes())
    by_bundle = succeed('predict', chain.table, '--model', chain.bundle).stdout.replace(f',{chain.bundle},,', ',s3://heimdall-models/localization/v7,7,')
    asked = ['--model', 's3://heimdall-models/localization/v7']
    assert succeed('predict', 's3://heimdall-models/monday/levels.csv', *asked).stdout == by_bundle
    assert succeed('predict', 's3://heimdall-models/monday', *asked).stdout == by_bundle
    run = 's3://heimdall-models/runs/monday'
    S3Store(run).write('model.safetensors', (chain.run / 'model.safetensors').read_bytes())
    assert succeed('predict', chain.table, '--model', run).stdout == succeed('predict', chain.table, '--model', chain.run).stdout.replace(str(chain.run), run)
    fail(f'{run}: results are written into the run folder: copy it to this machine first', 'evaluate', '--model', run)
    store.write('model.onnx', (chain.bundle / 'model.onnx').read_bytes().replace(b'e', b'f', 1))
    assert succeed('predict', chain.table, *asked).stdout == by_bundle  # of the cache, which is whole
    shutil.rmtree(tmp_path / 'cache')
    fail('model.onnx of the bundle is not what its SHA256SUMS says', 'predict', chain.table, *asked)
    fail('there is no such object', 'predict', chain.table, '--model', 's3://heimdall-models/localization/v8')
    fail('there is no such object', 'predict', 's3://heimdall-models/tuesday/levels.csv', '--model', chain.bundle)


@pytest.mark.s3
def test_a_level_table_is_ingested_from_a_bucket(chain: Chain, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in (('ENDPOINT', s3), ('ACCESS_KEY', ACCESS_KEY), ('SECRET_KEY', SECRET_KEY)):
        monkeypatch.setenv(f'HEIMDALL_S3_{name}', value)
    store = S3Store('s3://heimdall-datasets/tables')
    with suppress(store.client.exceptions.BucketAlreadyOwnedByYou, store.client.exceptions.BucketAlreadyExists):
        store.client.create_bucket(Bucket=store.bucket)
    place = f's3://heimdall-datasets/tables/{chain.table.parent.name}'
    where = '--catalog', tmp_path / 'catalog.db', '--store', tmp_path / 'store', '--json'
    fail('there is no such object', 'ingest', 'levels', f'{place}/levels.csv', *where)
    store.write(f'{chain.table.parent.name}/levels.csv', chain.table.read_bytes())
    fail(f'there is no {place}/receivers.csv', 'ingest', 'levels', f'{place}/levels.csv', *where)
    store.write(f'{chain.table.parent.name}/receivers.csv', (chain.table.parent / 'receivers.csv').read_bytes())
    there, here = json.loads(succeed('ingest', 'levels', f'{place}/levels.csv', *where).stdout), json.loads(chain.ingested.stdout)
    assert {**there, 'table_uri': None} == {**here, 'table_uri': None}
    assert Catalog(str(tmp_path / 'catalog.db')).network() == Catalog(str(chain.catalog)).network()


def test_the_same_seed_gives_the_same_model_and_a_finished_training_has_nothing_left_to_do(chain: Chain):
    out = chain.run.parent / 'again'
    chain.train(out)
    first, again = (load_file(folder / 'model.safetensors') for folder in (chain.run, out))
    assert first.keys() == again.keys()
    assert [name for name in first if not np.array_equal(first[name], again[name], equal_nan=True)] == []
    before = [(out / name).read_bytes() for name in ('checkpoints/best.safetensors', 'split.json')]
    succeed('train', '--resume', '--out', out)
    assert [(out / name).read_bytes() for name in ('checkpoints/best.safetensors', 'split.json')] == before
    refused = call('train', '--resume', '--out', out, '--epochs', 5)
    assert refused.exit_code == 2 and 'belong to another training' in refused.stderr


def test_papermill(chain: Chain, tmp_path: Path):
    out = chain.run.parent / 'papermill'
    parameters = {'epochs': 1, 'catalog': str(chain.catalog), 'out': str(out), 'test_sessions': str(chain.scene / 'test.txt')}
    notebook = papermill.execute_notebook(RUN_NOTEBOOK, tmp_path / 'out.ipynb', parameters, progress_bar=False, cwd=tmp_path)
    outputs = [output for cell in notebook.cells for output in cell.get('outputs', [])]
    assert any('| **model** |' in output.get('data', {}).get('text/markdown', '') for output in outputs)
    assert any('image/png' in output.get('data', {}) for output in outputs)
    assert yaml.safe_load((out / 'config.yaml').read_text())['epochs'] == 1
    assert (out / 'bundle' / 'SHA256SUMS').exists() and list(tmp_path.iterdir()) == [tmp_path / 'out.ipynb']


def test_papermill_refuses_an_unknown_parameter(tmp_path: Path):
    with pytest.raises(papermill.PapermillExecutionError, match=r'HeimdallError: unknown parameter epoch \(did you mean epochs\?\): known are allow_rejects'):
        papermill.execute_notebook(RUN_NOTEBOOK, tmp_path / 'out.ipynb', {'epoch': 1}, progress_bar=False, cwd=tmp_path)


def fail(words: str, *arguments: object) -> str:
    "Run the command; it must end in one line on standard error, which contains the words."
    result = call(*arguments)
    assert result.exit_code == 2, f'{arguments}: {result.exit_code} {result.exception!r}'
    assert result.stdout == ''
    assert result.stderr.startswith('heimdall-train: ') and result.stderr.count('\n') == 1, result.stderr
    assert words in result.stderr, result.stderr
    return result.stderr


RECEIVERS = 'name,lat,lon\nnorth,45.07,7.60\neast,45.06,7.62\nhill,45.05,7.59\n'
HEADER = 'session_id,started_at,lat,lon,north,east,hill\n'
GOOD = [f's{number},2026-05-01T10:00:{number:02}Z,45.0{number + 10},7.60{number},-71.2,,-64.{number}\n' for number in range(10)]


def write(folder: Path, table: str, receivers: str = RECEIVERS) -> Path:
    "A level table with its receivers."
    folder.mkdir(exist_ok=True)
    (folder / 'receivers.csv').write_text(receivers)
    (folder / 'levels.csv').write_text(table)
    return folder / 'levels.csv'


def ingest(table: Path, folder: Path) -> list[object]:
    "The arguments that ingest a table into a catalog in the folder."
    return ['ingest', 'levels', table, '--catalog', folder / 'catalog.db', '--store', folder / 'store']


@pytest.mark.fault
@pytest.mark.parametrize(('table', 'receivers', 'words'), [
    ('', RECEIVERS, 'levels.csv is empty: expected the columns session_id,started_at,lat,lon'),
    (HEADER, RECEIVERS, 'has a header but no rows'),
    ('session_id,lat,north\ns0,45,-70\n', RECEIVERS, 'column started_at, lon missing'),
    (HEADER.replace('hill', 'harbour') + GOOD[0], RECEIVERS, "has no receiver 'harbour': add it to receivers.csv"),
    ('session_id,started_at,lat,lon,north,east\n', RECEIVERS[:RECEIVERS.index('hill')], '2 receivers: at least 3'),
], ids=['empty table', 'no rows', 'missing columns', 'unknown receiver', 'two receivers'])
def test_a_table_that_cannot_be_used(tmp_path: Path, table: str, receivers: str, words: str):
    fail(words, *ingest(write(tmp_path / 'drive', table, receivers), tmp_path))
    assert not (tmp_path / 'catalog.db').exists() and not (tmp_path / 'store').exists()


@pytest.mark.fault
def test_a_missing_table(tmp_path: Path):
    fail('No such file or directory', *ingest(tmp_path / 'levels.csv', tmp_path))
    write(tmp_path / 'drive', HEADER + GOOD[0])
    (tmp_path / 'drive' / 'receivers.csv').unlink()
    fail('write name,lat,lon of each receiver into it', *ingest(tmp_path / 'drive' / 'levels.csv', tmp_path))


@pytest.mark.fault
def test_what_is_set_aside_is_listed(tmp_path: Path):
    bad = [GOOD[7].replace('-71.2', 'loud'), GOOD[8].replace('45.018', '95'), GOOD[0], GOOD[9].replace('2026-05-01', 'May')]
    table = write(tmp_path / 'drive', ''.join([HEADER, *GOOD[:7], *bad]))
    stopped = call(*ingest(table, tmp_path))
    lines = stopped.stderr.splitlines()
    assert stopped.exit_code == 2 and stopped.stdout == '' and lines[0].startswith('heimdall-train: ')
    assert '4 of 11 rows cannot be used' in lines[0] and '--allow-rejects' in lines[0]
    reasons = ["line 9: level 'loud' of receiver north is not a number", 'line 10: ', "line 11: session 's0' is already on line 2",
               'line 12: started_at']
    assert len(lines) == 5 and all(reason in line for reason, line in zip(reasons, lines[1:], strict=True)), stopped.stderr
    assert not (tmp_path / 'catalog.db').exists()
    kept = succeed(*ingest(table, tmp_path), '--allow-rejects')
    assert kept.stdout.startswith('7 sessions added to dataset drive\n4 rows set aside:\n')
    assert all(reason in kept.stdout for reason in reasons)
    listed = json.loads(succeed(*ingest(table, tmp_path), '--allow-rejects', '--json').stdout)['rejects']
    assert [reject['line'] for reject in listed] == [9, 10, 11, 12] and '95' in listed[1]['reason']


@pytest.mark.fault
def test_a_few_bad_rows_do_not_stop_it(tmp_path: Path):
    table = write(tmp_path / 'drive', ''.join([HEADER, *GOOD[:9], GOOD[9].replace('-71.2', 'loud')]))
    assert succeed(*ingest(table, tmp_path)).stdout.startswith('9 sessions added to dataset drive\n1 rows set aside:\n  line 11: level')


@pytest.mark.fault
def test_a_failed_ingest_leaves_what_was_there(tmp_path: Path):
    succeed(*ingest(write(tmp_path / 'drive', HEADER + ''.join(GOOD)), tmp_path))
    before = list(Catalog(tmp_path / 'catalog.db').sessions())
    fail('has a header but no rows', *ingest(write(tmp_path / 'other', HEADER), tmp_path))
    worse = call(*ingest(write(tmp_path / 'drive', HEADER + ''.join(row.replace('-71.2', 'x') for row in GOOD)), tmp_path))
    assert worse.exit_code == 2 and '10 of 10 rows cannot be used' in worse.stderr
    assert list(Catalog(tmp_path / 'catalog.db').sessions()) == before and len(before) == 10


@pytest.mark.fault
@pytest.mark.parametrize('command', ['train', 'evaluate', 'export'])
def test_a_catalog_that_is_none(chain: Chain, tmp_path: Path, command: str):
    where = ['--out', tmp_path / 'run'] if command == 'train' else ['--model', chain.run]
    fail('there is no catalog', command, *where, '--catalog', tmp_path / 'missing.db')
    (tmp_path / 'text.db').write_text('these are not sessions\n' * 100)
    fail('text.db', command, *where, '--catalog', tmp_path / 'text.db')
    assert not (tmp_path / 'missing.db').exists() and not (tmp_path / 'run').exists()


@pytest.mark.fault
def test_a_split_file_that_names_no_known_session(chain: Chain, tmp_path: Path):
    (tmp_path / 'empty.txt').write_text('\n')
    (tmp_path / 'unknown.txt').write_text(f'{chain.ids()[0]}\nnobody\n')
    faults = {'empty': 'names no session', 'unknown': "line 2: session 'nobody' is not in the dataset", 'missing': 'No such file'}
    for command, where in (('train', ['--out', tmp_path / 'run']), ('evaluate', ['--model', chain.run])):
        for name, words in faults.items():
            fail(words, command, *where, '--catalog', chain.catalog, '--test-sessions', tmp_path / f'{name}.txt')
    assert not (tmp_path / 'run').exists()


@pytest.mark.fault
@pytest.mark.parametrize(('option', 'value', 'words'), [('--epochs', 0, 'parameter epochs'), ('--seed', -1, 'parameter seed'),
                                                        ('--gain-drift', 'nan', 'parameter gain_drift'), ('--dataset', 'other', 'other')])
def test_a_setting_out_of_range(chain: Chain, tmp_path: Path, option: str, value: object, words: str):
    fail(words, 'train', '--catalog', chain.catalog, '--out', tmp_path / 'run', option, value)
    assert not (tmp_path / 'run').exists()


@pytest.mark.fault
def test_what_was_trained_on_is_not_evaluated(chain: Chain, tmp_path: Path):
    split = json.loads((chain.run / 'split.json').read_text())
    for part in ('train', 'validation'):
        (tmp_path / 'known.txt').write_text('\n'.join([*split['test'], split[part][0]]))
        fail('evaluate on others', 'evaluate', '--model', chain.run, '--catalog', chain.catalog, '--test-sessions', tmp_path / 'known.txt')


@pytest.mark.fault
def test_a_run_folder_without_a_finished_run(chain: Chain, tmp_path: Path):
    for command in ('evaluate', 'export'):
        fail('train first, or give --model', command, '--model', tmp_path / 'nothing', '--catalog', chain.catalog)
    fail('train first, or give --model', 'predict', chain.table, '--model', tmp_path / 'nothing')


@pytest.mark.fault
@pytest.mark.parametrize('kept', [0, 4, 100, 1_000_000])
def test_a_truncated_model(chain: Chain, tmp_path: Path, kept: int):
    for name in ('config.yaml', 'split.json', 'metrics.json'):
        shutil.copy(chain.run / name, tmp_path)
    with open(chain.run / 'model.safetensors', 'rb') as whole:
        (tmp_path / 'model.safetensors').write_bytes(whole.read(kept))
    for arguments in (['evaluate', '--catalog', chain.catalog], ['export', '--catalog', chain.catalog], ['predict', chain.table]):
        fail('not a whole model file', *arguments, '--model', tmp_path)


@pytest.mark.fault
@pytest.mark.parametrize('name', ['model.onnx', 'model.json', 'sample.json', 'MODEL_CARD.md', 'SHA256SUMS'])
def test_a_damaged_bundle(chain: Chain, tmp_path: Path, name: str):
    bundle = shutil.copytree(chain.bundle, tmp_path / 'bundle')
    content = (bundle / name).read_bytes()
    for damaged in (content[:len(content) // 2], content.replace(b'e', b'f', 1), b''):
        (bundle / name).write_bytes(damaged)
        fail('export again', 'predict', chain.table, '--model', bundle)
    (bundle / name).unlink()
    fail('train first' if name == 'model.json' else 'export again', 'predict', chain.table, '--model', bundle)


@contextmanager
def disk(folder: Path, *options: str) -> Iterator[Path]:
    "A file system of its own, where the tests may make one."
    folder.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', ','.join(options), 'tmpfs', str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('no right to mount a file system here')
    try:
        yield folder
    finally:
        subprocess.run(['umount', '--lazy', str(folder)], check=True)  # MLflow keeps its database open


@pytest.mark.fault
def test_a_folder_that_cannot_be_written(chain: Chain, tmp_path: Path):
    with disk(tmp_path / 'disk', 'ro') as folder:
        fail('choose a folder that you may write to', *chain.to_train(folder / 'run'))
        fail('choose a folder that you may write to', *ingest(chain.table, folder))
        fail('choose a folder that you may write to', 'predict', chain.table, '--model', chain.bundle, '--out', folder / 'answers.csv')


@pytest.mark.fault
def test_an_earlier_run_that_cannot_be_replaced(chain: Chain, tmp_path: Path):
    with disk(tmp_path / 'disk', 'size=1m') as folder:
        (folder / 'metrics.json').write_text('{}')
        subprocess.run(['mount', '-o', 'remount,ro', str(folder)], check=True)
        fail('choose another --out', 'train', '--catalog', chain.catalog, '--out', folder)


@pytest.mark.fault
@pytest.mark.parametrize('size', ['64k', '8m', '64m', '120m'])
def test_a_full_disk(chain: Chain, tmp_path: Path, size: str):
    "Full at the tracking database, at the first checkpoint, at the model, and at MLflow's copy of the model."
    with disk(tmp_path / 'disk', f'size={size}') as folder:
        result = call(*chain.to_train(folder / 'run'))
        lines = result.stderr.splitlines()
        assert result.exit_code == 2 and result.stdout == '' and 'Traceback' not in result.stderr, result.exception
        assert [line for line in lines if line.startswith('heimdall-train: ')] == lines[-1:], result.stderr
        assert 'free some space' in lines[-1], lines[-1]
        assert not list(folder.rglob('*.part')) and (size == '120m' or not (folder / 'run' / 'metrics.json').exists())


@pytest.mark.fault
def test_only_debug_shows_the_traceback(tmp_path: Path):
    program = [sys.executable, '-c', 'from heimdall_train.cli import main; main()', 'ingest', 'levels', str(tmp_path / 'levels.csv')]
    quiet, loud = (subprocess.run(program + more, capture_output=True, text=True, cwd=tmp_path) for more in ([], ['--debug']))
    assert quiet.returncode == 2 and quiet.stdout == '' and quiet.stderr.count('\n') == 1
    assert loud.returncode != 0 and 'Traceback' in loud.stderr and 'HeimdallError: ' in loud.stderr.splitlines()[-1]
    assert isinstance(call('ingest', 'levels', tmp_path / 'levels.csv', '--debug').exception, HeimdallError)
    assert list(tmp_path.iterdir()) == []


def test_a_watched_folder_is_ingested_as_it_fills(chain: Chain, tmp_path: Path):
    inbox, config = tmp_path / 'inbox', make_config(catalog=str(tmp_path / 'catalog.db'), store=str(tmp_path / 'store'))
    inbox.mkdir()
    found = watch(inbox, config, interval_s=0.01)
    lines = chain.table.read_text().splitlines(keepends=True)

    def campaign(name: str, text: str) -> Path:
        (inbox / name).mkdir(exist_ok=True)
        shutil.copy(chain.scene / 'receivers.csv', inbox / name / 'receivers.csv')
        (inbox / name / 'levels.csv').write_text(text)
        return inbox / name / 'levels.csv'

    first = campaign('monday', ''.join(lines[:20]))
    path, report = next(found)
    assert (path, report.dataset, report.sessions) == (first, 'monday', 19)
    campaign('monday', ''.join(lines[:25]))  # rows were appended
    broken = campaign('tuesday', 'no table')
    ends = dict([next(found), next(found)])
    assert isinstance(ends[first], IngestReport), ends[first]
    assert (ends[first].sessions, ends[first].unchanged) == (5, 19) and 'column' in str(ends[broken])
    campaign('tuesday', lines[0] + ''.join(lines[25:40]))  # mended
    path, report = next(found)
    assert (path, report.sessions) == (broken, 15)
    assert {entry.name for entry in Catalog(config.catalog).datasets()} == {'monday', 'tuesday'}


def test_help_names_the_defaults():
    shown = ' '.join(CliRunner().invoke(app, ['train', '--help'], env={'COLUMNS': '200', 'TERM': 'dumb'}).stdout.split())
    assert f'(default: {Config.model_fields["epochs"].default})' in shown and '(default: runs/catalog.db)' in shown


def test_a_watched_folder_waits_for_a_catalog_that_is_away(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    looks = iter(range(20))
    monkeypatch.setattr('heimdall_train.data.time.sleep', lambda seconds: next(looks))  # the watch is without end: it fails here after twenty looks
    found = watch(chain.scene, make_config(catalog='postgresql://somebody@127.0.0.1:9/db', store=str(tmp_path / 'store')), interval_s=0.01)
    ends = [next(found) for _ in range(3)]
    assert all(isinstance(end, HeimdallError) and 'Connection refused' in str(end) for _, end in ends)


def test_watch_ends_with_an_interruption_and_says_what_it_did(chain: Chain, tmp_path: Path):
    program = [sys.executable, '-c', 'import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n'  # in the background it would be ignored
               'from heimdall_train.cli import main; main()']
    options = ['ingest', '--watch', chain.scene, '--catalog', tmp_path / 'catalog.db', '--store', tmp_path / 'store']
    process = subprocess.Popen([str(part) for part in program + options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert 'sessions added to dataset' in said and process.returncode == 130 and 'interrupted' in errors
    assert call('ingest', '--watch', tmp_path / 'absent').exit_code == 2
