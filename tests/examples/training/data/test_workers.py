"""Worker processes: they survive signals to the whole group, but not their parent's SIGTERM or death."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest

import training.data.workers
from training.data.dataset import ImageSet, Pixels, Problems
from training.data.loading import read_batches
from training.data.workers import Worker, Workers, ended

PATIENCE = 60  # seconds for what takes milliseconds, and for ever when it is broken


class Numbers(ImageSet):
    """Images of one value, their own number; before each of the first ten a signal to the worker itself, as one to the
    whole group arrives."""

    def __init__(self, number: int | None = None, fails_at: int | None = None) -> None:
        self.number, self.fails_at, self.unreadable = number, fails_at, {}

    def pixels(self, numbers: Sequence[int]) -> tuple[Pixels, Problems]:
        assert multiprocessing.parent_process() is not None
        if self.number and numbers[0] < 10:
            os.kill(os.getpid(), self.number)
        if self.fails_at in numbers:
            raise ValueError("no image can be read\nand more")
        return np.array(numbers, np.uint8)[:, None, None, None].repeat(2**16, axis=3), {"some": "damaged"}


def read(source: Numbers, amount: int, workers: int) -> list[int]:
    order = ([(i, False)] for i in count())
    with closing(read_batches(source, order, workers=workers)) as batches:
        return [int(batch.images[0, 0, 0, -1]) for batch in islice(batches, amount)]


def check_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        assert read(Numbers(number), 10, workers=1) == list(range(10))
    workers = [Worker(Numbers().pixels) for _ in range(2)]
    for worker in workers:
        worker([0])  # it has started
        worker.process.terminate()  # what multiprocessing does once when Python ends, before it waits without end
    for worker in workers:
        worker.process.join(timeout=PATIENCE)
    assert [worker.process.exitcode for worker in workers] == [0, 0]


def start_a_worker_and_die() -> None:
    workers = [Worker(Numbers().pixels) for _ in range(2)]  # the second has a copy of the first one's pipe
    for worker in workers:
        worker([0])
        print(worker.process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_process_of_its_own(call: str, **more: bool) -> subprocess.CompletedProcess[str]:
    """As the trainer runs: a worker inherits the state of the process, which other tests have changed."""
    paths = [str(Path(__file__).parent), str(Path(training.data.workers.__file__).parents[2])]
    code = f"import sys; sys.path[:0] = {paths}; import test_workers; test_workers.{call}"
    return subprocess.run([sys.executable, "-c", code], timeout=120, text=True, **more)


@pytest.mark.slow  # starts a process
def test_signals_to_the_whole_group_are_ignored_and_one_sigterm_of_the_parent_is_not() -> None:
    in_a_process_of_its_own("check_signals()", check=True)


@pytest.mark.slow  # starts a process
def test_workers_end_when_their_parent_was_killed() -> None:
    done = in_a_process_of_its_own("start_a_worker_and_die()", capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    deadline = time.monotonic() + PATIENCE
    for pid in map(int, done.stdout.split()):
        while is_alive(pid):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # Where nobody waits for orphans, it stays a zombie.
    path = Path(f"/proc/{pid}/stat")
    return not path.exists() or path.read_text().rpartition(") ")[2][:1] != "Z"


@pytest.mark.parametrize("workers", [1, 3])
def test_images_and_problems_come_from_whichever_worker(workers: int) -> None:
    source = Numbers()
    assert read(source, 30, workers) == list(range(30))
    assert source.unreadable == {"some": "damaged"}
    assert not multiprocessing.active_children()


def test_a_source_that_fails_is_one_line() -> None:
    with pytest.raises(OSError, match=r"^no more images: no image can be read$"):
        read(Numbers(fails_at=2), 5, workers=2)


def test_a_worker_that_is_killed_is_noticed_at_once() -> None:
    pool = Workers(Numbers().pixels, 1)
    pool([0])
    pool.workers[0].process.kill()
    start = time.monotonic()
    with pytest.raises(OSError, match=r"^a worker was killed by SIGKILL, perhaps because memory ran out$"):
        pool([1])
    assert time.monotonic() - start < PATIENCE / 2
    pool.kill()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux' /proc")
def test_a_worker_that_is_stopped_is_named_and_ended() -> None:
    pool = Workers(Numbers().pixels, 2)
    process = pool.workers[1].process
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    deadline = time.monotonic() + PATIENCE
    while not pool.state():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert pool.state() == f"; worker {process.pid} is stopped"
    pool.kill()
    assert process.exitcode == -signal.SIGKILL


def test_how_a_process_ended() -> None:
    assert ended(-signal.SIGBUS) == "was killed by SIGBUS"
    assert ended(3) == "ended with status 3"
