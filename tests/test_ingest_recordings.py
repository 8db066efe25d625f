"""Recordings as they come from the field: every bad file is set aside with its reason, and nothing else is lost."""
import csv
import io
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heimdall_train.catalog import Catalog
from heimdall_train.ingest import TooManyRejects
from heimdall_train.ingest_recordings import ingest_recordings, inspect_iq, measure_level, read_iq, read_recordings
from heimdall_train.network import PIEDMONT, HeimdallError, Network, Receiver
from heimdall_train.object_store import open_store
from heimdall_train.store import encode_iq

NETWORK = Network('valley', (Receiver('roof', 45.05, 7.65, 270.0), Receiver('mast', 45.2, 7.8, 300.0), Receiver('hill', 45.02, 7.29, 600.0)))
COLUMNS = ['session_id', 'started_at', 'frequency_hz', 'sample_rate', 'start_offset', 'clock_error_s', 'lat', 'lon', 'source', 'error_m', 'file']
RATE, COUNT = 12_500, 1_250


def samples(seed: int, count: int = COUNT) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, (count, 2)).view(np.complex128).ravel().astype(np.complex64)


def header(descr: object, shape: tuple, version: bytes = b'\x01\x00') -> bytes:
    text = repr({'descr': descr, 'fortran_order': False, 'shape': shape}).encode() + b'\n'
    return b'\x93NUMPY' + version + len(text).to_bytes(2, 'little') + text


class Campaign:
    "Four sessions of three receivers in a folder, ready to be damaged."

    def __init__(self, folder: Path):
        self.folder = folder
        self.rows = {}
        for number in range(12):
            session, receiver = f's{number // 3}', NETWORK.names[number % 3]
            file = f'{session}/{receiver}.npy'
            self.rows[file] = dict(zip(COLUMNS, [
                session, f'2025-10-22T12:00:{number // 3:02}Z', '145.5e6', str(RATE), f'{number}e-9', '2e-8', '45.04', '7.66', 'car', '5', file]))
            self.write(file, encode_iq(samples(number)))
        self.catalog, self.store = Catalog(folder / 'catalog.db'), open_store(folder / 'store')

    def write(self, file: str, content: bytes) -> None:
        path = self.folder / 'in' / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def ingest(self, columns: list[str] = COLUMNS, **options: object):
        with open(self.folder / 'in' / 'recordings.csv', 'w', newline='') as file:
            writer = csv.DictWriter(file, columns, restval='')
            writer.writeheader()
            writer.writerows(self.rows.values())
        return ingest_recordings(self.folder / 'in', self.catalog, self.store, NETWORK, 'drive', **options)

    def stored(self) -> dict[str, list[str]]:
        return {session.id: [recording.receiver for recording in session.recordings] for session in self.catalog.sessions('drive', located=False)}


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    return Campaign(tmp_path)


def fails(action: Callable[[], object], words: str) -> None:
    with pytest.raises(HeimdallError) as caught:
        action()
    assert words in str(caught.value) and str(caught.value).isprintable()


def test_what_is_good_comes_back_bit_for_bit(campaign: Campaign):
    campaign.write('s0/roof.npy', encode_iq(samples(0).astype(np.complex128)))
    whole = np.round(samples(1).view(np.float32) * 20_000).astype(np.int16)
    campaign.write('s0/mast.npy', encode_iq(whole))
    campaign.rows['s1/hill.npy'] |= {'clock_error_s': ''}
    for file in ('s3/roof.npy', 's3/mast.npy', 's3/hill.npy'):
        campaign.rows[file] |= {'lat': '', 'lon': '', 'source': '', 'error_m': ''}
    report = campaign.ingest()
    assert (report.sessions, report.recordings, report.rejects, report.lost) == (4, 12, (), ())
    sessions = {session.id: session for session in campaign.catalog.sessions('drive', located=False)}
    assert [session.id for session in campaign.catalog.sessions('drive')] == ['s0', 's1', 's2']
    assert sessions['s3'].source is None and sessions['s0'].source.error_m == 5.0 and sessions['s0'].frequency_hz == 145.5e6
    for number in range(12):
        recording = sessions[f's{number // 3}'].recordings[number % 3]
        assert (recording.receiver, recording.sample_rate, recording.start_offset) == (NETWORK.names[number % 3], RATE, float(f'{number}e-9'))
        assert recording.clock_error_s == (None if number == 5 else 2e-8)
        expected = whole.astype(np.float32).view(np.complex64) / np.float32(32768) if number == 1 else samples(number)
        np.testing.assert_array_equal(campaign.store.read_recording(recording.iq_uri), expected)
        assert recording.level_db == pytest.approx(10 * np.log10(np.mean(np.abs(expected.astype(np.complex128))**2)), abs=1e-9)


