"""Images from processes that decode them, which end with the training, however that ends, and not before.

Ctrl-C, `torchrun` and schedulers signal every process of a run, but the step under way still needs its images. A worker
therefore ends when its parent says so, in the loader's queue or by SIGTERM, and when its parent has died.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from threading import Thread
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


def usable_cores() -> int:
    """The cores that this process may use, and so the processes that can decode at a time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decoded(source: Dataset[Any], batches: Iterable[Any], *, workers: int, pin_memory: bool = False) -> Iterator[Any]:
    """What `source` holds for each of the batches, in their order, from so many processes, or from this one for 0.

    Raises:
        OSError: where a worker was killed, or its source can no longer be read.
    """
    loader = DataLoader(
        source,
        sampler=batches,
        batch_size=None,  # the sampler's items are whole batches already
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # or the loader would draw from the generator that the training uses
        worker_init_fn=heed_the_parent_alone,
    )
    # The loader's handler of SIGCHLD raises an error as soon as a worker dies, wherever the training is, in the middle
    # of a save perhaps. Without it the error is raised here, some seconds after that worker's images are missed.
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    images = iter(loader)
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)
    try:
        yield from images
    except (RuntimeError, ValueError, OSError, EOFError) as error:
        said = str(error).strip() or "a worker was killed while it handed them over"
        reason = said.splitlines()[-1].removeprefix(f"{type(error).__name__}: ")  # before that a worker's traceback
        raise OSError(f"no more images: {reason}") from None


def heed_the_parent_alone(worker: int) -> None:
    """In a worker: ignore Ctrl-C, and every SIGTERM that another process than the parent has sent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent and hasattr(signal, "sigwaitinfo"):  # where there is none, any SIGTERM ends a worker
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        Thread(target=_end_for, args=(parent.pid,), daemon=True).start()


def _end_for(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)  # at once: the parent is waiting for it
