"""What ends a run early is one line, and what a fault of the code is keeps its traceback."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny_runs import leave_out_images, resume, train
from training.script import script


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a tiny run's time, and no test here looks at images."""
    leave_out_images(monkeypatch)


TOO_LARGE = 10**15  # bytes: more than an address can name, so that no memory is used


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        (
            lambda *_: torch.empty(TOO_LARGE, dtype=torch.uint8),
            r"can't allocate memory: you tried to allocate 10{15} b",
        ),
        (lambda *_: np.empty(TOO_LARGE, np.uint8), r"Unable to allocate 909\. TiB for an array"),
    ],
    ids=["torch", "numpy"],
)
def test_out_of_memory_is_one_line(
    fails: Callable[..., object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, told in (
        ("training.step.discriminator_step", rf"step 1: {message}.*--grad-accum-steps needs less$"),
        ("train_celeba.draw", message),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(name, fails)
            with pytest.raises(SystemExit, match=rf"^train_celeba\.py: .*{told}") as error:
                train(tmp_path, "--steps", "2", "--sample-every", "1")
        assert "\n" not in str(error.value)


def test_out_of_memory_on_a_gpu_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 2 GiB.\nSee the documentation")

    monkeypatch.setattr("training.step.discriminator_step", fails)
    with pytest.raises(SystemExit, match=r"step 1: Tried to allocate 2 GiB\. .*--grad-accum-steps") as error:
        train(tmp_path)
    assert "\n" not in str(error.value)


def test_out_of_memory_in_a_resume_is_no_fault_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 2 GiB.")

    train(tmp_path, "--steps", "1")
    monkeypatch.setattr(torch.optim.Adam, "load_state_dict", fails)
    with pytest.raises(SystemExit, match=r"^train_celeba\.py: Tried to allocate 2 GiB\.$"):
        resume(tmp_path, "--steps", "2")


def test_other_errors_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.step.discriminator_step", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        train(tmp_path)


def test_no_compiler_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise torch._dynamo.exc.TorchDynamoException("No working C++ compiler found\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr("training.step.discriminator_step", fails)
    with pytest.raises(SystemExit, match=r"--compile: No working C\+\+ compiler found$"):
        train(tmp_path)


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", rb"\xe9\u5b57\udcff"), ("utf-8", "é字".encode() + rb"\udcff")]
)
def test_what_a_terminal_cannot_show_is_escaped(encoding: str, shown: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", terminal)
    with pytest.raises(SystemExit) as end:
        script(lambda: print("é字\udcff"))  # the last from a file name that is not UTF-8
    assert end.value.code is None
    terminal.flush()
    assert terminal.buffer.getvalue() == shown + b"\n"


def test_ctrl_c_has_its_own_status() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match=r"^130$"):
        script(interrupted)
