"""Checks of arguments that several modules make."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import torch
from torch import Tensor

from torch_sagan._torch import is_recorded, is_transformed

__all__ = ["at_least_one", "check_labels", "nearest_names", "one_of"]


def at_least_one(**sizes: int | None) -> None:
    """Raise a ValueError that names the first of the given sizes that is below 1. None is allowed."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def one_of(choices: tuple[str, ...], **values: str) -> None:
    """Raise a ValueError that names the first of the given values that is not among the choices."""
    for name, value in values.items():
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def nearest_names(name: str, names: Iterable[str], *, cutoff: float = 0.0) -> str:
    """The dotted names that end in one that does not exist, or else those that resemble it, as an error lists them."""
    names = list(names)
    ending = [other for other in names if name and other.endswith(f".{name}")]
    return ", ".join(map(repr, ending[:5] or difflib.get_close_matches(name, names, n=5, cutoff=cutoff)))


def check_labels(labels: object, num_classes: int | None, batch: int, *, on_device: bool = False) -> None:
    """Raise unless there is one class label in range for each sample, or none for a network without classes.

    Every conditional layer checks its labels, since each is used alone too; on the CPU that takes 13 µs, 0.1 % of a
    generator's pass with three of them. CUDA would have to be waited for, and fake or traced tensors have no values:
    there the range is asserted on the device, and only with ``on_device``, which the networks set once
    per pass. (The lookup of a label asserts as well, but its message does not name labels.) ``torch.compile``,
    ``torch.export``, the transforms of ``torch.func`` and the meta device leave the range unchecked.

    Raises:
        ValueError: for labels that are missing, unexpected, of another shape, or out of range.
        TypeError: for labels that are not an integer tensor.
    """
    if num_classes is None:
        if labels is not None:
            raise ValueError("labels were given, but this is not conditional: num_classes is None")
        return
    if labels is None:
        raise ValueError(f"labels are needed: this is conditional on {num_classes} classes")
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int32, torch.int64):
        what = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"expected labels as a tensor of int64 or int32, got {what}")
    if labels.shape != (batch,):
        raise ValueError(f"expected labels of shape ({batch},), one for each sample, got {tuple(labels.shape)}")
    if labels.is_meta or torch.compiler.is_compiling() or is_transformed():
        return
    expected = f"expected labels from 0 to {num_classes - 1}"
    if labels.is_cuda or type(labels) is not Tensor or is_recorded():
        if on_device:
            # Without a public form: torch._assert reads the value, so that the host waits for the device.
            torch._assert_async(((labels >= 0) & (labels < num_classes)).all(), expected)
    elif batch and (on_device or labels.is_cpu):
        least, largest = labels.aminmax()
        if least < 0 or largest >= num_classes:
            raise ValueError(f"{expected}, got {int(least) if least < 0 else int(largest)}")
