"""Level tables through the catalog: the measured one without losing a row or a bit, a large one in little memory."""
import csv
import tracemalloc
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from heimdall_train.catalog import Catalog
from heimdall_train.ingest import ingest_levels, read_split_file
from heimdall_train.network import Network, Receiver
from heimdall_train.object_store import open_store
from heimdall_train.store import Recording, Session, Source


def test_the_powder_table_comes_back_identical(powder: Path, tmp_path: Path):
    catalog, store = Catalog(tmp_path / 'catalog.db'), open_store(tmp_path / 'store')
    report = ingest_levels(powder / 'levels.csv', catalog, store)
    sessions = list(catalog.sessions())
    assert (report.dataset, report.sessions, report.rejects) == ('powder_frs', 4138, ())

    with open(powder / 'levels.csv', newline='') as file:
        rows = {row['session_id']: row for row in csv.DictReader(file)}
    assert [session.id for session in sessions] == sorted(rows, key=lambda name: (rows[name]['started_at'], name))
    for session in sessions:
        row = rows[session.id]
        assert session.source is not None
        assert (session.source.latitude, session.source.longitude) == (float(row['lat']), float(row['lon']))
        assert f'{session.started_at:%Y-%m-%dT%H:%M:%SZ}' == row['started_at']
        levels = {name: float(row[name]) for name in list(row)[4:] if row[name]}
        assert {recording.receiver: recording.level_db for recording in session.recordings} == levels

    assert catalog.network() == Network.from_csv(powder / 'receivers.csv')
    assert sum(not receiver.has_position for receiver in catalog.network().receivers) == 11
    assert store.read(store.key(report.table_uri)) == (powder / 'levels.csv').read_bytes()
    again = ingest_levels(powder / 'levels.csv', catalog, store)
    assert str(again) == 'dataset powder_frs already holds these 4138 sessions; nothing changed'
    assert [dataset.sessions for dataset in catalog.datasets()] == [4138]

    for name, count in [('random_test', 826), ('grid_test', 666), ('april', 811)]:
        test = read_split_file(powder / 'splits' / f'{name}.txt', rows)
        assert len(test) == count
    assert [session.id for session in catalog.sessions(ids=test)] == sorted(test)


def test_reading_and_writing_need_no_more_memory_for_more_sessions(tmp_path: Path):
    network = Network('yard', tuple(Receiver(f'receiver-{k}') for k in range(3)))

    def many(count: int) -> Iterator[Session]:
        for k in range(count):
            start = datetime(2025, 10, 22, tzinfo=UTC) + timedelta(seconds=k)
            recordings = tuple(Recording(name, -60.0 - k % 50) for name in network.names)
            yield Session(f'{k:06}', start, Source(f'{k}', 45.0 + k * 1e-6, 7.6), recordings)

    def peak(count: int) -> tuple[int, int]:
        catalog = Catalog(tmp_path / f'{count}.db')
        tracemalloc.start()
        catalog.add_sessions(many(count), 'many', network=network)
        writing = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        assert sum(1 for _ in catalog.sessions()) == count
        reading = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return writing, reading
    peak(50)  # what is imported and cached once
    few, more = peak(600), peak(1800)
    assert more[0] < 1.5 * few[0] and more[1] < 1.5 * few[1]