NAN, INFINITE = samples(1), samples(1)
NAN[700], INFINITE[3] = np.nan, complex(0, -np.inf)
BAD_FILES = {
    'truncated': (encode_iq(samples(1))[:-100], 'it is truncated'),
    'cut in its header': (encode_iq(samples(1))[:50], 'header is damaged'),
    'empty': (b'', 'is empty'),
    '32 GiB': (header('<c8', (2**32,)) + bytes(1000), 'its header asks for 32 GiB of samples and 1000 bytes are there'),
    'beyond all bounds': (header('<c16', (2**70,)) + bytes(1000), 'an impossible number of bytes'),
    'negative': (header('<c8', (-1,)) + bytes(1000), 'an impossible number of bytes'),
    'too many bytes': (encode_iq(samples(1)) + b'more', 'header is damaged'),
    'objects': (header('|O', (1,)) + pickle.dumps([1]), 'Python objects are never loaded'),
    'a record': (header([('x', '<c8')], (COUNT,)) + bytes(8 * COUNT), 'expected complex64'),
    'floats': (header('<f8', (COUNT,)) + bytes(8 * COUNT), "holds 'float64'"),
    'two dimensions': (header('<c8', (COUNT, 1)) + bytes(8 * COUNT), '2 dimensions'),
    'no dimension': (header('<c8', ()) + bytes(8), '0 dimensions'),
    'odd int16': (header('<i2', (5,)) + bytes(10), 'an odd number of int16'),
    'WAV': (b'RIFF\x24\x08\x00\x00WAVEfmt ' + bytes(2000), 'is not a .npy file'),
    'NaN': (encode_iq(NAN), 'sample 700 is NaN or infinite'),
    'infinite': (encode_iq(INFINITE), 'sample 3 is NaN or infinite'),
    'zero': (encode_iq(np.zeros(COUNT, np.complex64)), 'all samples are zero'),
    'zero int16': (encode_iq(np.zeros(2 * COUNT, np.int16)), 'all samples are zero'),
    'overflow': (encode_iq(np.full(COUNT, 1e300 + 0j)), 'too large to be re full scale'),
    'short': (encode_iq(samples(1, COUNT - 1)), f'has {COUNT - 1} samples at {RATE} a second, others of its session have {COUNT}'),
    'no samples': (encode_iq(samples(1, 0)), 'holds no samples'),
}


@pytest.mark.fault
@pytest.mark.parametrize('name', BAD_FILES)
@pytest.mark.parametrize('first', [True, False])
def test_a_bad_file_costs_itself_only(campaign: Campaign, name: str, first: bool):
    content, words = BAD_FILES[name]
    file = 's1/roof.npy' if first else 's1/hill.npy'
    campaign.write(file, content)
    report = campaign.ingest()
    reject, = report.rejects
    assert (reject.file, reject.session_id, reject.line) == (file, 's1', 5 if first else 7)
    assert words in reject.reason and reject.reason.isprintable() and len(reject.reason) < 200
    assert campaign.stored() == {'s0': NETWORK.names, 's1': [name for name in NETWORK.names if name not in file], 's2': NETWORK.names, 's3': NETWORK.names}
    assert sum(len(np.load(campaign.folder / 'store' / key)) for key in campaign.store.keys('sessions/')) == 11


