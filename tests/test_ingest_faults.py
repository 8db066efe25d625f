"""Killed processes, full disks, read-only folders and damaged files: one line, and either all of a table or nothing."""
import errno
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import event

from heimdall_train.catalog import Catalog
from heimdall_train.ingest import TooManyRejects, ingest_levels, read_level_table
from heimdall_train.network import HeimdallError, Network, Receiver
from heimdall_train.object_store import open_store
from heimdall_train.store import Recording, Session, Source, write_file

pytestmark = pytest.mark.fault
NETWORK = Network('yard', tuple(Receiver(f'receiver-{k}', 45.0 + k / 100, 7.6) for k in range(20)))
START = datetime(2025, 10, 22, 12, tzinfo=UTC)


def sessions(count: int, prefix: str = 's') -> Iterator[Session]:
    for k in range(count):
        source = Source(f'place {k}', 45.0 + k * 1e-4, 7.6)
        recordings = tuple(Recording(name, -60.0 - k % 100 / 7) for name in NETWORK.names)
        yield Session(f'{prefix}{k:05}', START + timedelta(seconds=k), source, recordings)


def write_table(folder: Path, count: int, name: str = 'levels.csv') -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    header = ','.join(['session_id', 'started_at', 'lat', 'lon', *NETWORK.names])
    rows = [','.join([session.id, session.started_at.isoformat(), repr(session.source.latitude), repr(session.source.longitude),
                      *(repr(recording.level_db) for recording in session.recordings)]) for session in sessions(count)]
    (folder / name).write_text('\n'.join([header, *rows, '']))
    receivers = [f'{receiver.name},{receiver.latitude},{receiver.longitude}' for receiver in NETWORK.receivers]
    (folder / 'receivers.csv').write_text('\n'.join(['name,lat,lon', *receivers, '']))
    return folder / name


def fails(action: Callable[[], object], words: str) -> None:
    "The action ends in one line that contains the words."
    with pytest.raises(HeimdallError) as caught:
        action()
    assert words in str(caught.value)
    assert '\n' not in str(caught.value) and 'SQL' not in str(caught.value).replace('SQLite', '')


def run(program: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-c', program, *map(str, arguments)], capture_output=True, text=True, timeout=120)


KILLED = '''
import os, signal, sys
from sqlalchemy import event
sys.path.insert(0, sys.argv[2])
from test_ingest_faults import NETWORK, sessions
from heimdall_train.catalog import Catalog

def until_killed():
    yield from sessions(2500, 'killed-')
    os.kill(os.getpid(), signal.SIGKILL)

catalog = Catalog(sys.argv[1])
event.listen(catalog.database._engine, 'connect', lambda connection, record: connection.execute('PRAGMA cache_size = 10'))
catalog.add_sessions(until_killed(), sys.argv[3], network=NETWORK)
'''


@pytest.mark.parametrize('dataset', ['first', 'second'])
def test_a_killed_ingest_leaves_nothing(tmp_path: Path, dataset: str):
    "A small cache makes SQLite overwrite the file before the end, so that only its journal can undo it."
    catalog = Catalog(tmp_path / 'catalog.db')
    catalog.add_sessions(sessions(50), 'first', network=NETWORK)
    before, size = list(catalog.sessions('first')), catalog.database.path.stat().st_size
    done = run(KILLED, catalog.database.path, Path(__file__).parent, dataset)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert catalog.database.path.stat().st_size > 2 * size, 'killed too early to prove anything'
    assert catalog.database.path.with_name('catalog.db-journal').exists()
    assert list(catalog.sessions()) == before
    assert [(found.name, found.sessions) for found in catalog.datasets()] == [('first', 50)]
    assert catalog.add_sessions(sessions(50, 'more-'), dataset) == 50


def test_an_ingest_that_is_killed_anywhere_can_be_repeated(tmp_path: Path):
    table = write_table(tmp_path / 'drive', 400)
    program = '''
import os, signal, sys
from heimdall_train import catalog, ingest, object_store, store
calls = 0
def dying(function):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
store.write_file = dying(store.write_file)
for name in ['_put_network', '_put_dataset', '_put_sessions', '_insert']:
    setattr(catalog, name, dying(getattr(catalog, name)))
ingest.ingest_levels(sys.argv[1], catalog.Catalog(sys.argv[2]), object_store.open_store(sys.argv[2] + '.store'))
'''
    for call in [1, 2, 4, 7]:
        path = tmp_path / f'killed-{call}.db'
        done = run(program, table, path, call)
        assert done.returncode == -signal.SIGKILL, done.stderr
        catalog = Catalog(path)
        fails(catalog.sessions, 'there is no catalog')
        assert ingest_levels(table, catalog, open_store(f'{path}.store')).sessions == 400
        assert len(list(catalog.sessions())) == 400


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    "A file system of its own, where the tests may make one."
    folder.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('no right to mount a file system here')
    try:
        yield folder
    finally:
        subprocess.run(['umount', str(folder)], check=True)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path):
    table = write_table(tmp_path / 'drive', 2000)
    with small_disk(tmp_path / 'disk', 'size=1m') as disk:
        catalog, store = Catalog(disk / 'catalog.db'), open_store(disk / 'store')
        catalog.add_sessions(sessions(20, 'old-'), 'old', network=NETWORK)
        before = list(catalog.sessions())
        fails(lambda: ingest_levels(table, catalog), 'free some space')
        assert list(catalog.sessions()) == before
        fails(lambda: write_file(disk / 'large.bin', bytes(2_000_000)), 'No space left on device: free some space')
        fails(lambda: store.write('large.bin', bytes(2_000_000)), 'No space left on device')
        assert not (disk / 'large.bin').exists() and list(store.keys()) == []
        assert catalog.add_sessions(sessions(2, 'new-'), 'old') == 2


