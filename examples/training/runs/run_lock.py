"""A lock, so that one run at a time trains in a folder. Reading there needs no lock."""

from __future__ import annotations

import os
import platform
import sys
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from training.command_line import fail

TIMEOUT = 30  # seconds: as long as torchrun gives its processes to end, before it kills them


class RunLock:
    """The lock on a run's folder. It is the kernel's, so it ends with its process, even if that is killed."""

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out / "run.lock"
        self._lock = FileLock(self.path)

    def acquire(self) -> None:
        """Take the lock, unless this process has it; wait for a process that is about to end."""
        if self._lock.is_locked:
            return
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            print(f"waiting {TIMEOUT} s for {self._holder()}, which trains in {self.out}", file=sys.stderr, flush=True)
            try:
                self._lock.acquire(timeout=TIMEOUT)
            except Timeout:
                fail(f"--out {self.out}: {self._holder()} trains there")
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        self.path.write_text(f"process {os.getpid()} on {platform.node()}, since {since}\n")

    def _holder(self) -> str:
        try:
            return self.path.read_text().strip() or "another process"
        except OSError:  # on systems where a locked file cannot be read
            return "another process"

    def close(self) -> None:
        """Release the lock."""
        self._lock.release()
