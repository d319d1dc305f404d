"""Recompute u and v of spectral norms and the statistics of batch norms from the current weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from torch_sagan._modes import evaluation_mode
from torch_sagan._torch import BatchNorm
from torch_sagan.spectral.models import align_power_iteration

__all__ = ["recalibrate"]

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def recalibrate(model: M, inputs: Iterable[Tensor | Sequence[Any]] | None = None) -> M:
    """Fit the buffers of an averaged or edited model to its weights, in place.

    The buffers that are saved with averaged weights were computed for other weights. This function sets u and v of
    every spectral norm, of any implementation, to the first singular vectors of its weight, so that sigma is exact.
    Then it passes the inputs through the model, in evaluation mode except for its batch norms, and gives every batch
    norm the mean over batches of their means and variances, as :func:`torch.optim.swa_utils.update_bn` does.

    The result depends on weights and inputs alone, not on the buffers that were there. No random number is drawn.
    Modes change for the length of the passes, so no other thread may use the model meanwhile.

    Args:
        model: any module, an ``AveragedModel`` for example.
        inputs: batches on the model's device, for a model with batch norm: a tensor each, or a tuple of the model's
            arguments, such as ``(z, labels)``. About a thousand samples are enough. It is iterated once.

    Returns:
        The model itself.

    Raises:
        ValueError: for batch norm without inputs, or inputs without batch norm; when there is no batch, a batch norm is
            not reached, or a weight that is spectrally normalized holds infinities or NaN. After these errors, and
            after any error during a pass, the model is as it was.
        TypeError: when ``inputs`` is one tensor.

    >>> import torch
    >>> from torch_sagan import SAGANGenerator, recalibrate
    >>> generator = SAGANGenerator(16)  # with averaged weights
    >>> generator = recalibrate(generator, [torch.randn(64, 128) for _ in range(16)])
    """
    norms = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, BatchNorm) and module.running_mean is not None
    }
    kind = type(model).__name__
    if isinstance(inputs, Tensor):
        raise TypeError("inputs takes batches, such as a list of tensors, got one tensor")
    if norms and inputs is None:
        raise ValueError(f"{kind} has batch norm, whose statistics need inputs")
    if inputs is not None and not norms:
        raise ValueError(f"{kind} has no batch norm with running statistics: leave inputs out")
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    momenta = [(norm, norm.momentum) for norm in norms.values()]
    try:
        align_power_iteration(model)
        with evaluation_mode(model):
            for norm in norms.values():
                norm.reset_running_stats()
                norm.momentum = None  # the mean over batches, instead of a moving average
                norm.training = True
            batches = 0
            for batch in inputs or ():
                model(batch) if isinstance(batch, Tensor) else model(*batch)
                batches += 1
        if norms and not batches:
            raise ValueError("inputs holds no batch")
        for path, norm in norms.items():
            if norm.num_batches_tracked == 0:
                raise ValueError(f"{path!r} is not reached: no batch of inputs passes through it")
    except BaseException:
        for buffer, content in before:
            buffer.copy_(content)
        raise
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum
    return model
