"""Worker processes that decode images. They end when the training ends, in whichever way, and not before.

Ctrl-C, `torchrun` and schedulers signal every process of a run, but the current step still needs its images. Therefore
a worker ends only when its parent asks for it, by closing the pipe or by SIGTERM, or when its parent has died.

Images come through a pipe, not through shared memory: containers have 64 MiB of that, less than a few batches.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np

from training.data.dataset import Pixels, Problems
from training.runs.signals import ASKING

Read = Callable[[Any], tuple[Pixels, Problems]]

LOOK = 5.0  # seconds between two looks at the parent
STATES = {"T": "is stopped", "t": "is stopped", "D": "waits for a disk", "Z": "has ended"}  # of Linux' /proc


def usable_cores() -> int:
    """The number of cores that this process may use, which is also the most workers that make sense."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Worker:
    """A process that calls `read` for whoever asks it."""

    def __init__(self, read: Read) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=serve, args=(read, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def __call__(self, items: Any) -> tuple[Pixels, Problems]:
        """`read(items)`, or an OSError with the line that it raised, or that says how the process ended."""
        try:
            self.pipe.send(items)
            answer = self.pipe.recv()
            if isinstance(answer, str):
                raise OSError(answer)
            shape, problems = answer
            images = np.empty(shape, np.uint8)
            self.pipe.recv_bytes_into(images.reshape(-1))
        except (EOFError, ConnectionError):
            self.process.join(LOOK)
            raise OSError(f"a worker {ended(self.process.exitcode)}") from None
        return images, problems

    def kill(self) -> None:
        """End the process, suspended or not, and whoever waits for its answer."""
        self.process.kill()
        with suppress(OSError), socket.socket(fileno=os.dup(self.pipe.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)  # a process that waits for a dead disk may outlive the signal
        self.process.join(LOOK)


class Workers:
    """So many processes, of which whichever is free answers."""

    def __init__(self, read: Read, count: int) -> None:
        self.workers = [Worker(read) for _ in range(count)]
        self.free: SimpleQueue[Worker] = SimpleQueue()
        for worker in self.workers:
            self.free.put(worker)

    def __call__(self, items: Any) -> tuple[Pixels, Problems]:
        """`read(items)` by one of them; waits until one is free. For several threads."""
        worker = self.free.get()
        try:
            return worker(items)
        finally:
            self.free.put(worker)

    def kill(self) -> None:
        for worker in self.workers:
            worker.kill()

    def state(self) -> str:
        """Workers that are stopped or wait for a disk, as the end of a sentence, where the system tells."""
        found = [(w.process.pid, state) for w in self.workers if (state := _state(w.process.pid)) in STATES]
        return "".join(f"; worker {pid} {STATES[state]}" for pid, state in found)


def ended(status: int | None) -> str:
    """How a process ended, from its exit code."""
    if status is None or status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    return f"was killed by {name}" + (", perhaps because memory ran out" if name == "SIGKILL" else "")


def _state(pid: int | None) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1]
    except OSError:
        return ""


# In the worker.


def serve(read: Read, pipe: Connection[Any, Any]) -> None:
    """Answer until the parent closes the pipe or is gone."""
    obey_only_the_parent()
    parent = multiprocessing.parent_process()
    assert parent is not None
    ends: list[Any] = [pipe, parent.sentinel]
    father = os.getppid()
    # A worker that was started later holds a copy of the other end, so a closed pipe alone tells too little.
    with suppress(EOFError, ConnectionError):
        while parent.sentinel not in (ready := wait(ends, LOOK)) and os.getppid() == father:
            if not ready:
                continue
            items = pipe.recv()
            try:
                images, problems = read(items)
            except Exception as error:
                pipe.send((str(error).splitlines() or [type(error).__name__])[0])
                continue
            pipe.send((images.shape, problems))
            pipe.send_bytes(np.ascontiguousarray(images).reshape(-1).data)


def obey_only_the_parent() -> None:
    """Ignore what schedulers and terminals send, and every SIGTERM that does not come from the parent."""
    for number in set(ASKING) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent and hasattr(signal, "sigwaitinfo"):  # without sigwaitinfo, any SIGTERM ends a worker
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        Thread(target=_end_for, args=(parent.pid,), daemon=True).start()


def _end_for(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)  # at once: the parent is waiting for it
