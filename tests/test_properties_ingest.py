"""Whatever a level table holds: what is good comes back exactly, what is bad is set aside with a reason, and nothing is lost."""
import csv
import io
import tempfile
from collections import Counter
from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heimdall_train.catalog import Catalog
from heimdall_train.ingest import LEVEL_RANGE_DB, Reject, parse_level_table
from heimdall_train.network import HeimdallError, Network, Receiver
from heimdall_train.store import Recording, Session, Source

NETWORK = Network('yard', tuple(Receiver(name) for name in ('roof', 'van', 'hill', 'mast')))
HEADER = ['session_id', 'started_at', 'lat', 'lon', *NETWORK.names]

levels = st.floats(*LEVEL_RANGE_DB)
times = st.datetimes(datetime(1971, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC))
names = st.text(st.characters(codec='utf-8', categories=['L', 'N', 'P', 'S']), min_size=1, max_size=12)
places = st.tuples(st.floats(-90, 90), st.floats(-180, 180))
heard = st.dictionaries(st.sampled_from(NETWORK.names), levels, min_size=1)
cells = st.one_of(st.text(max_size=8), st.sampled_from([
    '', ' ', 'nan', 'inf', '-71,5', '95', '-999', '1e999', '2025-10-22', '2025-10-22T12:00:00+02:00', '45', '-60', 'a']))


@st.composite
def tables(draw: st.DrawFn) -> list[Session]:
    "Sessions that a level table can hold."
    return [Session(name, draw(times), Source(f'{latitude}, {longitude}', latitude, longitude),
                    tuple(Recording(receiver, found[receiver]) for receiver in NETWORK.names if receiver in found))
            for name in draw(st.lists(names, unique=True, min_size=1, max_size=8))
            for (latitude, longitude), found in [draw(st.tuples(places, heard))]]


def row(session: Session) -> dict[str, str]:
    found = {recording.receiver: repr(recording.level_db) for recording in session.recordings}
    return {'session_id': session.id, 'started_at': session.started_at.isoformat(),
            'lat': repr(session.source.latitude), 'lon': repr(session.source.longitude), **found}


def write(rows: list[dict[str, str]], columns: list[str]) -> bytes:
    file = io.StringIO(newline='')
    writer = csv.DictWriter(file, columns, restval='')
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


@settings(max_examples=50, deadline=None)
@given(tables(), st.permutations(HEADER))
def test_what_is_written_comes_back_bit_for_bit(sessions: list[Session], columns: list[str]):
    assert parse_level_table(write([row(session) for session in sessions], columns), NETWORK, 'table') == (sessions, [])


@settings(max_examples=20, deadline=None)
@given(tables())
def test_the_catalog_keeps_every_bit(sessions: list[Session]):
    with tempfile.TemporaryDirectory() as folder:
        catalog = Catalog(f'{folder}/catalog.db')
        catalog.add_sessions(sessions, 'a', network=NETWORK)
        stored = list(catalog.sessions())
    assert stored == sorted(sessions, key=lambda session: (session.started_at, session.id))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(cells, min_size=1, max_size=10), min_size=1, max_size=12))
def test_every_row_is_a_session_or_a_reject(rows: list[list[str]]):
    file = io.StringIO(newline='')
    csv.writer(file).writerows([HEADER, *rows])
    try:
        sessions, rejects = parse_level_table(file.getvalue().encode('utf-8', 'surrogatepass'), NETWORK, 'table')
    except HeimdallError as error:
        assert str(error).isprintable()
        return
    assert len(sessions) + len(rejects) == sum(any(cell.strip() for cell in cells) for cells in rows)
    assert len({session.id for session in sessions}) == len(sessions)
    lines = [reject.line for reject in rejects]
    assert lines == sorted(set(lines)) and all(1 < line <= file.getvalue().count('\n') + file.getvalue().count('\r') + 1 for line in lines)
    assert all(reject.reason and reject.reason.isprintable() and len(reject.reason) < 200 for reject in rejects)
    for session in sessions:
        assert session.source is not None and session.recordings
        assert all(LEVEL_RANGE_DB[0] <= recording.level_db <= LEVEL_RANGE_DB[1] for recording in session.recordings)


@settings(max_examples=100, deadline=None)
@given(tables(), st.data())
def test_one_bad_cell_costs_its_own_row_only(sessions: list[Session], data: st.DataObject):
    place = data.draw(st.integers(0, len(sessions) - 1))
    column, text = data.draw(st.sampled_from([
        ('lat', '95'), ('lon', '-180.5'), ('lat', ''), ('started_at', 'soon'), ('roof', 'loud'), ('hill', '-999'), ('van', 'NaN'),
        ('session_id', '')]))
    rows = [row(session) for session in sessions]
    rows[place][column] = text
    found, rejects = parse_level_table(write(rows, HEADER), NETWORK, 'table')
    assert found == sessions[:place] + sessions[place + 1:]
    assert [(reject.line, reject.session_id) for reject in rejects] == [(place + 2, rows[place]['session_id'])]
    assert column in rejects[0].reason


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.binary(max_size=100).map(lambda tail: (','.join(HEADER) + '\n').encode() + tail)))
def test_any_bytes_end_in_rows_or_in_one_line(content: bytes):
    try:
        sessions, rejects = parse_level_table(content, NETWORK, 'table')
    except HeimdallError as error:
        assert str(error).isprintable()
    else:
        assert all(isinstance(reject, Reject) for reject in rejects) and (sessions or rejects)


@pytest.mark.fault
def test_damaged_parquet_files():
    "Ten thousand Parquet files with bytes changed or cut off: sessions, or one line."
    count, file, generator = 30, io.BytesIO(), np.random.default_rng(0)
    columns = {'session_id': [f's{number}' for number in range(count)], 'started_at': pd.date_range('2025-10-22', periods=count, tz='UTC')}
    pd.DataFrame(columns | {'lat': 45.0, 'lon': 7.5, **{name: np.linspace(-80, -50, count) for name in NETWORK.names}}).to_parquet(file)
    whole = np.frombuffer(file.getvalue(), np.uint8)
    assert len(parse_level_table(whole.tobytes(), NETWORK, 'table')[0]) == count
    ends = Counter()
    for number in range(10_000):
        damaged = whole.copy()
        damaged[generator.integers(4, len(whole), generator.integers(1, 6))] = generator.integers(256)
        content = damaged[: generator.integers(4, len(whole)) if number % 5 == 0 else len(whole)].tobytes()
        try:
            parse_level_table(content, NETWORK, 'table')
            ends['sessions'] += 1
        except HeimdallError as error:
            assert str(error).isprintable()
            ends['one line'] += 1
    assert ends['one line'] > 5000 and ends['sessions'] > 100
