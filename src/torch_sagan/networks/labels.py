"""The check of the labels that conditional networks and their layers are given."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from torch_sagan._torch import is_transformed

__all__ = ["check_labels"]


def check_labels(labels: object, num_classes: int | None, inputs: Tensor, *, once: bool = False) -> None:
    """Raise unless there is one class label in range for each sample, or none for a network without classes.

    The range is asserted by an operation, so that compiled, traced and exported programs assert it too, with the same
    message, and CUDA is not waited for. Every conditional layer checks its labels, since each is used alone too; but
    on a GPU each check launches five kernels, so there only the networks check, ``once`` per pass. (A look-up asserts
    as well, but its message does not name labels.)

    Raises:
        ValueError: for labels that are missing, unexpected, of another shape, on another device, or out of range. In a
            compiled or traced program a RuntimeError reports the range; on CUDA, a device-side assertion.
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
    if labels.shape != inputs.shape[:1]:
        raise ValueError(
            f"expected labels of shape ({inputs.shape[0]},), one for each sample, got {tuple(labels.shape)}"
        )
    if labels.device != inputs.device:
        raise ValueError(f"expected labels on {inputs.device}, where the other input is, got {labels.device}")
    if not (once or labels.is_cpu):
        return
    expected = f"expected labels from 0 to {num_classes - 1}"
    try:
        if is_transformed():  # vmap has no rule for an assertion, but a look-up raises an error too
            labels.new_empty(num_classes).index_select(0, labels)
        else:
            # Without a public form: torch._assert reads the value, so that the host waits for the device.
            torch._assert_async(((labels >= 0) & (labels < num_classes)).all(), expected)
    except (RuntimeError, IndexError):
        with suppress(RuntimeError):  # vmap and make_fx do not tell values
            expected += f", got {next(label for label in labels.tolist() if not 0 <= label < num_classes)}"
        raise ValueError(expected) from None
