"""The modes that operations run in: autocast, recorders such as FakeTensorMode, transforms such as vmap."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = ["is_autocast", "is_recorded", "is_transformed", "no_autocast"]


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on. On devices without autocast, such as meta, PyTorch raises an error when asked."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context with autocast off, if the device has autocast. While compiling, that cannot be asked."""
    available = device_type != "meta" and (
        torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    )
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


# The two below have no public form up to torch 2.13.


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` (``vmap``, ``grad``, ``jvp``) is active."""
    return torch._C._are_functorch_transforms_active()


def is_recorded() -> bool:
    """Whether a mode such as ``FakeTensorMode`` or ``make_fx`` sees every operation, whose tensors have no values."""
    return is_in_torch_dispatch_mode()
