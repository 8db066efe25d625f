"""The same catalog in an SQLite file and on a PostgreSQL server; and a server that goes away, deadlocks, refuses and runs out of time."""
import logging
import secrets
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psycopg2
import pytest
import sqlalchemy as sa
from campaigns import HILL, NETWORK, ROOF, START, VAN, sessions
from servers import ACCESS_KEY, DATABASE_PASSWORD, DATABASE_USER, SECRET_KEY, PostgresServer
from test_cli import call

from heimdall_train import catalog as catalogs
from heimdall_train.catalog import Catalog, Dataset
from heimdall_train.config import make_config
from heimdall_train.data import read_data, simulate
from heimdall_train.dataset import TimedData
from heimdall_train.network import HeimdallError, Network, Receiver
from heimdall_train.store import Recording, Session, Source
from heimdall_train.tables import METADATA


def fails(action: Callable, *words: str) -> str:
    with pytest.raises(HeimdallError) as caught:
        action()
    assert all(word in str(caught.value) for word in words), caught.value
    assert '\n' not in str(caught.value) and 'canary' not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('HEIMDALL_CATALOG_PASSWORD', DATABASE_PASSWORD)
    monkeypatch.setenv('HEIMDALL_CATALOG_DEADLINE_S', '60')


@pytest.fixture
def uri(postgres: PostgresServer, password: None) -> str:
    "Of an empty database."
    name = f'db_{secrets.token_hex(6)}'
    postgres.sql(f'CREATE DATABASE {name}')
    return postgres.uri(name)


def database_of(uri: str) -> str:
    return uri.rpartition('/')[2]


@pytest.fixture
def server_catalog(uri: str) -> Catalog:
    catalog = Catalog(uri)
    catalog.create()
    return catalog


@pytest.fixture(params=['sqlite', pytest.param('postgres', marks=pytest.mark.postgres)])
def catalog(request: pytest.FixtureRequest, tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / 'catalog.db') if request.param == 'sqlite' else request.getfixturevalue('server_catalog')


# --- the same contract in both ---


def test_sessions_come_back_as_they_were(catalog: Catalog):
    campaign = sessions(1003)
    assert catalog.add_sessions(iter(campaign), 'drive', network=NETWORK) == 1003
    stored = list(catalog.sessions())
    assert stored == sorted(campaign, key=lambda session: (session.started_at, session.id))
    assert catalog.network() == NETWORK and catalog.datasets() == [Dataset('drive', 'valley', 1003)]
    assert [session.id for session in catalog.sessions(ids=['s700', 's2', 's1002'])] == ['s2', 's700', 's1002']
    assert list(catalog.sessions(ids=[])) == []
    fails(lambda: catalog.sessions(ids=['s1', 'x7', 'x8']), 'dataset drive has no approved session x7 (and 1 more)')


def test_ids_sort_alike_in_every_language(catalog: Catalog):
    names = ['b', 'A', 'a', 'B', 'é', '_', '10', '9', 'Z z', 'zz']
    catalog.add_sessions([replace(session, id=name, started_at=START) for session, name in zip(sessions(10), names, strict=True)], 'x', network=NETWORK)
    assert [session.id for session in catalog.sessions()] == sorted(names)


def test_strange_names_are_only_names(catalog: Catalog):
    names = ['it\'s; DROP TABLE measurements; --', 'a "quoted" name', 'back\\slash', '%s %(x)s :x', 'é ü 漢字 🛰']
    for number, name in enumerate(names):
        network = Network(name, tuple(Receiver(f'{name} {k}', 45.0, 7.0) for k in range(3)))
        heard = Session(name, START, Source(name, 45.0, 7.6), (Recording(f'{name} 1', -60.0 - number),))
        assert catalog.add_sessions([heard], name, network=network) == 1
        assert list(catalog.sessions(name, ids=[name])) == [heard]
        assert catalog.network(name) == network
    assert sorted(dataset.name for dataset in catalog.datasets()) == sorted(names)


