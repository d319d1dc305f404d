"""The modes that operations run in: autocast, recorders such as FakeTensorMode, transforms such as vmap."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = ["is_autocast", "is_recorded", "is_transformed", "no_autocast", "on_device"]


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on."""
    return _has_autocast(device_type) and torch.is_autocast_enabled(device_type)


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast is off inside."""
    return torch.autocast(device_type, enabled=False) if _has_autocast(device_type) else nullcontext()


def _has_autocast(device_type: str) -> bool:
    # Some devices have none, the meta device among them, and torch refuses to be asked about them. A compiler may not
    # ask at all (torch 2.5 cannot trace it).
    if torch.compiler.is_compiling():
        return device_type != "meta"
    return torch.amp.is_autocast_available(device_type)


def on_device(device: torch.device | str | int | None) -> AbstractContextManager[object]:
    """Inside, tensors are made on this device; on the default one for None."""
    return nullcontext() if device is None else torch.device(device)


# The two below have no public form up to torch 2.13.


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` (``vmap``, ``grad``, ``jvp``) is active."""
    return torch._C._are_functorch_transforms_active()


def is_recorded() -> bool:
    """Whether a mode such as ``FakeTensorMode`` or ``make_fx`` sees every operation, whose tensors have no values."""
    return is_in_torch_dispatch_mode()
