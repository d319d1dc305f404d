"""Attention in blocks of queries, with the derivatives that forward mode and Hessian-vector products take, by hand.

Autograd's derivatives of the plain equation compute the results, too, which nobody needs. With the derivatives of
logits l' and of weights p', for a gradient d of the result:

    p = softmax(qᵀk)    l' = q'ᵀk + qᵀk'    p' = p (l' - Σ p l')    o' = v p'ᵀ + v' pᵀ
    u = dᵀv    g = p (u - Σ p u)    dq = k gᵀ    dk = q g    dv = d p
    u' = d'ᵀv + dᵀv'    g' = p' (u - Σ p u) + p (u' - Σ p' u - Σ p u')

With a mask, and for all further derivatives, autograd's are taken.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from torch_sagan.attention.blocks import Block, Blockwise, block_size
from torch_sagan.attention.plain import attend

__all__ = ["attention_in_blocks", "gradients_in_blocks"]


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
