"""Batches of a data set for the training: from workers, from a thread, in order, and with a word on what is missing."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterable

import torch
from tqdm import tqdm

from training.data.dataset import Batch, ImageSet, Indices
from training.data.prefetch import made_ahead
from training.data.workers import Workers

# Batches that are made before they are asked for.
AHEAD_OF_A_WORKER = 2
AHEAD_OF_A_GPU = 2


def read_batches(
    source: ImageSet,
    order: Iterable[Indices],
    *,
    workers: int = 0,
    pin_memory: bool = False,
) -> Generator[Batch]:
    """The batches of `source` in this order, decoded by so many processes, or by a thread of this one if there are 0.

    With `pin_memory`, for a GPU, they are in page-locked memory. For a GPU and from workers they are made ahead; on the
    CPU that would only take a core from the step.

    Raises:
        StopRequested: if a signal asks the run to stop while a batch is due.
        OSError: if a worker was killed, or the source can no longer be read.
    """
    pool = Workers(source.read, workers) if workers else None

    def make(indices: Indices) -> Batch:
        images, problems = (pool or source.read)(indices)
        source.unreadable |= problems
        batch = source.batch(indices, images)
        return batch.pin_memory() if pin_memory else batch

    batches = made_ahead(
        make,
        order,
        threads=max(1, workers),
        ahead=AHEAD_OF_A_WORKER * workers or AHEAD_OF_A_GPU * pin_memory,
        why_late=pool.state if pool else lambda: "",
        # As in the thread of torch's own loader: with more, pinning a batch could take all cores.
        begin=lambda: torch.set_num_threads(1) if pin_memory else None,
        abandon=pool.kill if pool else lambda: None,
    )
    named: set[str] = set()
    try:
        for batch in batches:
            for path in sorted(source.unreadable.keys() - named):
                tqdm.write(f"{source.unreadable[path]}, replaced by another image: {path}", file=sys.stderr)
                named.add(path)
            yield batch
    except (RuntimeError, ValueError, OSError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(f"no more images: {said}") from None
    finally:
        batches.close()
