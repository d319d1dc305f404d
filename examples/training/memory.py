"""Memory in words: numbers of bytes, and what PyTorch and NumPy raise where it is short, in one sentence."""

from __future__ import annotations

import torch


def readable(size: int) -> str:
    """A number of bytes in the largest unit of which there is at least one: 1536 is 1.5 KiB."""
    power = max(0, size.bit_length() - 1) // 10
    return f"{size / 1024**power:.4g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB', 'EiB')[power]}"


def out_of_memory(error: BaseException) -> str | None:
    """What was asked for in vain; None for every other error."""
    said = (str(error).splitlines() or ["out of memory"])[0]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return said
    _, allocator, what = said.partition("DefaultCPUAllocator: ")  # the CPU has no error of its own
    return what if isinstance(error, RuntimeError) and allocator else None
