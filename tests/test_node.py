"""The example for Node.js: what it installs, and what it says of sessions that do not fit. That it locates is tested with the bundles of test_cli.py and
test_iq_chain.py."""
import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from heimdall_train.bundle import MEANINGS

EXAMPLE = Path(__file__).resolve().parent.parent / 'examples' / 'node'


def test_the_lock_fixes_every_package_and_names_no_mirror():
    lock = json.loads((EXAMPLE / 'package-lock.json').read_text())
    package = json.loads((EXAMPLE / 'package.json').read_text())
    assert lock['packages']['']['dependencies'] == package['dependencies']
    installed = {name: entry for name, entry in lock['packages'].items() if name}
    assert 'node_modules/onnxruntime-node' in installed
    for name, entry in installed.items():
        assert entry['integrity'].startswith('sha512-'), name
        assert entry.get('resolved', 'https://registry.npmjs.org/').startswith('https://registry.npmjs.org/'), name


def test_what_is_no_bundle_ends_in_one_line(by_node: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path):
    for arguments, words in (([], 'usage: node locate.mjs BUNDLE'), ([tmp_path], 'no SHA256SUMS: not a bundle')):
        done = by_node(*arguments)
        assert done.returncode == 2 and done.stdout == ''
        assert done.stderr.count('\n') == 1 and words in done.stderr


def described(**inputs: list[int]) -> dict:
    "What model.json says of a graph with these inputs."
    tensors = {
        name: {'type': 'float64' if name in ('start_offset', 'clock_error') else 'float32', 'shape': ['batch', *shape], 'meaning': MEANINGS[name]}
        for name, shape in inputs.items()
    }
    return {'format': 1, 'inputs': [*inputs], 'tensors': tensors, 'receivers': [{'name': name, 'known': name != 'new'} for name in ('a', 'b', 'c', 'new')]}