def test_all_or_nothing(catalog: Catalog):
    campaign = sessions(20)
    catalog.add_sessions(campaign, 'drive', network=NETWORK)
    for wrong, words in [(campaign[3], 'already has a session s3'), (Session('x', START, None, ()), 'heard by no receiver'),
                         (Session('x', START, None, (Recording('nobody', -70.0),)), 'has no receiver nobody')]:
        fails(lambda wrong=wrong: catalog.add_sessions([*sessions(5, 'new-'), wrong], 'drive'), words)
        assert len(list(catalog.sessions())) == 20
    unlocated = Session('unknown', START, None, (Recording('roof', -60.0),))
    catalog.add_sessions([*sessions(3, 'later-'), unlocated], 'second', approved=False)
    assert list(catalog.sessions('second')) == [] and len(list(catalog.sessions('second', approved=False))) == 3
    assert list(catalog.sessions('second', approved=False, located=False, ids=['unknown'])) == [unlocated]
    fails(lambda: catalog.sessions(), 'holds 2 datasets: choose one of drive, second')


def test_networks_and_models(catalog: Catalog):
    fails(lambda: catalog.add_sessions(sessions(1), 'drive'), 'holds no network yet')
    catalog.add_sessions(sessions(5), 'drive', network=NETWORK)
    corrected = replace(NETWORK, receivers=(Receiver('mast', 45.2, 7.8), replace(ROOF, altitude=275.0), VAN, HILL), zone=None)
    catalog.add_network(corrected)
    assert catalog.networks() == [corrected] and list(catalog.sessions()) == sessions(5)
    fails(lambda: catalog.add_network(NETWORK), 'also has the receiver mast')
    key = catalog.add_model('localization_model', 'levels', hyperparameters={'epochs': 8}, metrics={'coverage': {'90': 0.89}}, accuracy_meters=131.5)
    model, = catalog.models()
    assert (str(model['id']), model['performance_metrics'], model['accuracy_meters']) == (key, {'coverage': {'90': 0.89}}, 131.5)
    assert model['created_at'].tzinfo is UTC
    for run in ('first', 'second'):
        catalog.add_model('localization_model', 'levels', mlflow_run_id=run)
    for run, known in (('first', True), ('second', True), ('unknown', False)):
        assert catalog.set_production('localization_model', run) == known
        assert [entry['mlflow_run_id'] for entry in catalog.models() if entry['is_production']] == [run] * known
    fails(lambda: catalog.add_model('m', 'levels', metrics={'nees': float('nan')}), 'JSON')


def test_what_is_missing_is_added_and_nothing_else(catalog: Catalog):
    catalog.add_sessions(sessions(5), 'drive', network=NETWORK)
    assert catalog.create() == []
    with catalog.database._engine.begin() as connection:
        connection.execute(sa.text('ALTER TABLE measurements DROP COLUMN snr_db'))
        connection.execute(sa.text('ALTER TABLE known_sources ADD COLUMN owner TEXT'))
        connection.execute(sa.text('DROP TABLE models'))
    old = Catalog(catalog.database.path if hasattr(catalog.database, 'path') else catalog.database.name)
    without = [replace(session, recordings=tuple(replace(recording, snr_db=None) for recording in session.recordings)) for session in sessions(5)]
    assert list(old.sessions()) == without
    assert sorted(old.create()) == ['measurements.snr_db', 'models'] and old.create() == []
    assert list(old.sessions()) == without
    old.add_sessions(sessions(3, 'new-'), 'drive')
    assert [session for session in old.sessions() if session.id.startswith('new-')] == sessions(3, 'new-')


