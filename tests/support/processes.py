"""Processes that tests start, which end with the block that uses them, also where an assertion in it fails."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def started(command: Sequence[str], **more: Any) -> Iterator[subprocess.Popen[str]]:
    """A process with a session of its own; at the end of the block all processes in it are killed.

    `with Popen(...)` would wait for it, for ever where it does not end by itself, and hide the error in the block.
    """
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | more
    with subprocess.Popen(command, start_new_session=True, **streams) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError, PermissionError):  # macOS refuses it where only zombies are left
                os.killpg(process.pid, signal.SIGKILL)
