"""Fixtures that several test files share."""
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from servers import Missing, PostgresServer, RabbitServer, RedisServer, node_packages, postgres_server, rabbit_server, redis_server, s3_server
from xdist.scheduler import LoadScopeScheduling

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')  # before torch: threads that wait leave the cores to others
ROOT = Path(__file__).resolve().parent.parent


class ByFile(LoadScopeScheduling):
    "A file's tests share a process, and so its fixtures; notebooks and tutorials are shared out one by one."

    def _split_scope(self, nodeid: str) -> str:
        alone = nodeid.split('::')[0].endswith(('test_notebooks.py', 'test_tutorials.py'))
        return nodeid if alone else super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return ByFile(config, log)


def pytest_xdist_auto_num_workers() -> int:
    "One more than there are cores, for many tests wait: for servers that start, or come back."
    return len(os.sched_getaffinity(0)) + 1


@pytest.fixture(scope='session', autouse=True)
def _exporter_without_coverage() -> Iterator[None]:
    "torch's exporter makes a hundred million calls, none of them ours: under coverage they take twice as long. What it calls of ours runs without it too."
    if sys.gettrace() is None:
        yield
        return
    import torch

    export = torch.onnx.export

    def untraced(*arguments, **settings):
        tracer = sys.gettrace()
        sys.settrace(None)
        try:
            return export(*arguments, **settings)
        finally:
            sys.settrace(tracer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, 'export', untraced)
        yield


@contextmanager
def _required() -> Iterator[None]:
    "A server that is not installed skips what needs it, and fails it where services are required."
    try:
        yield
    except Missing as missing:
        if os.environ.get('HEIMDALL_REQUIRE_SERVICES') == '1':
            pytest.fail(str(missing), pytrace=False)
        pytest.skip(str(missing))


@pytest.fixture(scope='session')
def s3() -> Iterator[str]:
    "The endpoint of an S3 server."
    with _required(), s3_server() as endpoint:
        yield endpoint


@pytest.fixture(scope='session')
def postgres() -> Iterator[PostgresServer]:
    "A PostgreSQL server."
    with _required(), postgres_server() as server:
        yield server


@pytest.fixture(scope='session')
def rabbit() -> Iterator[RabbitServer]:
    "A RabbitMQ broker."
    with _required(), rabbit_server() as server:
        yield server


@pytest.fixture(scope='session')
def redis() -> Iterator[RedisServer]:
    "A Redis server."
    with _required(), redis_server() as server:
        yield server


@pytest.fixture(scope='session')
def node_example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A copy of examples/node with its packages."
    example, folder = ROOT / 'examples' / 'node', tmp_path_factory.mktemp('node')
    with _required():
        (folder / 'node_modules').symlink_to(node_packages(example))
    for module in example.glob('*.mjs'):
        shutil.copy(module, folder)
    return folder


@pytest.fixture(scope='session')
def by_node(node_example: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    "Runs examples/node/locate.mjs on a bundle."
    return lambda *paths: subprocess.run(['node', node_example / 'locate.mjs', *paths], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope='session')
def powder() -> Path:
    "The folder of the POWDER level table: levels.csv, receivers.csv, splits/."
    folder = Path(os.environ.get('HEIMDALL_DATA') or ROOT.parent / 'shared' / 'data') / 'powder_frs'
    if not (folder / 'levels.csv').is_file():
        missing = f'no measured data in {folder}: get it from Zenodo, 10.5281/zenodo.7259895, and set HEIMDALL_DATA to the folder above it'
        if os.environ.get('HEIMDALL_REQUIRE_DATA') == '1':
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)
    return folder