def test_pages_are_read_as_needed(catalog: Catalog, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(catalogs, '_PAGE', 100)
    catalog.add_sessions(sessions(650), 'drive', network=NETWORK)

    def peak(count: int) -> int:
        tracemalloc.start()
        for _ in zip(range(count), catalog.sessions()):
            pass
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used
    peak(1)
    assert peak(650) < 1.5 * peak(250)


# --- a server ---

postgres_only = pytest.mark.postgres
fault = pytest.mark.fault


@postgres_only
def test_tables_are_made_on_purpose(uri: str, postgres: PostgresServer):
    catalog = Catalog(uri)
    assert not catalog.exists()
    fails(lambda: list(catalog.sessions()), 'it has no table websdr_stations, so it is no catalog: ', 'heimdall-train catalog init')
    fails(lambda: catalog.add_sessions(sessions(3), 'drive', network=NETWORK), 'lacks tables of a catalog: run heimdall-train catalog init')
    fails(lambda: catalog.add_network(NETWORK), 'run heimdall-train catalog init')
    result = call('catalog', 'upgrade', '--catalog', uri)
    assert result.exit_code == 2 and 'there is no catalog' in result.stderr and 'catalog init' in result.stderr
    result = call('catalog', 'init', '--catalog', uri)
    assert result.exit_code == 0 and 'added ' in result.stdout and 'measurements' in result.stdout, result.stderr
    assert call('catalog', 'upgrade', '--catalog', uri, '--json').stdout == f'{{"catalog": "{uri}", "added": []}}\n'
    assert catalog.exists() and catalog.datasets() == []
    query = "SELECT table_schema, count(*) FROM information_schema.tables WHERE table_schema IN ('heimdall', 'public') GROUP BY 1"
    rows = postgres.sql(query, database_of(uri))
    assert rows == [['heimdall', str(len(METADATA.tables))]]


OWN = '''
CREATE SCHEMA heimdall;
SET search_path TO heimdall;
CREATE TYPE session_status AS ENUM ('pending', 'in_progress', 'completed', 'failed');
CREATE TABLE websdr_stations (id uuid PRIMARY KEY, name varchar(80), url text, latitude numeric(9, 6), longitude numeric(9, 6), antenna text);
CREATE TABLE known_sources (id uuid PRIMARY KEY, name varchar(80), frequency_hz bigint, latitude double precision, longitude double precision,
                            error_margin_meters integer);
CREATE TABLE recording_sessions (id uuid PRIMARY KEY, known_source_id uuid REFERENCES known_sources, session_name text, session_start timestamptz,
                                 status session_status, approval_status text);
CREATE TABLE measurements (timestamp timestamptz, id uuid, recording_session_id uuid REFERENCES recording_sessions,
                           websdr_station_id uuid REFERENCES websdr_stations, frequency_hz bigint, signal_strength_db real, iq_sample_rate integer,
                           PRIMARY KEY (timestamp, id));
INSERT INTO websdr_stations SELECT ('00000000-0000-0000-0000-00000000000' || n)::uuid, 'station ' || n, NULL, 45 + n * 0.1, 7 + n * 0.1, 'discone'
    FROM generate_series(1, 3) n;
INSERT INTO known_sources VALUES ('00000000-0000-0000-0000-0000000000aa', 'repeater', 145500000, 45.1, 7.4, 30);
INSERT INTO recording_sessions SELECT ('00000000-0000-0000-0001-' || lpad(n::text, 12, '0'))::uuid, '00000000-0000-0000-0000-0000000000aa', 'evening',
    '2025-10-22 18:30:00+02'::timestamptz + n * interval '1 second', CASE WHEN n % 10 = 3 THEN 'failed' ELSE 'completed' END::session_status,
    CASE WHEN n % 10 = 7 THEN 'pending' ELSE 'approved' END FROM generate_series(1, 1200) n;
INSERT INTO measurements SELECT session_start + interval '0.25 second', gen_random_uuid(), s.id, w.id, 145500000, -70.5, 12500
    FROM recording_sessions s, websdr_stations w;
CREATE ROLE reader_{name} LOGIN PASSWORD '{password}';
GRANT USAGE ON SCHEMA heimdall TO reader_{name};
GRANT SELECT ON ALL TABLES IN SCHEMA heimdall TO reader_{name};
'''


@postgres_only
def test_a_network_s_own_database_is_read_as_it_is(uri: str, postgres: PostgresServer):
    name = database_of(uri)
    postgres.sql(OWN.format(name=name, password=DATABASE_PASSWORD), name)
    reader = Catalog(postgres.uri(name, f'reader_{name}'))
    found = list(reader.sessions())
    assert len(found) == len(list(reader.sessions('all'))) == 960
    assert len({session.id for session in found}) == 960 and found == sorted(found, key=lambda session: session.started_at)
    assert found[0] == Session(
        '00000000-0000-0000-0001-000000000001', datetime(2025, 10, 22, 16, 30, 1, tzinfo=UTC), Source('repeater', 45.1, 7.4, None, 30.0),
        tuple(Recording(f'station {k}', -70.5, None, 12_500.0, 0.25) for k in (1, 2, 3)), 145.5e6)
    assert len(list(reader.sessions(approved=False))) == 1080
    assert reader.datasets() == [Dataset('all', 'stations', 1200)]
    assert reader.network() == Network('stations', tuple(Receiver(f'station {k}', 45 + k / 10, 7 + k / 10) for k in (1, 2, 3)))
    fails(lambda: reader.create(), 'permission denied', 'use a role that may do that')
    fails(lambda: reader.add_sessions(sessions(2), 'drive', network=NETWORK), 'catalog ')
    # what is missing is added; what was there stays
    before = postgres.sql('SELECT md5(string_agg(m::text, E\'\\n\' ORDER BY id)) FROM heimdall.measurements m', name)
    owner = Catalog(uri)
    added = owner.create()
    assert {'networks', 'training_datasets', 'models', 'measurements.start_offset_s', 'measurements.clock_error_s'} <= set(added)
    assert not {'websdr_stations', 'known_sources', 'recording_sessions', 'measurements'} & set(added)
    kept = 'timestamp, id, recording_session_id, websdr_station_id, frequency_hz, signal_strength_db, iq_sample_rate'
    after = postgres.sql(f"SELECT md5(string_agg((SELECT r::text FROM (SELECT {kept}) r), E'\\n' ORDER BY id)) FROM heimdall.measurements m", name)
    assert before == after and list(owner.sessions()) == found


@postgres_only
def test_a_schema_without_sessions_is_explained(uri: str, postgres: PostgresServer):
    name = database_of(uri)
    postgres.sql(OWN.format(name=name, password=DATABASE_PASSWORD) + 'ALTER TABLE measurements DROP COLUMN recording_session_id;', name)
    fails(Catalog(uri).datasets, 'its table measurements has no column recording_session_id, which says what was recorded together')


@postgres_only
def test_two_writers_queue(server_catalog: Catalog):
    program = '''
import sys
sys.path.insert(0, sys.argv[2])
from campaigns import NETWORK, sessions
from heimdall_train.catalog import Catalog
print(Catalog(sys.argv[1]).add_sessions(sessions(70, sys.argv[3]), sys.argv[3], network=NETWORK))
'''
    command = [sys.executable, '-c', program, server_catalog.database.name, str(Path(__file__).parent)]
    processes = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in ('monday', 'tuesday')]
    assert [process.communicate(timeout=120)[0] for process in processes] == ['70\n', '70\n']
    assert server_catalog.datasets() == [Dataset('monday', 'valley', 70), Dataset('tuesday', 'valley', 70)]


