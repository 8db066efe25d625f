"""Trainings that are killed at chosen places and resumed end on the bytes of a training that nobody disturbed."""
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.resume


def serve() -> None:
    """In a process of its own: for each line of JSON on standard input, train in a fork, and print how that ended.

    What is imported and prepared once is shared by all forks; with one thread there are no others that a fork could lose.
    """
    import multiprocessing

    from resume_job import prepare
    job, context = prepare(), multiprocessing.get_context('fork')
    for line in sys.stdin:
        process = context.Process(target=train_as_ordered, args=(job, json.loads(line)))
        process.start()
        process.join()
        print(process.exitcode, flush=True)
    os._exit(0)  # without taking torch apart


def train_as_ordered(job, order: dict) -> None:
    "Train; what is to be killed kills itself at its place."
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process started in the background ignores it
    import resource

    from fastai.basics import Callback
    from resume_job import train
    place, replace, unlink = order.get('place', {}), os.replace, os.unlink

    def kill():
        os.kill(os.getpid(), getattr(signal, place.get('signal', 'SIGKILL')))

    class KillAt(Callback):
        def after_loss(self):
            if (self.epoch, self.iter, not self.training) == (place.get('epoch'), place.get('batch'), place.get('validation', False)):
                kill()

    def dying_replace(source, target):
        if Path(target).name != place.get('file'):
            return replace(source, target)
        if place['when'] == 'half written':
            os.truncate(source, os.stat(source).st_size // 2)
        if place['when'] == 'written':
            replace(source, target)
        kill()

    def dying_unlink(path, **options):
        unlink(path, **options)
        if Path(path).name == place.get('removed'):
            kill()

    os.replace, os.unlink = dying_replace, dying_unlink
    if 'file_limit' in order:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (order['file_limit'],) * 2)
    train(job, Path(order['folder']), order.get('resume', False), order.get('workers', 0), (KillAt(),), poison=order.get('poison'),
          threads=order.get('threads', 1), heads=order.get('heads', 1))


Order = Callable[..., int]