LEVELS, RECORDINGS = described(levels=[4], heard=[4]), described(iq=[4, 2, 3], heard=[4], start_offset=[4], clock_error=[4])
OF_LEVELS = {'levels': [[-99.1, -115.2, -112.8, 0]], 'heard': [[1, 1, 1, 0]]}
OF_RECORDINGS = {'iq': {'file': 'iq.f32', 'shape': [1, 4, 2, 3]}, 'heard': [[1, 1, 0, 1]], 'start_offset': [[0] * 4], 'clock_error': [[0, None, None, 0]]}
EXPECTED = {
    'levels': ': shape 1 × 4, received level, dB; anything where not heard',
    'heard': ': shape 1 × 4, 1 where the receiver heard the transmission, 0 where not',
    'iq': ': shape 1 × 4 × 2 × 3, samples re full scale, real and imaginary parts; anything where not heard',
    'start_offset': ": shape 1 × 4, seconds from the session's start to the first sample",
    'clock_error': ": shape 1 × 4, seconds, known error of the receiver's clock; NaN where it is not disciplined",
}
SESSIONS: list[tuple[dict, object, str]] = [  # of which model, what stands in the file (text as it is), what is said of it
    (LEVELS, OF_LEVELS, 'fits'),
    (LEVELS, {**OF_LEVELS, 'levels': [[-99.1, -115.2, -112.8, None]], 'name': 'more than is asked for'}, 'fits'),
    (LEVELS, {**OF_LEVELS, 'heard': [[0] * 4]}, 'fits'),
    (LEVELS, 'not json', 'not JSON, which has null for "not a number": '),
    (LEVELS, '{"levels": [[NaN, 1, 1, 1]], "heard": [[0, 1, 1, 1]]}', 'not JSON, which has null for "not a number": '),
    (LEVELS, None, 'heard is missing'),
    (LEVELS, {'levels': OF_LEVELS['levels']}, 'heard is missing'),
    (LEVELS, OF_RECORDINGS, 'levels is missing'),
    (LEVELS, {**OF_LEVELS, 'levels': None}, 'levels is null, not a list'),
    (LEVELS, {**OF_LEVELS, 'levels': [-99.1, -115.2, -112.8, 0]}, 'levels has 4 entries, not 1'),
    (LEVELS, {**OF_LEVELS, 'levels': [[-99.1, -115.2, -112.8]]}, 'levels[0] has 3 entries, not 4'),
    (LEVELS, {**OF_LEVELS, 'levels': OF_LEVELS['levels'] * 2}, 'levels has 2 entries, not 1'),
    (LEVELS, {**OF_LEVELS, 'levels': [['loud', 'b', 'c', 'd']]}, 'levels[0][0] is "loud", not a number'),
    (LEVELS, {**OF_LEVELS, 'levels': [[-99.1, [-115.2], -112.8, 0]]}, 'levels[0][1] is [-115.2], not a number'),
    (LEVELS, {**OF_LEVELS, 'levels': [[-99.1, None, -112.8, 0]]}, 'levels[0][1] is not finite where heard is 1'),
    (LEVELS, {**OF_LEVELS, 'levels': [[-99.1, 1e300, -112.8, 0]]}, 'levels[0][1] is not finite where heard is 1'),
    (LEVELS, {**OF_LEVELS, 'heard': [[1, 1, 0.5, 0]]}, 'heard[0][2] is neither 0 nor 1'),
    (LEVELS, {**OF_LEVELS, 'heard': [[1, 1, 1, None]]}, 'heard[0][3] is neither 0 nor 1'),
    (LEVELS, {**OF_LEVELS, 'heard': [[True, 1, 1, 0]]}, 'heard[0][0] is true, not a number'),
    (RECORDINGS, OF_RECORDINGS, 'fits'),
    (RECORDINGS, {**OF_RECORDINGS, 'iq': np.zeros((1, 4, 2, 3)).tolist()}, 'fits'),
    (RECORDINGS, {**OF_RECORDINGS, 'start_offset': [[0, 0, None, 0]]}, 'fits'),
    (RECORDINGS, {**OF_RECORDINGS, 'start_offset': [[0, 0, 0, None]]}, 'start_offset[0][3] is not finite where heard is 1'),
    (RECORDINGS, json.dumps({**OF_RECORDINGS, 'clock_error': [['1e999'] * 4]}).replace('"1e999"', '1e999'), 'clock_error[0][0] is not finite where heard is 1'),
    (RECORDINGS, {**OF_RECORDINGS, 'heard': [[1] * 4]}, 'iq[0][2] is not finite where heard is 1'),
    (RECORDINGS, {**OF_RECORDINGS, 'iq': {'file': 'iq.f32'}}, 'iq.shape is missing'),
    (RECORDINGS, {**OF_RECORDINGS, 'iq': {'file': 'iq.f32', 'shape': [4, 2, 3]}}, 'iq.shape is [4,2,3]'),
    (RECORDINGS, {**OF_RECORDINGS, 'iq': {'file': 'no.f32', 'shape': [1, 4, 2, 3]}}, 'iq.file no.f32 cannot be read: no such file or directory'),
    (RECORDINGS, {**OF_RECORDINGS, 'iq': {'file': 'short.f32', 'shape': [1, 4, 2, 3]}}, 'iq.file short.f32 has 4 bytes, not 96'),
]
TRY = """
import { readFileSync } from 'node:fs';
import { readSession } from './session.mjs';
const said = [];
for (const [description, file] of JSON.parse(readFileSync('cases.json', 'utf8'))) {
  said.push(await readSession(file, description).then(() => 'fits', (error) => `${error.constructor.name}: ${error.message}`));
}
console.log(JSON.stringify(said));
"""


