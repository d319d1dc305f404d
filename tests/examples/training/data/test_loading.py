"""Batches for the training: made ahead for a GPU, and a run that loses nothing when they do not come."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import count, islice
from pathlib import Path

import pytest
import torch
from PIL import Image

import train_celeba
from processes import started
from tiny_runs import SCRIPT, assert_same, checkpoint, resume, train
from training import step
from training.data.dataset import Batch, Pixels, Problems
from training.data.sources import ArrayDataset, procedural_faces
from training.flags import Config
from training.runs.distributed import Ranks

PATIENCE = 120  # seconds for what takes some, and for ever when it is broken


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, threading.Thread]]:
    """The tensors that were pinned, each with the thread that did it. They are copies: real pinning needs a GPU."""
    tensors: list[tuple[torch.Tensor, threading.Thread]] = []

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


@pytest.mark.parametrize("classes", [False, True])
def test_for_a_gpu_a_thread_builds_and_pins_the_same_batches(
    classes: bool, pinned: list[tuple[torch.Tensor, threading.Thread]]
) -> None:
    data, config = procedural_faces(16, 40), Config(image_size=16, batch_size=8)
    data.labels = data.labels if classes else None

    def read(device: str) -> list[Batch]:
        with closing(train_celeba.read_images(data, config, 24, torch.device(device), Ranks())) as images:
            return list(islice(images, 12))

    expected = read("cpu")
    assert not pinned
    for batch, other in zip(read("cuda"), expected, strict=True):
        for ours, theirs in list(zip(batch, other, strict=True))[: 1 + classes]:
            assert torch.equal(ours, theirs)
            (thread,) = (thread for tensor, thread in pinned if tensor is ours)
            assert thread is not threading.current_thread()
        assert classes or batch.labels is other.labels is None


@pytest.mark.usefixtures("no_drawing")
def test_a_run_that_was_stopped_goes_on_with_the_next_image_that_it_has_not_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pinned: list[object]
) -> None:
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


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (OSError(5, "Input/output error"), r"^train_celeba\.py: step 4: no more images: .*Input/output error$"),
        (RuntimeError("CUDA error: out of memory\nadvice"), r"step 4: no more images: CUDA error: out of memory$"),
    ],
)
@pytest.mark.parametrize("gpu", [False, True])
def test_where_no_more_images_come_the_last_step_is_saved(
    gpu: bool, error: Exception, ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pinned: list[object]
) -> None:
    if gpu:
        on_a_gpu(monkeypatch)
    read, drawn = ArrayDataset.pixels, count()

    def fails(data: ArrayDataset, numbers: Sequence[int]) -> tuple[Pixels, Problems]:
        if threading.current_thread() is not threading.main_thread() and next(drawn) == 3:
            raise error
        return read(data, numbers)

    monkeypatch.setattr(ArrayDataset, "pixels", fails)
    with pytest.raises(SystemExit, match=ends):
        train(tmp_path, "--steps", "6")
    assert checkpoint(tmp_path)["step"] == 3
    assert checkpoint(tmp_path)["losses"].shape == (3, 2)  # for the next line of the log


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pinned: list[object]) -> None:
    on_a_gpu(monkeypatch)

    def interrupted(*_: object) -> torch.Tensor:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr(step, "generator_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "--steps", "6")
    assert pinned


# ---------------------------------------------------------------------------------------------- images that do not come


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    root.mkdir()
    for i in range(12):
        Image.new("RGB", (32, 32), (20 * i, 0, 0)).save(root / f"{i}.png")
    return root


def wait_for_steps(out: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not (out / "log.jsonl").exists() or (out / "log.jsonl").stat().st_size == 0:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def run(images: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run of its own process that decodes in one worker and has no checkpoint yet."""
    command = [sys.executable, *SCRIPT, "--data", str(images), "--out", str(tmp_path / "run"), "--no-cache"]
    command += ["--num-workers", "1", "--log-every", "1", "--eval-every", "0", "--steps", "1000000"]
    with started(command) as process:
        yield process


def worker_of(process: subprocess.Popen[str]) -> int:
    (worker,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(worker)


@pytest.mark.slow  # starts a process, which imports torch
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux' /proc")
def test_sigterm_is_answered_with_a_checkpoint_while_a_worker_is_suspended(
    run: subprocess.Popen[str], tmp_path: Path
) -> None:
    wait_for_steps(tmp_path / "run", run)
    worker = worker_of(run)
    os.kill(worker, signal.SIGSTOP)
    time.sleep(1)  # the batches that were made ahead are used up in milliseconds
    run.terminate()
    said, complaints = run.communicate(timeout=PATIENCE)
    assert run.returncode == 128 + signal.SIGTERM, complaints
    stopped_at = int(re.search(r"^stopped at step (\d+)$", said, re.MULTILINE)[1])
    assert checkpoint(tmp_path / "run")["step"] == stopped_at > 0
    assert not Path(f"/proc/{worker}").exists()


@pytest.mark.exhaustive
@pytest.mark.slow  # starts a process, which imports torch
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux' /proc")
def test_a_worker_that_is_killed_costs_no_step(run: subprocess.Popen[str], tmp_path: Path) -> None:
    wait_for_steps(tmp_path / "run", run)
    os.kill(worker_of(run), signal.SIGKILL)
    _, complaints = run.communicate(timeout=PATIENCE)
    assert run.returncode == 1
    lost_at = int(re.search(r"step (\d+): no more images: a worker was killed by SIGKILL", complaints)[1])
    assert checkpoint(tmp_path / "run")["step"] == lost_at - 1 > 0


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    mount = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/dev/shm"]
    return subprocess.run(mount, capture_output=True).returncode == 0


@pytest.mark.exhaustive
@pytest.mark.slow  # starts a process, which imports torch
@pytest.mark.skipif(not can_mount(), reason="needs the rights to mount a file system")
@pytest.mark.parametrize(
    "cache",
    [["--no-cache", "--num-workers", "2"], pytest.param([], marks=pytest.mark.exhaustive)],
    ids=["no cache", "cache"],
)
def test_little_shared_memory_is_enough(cache: list[str], images: Path, tmp_path: Path) -> None:
    """Docker gives 64 MiB, less than five batches of 512 images of 128 pixels from each worker; here, a batch has three
    times as much as all of it."""
    size = ["--image-size", "32", "--batch-size", "64", "--data", str(images), "--out", str(tmp_path / "run")]
    command = [sys.executable, *SCRIPT, *size, "--steps", "3", "--eval-every", "0", *cache]
    mounted = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mounted, "sh", *command], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert checkpoint(tmp_path / "run")["step"] == 3
