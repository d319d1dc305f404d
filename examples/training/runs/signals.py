"""Signals that wait for the end of the current step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_signals(*, second_stops: bool = True) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM are only added to the list, which the training reads between two steps.

    With `second_stops` a second Ctrl-C stops at once. (Not under `torchrun`, which repeats signals to its processes.)
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
