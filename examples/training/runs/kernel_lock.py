"""A file that one process at a time has, by the kernel's lock (flock), which ends with the process however that ends.

Some file systems have no such lock, and Windows has none: what then is for the caller to say.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_descriptors: set[int] = set()  # of this process's locks, which a forked worker would hold too


def _close_in_a_child() -> None:
    while _descriptors:
        os.close(_descriptors.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_a_child)


class KernelLock:
    """The lock on a file, which is created and stays. Its text may say who has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.missing = ""  # why there is no lock here
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _descriptors.add(self.descriptor)

    def attempt(self) -> bool | None:
        """Whether this process has the lock now; None if there is none here."""
        if fcntl is None:
            self.missing = "Windows has no flock"
            return None
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            self.missing = error.strerror or str(error)
            return None
        return True

    def wait(self, doing: str) -> bool | None:
        """`attempt` until nobody else has the lock, with a line that names who `doing`, and then sign the file."""
        told = False
        while (locked := self.attempt()) is False:
            if not told:
                print(f"waiting for {holder(self.read())}, which {doing}", file=sys.stderr, flush=True)
                told = True
            time.sleep(0.1)
        if locked:
            with suppress(OSError):
                self.clear()
                self.write(this_process())
        return locked

    def write(self, text: str) -> None:
        """Write the beginning of the file."""
        os.lseek(self.descriptor, 0, os.SEEK_SET)
        os.write(self.descriptor, text.encode())

    def clear(self) -> None:
        """Empty the file."""
        os.ftruncate(self.descriptor, 0)

    def read(self) -> str:
        """What is in the file."""
        try:
            return self.path.read_text(errors="replace")  # opened anew, for which NFS asks the server
        except OSError:
            return ""

    def close(self) -> None:
        """Let go of the lock."""
        _descriptors.discard(self.descriptor)
        os.close(self.descriptor)


def this_process() -> str:
    """What to write into the file."""
    return f"process {os.getpid()} on {platform.node()}"


def holder(text: str) -> str:
    """Who has the lock, from the text in the file."""
    return text.split("\n", 1)[0].strip() or "another process"


def machine() -> str:
    """What tells this kernel from all others, where there is such a thing: names of machines may be equal."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return "-".join(platform.node().split()) or "unknown"