BAD_ROWS = [
    ({'sample_rate': '0'}, 'sample_rate'), ({'sample_rate': '-12500'}, 'sample_rate'), ({'sample_rate': 'fast'}, 'sample_rate'),
    ({'sample_rate': ''}, 'sample_rate'), ({'sample_rate': 'nan'}, 'sample_rate'), ({'sample_rate': '48000'}, 'others of its session'),
    ({'frequency_hz': '-1'}, 'frequency_hz'),
    ({'start_offset': ''}, 'start_offset'), ({'start_offset': '1e300'}, 'more than a day'), ({'clock_error_s': 'GPS'}, 'clock_error_s'),
    ({'lat': '95'}, 'latitude 95'), ({'lat': ''}, 'lat is missing'), ({'error_m': '-3'}, 'error_m'), ({'error_m': 'good'}, 'error_m'),
    ({'lat': '45.05'}, 'has another source'), ({'started_at': '2025-10-22T12:00:09Z'}, 'has another started_at'), ({'started_at': 'noon'}, 'started_at'),
    ({'file': 's1/absent/mast.npy'}, 'there is no such file'), ({'file': ''}, 'file is missing'), ({'file': 's1/attic.npy'}, "no receiver 'attic'"),
    ({'file': 's0/roof.npy'}, 'has receiver roof already'), ({'file': '.'}, 'has no receiver'), ({'session_id': ''}, 'session_id is missing'),
    ({'session_id': 'x' * 300}, 'session_id is too long'), ({'file': 'y' * 300 + '/mast.npy'}, 'name too long'),
    ({'file': 'a\nb/mast.npy'}, 'there is no such file'),
]


@pytest.mark.fault
@pytest.mark.parametrize('changes, words', BAD_ROWS, ids=lambda value: value if isinstance(value, str) else '')
def test_a_bad_row_costs_itself_only(campaign: Campaign, changes: dict[str, str], words: str):
    campaign.rows['s1/mast.npy'] |= changes
    report = campaign.ingest()
    reject, = report.rejects
    assert words in reject.reason and reject.reason.isprintable()
    assert (reject.line, reject.file) == (6, campaign.rows['s1/mast.npy']['file'])
    assert campaign.stored() == {'s0': NETWORK.names, 's1': ['roof', 'hill'], 's2': NETWORK.names, 's3': NETWORK.names}


def test_a_length_that_is_not_the_one_asked_for(campaign: Campaign):
    for row in campaign.rows.values():
        row |= {'duration_s': '0.1', 'receiver': Path(row['file']).stem}
    campaign.rows['s2/mast.npy'] |= {'duration_s': '0.2'}
    report = campaign.ingest([*COLUMNS, 'duration_s', 'receiver'])
    assert [str(reject) for reject in report.rejects] == ["line 9: file 's2/mast.npy' has 1250 samples, and duration_s asks for 2500"]


def test_a_pipe_and_a_folder_are_no_recordings(campaign: Campaign):
    for file in ('s1/mast.npy', 's2/mast.npy'):
        (campaign.folder / 'in' / file).unlink()
    os.mkfifo(campaign.folder / 'in' / 's1/mast.npy')
    (campaign.folder / 'in' / 's2/mast.npy').mkdir()
    assert [reject.file for reject in campaign.ingest().rejects] == ['s1/mast.npy', 's2/mast.npy']


def test_a_session_left_with_no_recording_is_named(campaign: Campaign):
    for receiver in NETWORK.names:
        campaign.write(f's2/{receiver}.npy', b'')
    fails(campaign.ingest, '3 of 12 rows cannot be used (line 8: file')
    report = campaign.ingest(allow_rejects=True)
    assert (report.sessions, report.lost) == (3, ('s2',)) and 'sessions left with no recording (1): s2' in str(report)


@pytest.mark.fault
def test_a_fifth_may_be_set_aside_but_not_more(campaign: Campaign):
    for file in ('s0/roof.npy', 's1/roof.npy'):
        campaign.write(file, b'')
    assert len(campaign.ingest().rejects) == 2
    campaign.write('s2/roof.npy', b'')
    campaign.catalog, campaign.store = Catalog(campaign.folder / 'new.db'), open_store(campaign.folder / 'new')
    with pytest.raises(TooManyRejects, match='3 of 12 rows cannot be used') as caught:
        campaign.ingest()
    assert [reject.file for reject in caught.value.rejects] == ['s0/roof.npy', 's1/roof.npy', 's2/roof.npy']
    assert not campaign.catalog.exists() and list(campaign.store.keys()) == []
    for row in campaign.rows.values():
        row['sample_rate'] = '0'
    fails(lambda: campaign.ingest(allow_rejects=True), '12 of 12 rows cannot be used')