@pytest.fixture(scope='module')
def said(node_example: Path) -> list[str]:
    "What is said of each of `SESSIONS`, all by one process."
    samples = np.zeros((4, 2, 3), '<f4')
    samples[2, 1, 1] = np.nan
    (node_example / 'iq.f32').write_bytes(samples.tobytes())
    (node_example / 'short.f32').write_bytes(bytes(4))
    for place, (_, session, _) in enumerate(SESSIONS):
        (node_example / f'{place}.json').write_text(session if isinstance(session, str) else json.dumps(session))
    (node_example / 'cases.json').write_text(json.dumps([(description, f'{place}.json') for place, (description, _, _) in enumerate(SESSIONS)]))
    (node_example / 'try.mjs').write_text(TRY)
    done = subprocess.run(['node', 'try.mjs'], cwd=node_example, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize('place', range(len(SESSIONS)), ids=[words for _, _, words in SESSIONS])
def test_a_session_is_held_against_the_inputs(said: list[str], place: int):
    _, _, words = SESSIONS[place]
    if words == 'fits':
        assert said[place] == words
    elif words.startswith('not JSON'):
        assert said[place].startswith(f'BadSession: {place}.json: {words}')
    else:
        name = words.replace('.', ' ').replace('[', ' ').split()[0]
        assert said[place] == f'BadSession: {place}.json: {words}{EXPECTED[name]}'


@pytest.fixture(scope='module')
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "What the example reads of a bundle; its graph takes levels and clocks, and answers with the first two levels."
    folder = tmp_path_factory.mktemp('bundle')
    constants = [numpy_helper.from_array(value, name) for name, value in (
        ('places', np.array([0, 1])), ('sigma', np.ones((1, 2), 'f4')), ('covariance', np.eye(2, dtype='f4')[None]))]
    nodes = [helper.make_node('Gather', ['levels', 'places'], ['position_enu'], axis=1),
             helper.make_node('Cast', ['position_enu'], ['position'], to=TensorProto.DOUBLE)]
    types = {'levels': TensorProto.FLOAT, 'heard': TensorProto.FLOAT, 'clock_error': TensorProto.DOUBLE}
    graph = helper.make_graph(
        nodes, 'g', [helper.make_tensor_value_info(name, kind, ['batch', 4]) for name, kind in types.items()],
        [helper.make_tensor_value_info('position', TensorProto.DOUBLE, None),
         *(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ('position_enu', 'sigma', 'covariance'))], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=10)
    (folder / 'model.onnx').write_bytes(model.SerializeToString())
    (folder / 'model.json').write_text(json.dumps(described(levels=[4], heard=[4], clock_error=[4])))
    (folder / 'sample.json').write_text(json.dumps({**OF_LEVELS, 'clock_error': [[0] * 4], 'position_enu': [[-99.1, -115.2]], 'sigma': [[1, 1]]}))
    (folder / 'SHA256SUMS').write_text(''.join(f'{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n' for file in folder.iterdir()))
    return folder


def test_what_a_reader_should_know_is_noted(by_node: Callable[..., subprocess.CompletedProcess[str]], bundle: Path, tmp_path: Path):
    sample = json.loads((bundle / 'sample.json').read_text())
    for heard, clocks, note in (  # the last receiver is not known
        ([1, 1, 1, 0], [0, 0, 0, None], ''),
        ([1, 1, 0, 1], [0, 0, 0, 0], 'heard by 2 receivers that the model knows; three are needed for a position worth the name'),
        ([1, 1, 1, 1], [0, None, 0, 0], '2 receivers with a disciplined clock; three are needed for time differences: located by levels'),
    ):
        own = {**sample, 'levels': [[-80, -90, -90, -90]], 'heard': [heard], 'clock_error': [clocks]}  # the sample's answer is in it still
        (tmp_path / 'own.json').write_text(json.dumps(own))
        done = by_node(bundle, tmp_path / 'own.json')
        assert done.returncode == 0 and done.stderr == '', done.stderr
        fix = json.loads(done.stdout)
        assert (fix['east_m'], fix['north_m'], fix['note']) == (-80, -90, note)


@pytest.mark.parametrize(('session', 'words'), [
    ('{"levels": [[-80, -90, -90, -90]]}', f'heard is missing{EXPECTED["heard"]}'),
    ('{"levels": [[null, -90, -90, -90]], "heard": [[0, 1, 1, 1]], "clock_error": [[0, 0, 0, 0]]}', 'no finite answer: are the units those of model.json?'),
    (None, 'cannot be read: no such file or directory'),
])
def test_a_session_that_does_not_fit_is_named(by_node: Callable[..., subprocess.CompletedProcess[str]], bundle: Path, tmp_path: Path, session, words: str):
    if session is not None:
        (tmp_path / 'own.json').write_text(session)
    done = by_node(bundle, tmp_path / 'own.json')
    assert (done.returncode, done.stdout, done.stderr) == (2, '', f'locate: {tmp_path}/own.json: {words}\n')
