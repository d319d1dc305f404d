"""A lock, so that one run at a time trains in a folder, on whichever file system and machine. Reading needs no lock.

The kernel's lock (flock) ends with its process, even if that is killed. But network file systems may refuse it, or keep
it to one machine. So a run also writes a sign of life into `run.lock` every few seconds. Where the kernel's lock says
nothing about the process that this file names, the next run listens first, and begins after a minute of silence.
A run that finds another's name in its lock ends at once.
"""

from __future__ import annotations

import os
import platform
import secrets
import sys
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from threading import Event, Thread

from training.script import fail, line

if sys.platform != "win32":
    import fcntl

TIMEOUT = 30  # seconds: as long as torchrun gives its processes to end, before it kills them
BEAT = 5.0  # seconds between two signs of life
SILENCE = 60  # seconds without one before a process counts as dead: a busy server may hold some of them up
SETTLE = 2.0  # seconds in which two runs that begin at the same time see each other, where only their names tell

_descriptors: set[int] = set()  # of this process's locks, which a forked worker would hold too


def _close_in_a_child() -> None:
    while _descriptors:
        os.close(_descriptors.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_a_child)


class RunLock:
    """The lock on a run's folder."""

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out / "run.lock"
        self._descriptor: int | None = None
        self._name, self._beats = "", 0
        self._ended, self._thread = Event(), Thread(target=self._live, name="run lock", daemon=True)

    def acquire(self) -> None:
        """Take the lock, unless this process has it; wait for a process that is about to end."""
        if self._descriptor is not None:
            return
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        _descriptors.add(self._descriptor)
        try:
            self._begin(self._wait())
        except BaseException:
            self._let_go()
            raise
        self._thread.start()

    def close(self) -> None:
        """Release the lock, and sign off."""
        if self._descriptor is not None:
            self._ended.set()
            self._thread.join()  # or it could write into the file that gets the descriptor's number next
            with suppress(OSError):
                if self._holds():
                    os.ftruncate(self._descriptor, 0)
            self._let_go()

    def _wait(self) -> bool:
        """Wait until nobody else has the folder. Returns whether the kernel says so."""
        begun = changed = time.monotonic()
        text, told, alive = self._read(), False, False
        while True:
            free, now = self._flock(), time.monotonic()
            before, text = text, self._read()
            if text != before:
                alive, changed = True, now
            listens = free is not False and _may_live(text, kernel=free is not None)
            if free is not False and (not listens or now - changed > SILENCE):
                return free is not None
            if (free is False or alive) and now - begun > TIMEOUT:
                fail(f"--out {self.out}: {_holder(text)} trains there")
            if not told:
                how = f"{SILENCE} s for a sign of life of" if listens else f"{TIMEOUT} s for"
                print(f"waiting {how} {_holder(text)}, which trains in {self.out}", file=sys.stderr, flush=True)
                told = True
            time.sleep(0.1)

    def _flock(self) -> bool | None:
        """Whether the kernel gives the lock to this process; None if this file system has none."""
        if sys.platform == "win32":
            return None
        assert self._descriptor is not None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            self._reason = error.strerror
            return None
        return True

    def _begin(self, kernel: bool) -> None:
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        self._name = f"process {os.getpid()} on {platform.node()}, since {since}\n"
        self._name += f"{'flock' if kernel else 'alone'} {_machine()} {secrets.token_hex(4)}\n"
        try:
            self._beat()
        except OSError as error:
            fail(f"--out {self.out}: cannot write {self.path}: {error.strerror}")
        if kernel:
            return
        if sys.platform != "win32":
            print(
                f"{self.path}: this file system has no locks ({self._reason}); the run writes signs of life into this "
                "file instead",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(SETTLE)
        if not self._holds():
            fail(f"--out {self.out}: {_holder(self._read())} trains there")

    def _live(self) -> None:
        while not self._ended.wait(BEAT):
            if (text := self._read()) and not self._holds():
                # Every file is written completely or not at all, so this can be at any moment.
                message = line(f"--out {self.out}: {_holder(text)} has taken the folder over; this process ends")
                print(message, file=sys.stderr, flush=True)
                os._exit(1)
            with suppress(OSError):
                self._beat()

    def _beat(self) -> None:
        assert self._descriptor is not None
        self._beats += 1
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        os.write(self._descriptor, f"{self._name}{self._beats:08}\n".encode())
        with suppress(OSError):  # some file systems have no such thing
            os.fsync(self._descriptor)  # NFS shows to others what is on the server

    def _holds(self) -> bool:
        return self._read().startswith(self._name)

    def _read(self) -> str:
        try:
            return self.path.read_text(errors="replace")  # opened anew, for which NFS asks the server
        except OSError:
            return ""

    def _let_go(self) -> None:
        assert self._descriptor is not None
        _descriptors.discard(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = None


def _may_live(text: str, *, kernel: bool) -> bool:
    """Whether the process that is named in the file may live, although the kernel does not see its lock."""
    if not text:  # it has signed off
        return False
    how, machine, *_ = [*text.split("\n", 2)[1].split(), "", ""] if "\n" in text else ("", "")
    # The name alone is of an older version, which had the kernel's lock.
    return not kernel or not (how in ("flock", "") and machine in (_machine(), ""))


def _holder(text: str) -> str:
    return text.split("\n", 1)[0].strip() or "another process"


def _machine() -> str:
    """What tells this kernel from all others, where there is such a thing: names of machines may be equal."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return "-".join(platform.node().split()) or "unknown"