def test_twice_changes_nothing_and_a_session_that_differs_is_set_aside(campaign: Campaign):
    campaign.rows['s3/roof.npy'] |= {'lat': '', 'lon': ''}
    campaign.rows['s3/mast.npy'] |= {'lat': '', 'lon': ''}
    campaign.rows['s3/hill.npy'] |= {'lat': '', 'lon': ''}
    campaign.ingest()
    before = {key: campaign.store.read(key) for key in campaign.store.keys()}, list(campaign.catalog.sessions(located=False))
    again = campaign.ingest()
    assert (again.sessions, again.unchanged, again.recordings) == (0, 4, 0)
    campaign.rows['s1/roof.npy'] |= {'start_offset': '1e-6'}
    campaign.write('s2/roof.npy', encode_iq(samples(2).conj()))  # the same level to the last bit
    changed = campaign.ingest(allow_rejects=True)
    assert [reject.session_id for reject in changed.rejects] == ['s1'] * 3 + ['s2'] * 3
    assert 'the dataset already has a session' in changed.rejects[0].reason and 'the store already has other samples' in changed.rejects[3].reason
    assert ({key: campaign.store.read(key) for key in campaign.store.keys() if key in before[0]}, list(campaign.catalog.sessions(located=False))) == before


@pytest.mark.fault
def test_a_store_that_cannot_be_written(campaign: Campaign):
    (campaign.folder / 'store').write_text('a file where the folder should be')
    fails(campaign.ingest, 'a file stands where a folder is needed')
    assert not campaign.catalog.exists()


@pytest.mark.fault
def test_a_folder_without_the_right_to_write():
    with tempfile.TemporaryDirectory() as name:
        campaign = Campaign(Path(name))
        os.chmod(name, 0o755)
        (campaign.folder / 'locked').mkdir()
        os.chmod(campaign.folder / 'locked', 0o555)
        manifest = campaign.folder / 'in' / 'recordings.csv'
        manifest.write_text('\n'.join([','.join(COLUMNS), *(','.join(row.values()) for row in campaign.rows.values())]))
        store, root = open_store(campaign.folder / 'locked' / 'store'), os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            fails(lambda: ingest_recordings(manifest, campaign.catalog, store, NETWORK), 'Permission denied: choose a folder that you may write to')
        finally:
            if root:
                os.seteuid(0)
        assert not campaign.catalog.exists() and list(store.keys()) == []


def test_a_signal_that_carries_no_position_is_set_aside(campaign: Campaign):
    signal = np.exp(2j * np.pi * 137.0 * np.arange(COUNT) / RATE)
    for number, receiver in enumerate(NETWORK.names):
        campaign.write(f's2/{receiver}.npy', encode_iq((0.5 * signal + 0.1 * samples(number)).astype(np.complex64)))
        campaign.write(f's3/{receiver}.npy', encode_iq((0.5 * signal + 0.1 * samples(number)).astype(np.complex64)))
        campaign.rows[f's3/{receiver}.npy'] |= {'clock_error_s': ''}  # without a common clock its levels count
    report = campaign.ingest(allow_rejects=True)
    assert [(reject.session_id, 'carrier without modulation' in reject.reason) for reject in report.rejects] == [('s2', True)] * 3
    assert report.lost == ('s2',) and set(campaign.stored()) == {'s0', 's1', 's3'}


@pytest.mark.fault
@pytest.mark.parametrize('failing', ['write_recordings', 'write', 'catalog'])
def test_a_failure_half_way_leaves_nothing(campaign: Campaign, monkeypatch: pytest.MonkeyPatch, failing: str):
    calls = []

    def fail(*arguments: object, **options: object) -> str:
        calls.append(arguments)
        if failing == 'write_recordings' and len(calls) < 3:
            return original(*arguments, **options)
        raise HeimdallError('No space left on device')
    target = campaign.catalog if failing == 'catalog' else campaign.store
    name = 'add_sessions' if failing == 'catalog' else failing
    original = getattr(target, name)
    with monkeypatch.context() as patch:
        patch.setattr(target, name, fail)
        fails(campaign.ingest, 'No space left')
    assert calls and not campaign.catalog.exists()
    assert list(campaign.store.keys('sessions/')) == []
    assert campaign.ingest().recordings == 12


KILLED = '''
import os, signal, sys
from heimdall_train import ingest_recordings, object_store, store
from heimdall_train.catalog import Catalog
calls, original = 0, store.write_file
def dying(*arguments):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    original(*arguments)
store.write_file = dying
sys.path.insert(0, sys.argv[3])
from test_ingest_recordings import NETWORK
folder = sys.argv[1]
ingest_recordings.ingest_recordings(folder + '/in', Catalog(folder + '/catalog.db'), object_store.open_store(folder + '/store'), NETWORK, 'drive')
'''


