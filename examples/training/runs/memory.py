"""Sizes in bytes as text, and out-of-memory errors of PyTorch, NumPy and Pillow as one sentence."""

from __future__ import annotations

import errno

import torch


def readable(size: int) -> str:
    """A number of bytes in the largest unit that makes it at least 1: 1536 is 1.5 KiB."""
    power = max(0, size.bit_length() - 1) // 10
    return f"{size / 1024**power:.4g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB', 'EiB')[power]}"


def out_of_memory(error: BaseException) -> str | None:
    """The message of an out-of-memory error; None for every other error."""
    said = (str(error).splitlines() or ["out of memory"])[0]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return said
    if isinstance(error, OSError) and (error.errno == errno.ENOMEM or said.startswith("out of memory")):  # a decoder's
        return error.strerror or said
    _, allocator, what = said.partition("DefaultCPUAllocator: ")  # on the CPU it is a plain RuntimeError
    return what if isinstance(error, RuntimeError) and allocator else None
