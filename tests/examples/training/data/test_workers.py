"""Worker processes: they survive signals to the whole group, but not their parent's SIGTERM or death."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from itertools import count, islice
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset, get_worker_info

import training.data.workers
from training.data.workers import decoded


class Numbers(Dataset[torch.Tensor]):
    """Its own index; before each of the first ten a signal to the worker itself, as one to the whole group arrives."""

    def __init__(self, number: int | None = None, fails_at: int | None = None) -> None:
        self.number, self.fails_at = number, fails_at

    def __getitem__(self, index: int) -> torch.Tensor:
        assert get_worker_info() is not None
        if self.number and index < 10:
            os.kill(os.getpid(), self.number)
        if index == self.fails_at:
            raise ValueError("none of the 7 images can be read")
        return torch.tensor(index)


def check_that_signals_to_the_whole_group_are_ignored(number: int) -> None:
    images = decoded(Numbers(number), count(), workers=1)
    assert [next(images).item() for _ in range(10)] == list(range(10))


def check_that_one_sigterm_of_the_parent_ends_a_worker() -> None:
    images = decoded(Numbers(signal.SIGTERM), count(), workers=2)
    # Both have started, and their own signals are over: of two that arrive at once, the kernel keeps one.
    assert [next(images).item() for _ in range(20)] == list(range(20))
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        worker.terminate()  # what multiprocessing does once when Python ends, before it waits without end
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0, 0]


def in_a_process_of_its_own(check: str) -> None:
    """As the trainer runs: a worker inherits the state of the process, which other tests have changed."""
    paths = [str(Path(__file__).parent), str(Path(training.data.workers.__file__).parents[2])]
    code = f"import sys; sys.path[:0] = {paths}; import test_workers; test_workers.{check}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.slow  # starts a process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_the_whole_group_are_ignored(number):
    in_a_process_of_its_own(f"check_that_signals_to_the_whole_group_are_ignored({int(number)})")


@pytest.mark.slow  # starts a process
def test_one_sigterm_of_the_parent_ends_a_worker():
    in_a_process_of_its_own("check_that_one_sigterm_of_the_parent_ends_a_worker()")


def test_a_source_that_fails_is_one_line():
    images = decoded(Numbers(fails_at=2), count(), workers=2)
    assert [next(images).item() for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match=r"^no more images: none of the 7 images can be read$"):
        next(images)


@pytest.mark.slow  # the loader looks every five seconds whether a worker that does not answer is alive
def test_a_worker_that_is_killed_is_noticed_where_its_images_are_missed():
    handler = signal.getsignal(signal.SIGCHLD)
    others = set(multiprocessing.active_children())  # of earlier tests, whose iterators have not been collected yet
    images = decoded(Numbers(), count(), workers=2)
    next(images)
    assert signal.getsignal(signal.SIGCHLD) is handler
    worker = (set(multiprocessing.active_children()) - others).pop()
    worker.kill()
    worker.join()
    with pytest.raises(OSError, match=r"^no more images: \S") as error:
        list(islice(images, 100))
    assert "\n" not in str(error.value)