@pytest.mark.fault
@pytest.mark.parametrize('call', [1, 3, 5])
def test_an_ingest_that_is_killed_can_be_repeated(campaign: Campaign, call: int):
    campaign.ingest()
    expected = list(campaign.catalog.sessions('drive'))
    for key in campaign.store.keys():
        campaign.store.delete(key)
    campaign.catalog.database.path.unlink()
    done = subprocess.run([sys.executable, '-c', KILLED, campaign.folder, str(call), Path(__file__).parent], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not campaign.catalog.exists() and len(list(campaign.store.keys('sessions/'))) <= call - 1
    assert campaign.ingest().recordings == 12
    assert list(campaign.catalog.sessions('drive')) == expected


SMALL_MEMORY = '''
import resource, sys
from heimdall_train.ingest_recordings import read_iq
resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30))
try:
    read_iq(sys.argv[1])
except ValueError as error:
    print(error)
'''


@pytest.mark.fault
@pytest.mark.parametrize('version', [b'\x01\x00', b'\x02\x00'])
def test_a_header_that_asks_for_32_gib_allocates_nothing(tmp_path: Path, version: bytes):
    path = tmp_path / 'x.npy'
    content = header('<c8', (2**32,), version)
    path.write_bytes((content if version == b'\x01\x00' else content[:8] + (2**31).to_bytes(4, 'little') + content[10:]) + bytes(1000))
    done = subprocess.run([sys.executable, '-c', SMALL_MEMORY, path], capture_output=True, text=True, timeout=120)
    assert done.stdout.count('\n') == 1 and 'x.npy' in done.stdout, done.stderr
    tracemalloc.start()
    try:
        fails(lambda: read_iq(path), 'x.npy')
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.fault
@pytest.mark.parametrize('lies', [False, True], ids=['deflated', 'lies about its size'])
def test_an_archive_that_would_unpack_to_a_quarter_of_a_gigabyte_is_not_unpacked(tmp_path: Path, lies: bool):
    store = open_store(tmp_path)
    path = tmp_path / 'sessions' / 's.npz'
    path.parent.mkdir()
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive, archive.open('roof.npy', 'w', force_zip64=True) as member:
        member.write(header('<c8', (2**25,)))
        for _ in range(256):
            member.write(bytes(2**20))
    content = path.read_bytes()
    assert len(content) < 2**21
    if lies:  # the directory says that nothing is compressed
        method = content.rindex(b'PK\x01\x02') + 10
        path.write_bytes(content[:method] + b'\0\0' + content[method + 2:])
    tracemalloc.start()
    try:
        found, = store.read_recordings([f'{path.as_uri()}#roof'])
        assert isinstance(found, HeimdallError) and 's.npz' in str(found) and '\n' not in str(found)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


def test_objects_are_never_unpickled(tmp_path: Path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'ran'),)
    file = io.BytesIO()
    np.save(file, np.array([Trap(), Trap()], dtype=object), allow_pickle=True)
    (tmp_path / 'x.npy').write_bytes(file.getvalue())
    fails(lambda: read_iq(tmp_path / 'x.npy'), 'Python objects are never loaded')
    assert not (tmp_path / 'ran').exists()


def test_memory_holds_one_recording_at_a_time(campaign: Campaign):
    size = 1_000_000
    for number, file in enumerate(campaign.rows):
        campaign.write(file, encode_iq(samples(number, size)))
    tracemalloc.start()
    try:
        assert campaign.ingest().recordings == 12
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * 8 * size  # twelve recordings are 96 MB; one, its copy in float64 and its bytes for the store are less than half of that


