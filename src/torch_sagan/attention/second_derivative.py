r"""The derivative of attention's backward, in blocks of queries: the attention matrix is never materialised.

A gradient penalty differentiates attention twice, which neither the CPU tiles nor the fused CUDA kernels do alone. For
one query q with all keys K and values V, and with the gradient d of its result, the backward computes

.. math::
    p = \operatorname{softmax}(q^\top K), \qquad u = d^\top V - \langle p, d^\top V \rangle, \qquad
    \mathrm{d}q = K (p u), \qquad \mathrm{d}K = q (p u)^\top, \qquad \mathrm{d}V = d\, p^\top

Given the gradients a, B and C of a loss with respect to dq, dK and dV, its gradients with respect to q, K, V and d are

.. math::
    t = a^\top K + q^\top B, \qquad s = t - \langle p, t \rangle, \qquad
    r = p (u s + d^\top C), \qquad \bar{g} = r - p \textstyle\sum r

    \bar{q} = K \bar{g} + B (p u), \qquad \bar{K} = q \bar{g}^\top + a (p u)^\top, \qquad
    \bar{V} = d (p s)^\top, \qquad \bar{d} = V (p s) + C p

Each kernel is a pair of operators, forward and backward. :func:`register_derivatives` connects them, so that all
kernels are differentiated in one way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from torch_sagan._torch import CustomOpDef, no_autocast, plain_tensor

__all__ = ["as_base", "in_float32", "register_derivatives"]

# On the CPU, chosen by measuring: fewer cost call overhead, more fall out of the cache.
BLOCK_QUERIES = 64
# Elsewhere launches are what costs, so a block is as large as memory allows: about ten matrices of (B, n, M) are alive
# at once, each of at most this many entries (128 MiB in float32).
BLOCK_ENTRIES = 2**25


def register_derivatives(forward: CustomOpDef, backward: CustomOpDef) -> None:
    """Make a kernel differentiable twice, and declare its cost to FLOP counters, which cannot look inside an operator.

    Args:
        forward: an operator ``(query, key, value) -> (attended, *statistics)``, whose shapes are those of
            :func:`torch_sagan.functional.attention`. The backward is given the statistics as they are.
        backward: an operator ``(d_attended, query, key, value, attended, *statistics)`` that returns the gradients of
            query, key and value.
    """

    def keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)  # no zeros for statistics, which have no gradient
        ctx.save_for_backward(*inputs, *output)

    def differentiate(ctx: Any, d_attended: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if d_attended is None:
            return None, None, None
        d_attended = plain_tensor(d_attended)
        query, key, value, *results = ctx.saved_tensors
        with torch.no_grad():
            gradients: tuple[Tensor, Tensor, Tensor] = backward(d_attended, query, key, value, *results)
        if torch.is_grad_enabled():  # the same gradients, with the derivative that the kernel lacks
            gradients = _with_derivative(*gradients, d_attended, query, key, value)
        return gradients

    def forward_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * q[0] * q[2] * k[2] * (q[1] + v[1])

    def backward_flops(_: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *__: Any, **___: Any) -> int:
        return 2 * q[0] * q[2] * k[2] * (3 * q[1] + 2 * v[1])

    forward.register_autograd(differentiate, setup_context=keep)
    for operator, formula in (forward, forward_flops), (backward, backward_flops):
        register_flop_formula(operator._opoverload.overloadpacket)(formula)


def in_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the precision of logits and softmax, whichever path computes them: float32, or float64 as it is."""
    return tuple(tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors)


def as_base(tensor: Tensor) -> Tensor:
    """The same memory, not as a view: autograd forbids in-place changes of a view that is one of several results."""
    storage = tensor.untyped_storage()
    return tensor.new_empty(0).set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


# An operator instead of an autograd.Function, because its derivative also works for batched gradients.
@torch.library.custom_op("torch_sagan::attention_gradients", mutates_args=())
def _with_derivative(
    d_query: Tensor, d_key: Tensor, d_value: Tensor, d_attended: Tensor, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return d_query.clone(), d_key.clone(), d_value.clone()


@_with_derivative.register_fake
def _(
    d_query: Tensor, d_key: Tensor, d_value: Tensor, d_attended: Tensor, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(d_query), torch.empty_like(d_key), torch.empty_like(d_value)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[3:])


def _backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    return None, None, None, *_double_backward(*cotangents, *ctx.saved_tensors)


_with_derivative.register_autograd(_backward, setup_context=_setup_context)


def _double_backward(
    a: Tensor, b: Tensor, c: Tensor, d_attended: Tensor, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of d_attended, query, key and value, in operations that can be differentiated again."""
    a, b, c, d_attended, query, key, value = in_float32(a, b, c, d_attended, query, key, value)
    g_d_attended, g_query = [], []
    g_key, g_value = torch.zeros_like(key), torch.zeros_like(value)
    key_b = torch.cat([key, b], dim=1)  # (B, 2D, M)
    on_cpu = query.device.type == "cpu"
    block = BLOCK_QUERIES if on_cpu else max(BLOCK_QUERIES, BLOCK_ENTRIES // (len(key) * key.shape[2]))
    with no_autocast(query.device.type):
        for a_, d, q in zip(*(x.split(block, dim=2) for x in (a, d_attended, query)), strict=True):
            p = torch.softmax(q.mT @ key, dim=2)  # (B, n, M)
            u = d.mT @ value  # (B, n, M)
            u = u - (p * u).sum(dim=2, keepdim=True)
            s = torch.cat([a_, q], dim=1).mT @ key_b  # (B, n, M)
            s = s - (p * s).sum(dim=2, keepdim=True)
            pu, ps = p * u, p * s  # (B, n, M)
            r = torch.addcmul(pu * s, p, d.mT @ c)  # (B, n, M)
            g = torch.addcmul(r, p, r.sum(dim=2, keepdim=True), value=-1)  # (B, n, M)
            g_d_attended.append(torch.baddbmm(value @ ps.mT, c, p.mT))  # (B, E, n)
            g_query.append(torch.baddbmm(key @ g.mT, b, pu.mT))  # (B, D, n)
            g_key = torch.baddbmm(g_key + q @ g, a_, pu)  # (B, D, M)
            g_value = torch.baddbmm(g_value, d, ps)  # (B, E, M)
    return torch.cat(g_d_attended, dim=2), torch.cat(g_query, dim=2), g_key, g_value
