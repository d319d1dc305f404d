"""Batches that a thread makes ahead: the same ones in the same order, and no thread is left."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import count, islice

import pytest
import torch
from tqdm import TMonitor

import train_celeba
from tiny_runs import assert_same, checkpoint, resume, train
from training import step
from training.configuration import Config
from training.data.image_folder import Batch
from training.data.prefetch import prefetched
from training.data.sources import ArrayDataset, Indices, procedural_faces
from training.runs.distributed import Ranks

PATIENCE = 60  # seconds for what takes milliseconds, and for ever when it is broken


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if not isinstance(thread, TMonitor)]  # the progress bars' own


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, threading.Thread]]:
    """The tensors that were pinned, each with the thread that did it. They are copies: real pinning needs a GPU."""
    tensors = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        tensors.append((tensor.clone(), threading.current_thread()))
        return tensors[-1][0]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    return tensors


def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the trainer read its images as for a GPU, and train on the CPU."""
    read_images = train_celeba.read_images
    monkeypatch.setattr(
        train_celeba,
        "read_images",
        lambda data, config, position, device, ranks: read_images(data, config, position, torch.device("cuda"), ranks),
    )


def test_items_and_their_end_are_the_same():
    assert list(prefetched(iter(range(10)))) == list(range(10))
    assert list(prefetched(iter(range(1)))) == [0]
    assert list(prefetched(iter(()))) == []


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_some_are_made_before_they_are_asked_for_and_no_more(ahead):
    made, enough = [], threading.Event()

    def make() -> Iterator[int]:
        for number in count():
            made.append(number)
            if number == 4 + ahead:
                enough.set()
            yield number

    with closing(prefetched(make(), ahead)) as items:
        assert list(islice(items, 5)) == list(range(5))
        assert enough.wait(PATIENCE)
    assert made == list(range(5 + ahead))


def test_an_error_comes_in_its_place():
    def make() -> Iterator[int]:
        yield from (0, 1)
        raise OSError(5, "Input/output error")

    items = prefetched(make())
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(OSError, match="Input/output error"):
        next(items)
    assert next(items, None) is None


def test_closing_waits_for_the_read_of_one_item_and_for_no_other(monkeypatch):
    reading, writing = os.pipe()
    made, shutdown = [], ThreadPoolExecutor.shutdown

    def make() -> Iterator[bytes]:
        yield b"first"
        while True:
            made.append(os.read(reading, 1))  # waits until the end of the pipe is closed
            yield made[-1]

    def then_the_read_returns(pool: ThreadPoolExecutor, wait: bool = True, **options: bool) -> None:
        shutdown(pool, wait=False, **options)
        os.close(writing)
        shutdown(pool, wait)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", then_the_read_returns)
    items = prefetched(make(), ahead=3)
    assert next(items) == b"first"
    items.close()
    os.close(reading)
    assert len(made) <= 1


def test_the_threads_of_the_training_stay_as_many():
    before = torch.get_num_threads()
    with closing(prefetched(count())) as items:
        next(items)
    assert torch.get_num_threads() == before


# ------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("classes", [False, True])
def test_for_a_gpu_a_thread_builds_and_pins_the_same_batches(classes, pinned):
    data, config = procedural_faces(16, 40), Config(image_size=16, batch_size=8)
    data.labels = data.labels if classes else None

    def read(device: str) -> list[Batch]:
        with closing(train_celeba.read_images(data, config, 24, torch.device(device), Ranks())) as images:
            return list(islice(images, 12))

    expected = read("cpu")
    assert not pinned
    for batch, other in zip(read("cuda"), expected, strict=True):
        assert batch.unreadable == other.unreadable
        for ours, theirs in list(zip(batch[:2], other[:2], strict=True))[: 1 + classes]:
            assert torch.equal(ours, theirs)
            (thread,) = (thread for tensor, thread in pinned if tensor is ours)
            assert thread is not threading.current_thread()
        assert classes or batch.labels is other.labels is None


def test_a_run_that_was_stopped_goes_on_with_the_next_image_that_it_has_not_seen(tmp_path, monkeypatch, pinned):
    train(tmp_path / "whole", "--steps", "6")
    on_a_gpu(monkeypatch)
    generator_step, steps = step.generator_step, count()

    def interrupted(*arguments: object) -> torch.Tensor:
        if next(steps) == 2:
            signal.raise_signal(signal.SIGTERM)
        return generator_step(*arguments)

    monkeypatch.setattr(step, "generator_step", interrupted)
    assert train(tmp_path / "stopped", "--steps", "6") == 128 + signal.SIGTERM
    assert checkpoint(tmp_path / "stopped")["step"] == 3
    assert checkpoint(tmp_path / "stopped")["images"] == 12
    resume(tmp_path / "stopped", "--steps", "6")
    assert pinned
    assert_same(checkpoint(tmp_path / "stopped"), checkpoint(tmp_path / "whole"), apart_from=("/config/out",))


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (OSError(5, "Input/output error"), r"^train_celeba\.py: step 4: no more images: .*Input/output error$"),
        (RuntimeError("CUDA error: out of memory\nadvice"), r"step 4: no more images: CUDA error: out of memory$"),
    ],
)
def test_an_error_of_the_thread_ends_the_run_with_one_line(error, ends, tmp_path, monkeypatch, pinned):
    on_a_gpu(monkeypatch)
    build: Callable[[ArrayDataset, Indices], Batch] = ArrayDataset.__getitem__

    def fails(data: ArrayDataset, indices: Indices) -> Batch:
        if threading.current_thread() is not threading.main_thread() and len(pinned) == 3:
            raise error
        return build(data, indices)

    monkeypatch.setattr(ArrayDataset, "__getitem__", fails)
    with pytest.raises(SystemExit, match=ends):
        train(tmp_path, "--steps", "6")


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch, pinned):
    on_a_gpu(monkeypatch)

    def interrupted(*_: object) -> torch.Tensor:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr(step, "generator_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "--steps", "6")
    assert pinned
