"""The plain equation of all queries or of a block of them: with masks, and on every device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["attend", "in_float32", "scaled"]


def attend(
    start: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, causal: bool = False
) -> tuple[Tensor]:
    """The plain equation for a block of queries, of which ``start`` is the first one's position, or for all from 0 on.

    Args:
        start: the position of the first query.
        query: (…, D, n), multiplied by the scale.
        key: (…, D, M).
        value: (…, E, M).
        mask: (…, M, n) or (…, M, 1), broadcast: which keys a query attends to, or what is added to logits. A query
            without a key has the result zero, as in PyTorch.
        causal: a query attends to the keys up to its own position.

    Returns:
        (…, E, n), as the only result.
    """
    if causal:
        n, m = query.shape[-1], min(start + query.shape[-1], key.shape[-1])
        key, value = key[..., :m], value[..., :m]
        mask = torch.ones(n, m, dtype=torch.bool, device=key.device).tril(start).mT  # (m, n)
    logits = query.mT @ key  # (…, n, M)
    if mask is None:
        weights = torch.softmax(logits, dim=-1)
    else:
        logits = (
            logits.masked_fill(~mask.mT, -math.inf) if mask.dtype == torch.bool else logits + mask.mT.to(logits.dtype)
        )
        empty = (logits == -math.inf).all(dim=-1, keepdim=True)  # (…, n, 1)
        weights = torch.softmax(logits.masked_fill(empty, 0), dim=-1).masked_fill(empty, 0)
    return (value @ weights.mT,)


def in_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the precision of logits and softmax, whichever path computes them: float32, or float64 as it is."""
    return tuple(tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors)


def scaled(tensor: Tensor, scale: float) -> Tensor:
    """Multiplied by it, and the same tensor where that is 1."""
    return tensor if scale == 1 else tensor * scale
