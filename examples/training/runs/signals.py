"""Signals that ask a run to stop. They wait for the end of the current step, after which the run saves."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Ctrl-C; schedulers, `docker stop` and shutdowns; a terminal or ssh session that was closed; what schedulers send some
# time before the end; a limit of CPU seconds. Windows has the first two alone.
ASKING = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(signal, name)
)

_received: list[int] = []


class StopRequested(Exception):
    """Raised by what waits, as for images, when `stop_requested`: the next step does not begin."""


def stop_requested() -> int:
    """The first signal that has asked this run to stop, or 0."""
    return _received[0] if _received else 0


@contextmanager
def deferred_signals(*, second_stops: bool = True) -> Iterator[None]:
    """Signals that ask to stop only change `stop_requested`, which the training reads between two steps.

    With `second_stops` a second Ctrl-C stops at once. (Not under `torchrun`, which repeats signals to its processes.)
    """

    def note(number: int, frame: FrameType | None) -> None:
        if _received and second_stops and number == signal.SIGINT:
            raise KeyboardInterrupt
        _received.append(number)

    before = {number: signal.getsignal(number) for number in ASKING}
    for number, handler in list(before.items()):
        # What nohup and the like ignore stays ignored; None was set by other than Python code, which will want it.
        if handler in (signal.SIG_IGN, None) and number not in (signal.SIGINT, signal.SIGTERM):
            del before[number]
    _received.clear()
    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        _received.clear()
