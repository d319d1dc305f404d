"""Batches made ahead by a thread, while the training takes its step.

Building a batch releases the interpreter's lock: it copies images, or waits for a disk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def prefetched(items: Iterator[T], ahead: int = 2) -> Generator[T]:
    """The items, in their order; a thread makes up to `ahead` of them before they are asked for.

    An error in making an item is raised where that item is asked for. Closing the generator ends the thread, after at
    most the one item that it is making.
    """
    # As in the thread of torch's own loader: with more, pinning a batch could take all cores.
    thread = ThreadPoolExecutor(1, "prefetch", torch.set_num_threads, (1,))
    try:
        coming = deque(thread.submit(next, items) for _ in range(ahead))
        while True:
            try:
                item = coming.popleft().result()
            except StopIteration:
                return
            coming.append(thread.submit(next, items))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)
