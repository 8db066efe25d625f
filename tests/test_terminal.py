"""The command line as a person at a terminal meets it: bars, silence, completion, and Ctrl-C in the middle of long work."""
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import heimdall_train
from heimdall_train.catalog import Catalog
from heimdall_train.cli import app
from heimdall_train.pipeline import write_scene_table

PROGRAM = [sys.executable, '-c', 'import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from heimdall_train.cli import main; main()']


def command(*arguments: object) -> list[str]:
    return [*PROGRAM, *(str(argument) for argument in arguments)]


def interrupted(arguments: list[object], when: Callable[[], bool]) -> str:
    "What is said on Ctrl-C, which is sent as soon as `when` holds."
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        give_up = time.monotonic() + 120
        while not when():
            assert process.poll() is None and time.monotonic() < give_up
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and output == '' and 'Traceback' not in errors, errors
    return errors


def succeed(*arguments: object):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, f'{result.exception!r}\n{result.stderr}'
    return result


@pytest.mark.resume
def test_a_simulation_goes_on_after_ctrl_c(tmp_path: Path):
    where = ['--catalog', tmp_path / 'catalog.db', '--store', tmp_path / 'store']
    folder = tmp_path / 'store' / 'sessions'
    said = interrupted(['simulate', 'demo-v1', '--sessions', 240, *where], lambda: folder.exists() and len(list(folder.iterdir())) > 140)
    assert said.endswith('interrupted; what was finished is kept: the same command goes on after the sessions that are in the catalog\n')
    there = {path.name: path.stat().st_mtime_ns for path in folder.glob('*.npz')}
    result = json.loads(succeed('simulate', 'demo-v1', '--sessions', 240, *where, '--json').stdout)
    assert result['train'] + result['validation'] + result['test'] == 240 == len(list(Catalog(tmp_path / 'catalog.db').sessions()))
    assert sum(stamp == (folder / name).stat().st_mtime_ns for name, stamp in there.items()) >= 100  # rows come in hundreds


def read_terminal(terminal: int) -> str:
    "What was written to a terminal until nobody has it open any more."
    seen = b''
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # Linux's way to say that nobody writes any more
            break
        if not part:
            break
        seen += part
    return seen.decode()


@pytest.mark.resume
def test_a_training_goes_on_after_ctrl_c(tmp_path: Path):
    description = yaml.safe_load((Path(heimdall_train.__file__).parent / 'scenes' / 'testbed-v1.yaml').read_text())
    (tmp_path / 'tiny.yaml').write_text(yaml.safe_dump({**description, 'name': 'tiny', 'receivers': 6}))
    table = write_scene_table(str(tmp_path / 'tiny.yaml'), tmp_path / 'scene', 0, {'train': 64, 'validation': 24, 'test': 10})
    where, out = ['--catalog', tmp_path / 'catalog.db'], tmp_path / 'run'
    succeed('ingest', 'levels', table, *where, '--store', tmp_path / 'store')
    options = ['train', *where, '--out', out, '--epochs', 4, '--test-sessions', table.parent / 'test.txt']
    said = interrupted(options, lambda: (out / 'checkpoints' / 'epoch-0001.sha256').exists())
    assert said.endswith(f'interrupted; what was finished is kept: go on with heimdall-train train --resume --out {out}\n')
    record = json.loads(succeed('train', '--resume', '--out', out, '--json').stdout)
    assert len(record['history']) == 4
    terminal, its_end = pty.openpty()
    process = subprocess.Popen(command('predict', table, '--model', out), stdout=its_end, stderr=subprocess.DEVNULL, env={**os.environ, 'COLUMNS': '120'})
    os.close(its_end)
    seen = read_terminal(terminal)
    assert process.wait(60) == 0 and '98 locations' in seen and '90 % ellipse, m' in seen and 'inputs_sha256' not in seen, seen[:500]


def test_a_terminal_sees_how_fast_and_how_long(tmp_path: Path):
    "Bars on a terminal; lines where there is none; nothing with --quiet."
    arguments = ['simulate', 'demo-v1', '--sessions', 30, '--store', tmp_path / 'store', '--catalog']
    terminal, its_end = pty.openpty()
    environment = {**os.environ, 'COLUMNS': '120', 'TERM': 'xterm'}
    process = subprocess.Popen(command(*arguments, tmp_path / 'one.db'), stdout=subprocess.PIPE, stderr=its_end, env=environment)
    os.close(its_end)
    seen = read_terminal(terminal)
    process.communicate(timeout=60)
    assert process.returncode == 0 and 'sessions' in seen and '━' in seen and '/s' in seen
    plain = subprocess.run(command(*arguments, tmp_path / 'two.db'), capture_output=True, text=True, timeout=120)
    assert plain.returncode == 0 and '━' not in plain.stderr and 'next:' in plain.stderr
    silent = succeed(*arguments, tmp_path / 'three.db', '--quiet')
    assert silent.stderr == '' and silent.stdout != ''


@pytest.mark.parametrize(('words', 'found'), [
    ('heimdall-train tr', 'train'), ('heimdall-train simulate pied', 'piedmont-sync-v1'), ('heimdall-train mod', 'models'),
])
def test_the_shell_completes_commands_and_scenes(words: str, found: str):
    environment = {**os.environ, '_HEIMDALL_TRAIN_COMPLETE': 'complete_bash', 'COMP_WORDS': words, 'COMP_CWORD': str(words.count(' '))}
    program = [sys.executable, '-c', "import sys; sys.argv = ['heimdall-train']; from heimdall_train.cli import main; main()"]
    done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=60)
    assert found in done.stdout.split(), done


@pytest.mark.parametrize(('arguments', 'meant'), [
    (['trian'], 'did you mean train?'), (['train', '--sede', '3'], 'did you mean --seed?'), (['models', 'lst'], 'did you mean list?'),
    (['simulate', 'demo-v2'], 'did you mean demo-v1?'),
])
def test_what_was_probably_meant(arguments: list[str], meant: str):
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == '' and done.stderr.count('\n') == 1 and meant in done.stderr, done
