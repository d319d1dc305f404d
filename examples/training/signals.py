"""Signals that wait until the step under way has ended."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_signals(*, second_stops: bool = True) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM only enter the list, to be looked at between two steps.

    A second Ctrl-C stops at once, with `second_stops`; `torchrun` passes on what its processes may have had already.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received and second_stops and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
