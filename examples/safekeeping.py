"""Nothing is lost: checkpoints that are never half written, and a Ctrl-C that never cuts a step in two."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch

CONTENTS = {"config", "random", "step", "images"}  # what a checkpoint holds beside the state dicts


def write(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Write a new file, wait until it is on the disk, and only then let it take the old one's name."""
    new = path.with_name(path.name + ".new")
    try:
        with open(new, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        new.unlink(missing_ok=True)
        raise SystemExit(f"cannot save {path}: {str(error).splitlines()[0]}") from None


def save(state: dict[str, Any], path: Path) -> None:
    """Write one checkpoint."""
    write(path, lambda file: torch.save(state, file))


def load(path: Path) -> dict[str, Any]:
    """The state in a checkpoint file, or in the folder of a run."""
    file = path / "checkpoint.pt" if path.is_dir() else path
    if not file.exists():
        raise SystemExit(f"cannot resume from {file}: no such file")
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        missing = CONTENTS - set(state)
    except Exception:  # whatever a damaged or foreign file makes the reader raise
        raise SystemExit(f"cannot resume from {file}: it cannot be read as a checkpoint") from None
    if missing:
        raise SystemExit(f"cannot resume from {file}: it is not a checkpoint of this trainer")
    return state


@contextmanager
def postponed_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM only enter the list, to be looked at between two steps; a second one stops at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_interrupts(worker: int) -> None:
    """For the data loader's workers: Ctrl-C reaches the whole group of processes, but the training still needs them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
