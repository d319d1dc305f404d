"""The plain equation, for all queries at once or block by block: with masks, and on every device."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from torch_sagan.attention.blocks import Block, Blockwise, block_size

__all__ = ["attend", "attention_in_blocks", "gradients_in_blocks", "in_float32", "scaled"]


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


# Derivatives of attend without a mask, by hand: autograd's compute the results, too, which nobody needs. With the
# derivatives of logits l' and of weights p', for a gradient d of the result:
#     p = softmax(qᵀk)    l' = q'ᵀk + qᵀk'    p' = p (l' - Σ p l')    o' = v p'ᵀ + v' pᵀ
#     u = dᵀv    g = p (u - Σ p u)    dq = k gᵀ    dk = q g    dv = d p
#     u' = d'ᵀv + dᵀv'    g' = p' (u - Σ p u) + p (u' - Σ p' u - Σ p u')


def _attend_tangent(
    _: int, q: Tensor, k: Tensor, v: Tensor, dot_q: Tensor, dot_k: Tensor, dot_v: Tensor
) -> tuple[Tensor]:
    p = torch.softmax(q.mT @ k, dim=-1)  # (…, n, M)
    dot_p = _softmax_derivative(p, _product_tangent(q, k, dot_q, dot_k))  # (…, n, M)
    return (v @ dot_p.mT + dot_v @ p.mT,)  # (…, E, n)


def _attend_backward(_: int, q: Tensor, k: Tensor, v: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    p = torch.softmax(q.mT @ k, dim=-1)  # (…, n, M)
    g = _softmax_derivative(p, d.mT @ v)  # (…, n, M)
    return k @ g.mT, q @ g, d @ p  # (…, D, n), (…, D, M), (…, E, M)


def _attend_backward_tangent(
    _: int, q: Tensor, k: Tensor, v: Tensor, d: Tensor, *dots: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dot_q, dot_k, dot_v, dot_d = dots
    p = torch.softmax(q.mT @ k, dim=-1)  # (…, n, M)
    dot_p = _softmax_derivative(p, _product_tangent(q, k, dot_q, dot_k))  # (…, n, M)
    u = d.mT @ v  # (…, n, M)
    u = u - (p * u).sum(dim=-1, keepdim=True)
    g = p * u  # (…, n, M)
    dot_g = torch.addcmul(_softmax_derivative(p, _product_tangent(d, v, dot_d, dot_v)), dot_p, u)
    dot_g = torch.addcmul(dot_g, p, (dot_p * u).sum(dim=-1, keepdim=True), value=-1)  # (…, n, M)
    return k @ dot_g.mT + dot_k @ g.mT, q @ dot_g + dot_q @ g, d @ dot_p + dot_d @ p


def _softmax_derivative(p: Tensor, x: Tensor) -> Tensor:
    """p (x - Σ p x), of rows."""
    weighted = p * x
    return torch.addcmul(weighted, p, weighted.sum(dim=-1, keepdim=True), value=-1)


def _product_tangent(x: Tensor, y: Tensor, dot_x: Tensor, dot_y: Tensor) -> Tensor:
    """That of xᵀy."""
    return torch.cat([dot_x, x], dim=-2).mT @ torch.cat([y, dot_y], dim=-2)


_BY_HAND = Block(attend, Block(_attend_backward, tangent=Block(_attend_backward_tangent)), Block(_attend_tangent))


def attention_in_blocks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, causal: bool = False
) -> Tensor:
    """What :func:`attend` computes for all queries, (…, E, N), at least one, block by block."""
    arguments = (query, key, value) if mask is None else (query, key, value, mask)
    return _blockwise(*arguments, causal=causal)(*arguments)[0]


def gradients_in_blocks(d_attended: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """The gradients of query, key and value, of which that of :func:`attention_in_blocks` is ``d_attended``."""
    return _blockwise(query, key, value).gradients([True] * 3)(query, key, value, d_attended)


def _blockwise(query: Tensor, key: Tensor, value: Tensor, *mask: Tensor, causal: bool = False) -> Blockwise:
    of_queries = (True, False, False, *(m.shape[-1] > 1 for m in mask))
    block = Block(partial(attend, causal=causal)) if mask or causal else _BY_HAND
    return Blockwise(block, of_queries, (True,), block_size(query, key))


def in_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the precision of logits and softmax, whichever path computes them: float32, or float64 as it is."""
    return tuple(tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors)


def scaled(tensor: Tensor, scale: float) -> Tensor:
    """Multiplied by it, and the same tensor where that is 1."""
    return tensor if scale == 1 else tensor * scale
