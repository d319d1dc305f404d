"""In which mode operations run: autocast, and what records or transforms them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = ["is_autocast", "is_recorded", "is_transformed", "no_autocast"]


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on. Some devices, the meta device among them, have none and refuse to be asked."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast is off inside, where the device has it. A compiler may not ask whether it has."""
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