def server() -> Iterator[Order]:
    "A process that trains as ordered; what is yielded takes an order and returns how the training's process ended."
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1'}
    process = subprocess.Popen([sys.executable, '-c', 'from test_resume import serve; serve()'], cwd=Path(__file__).parent, env=environment,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def order(folder: Path, **values: object) -> int:
        folder.mkdir(exist_ok=True)
        process.stdin.write(json.dumps({'folder': str(folder), **values}) + '\n')
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, process.communicate()[1]
        return int(answer)
    yield order
    process.communicate(timeout=60)


@pytest.fixture(scope='module')
def first_process() -> Iterator[Order]:
    yield from server()


@pytest.fixture(scope='module')
def second_process() -> Iterator[Order]:
    "Another interpreter: what it reads of the first one's checkpoints is what is on disk."
    yield from server()


@pytest.fixture(scope='module')
def undisturbed(first_process: Order, tmp_path_factory: pytest.TempPathFactory) -> str:
    "The outcome of a training that nobody disturbs."
    folder = tmp_path_factory.mktemp('undisturbed')
    assert first_process(folder) == 0
    return outcome(folder)


def outcome(folder: Path) -> str:
    return (folder / 'outcome.json').read_text()


def said(folder: Path) -> list[str]:
    return (folder / 'said.txt').read_text().splitlines()


def test_the_same_seed_gives_the_same_bytes_in_another_process(undisturbed: str, second_process: Order, tmp_path: Path):
    assert second_process(tmp_path) == 0
    assert outcome(tmp_path) == undisturbed
    assert second_process(tmp_path / 'workers', workers=2) == 0
    assert outcome(tmp_path / 'workers') == undisturbed


PLACES = {
    'in the first epoch': ({'epoch': 0, 'batch': 3}, None),
    'in a batch': ({'epoch': 2, 'batch': 4}, 2),
    'in validation': ({'epoch': 1, 'batch': 1, 'validation': True}, 1),
    'in a batch, two workers': ({'epoch': 1, 'batch': 2, 'workers': 2}, 1),
    'in validation, two workers': ({'epoch': 3, 'batch': 0, 'validation': True, 'workers': 2}, 3),
    'while the best model is written': ({'file': 'best.safetensors', 'when': 'half written'}, None),
    'while tensors are written': ({'file': 'epoch-0003.safetensors', 'when': 'half written'}, 2),
    'between tensors and values': ({'file': 'epoch-0002.safetensors', 'when': 'written'}, 1),
    'before the marker': ({'file': 'epoch-0003.sha256', 'when': 'half written'}, 2),
    'after the marker': ({'file': 'epoch-0003.sha256', 'when': 'written'}, 3),
    'while an old checkpoint is removed': ({'removed': 'epoch-0001.sha256'}, 3),
    'after the last epoch': ({'file': 'epoch-0004.sha256', 'when': 'written'}, 4),
}


@pytest.mark.parametrize('place, kept', PLACES.values(), ids=PLACES.keys())
def test_killed_and_resumed(undisturbed: str, first_process: Order, second_process: Order, tmp_path: Path, place: dict, kept: int | None):
    assert first_process(tmp_path, place=place, workers=place.get('workers', 0)) == -signal.SIGKILL
    assert not (tmp_path / 'outcome.json').exists()
    assert second_process(tmp_path, resume=True, workers=place.get('workers', 0)) == 0
    assert outcome(tmp_path) == undisturbed
    expected = f'going on after epoch {kept} of 4' if kept else f'{tmp_path / "checkpoints"}: no whole checkpoint: training begins at the beginning'
    assert said(tmp_path)[-1] == expected
    assert not list((tmp_path / 'checkpoints').glob('.*')), 'something half written was left'


def test_killed_again_and_again(undisturbed: str, first_process: Order, second_process: Order, tmp_path: Path):
    for number, place in enumerate([{'epoch': 1, 'batch': 5}, {'file': 'epoch-0002.json', 'when': 'half written'},
                                    {'epoch': 2, 'batch': 0, 'validation': True}]):
        assert first_process(tmp_path, place=place, resume=number > 0) == -signal.SIGKILL
    assert second_process(tmp_path, resume=True) == 0
    assert outcome(tmp_path) == undisturbed


@pytest.mark.parametrize('workers, validation', [(0, False), (2, True)])
def test_sigterm_stops_between_two_batches(undisturbed: str, first_process: Order, second_process: Order, tmp_path: Path, workers: int, validation: bool):
    place = {'epoch': 2, 'batch': 0, 'validation': validation, 'signal': 'SIGTERM'}
    assert first_process(tmp_path, place=place, workers=workers) == 143
    assert said(tmp_path)[-1] == f'stopped by SIGTERM in epoch 3 of 4 (finished: 2, kept in {tmp_path / "checkpoints"}): go on with --resume'
    assert second_process(tmp_path, resume=True, workers=workers) == 0
    assert outcome(tmp_path) == undisturbed


def test_sigint_loses_the_epoch_only(undisturbed: str, first_process: Order, second_process: Order, tmp_path: Path):
    assert first_process(tmp_path, place={'epoch': 2, 'batch': 1, 'signal': 'SIGINT'}) == 1
    assert second_process(tmp_path, resume=True) == 0
    assert 'going on after epoch 2 of 4' in said(tmp_path)
    assert outcome(tmp_path) == undisturbed


def test_a_damaged_checkpoint_is_passed_over(undisturbed: str, first_process: Order, second_process: Order, tmp_path: Path):
    assert first_process(tmp_path, place={'epoch': 3, 'batch': 1}) == -signal.SIGKILL
    damaged = tmp_path / 'checkpoints' / 'epoch-0003.safetensors'
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    assert second_process(tmp_path, resume=True) == 0
    assert said(tmp_path)[:2] == [f'{damaged.with_suffix("")}: not a whole checkpoint (its files do not fit their digests): passed over',
                                  'going on after epoch 2 of 4']
    assert outcome(tmp_path) == undisturbed


def test_a_training_keeps_its_number_of_threads(first_process: Order, second_process: Order, tmp_path: Path):
    "Sums that are shared among threads in another way are rounded in another way."
    assert first_process(tmp_path / 'undisturbed', threads=2) == 0
    assert first_process(tmp_path / 'killed', threads=2, place={'epoch': 1, 'batch': 3}) == -signal.SIGKILL
    assert second_process(tmp_path / 'killed', threads=1, resume=True) == 0
    assert said(tmp_path / 'killed') == ['going on with 2 threads, as before', 'going on after epoch 1 of 4']
    assert outcome(tmp_path / 'killed') == outcome(tmp_path / 'undisturbed')


def test_several_heads(first_process: Order, second_process: Order, tmp_path: Path):
    assert first_process(tmp_path / 'undisturbed', heads=3) == 0
    assert first_process(tmp_path / 'killed', heads=3, place={'epoch': 2, 'batch': 3}) == -signal.SIGKILL
    assert second_process(tmp_path / 'killed', heads=3, resume=True) == 0
    assert outcome(tmp_path / 'killed') == outcome(tmp_path / 'undisturbed')
    assert 'model.correction.2.position_head.weight' in outcome(tmp_path / 'killed')


def test_a_full_disk_ends_in_one_line_and_loses_the_epoch_only(undisturbed: str, first_process: Order, second_process: Order, tmp_path: Path):
    assert first_process(tmp_path, place={'epoch': 2, 'batch': 1}) == -signal.SIGKILL
    limit = (tmp_path / 'checkpoints' / 'epoch-0002.safetensors').stat().st_size - 1000
    assert first_process(tmp_path, resume=True, file_limit=limit) == 2
    assert said(tmp_path)[-1].startswith(f'cannot write {tmp_path / "checkpoints" / "epoch-0003.safetensors"}: File too large')
    assert second_process(tmp_path, resume=True) == 0
    assert outcome(tmp_path) == undisturbed


def test_a_loss_that_is_not_finite(first_process: Order, tmp_path: Path):
    "Session 7's position is spoilt; the message has it, in one line, and the best model is still there."
    assert first_process(tmp_path, place={'epoch': 2, 'batch': 1}) == -signal.SIGKILL
    best = (tmp_path / 'checkpoints' / 'best.safetensors').read_bytes()
    assert first_process(tmp_path, resume=True, poison=7) == 2
    line = said(tmp_path)[-1]
    assert line.startswith('the loss is not finite in epoch 3, batch ') and 'train-00007' in line.split(': ')[-1].split(', ')
    assert (tmp_path / 'checkpoints' / 'best.safetensors').read_bytes() == best