def test_a_read_only_file_system(tmp_path: Path):
    table = write_table(tmp_path / 'drive', 30)
    with small_disk(tmp_path / 'disk', 'size=4m') as disk:
        catalog = Catalog(disk / 'catalog.db')
        ingest_levels(table, catalog)
        subprocess.run(['mount', '-o', 'remount,ro', str(disk)], check=True)
        assert len(list(catalog.sessions())) == 30
        fails(lambda: ingest_levels(table, catalog, dataset='other'), 'readonly database: choose a folder that you may write to')
        fails(lambda: ingest_levels(table, Catalog(disk / 'new.db')), 'choose a folder that you may')
        fails(Catalog(disk / 'new' / 'catalog.db').create, 'Read-only file system: choose a folder that you may write to')
        fails(lambda: ingest_levels(table, Catalog(tmp_path / 'new.db'), open_store(disk / 'store')), 'Read-only file system')
        assert not Catalog(tmp_path / 'new.db').exists()


LIMITED = '''
import resource, sys
from heimdall_train.catalog import Catalog
from heimdall_train.ingest import ingest_levels
from heimdall_train.network import HeimdallError
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    ingest_levels(sys.argv[1], Catalog(sys.argv[2]))
except HeimdallError as error:
    print(error)
'''


def test_a_file_that_may_not_grow(tmp_path: Path):
    table = write_table(tmp_path / 'drive', 500)
    done = run(LIMITED, table, tmp_path / 'catalog.db')
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('\n') == 1 and 'free some space' in done.stdout
    assert ingest_levels(table, Catalog(tmp_path / 'catalog.db')).sessions == 500


@contextmanager
def locked_folder() -> Iterator[Path]:
    "A folder with a catalog in which this process may create and change nothing, even where it runs as root."
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        folder = Path(name, 'locked')
        folder.mkdir()
        Catalog(folder / 'catalog.db').add_sessions(sessions(3), 'old', network=NETWORK)
        os.chmod(folder / 'catalog.db', 0o444)
        os.chmod(folder, 0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if root:
                os.seteuid(0)
            os.chmod(folder, 0o755)


def test_a_folder_without_the_right_to_write(tmp_path: Path):
    network, found, _ = read_level_table(write_table(tmp_path / 'drive', 30))
    with locked_folder() as folder:
        catalog = Catalog(folder / 'catalog.db')
        assert len(list(catalog.sessions())) == 3
        fails(lambda: catalog.add_sessions(found, 'new', network=network), 'choose a folder that you may')
        fails(Catalog(folder / 'new.db').create, 'unable to open database file: choose a folder that you may')
        fails(Catalog(folder / 'new' / 'catalog.db').create, 'Permission denied: choose a folder that you may write to')
        fails(lambda: open_store(folder / 'store').write('a', b''), 'Permission denied: choose a folder that you may write to')
        fails(lambda: write_file(folder / 'model.bin', b''), 'Permission denied')


@pytest.mark.parametrize('failing', ['fsync', 'replace'])
def test_a_disk_that_fails_late_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str):
    write_file(tmp_path / 'model.bin', b'old')

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        fails(lambda: write_file(tmp_path / 'model.bin', b'new'), 'No space left on device: free some space')
    assert (tmp_path / 'model.bin').read_bytes() == b'old'
    assert [file.name for file in tmp_path.iterdir()] == ['model.bin']


@pytest.mark.parametrize('kept', [0.02, 0.3, 0.7, 0.95])
def test_a_truncated_catalog(tmp_path: Path, kept: float):
    catalog = Catalog(tmp_path / 'catalog.db')
    catalog.add_sessions(sessions(300), 'old', network=NETWORK)
    content = catalog.database.path.read_bytes()
    catalog.database.path.write_bytes(content[:int(len(content) * kept)])
    fails(lambda: list(catalog.sessions()), 'malformed: the file is damaged')


