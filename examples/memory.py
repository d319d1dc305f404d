"""What PyTorch and NumPy raise where memory is short, on a device or on the CPU, in one sentence."""

from __future__ import annotations

import torch


def out_of_memory(error: BaseException) -> str | None:
    """What was asked for in vain; None for every other error."""
    said = (str(error).splitlines() or ["out of memory"])[0]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return said
    _, allocator, what = said.partition("DefaultCPUAllocator: ")  # the CPU has no error of its own
    return what if isinstance(error, RuntimeError) and allocator else None
