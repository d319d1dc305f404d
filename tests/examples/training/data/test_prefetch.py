"""Results that threads make ahead: the same in the same order, a wait that can be given up, and no thread is left."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import count, islice

import pytest
import torch
from tqdm import TMonitor

from training.data import prefetch
from training.data.prefetch import made_ahead
from training.runs.signals import StopRequested, deferred_signals

PATIENCE = 60  # seconds for what takes milliseconds, and for ever when it is broken


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if not isinstance(thread, TMonitor)]  # the progress bars' own


def same(item: int) -> int:
    return item


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_results_and_their_end_are_those_of_the_items(threads: int, ahead: int) -> None:
    def slowest_first(item: int) -> int:
        time.sleep(0.02 if item % 3 == 0 else 0)
        return item

    for items in (range(10), range(1), ()):
        assert list(made_ahead(slowest_first, items, threads=threads, ahead=ahead)) == list(items)


@pytest.mark.parametrize("ahead", [0, 1, 2, 3])
def test_some_are_made_before_they_are_asked_for_and_no_more(ahead: int) -> None:
    made: list[int] = []
    enough = threading.Event()

    def make(number: int) -> int:
        made.append(number)
        if number == 4 + ahead:
            enough.set()
        return number

    with closing(made_ahead(make, count(), ahead=ahead)) as results:
        assert list(islice(results, 5)) == list(range(5))
        assert enough.wait(PATIENCE)
    assert made == list(range(5 + ahead))


def test_an_error_comes_in_its_place() -> None:
    def make(number: int) -> int:
        if number == 2:
            raise OSError(5, "Input/output error")
        return number

    results = made_ahead(make, count())
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(OSError, match="Input/output error"):
        next(results)
    assert next(results, None) is None


def test_a_thread_that_is_stuck_is_let_go_before_it_is_waited_for() -> None:
    reading, writing = os.pipe()

    def make(number: int) -> bytes:
        return b"first" if number == 0 else os.read(reading, 1)  # waits until the end of the pipe is closed

    results = made_ahead(make, count(), ahead=3, abandon=lambda: os.close(writing))
    assert next(results) == b"first"
    results.close()
    os.close(reading)


def test_a_thread_that_stays_stuck_does_not_keep_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "END", 0.05)
    release = threading.Event()
    results = made_ahead(lambda number: number == 0 or release.wait(PATIENCE), count())
    assert next(results)
    results.close()
    (stuck,) = (thread for thread in threading.enumerate() if thread.name == "ahead-0")
    assert stuck.daemon
    release.set()
    stuck.join(PATIENCE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_wait(number: int) -> None:
    release = threading.Event()
    with deferred_signals():
        results = made_ahead(lambda item: item == 0 or release.wait(PATIENCE), count(), abandon=release.set)
        assert next(results)
        timer = threading.Timer(0.3, os.kill, (os.getpid(), number))
        timer.start()
        start = time.monotonic()
        with pytest.raises(StopRequested):
            next(results)
        assert time.monotonic() - start < PATIENCE / 2
        timer.join()


def test_a_result_that_is_late_is_reported_and_then_given_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prefetch, "POLL", 0.01)
    monkeypatch.setattr(prefetch, "NOTICE", 0.05)
    monkeypatch.setattr(prefetch, "LIMIT", 0.2)
    release = threading.Event()
    results = made_ahead(
        lambda item: release.wait(PATIENCE), count(), why_late=lambda: "; worker 7 is stopped", abandon=release.set
    )
    with pytest.raises(OSError, match=r"^nothing came for 0 s; worker 7 is stopped$"):
        next(results)
    assert capsys.readouterr().err.count("waiting for images since 0 s; worker 7 is stopped") == 1


def test_the_threads_of_the_training_stay_as_many() -> None:
    before = torch.get_num_threads()
    with closing(made_ahead(same, count(), begin=lambda: torch.set_num_threads(1))) as results:
        next(results)
    assert torch.get_num_threads() == before
