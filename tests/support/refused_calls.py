"""System calls of file systems that refuse some of what POSIX promises."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest


def refusing(call: Callable[..., object], code: int, when: Callable[..., bool]) -> Callable[..., object]:
    """The system call, which refuses where `when` is true of its arguments."""

    def refuses(*arguments: object) -> object:
        if when(*arguments):
            raise OSError(code, os.strerror(code))
        return call(*arguments)

    return refuses


def refuse_fsync(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Nothing can be forced onto the disk."""
    monkeypatch.setattr(os, "fsync", refusing(os.fsync, code, lambda _: True))