@postgres_only
@pytest.mark.s3
def test_the_same_commands_with_other_uris(uri: str, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in (('ENDPOINT', s3), ('ACCESS_KEY', ACCESS_KEY), ('SECRET_KEY', SECRET_KEY)):
        monkeypatch.setenv(f'HEIMDALL_S3_{name}', value)
    Catalog(uri).create()
    bucket, data = f's3://heimdall-raw-iq/{secrets.token_hex(6)}', []
    for catalog, store in [(str(tmp_path / 'c.db'), str(tmp_path / 'store')), (uri, bucket), (str(tmp_path / 'd.db'), f'{bucket}/d')]:
        config = make_config(catalog=catalog, store=store, cache=tmp_path / f'cache-{len(data)}')
        assert simulate('demo-v1', config, 12)['test'] == 3
        data.append(read_data(config))
    for other in data[1:]:
        assert isinstance(data[0], TimedData) and isinstance(other, TimedData)
        assert list(other.ids) == list(data[0].ids)
        np.testing.assert_array_equal(other.delay, data[0].delay)
        np.testing.assert_array_equal(other.maps[other.row], data[0].maps[data[0].row])


@postgres_only
def test_timescale_is_used_where_it_is(uri: str, postgres: PostgresServer):
    "TimescaleDB is in no registry: what is sent to it is executed by a function of the same name and parameters."
    Catalog(uri).create()
    postgres.sql('''
        CREATE SCHEMA "Time Scale";
        CREATE TABLE public.called (what text);
        CREATE FUNCTION "Time Scale".create_hypertable(relation regclass, time_column_name name, if_not_exists boolean DEFAULT false,
            migrate_data boolean DEFAULT false) RETURNS text LANGUAGE sql AS $$
            INSERT INTO public.called VALUES (
                (SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = relation)
                || ' ' || time_column_name || if_not_exists || migrate_data) RETURNING what $$;
        INSERT INTO pg_extension SELECT 99999, 'timescaledb', 10, oid, true, '2.17', NULL, NULL FROM pg_namespace WHERE nspname = 'Time Scale';
    ''', database_of(uri))
    Catalog(uri).create()
    assert postgres.sql('SELECT what FROM called', database_of(uri)) == [['heimdall.measurements timestamptruetrue']]


# --- a server that fails ---


def returns(server: PostgresServer, after: float) -> threading.Thread:
    "Start the server again in a while."
    def start() -> None:
        time.sleep(after)
        server.start()
    thread = threading.Thread(target=start)
    thread.start()
    return thread


@postgres_only
@fault
@pytest.mark.parametrize('away', [1.0, 10.0])
def test_a_server_killed_while_it_is_read(server_catalog: Catalog, postgres: PostgresServer, away: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(catalogs, '_PAGE', 50)
    server_catalog.add_sessions(sessions(300), 'drive', network=NETWORK)
    undisturbed, read = list(server_catalog.sessions()), []
    for session in server_catalog.sessions():
        read.append(session)
        if len(read) == 120:
            postgres.crash()
            back = returns(postgres, away)
    back.join()
    assert read == undisturbed


@postgres_only
@fault
def test_a_server_killed_in_the_middle_of_a_query(server_catalog: Catalog, postgres: PostgresServer):
    server_catalog.add_sessions(sessions(10), 'drive', network=NETWORK)
    calls, threads = [], []

    def work(connection: sa.Connection) -> int:
        calls.append(len(calls))
        if len(calls) == 1:
            kill = threading.Timer(0.5, lambda: (postgres.crash(), postgres.start()))
            kill.start()
            threads.append(kill)
            connection.execute(sa.text('SELECT pg_sleep(60)'))
        return connection.execute(sa.text('SELECT count(*) FROM measurements')).scalar_one()
    assert server_catalog.database.read(work) == 30 and len(calls) == 2
    threads[0].join()


@postgres_only
@fault
@pytest.mark.parametrize('moment', ['before', 'in', 'after'])
def test_a_server_killed_while_it_is_written_to(server_catalog: Catalog, postgres: PostgresServer, moment: str, monkeypatch: pytest.MonkeyPatch):
    "Before the commit, in its place, and after it, when only the answer is lost."
    monkeypatch.setattr(catalogs, '_BATCH', 50)
    server_catalog.add_sessions(sessions(10), 'old', network=NETWORK)
    dialect = server_catalog.database._engine.dialect
    commit, killed = dialect.do_commit, []

    def do_commit(connection) -> None:
        if killed:
            return commit(connection)
        if moment == 'after':
            commit(connection)
        postgres.crash()
        postgres.start()
        killed.append(True)
        if moment == 'after':
            raise psycopg2.OperationalError('server closed the connection unexpectedly')
        commit(connection)

    if moment != 'before':
        monkeypatch.setattr(dialect, 'do_commit', do_commit)
    else:  # at the second batch
        insert, batches = catalogs._insert, []

        def dying_insert(connection, table, rows) -> None:
            batches.append(table.name)
            if len(batches) == 5 and not killed:
                killed.append(True)
                postgres.crash()
                postgres.start()
            insert(connection, table, rows)
        monkeypatch.setattr(catalogs, '_insert', dying_insert)
    assert server_catalog.add_sessions(sessions(110, 'new-'), 'new', network=NETWORK) == 110
    assert killed and server_catalog.datasets() == [Dataset('new', 'valley', 110), Dataset('old', 'valley', 10)]
    assert sorted(server_catalog.sessions('new'), key=lambda session: session.id) == sorted(sessions(110, 'new-'), key=lambda session: session.id)


@postgres_only
@fault
def test_a_writer_that_is_killed_leaves_nothing(server_catalog: Catalog):
    program = '''
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from campaigns import NETWORK, sessions
from heimdall_train import catalog
catalog._BATCH = 50
insert, calls = catalog._insert, []
def dying(*arguments):
    calls.append(1)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    insert(*arguments)
catalog._insert = dying
catalog.Catalog(sys.argv[1]).add_sessions(sessions(110), 'drive', network=NETWORK)
'''
    server_catalog.add_network(NETWORK)
    done = subprocess.run([sys.executable, '-c', program, server_catalog.database.name, Path(__file__).parent], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert server_catalog.datasets() == []
    assert server_catalog.add_sessions(sessions(110), 'drive', network=NETWORK) == 110
    assert len(list(server_catalog.sessions())) == 110


@postgres_only
@fault
def test_a_deadlock_passes(server_catalog: Catalog, uri: str, monkeypatch: pytest.MonkeyPatch):
    "Another program holds a station and wants a network; we have the network and want the station."
    server_catalog.add_sessions(sessions(4), 'drive', network=NETWORK)
    other = psycopg2.connect(uri, password=DATABASE_PASSWORD)
    cursor, wanting, attempts = other.cursor(), [], []
    cursor.execute("SET deadlock_timeout = '1h'")  # so that it is ours that is chosen to give way
    cursor.execute("UPDATE heimdall.websdr_stations SET notes = 'cleaned' WHERE name = 'roof'")

    def work(connection: sa.Connection) -> int:
        attempts.append(1)
        connection.execute(sa.text("UPDATE networks SET source_height = 100"))
        if len(attempts) == 1:
            def want() -> None:
                cursor.execute('UPDATE heimdall.networks SET source_height = 200')
                other.commit()
            wanting.append(threading.Thread(target=want))
            wanting[0].start()
            time.sleep(0.3)
        return connection.execute(sa.text("UPDATE websdr_stations SET notes = 'moved' WHERE name = 'roof'")).rowcount
    assert server_catalog.database.write(work) == 1 and len(attempts) == 2
    wanting[0].join()
    assert server_catalog.network().source_height == 100.0 and server_catalog.network().receivers[0].notes == 'moved'
    other.close()


@postgres_only
@fault
def test_a_statement_timeout_is_explained(server_catalog: Catalog, postgres: PostgresServer, uri: str):
    server_catalog.add_sessions(sessions(4), 'drive', network=NETWORK)
    postgres.sql(f"ALTER DATABASE {database_of(uri)} SET statement_timeout = '300ms'")
    blocker = psycopg2.connect(uri, password=DATABASE_PASSWORD)
    blocker.cursor().execute('LOCK TABLE heimdall.measurements IN ACCESS EXCLUSIVE MODE')
    fails(lambda: list(server_catalog.sessions()), 'took longer than the statement_timeout of the server')
    fails(lambda: server_catalog.add_sessions(sessions(4, 'new-'), 'drive'), 'took longer than the statement_timeout of the server')
    blocker.rollback()
    blocker.close()
    assert len(list(server_catalog.sessions())) == 4
    assert server_catalog.add_sessions(sessions(4, 'new-'), 'drive') == 4


@postgres_only
@fault
def test_patience_ends(server_catalog: Catalog, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv('HEIMDALL_CATALOG_DEADLINE_S', '2')
    impatient = Catalog(server_catalog.database.name)
    impatient.add_sessions(sessions(4), 'drive', network=NETWORK)
    postgres.crash()
    try:
        fails(lambda: list(impatient.sessions()), 'Connection refused: start the server, or correct the URI (tried for')
    finally:
        postgres.start()
    assert len(list(impatient.sessions())) == 4


@postgres_only
@fault
def test_what_cannot_pass_is_said_at_once(uri: str, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    logging.getLogger('sqlalchemy.engine').setLevel(logging.DEBUG)
    name = database_of(uri)
    postgres.sql("CREATE ROLE stranger LOGIN PASSWORD '" + DATABASE_PASSWORD + "'")
    Catalog(uri).create()
    fails(Catalog(postgres.uri('nowhere')).exists, 'database "nowhere" does not exist: create it first, or correct the URI')
    fails(Catalog(postgres.uri(name, 'nobody')).exists, 'authentication failed', 'check the user in the URI, and HEIMDALL_CATALOG_PASSWORD or PGPASSWORD')
    fails(Catalog(postgres.uri(name, 'stranger')).datasets, 'it has no table websdr_stations')
    fails(lambda: Catalog(f'postgresql://{DATABASE_USER}:{DATABASE_PASSWORD}@127.0.0.1/{name}'), 'holds a password')
    result = call('catalog', 'init', '--catalog', f'postgresql://heimdall:{DATABASE_PASSWORD}@127.0.0.1:{postgres.port}/{name}')
    assert result.exit_code == 2 and 'holds a password' in result.stderr and 'canary' not in result.output
    monkeypatch.setenv('HEIMDALL_CATALOG_PASSWORD', 'canary-wrong')
    fails(Catalog(uri).exists, 'password authentication failed')
    assert 'canary' not in repr(Catalog(uri)) + repr(Catalog(uri).database._engine) + caplog.text
    monkeypatch.delenv('HEIMDALL_CATALOG_PASSWORD')
    fails(Catalog(uri).exists, 'no password supplied: set HEIMDALL_CATALOG_PASSWORD or PGPASSWORD')
    monkeypatch.setenv('PGPASSWORD', DATABASE_PASSWORD)
    assert Catalog(uri).exists()
    logging.getLogger('sqlalchemy.engine').setLevel(logging.NOTSET)