def test_a_catalog_that_another_program_is_writing(tmp_path: Path):
    catalog = Catalog(tmp_path / 'catalog.db')
    event.listen(catalog.database._engine, 'connect', lambda connection, record: connection.execute('PRAGMA busy_timeout = 50'))
    catalog.add_sessions(sessions(3), 'old', network=NETWORK)
    with sqlite3.connect(catalog.database.path, isolation_level=None) as other:
        other.execute('BEGIN IMMEDIATE')
        assert len(list(catalog.sessions())) == 3
        fails(lambda: catalog.add_sessions(sessions(3, 'new-'), 'old'), 'database is locked: another program is writing to it')
        other.execute('COMMIT')
    assert catalog.add_sessions(sessions(3, 'new-'), 'old') == 3


def test_two_processes_ingest_at_once(tmp_path: Path):
    program = '''
import sys
from heimdall_train.catalog import Catalog
from heimdall_train.ingest import ingest_levels
print(ingest_levels(sys.argv[1], Catalog(sys.argv[2])))
'''
    tables = [write_table(tmp_path / 'drives', 300, f'{name}.csv') for name in ('monday', 'tuesday')]
    command = [sys.executable, '-c', program]
    processes = [subprocess.Popen([*command, table, tmp_path / 'catalog.db'], stdout=subprocess.PIPE, text=True) for table in tables]
    for process, table in zip(processes, tables):
        assert process.communicate(timeout=120)[0] == f'300 sessions added to dataset {table.stem}\n'
    datasets = Catalog(tmp_path / 'catalog.db').datasets()
    assert [(dataset.name, dataset.sessions) for dataset in datasets] == [('monday', 300), ('tuesday', 300)]


def test_a_table_cut_off_in_its_last_row(tmp_path: Path):
    table = write_table(tmp_path / 'drive', 30)
    table.write_bytes(table.read_bytes()[:-150])
    report = ingest_levels(table, Catalog(tmp_path / 'catalog.db'))
    assert (report.sessions, [str(reject) for reject in report.rejects]) == (29, ['line 31: 17 cells where the header has 24 columns'])


def test_a_fifth_may_be_set_aside_but_not_more(tmp_path: Path):
    table = write_table(tmp_path / 'drive', 20)
    lines = table.read_text().splitlines()
    for bad in range(1, 6):
        table.write_text('\n'.join(line.replace('-6', 'x', 1) if 1 <= number <= bad else line for number, line in enumerate(lines)))
        catalog = Catalog(tmp_path / f'{bad}.db')
        if bad <= 4:
            assert ingest_levels(table, catalog).sessions == 20 - bad
        else:
            with pytest.raises(TooManyRejects, match=r'levels\.csv: 5 of 20 rows cannot be used \(line 2: level') as caught:
                ingest_levels(table, catalog)
            assert [reject.line for reject in caught.value.rejects] == [2, 3, 4, 5, 6]
            assert not catalog.exists()
            assert ingest_levels(table, catalog, allow_rejects=True).sessions == 15


def test_a_table_without_a_usable_row(tmp_path: Path):
    table = write_table(tmp_path / 'drive', 3)
    table.write_text(table.read_text().replace('2025', 'year'))
    catalog = Catalog(tmp_path / 'catalog.db')
    for allow in (False, True):
        fails(lambda allow=allow: ingest_levels(table, catalog, allow_rejects=allow), '3 of 3 rows cannot be used')
    assert not (tmp_path / 'catalog.db').exists()


def test_receivers_that_do_not_fit(tmp_path: Path):
    table = write_table(tmp_path / 'drive', 3)
    receivers = table.with_name('receivers.csv')
    lines = receivers.read_text().splitlines(keepends=True)
    catalog = Catalog(tmp_path / 'catalog.db')
    receivers.write_text(''.join(lines[:-1]))
    fails(lambda: ingest_levels(table, catalog), "network drive has no receiver 'receiver-19': add it to receivers.csv")
    receivers.write_text(''.join(lines[:3]))
    fails(lambda: ingest_levels(table, catalog), 'network drive has 2 receivers: at least 3 are needed')
    receivers.write_text(''.join(lines).replace('45.03', '95.03'))
    fails(lambda: ingest_levels(table, catalog), 'latitude 95.03')
    receivers.unlink()
    fails(lambda: ingest_levels(table, catalog), 'receivers.csv: write name,lat,lon of each receiver into it')
    table.unlink()
    fails(lambda: ingest_levels(table, catalog), 'No such file or directory')
    assert not catalog.exists()
