"""A lock, so that one run at a time trains in a folder, on whichever file system and machine. Reading needs no lock.

The kernel's lock (flock) ends with its process, even if that is killed. But network file systems may refuse it, or keep
it to one machine. So a run also writes a sign of life into `run.lock` every few seconds. Where the kernel's lock says
nothing about the process that this file names, the next run listens first, and begins after a minute of silence.
A run that finds another's name in its lock ends at once.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from threading import Event, Thread

from training.runs.kernel_lock import KernelLock, holder, machine, this_process
from training.script import fail, line

TIMEOUT = 30  # seconds: as long as torchrun gives its processes to end, before it kills them
BEAT = 5.0  # seconds between two signs of life
SILENCE = 60  # seconds without one before a process counts as dead: a busy server may hold some of them up
SETTLE = 2.0  # seconds in which two runs that begin at the same time see each other, where only their names tell


class RunLock:
    """The lock on a run's folder."""

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out / "run.lock"
        self._lock: KernelLock | None = None
        self._name, self._beats = "", 0
        self._ended, self._thread = Event(), Thread()

    def acquire(self) -> None:
        """Take the lock, unless this process has it; wait for a process that is about to end."""
        if self._lock is not None:
            return
        self._lock = KernelLock(self.path)
        try:
            self._begin(self._lock, kernel=self._wait(self._lock))
        except BaseException:
            self._let_go(self._lock)
            raise
        self._thread = Thread(target=self._live, args=(self._lock,), name="run lock", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Release the lock, and sign off."""
        if self._lock is not None:
            self._ended.set()
            self._thread.join()  # or it could write into the file that gets the descriptor's number next
            with suppress(OSError):
                if self._holds(self._lock):
                    self._lock.clear()
            self._let_go(self._lock)

    def _wait(self, lock: KernelLock) -> bool:
        """Wait until nobody else has the folder. Returns whether the kernel says so."""
        begun = changed = time.monotonic()
        text, told, alive = lock.read(), False, False
        while True:
            free, now = lock.attempt(), time.monotonic()
            before, text = text, lock.read()
            if text != before:
                alive, changed = True, now
            listens = free is not False and _may_live(text, kernel=free is not None)
            if free is not False and (not listens or now - changed > SILENCE):
                return free is not None
            if (free is False or alive) and now - begun > TIMEOUT:
                fail(f"--out {self.out}: {holder(text)} trains there")
            if not told:
                how = f"{SILENCE} s for a sign of life of" if listens else f"{TIMEOUT} s for"
                print(f"waiting {how} {holder(text)}, which trains in {self.out}", file=sys.stderr, flush=True)
                told = True
            time.sleep(0.1)

    def _begin(self, lock: KernelLock, *, kernel: bool) -> None:
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        self._name = f"{this_process()}, since {since}\n"
        self._name += f"{'flock' if kernel else 'alone'} {machine()} {secrets.token_hex(4)}\n"
        try:
            self._beat(lock)
        except OSError as error:
            fail(f"--out {self.out}: cannot write {self.path}: {error.strerror}")
        if kernel:
            return
        if sys.platform != "win32":
            print(
                f"{self.path}: this file system has no locks ({lock.missing}); the run writes signs of life into this "
                "file instead",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(SETTLE)
        if not self._holds(lock):
            fail(f"--out {self.out}: {holder(lock.read())} trains there")

    def _live(self, lock: KernelLock) -> None:
        while not self._ended.wait(BEAT):
            if (text := lock.read()) and not self._holds(lock):
                # Every file is written completely or not at all, so this can be at any moment.
                message = line(f"--out {self.out}: {holder(text)} has taken the folder over; this process ends")
                print(message, file=sys.stderr, flush=True)
                os._exit(1)
            with suppress(OSError):
                self._beat(lock)

    def _beat(self, lock: KernelLock) -> None:
        self._beats += 1
        lock.write(f"{self._name}{self._beats:08}\n")
        with suppress(OSError):  # some file systems have no such thing
            os.fsync(lock.descriptor)  # NFS shows to others what is on the server

    def _holds(self, lock: KernelLock) -> bool:
        return lock.read().startswith(self._name)

    def _let_go(self, lock: KernelLock) -> None:
        lock.close()
        self._lock = None


def _may_live(text: str, *, kernel: bool) -> bool:
    """Whether the process that is named in the file may live, although the kernel does not see its lock."""
    if not text:  # it has signed off
        return False
    how, where, *_ = [*text.split("\n", 2)[1].split(), "", ""] if "\n" in text else ("", "")
    # The name alone is of an older version, which had the kernel's lock.
    return not kernel or not (how in ("flock", "") and where in (machine(), ""))
