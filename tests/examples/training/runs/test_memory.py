"""Errors that say that memory ran out are told from all others."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch

from training.runs.memory import out_of_memory

TOO_LARGE = 10**15  # bytes: more than an address can name, so that no memory is used


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "Cannot allocate memory"),
        (OSError("out of memory when reading image file"), "out of memory when reading image file"),  # of Pillow
        (torch.OutOfMemoryError("CUDA out of memory.\nMore"), "CUDA out of memory."),
        (OSError(errno.EIO, os.strerror(errno.EIO)), None),
        (OSError("image file is truncated"), None),
        (RuntimeError("shapes"), None),
        (ValueError("out of memory"), None),
    ],
    ids=repr,
)
def test_it_is_the_message_or_none(error: Exception, message: str | None) -> None:
    assert out_of_memory(error) == message


def test_errors_as_they_are_raised() -> None:
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(TOO_LARGE, dtype=torch.uint8)
    assert str(out_of_memory(of_torch.value)).startswith("can't allocate memory: you tried to allocate")
    with pytest.raises(MemoryError) as of_numpy:
        np.empty(TOO_LARGE, np.uint8)
    assert str(out_of_memory(of_numpy.value)).startswith("Unable to allocate 909. TiB")