def _headers() -> st.SearchStrategy[bytes]:
    "Whole files: headers that say anything, with anything behind."
    descr = st.one_of(st.sampled_from(['<c8', '<c16', '<i2', '>c8', '|O', '<f8', '|V0', '<c8' * 3, '(3,)<c8', '|S', '<U1000000']), st.text(max_size=6),
                      st.just([('a', '<c8'), ('b', '|O')]))
    shape = st.one_of(st.lists(st.integers(-2**70, 2**70), max_size=3).map(tuple), st.integers(0, 6).map(lambda count: (count,)), st.just((True,)))
    text = st.one_of(
        st.builds(lambda d, s, f: repr({'descr': d, 'fortran_order': f, 'shape': s}), descr, shape, st.booleans()),
        st.sampled_from(['(' * 9_000, '-' * 9_000 + '1', '[' * 200, '{' * 50, "{'descr': '<c8'}", '1' * 5_000,
                         "{'descr':'<c8','fortran_order':False,'shape':(0x" + 'f' * 9_000 + ',)}',
                         "{'descr':'<c8','fortran_order':False,'shape':(5L,)}", '\x00', '"""']), st.text(max_size=40))
    version = st.sampled_from([(1, 0, 2), (2, 0, 4), (3, 0, 4), (9, 9, 2)])

    def build(text: str, version: tuple[int, int, int], length: int | None, tail: bytes) -> bytes:
        body = text.encode('utf-8', 'surrogatepass') + b'\n'
        count = (len(body) if length is None else length) % 256**version[2]
        return b'\x93NUMPY' + bytes(version[:2]) + count.to_bytes(version[2], 'little') + body + tail
    return st.builds(build, text, version, st.one_of(st.none(), st.none(), st.integers(0, 2**32 - 1)), st.binary(max_size=64))


def _damaged() -> st.SearchStrategy[bytes]:
    "A good file with a few bytes changed, or cut."
    good = st.sampled_from([encode_iq(samples(0, 5)), encode_iq(samples(0, 5).astype(np.complex128)), encode_iq(np.arange(10, dtype=np.int16))])

    def damage(content: bytes, changes: list[tuple[int, int]], cut: int) -> bytes:
        changed = bytearray(content)
        for place, value in changes:
            changed[place % len(changed)] = value
        return bytes(changed[:cut])
    return st.builds(damage, good, st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), max_size=4), st.integers(0, 300))


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(max_size=300), st.binary(max_size=100).map(lambda tail: b'\x93NUMPY\x01\x00' + tail), _headers(), _damaged()))
def test_any_bytes_are_samples_or_one_line(tmp_path: Path, content: bytes):
    path = tmp_path / 'x.npy'
    path.write_bytes(content)
    tracemalloc.start()
    try:
        iq = read_iq(path)
        assert iq.ndim == 1 and iq.dtype in (np.complex64, np.complex128, np.int16) and 0 < iq.nbytes <= len(content)
        assert inspect_iq(path).samples == len(iq) // (2 if iq.dtype == np.int16 else 1)
        assert np.isfinite(measure_level(iq, 'x.npy'))
    except HeimdallError as error:
        assert str(error).isprintable() and len(str(error)) < 400
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**24  # Python's parser takes a few MB for the deepest of these headers


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cells=st.lists(st.lists(st.one_of(st.text(max_size=8), st.sampled_from(['roof.npy', '12500', '2025-10-22', '0', '45', '', 'a', 'nan', '1e999', '../x'])),
                               min_size=9, max_size=12), min_size=1, max_size=6))
def test_every_row_is_a_recording_or_a_reject(tmp_path: Path, cells: list[list[str]]):
    (tmp_path / 'roof.npy').write_bytes(encode_iq(samples(0)))
    file = io.StringIO(newline='')
    csv.writer(file).writerows([COLUMNS, *cells])
    (tmp_path / 'recordings.csv').write_bytes(file.getvalue().encode('utf-8', 'surrogatepass'))
    try:
        _, sessions, rejects = read_recordings(tmp_path, NETWORK)
    except HeimdallError as error:
        assert str(error).isprintable()
        return
    assert sum(len(session.recordings) for session in sessions) + len(rejects) == sum(any(cell.strip() for cell in row) for row in cells)
    assert all(reject.reason.isprintable() for reject in rejects)


def test_faults_of_the_whole_manifest(campaign: Campaign):
    campaign.ingest()
    fails(lambda: read_recordings(campaign.folder / 'in'), 'receivers.csv: write name,lat,lon of each receiver into it')
    fails(lambda: ingest_recordings(campaign.folder / 'in', campaign.catalog, campaign.store, PIEDMONT, 'other'), '12 of 12 rows cannot be used')
    fails(lambda: read_recordings(campaign.folder / 'absent.csv', NETWORK), 'No such file')
    (campaign.folder / 'in' / 'recordings.csv').write_text(','.join(COLUMNS).replace('file', 'files') + '\n')
    fails(lambda: read_recordings(campaign.folder / 'in', NETWORK), 'column file missing')
