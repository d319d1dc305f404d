"""Worker processes that decode images. They end when the training ends, in whichever way, and not before.

Ctrl-C, `torchrun` and schedulers signal every process of a run, but the current step still needs its images. Therefore
a worker ends only when its parent asks for it, through the loader's queue or by SIGTERM, or when its parent has died.
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

from training.data.prefetch import prefetched


def usable_cores() -> int:
    """The number of cores that this process may use, which is also the most workers that make sense."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decoded(source: Dataset[Any], batches: Iterable[Any], *, workers: int, pin_memory: bool = False) -> Iterator[Any]:
    """The items of `source` for each batch, in order, from `workers` processes, or from this one if there are 0.

    With `pin_memory`, for a GPU, they are in page-locked memory, and a thread makes them ahead where no workers do.

    Raises:
        OSError: if a worker was killed, or its source can no longer be read.
    """
    images: Iterator[Any]
    if workers:
        images = _from_workers(source, batches, workers, pin_memory)
    elif pin_memory:
        images = prefetched(source[batch].pin_memory() for batch in batches)
    else:  # on the CPU a thread would only take a core from the step
        images = map(source.__getitem__, batches)
    try:
        yield from images
    except (RuntimeError, ValueError, OSError, EOFError) as error:
        said = str(error).strip() or "a worker was killed while it transferred them"
        said = said.splitlines()[-1 if workers else 0]  # a worker's begins with its traceback
        reason = said.removeprefix(f"{type(error).__name__}: ")
        raise OSError(f"no more images: {reason}") from None


def _from_workers(source: Dataset[Any], batches: Iterable[Any], workers: int, pin_memory: bool) -> Iterator[Any]:
    loader = DataLoader(
        source,
        sampler=batches,
        batch_size=None,  # the sampler's items are whole batches already
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # or it would use that of the training
        worker_init_fn=obey_only_the_parent,
    )
    # The loader's handler of SIGCHLD raises an error as soon as a worker dies, perhaps in the middle of a save. Without
    # the handler the error is raised by `next`, some seconds after the worker's images are due.
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    images = iter(loader)
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)
    return images


def obey_only_the_parent(worker: int) -> None:
    """In a worker: ignore Ctrl-C, and every SIGTERM that does not come from the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent and hasattr(signal, "sigwaitinfo"):  # without sigwaitinfo, any SIGTERM ends a worker
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        Thread(target=_end_for, args=(parent.pid,), daemon=True).start()


def _end_for(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)  # at once: the parent is waiting for it
