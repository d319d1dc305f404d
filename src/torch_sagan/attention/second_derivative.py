r"""The derivative of attention's backward, in blocks of queries: the attention matrix is never materialized.

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

Logits are multiplied by a scale: read q as the scaled query, whose gradient is that of the query divided by the scale.

Each kernel is a pair of operators, forward and backward. :func:`register_derivatives` connects them, so that all
kernels are differentiated in one way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from torch_sagan._torch import CustomOpDef, only_plain_operations, plain_tensor
from torch_sagan.attention.blocks import Block, Blockwise, block_size
from torch_sagan.attention.forward_mode import gradients_in_blocks
from torch_sagan.attention.plain import in_float32, scaled

__all__ = ["as_base", "register_derivatives"]


def register_derivatives(forward: CustomOpDef, backward: CustomOpDef) -> None:
    """Make a kernel differentiable twice, and declare its cost to FLOP counters, which cannot look inside an operator.

    Args:
        forward: an operator ``(query, key, value, scale) -> (attended, *statistics)``, whose shapes are those of
            :func:`torch_sagan.functional.attention`. The backward is given the statistics as they are.
        backward: an operator ``(d_attended, query, key, value, scale, attended, *statistics)`` that returns the
            gradients of query, key and value.
    """

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)  # no zeros for statistics, which have no gradient
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors, *output)

    def differentiate(ctx: Any, d_attended: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if d_attended is None:
            return None, None, None, None
        d_attended = plain_tensor(d_attended)
        query, key, value, *results = ctx.saved_tensors
        if only_plain_operations(d_attended):  # the operators have no forward mode, and are not vectorized
            return *_plain_gradients(d_attended, query, key, value, ctx.scale), None
        with torch.no_grad():
            gradients: tuple[Tensor, Tensor, Tensor] = backward(d_attended, query, key, value, ctx.scale, *results)
        if torch.is_grad_enabled():  # the same gradients, with the derivative that the kernel lacks
            gradients = _with_derivative(*gradients, d_attended, query, key, value, ctx.scale)
        return *gradients, None

    def forward_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * q[0] * q[2] * k[2] * (q[1] + v[1])

    def backward_flops(_: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *__: Any, **___: Any) -> int:
        return 2 * q[0] * q[2] * k[2] * (3 * q[1] + 2 * v[1])

    forward.register_autograd(differentiate, setup_context=keep)
    for operator, formula in (forward, forward_flops), (backward, backward_flops):
        register_flop_formula(operator._opoverload.overloadpacket)(formula)


def as_base(tensor: Tensor) -> Tensor:
    """The same memory, not as a view: autograd forbids in-place changes of a view that is one of several results."""
    storage = tensor.untyped_storage()
    return tensor.new_empty(0).set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


# An operator instead of an autograd.Function, because its derivative also works for batched gradients.
@torch.library.custom_op("torch_sagan::attention_gradients", mutates_args=())
def _with_derivative(
    d_query: Tensor,
    d_key: Tensor,
    d_value: Tensor,
    d_attended: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return d_query.clone(), d_key.clone(), d_value.clone()


@_with_derivative.register_fake
def _(
    d_query: Tensor,
    d_key: Tensor,
    d_value: Tensor,
    d_attended: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(d_query), torch.empty_like(d_key), torch.empty_like(d_value)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale = inputs[3:]
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    return None, None, None, *_double_backward(ctx.scale, *cotangents, *ctx.saved_tensors), None


_with_derivative.register_autograd(_backward, setup_context=_setup_context)


def _plain_gradients(
    d_attended: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, in operations that have every derivative."""
    d, q, k, v = in_float32(d_attended, query, key, value)
    d_query, d_key, d_value = gradients_in_blocks(d, scaled(q, scale), k, v)
    return scaled(d_query, scale).to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype)


def _double_backward(scale: float, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From a, b, c, d_attended, query, key and value the gradients of the last four, with every derivative."""
    a, b, c, d_attended, query, key, value = in_float32(*tensors)
    of_queries, per_query = (True, True, True, False, False, False), (True, True, False, False)
    in_blocks = Blockwise(Block(_double_backward_of_block), of_queries, per_query, block_size(query, key))
    key_b = torch.cat([key, b], dim=1)  # (B, 2D, M)
    a, query = scaled(a, scale), scaled(query, scale)
    g_d_attended, g_query, g_key, g_value = in_blocks(a, d_attended, query, key_b, value, c)
    return g_d_attended, scaled(g_query, scale), g_key, g_value


def _double_backward_of_block(
    _: int, a: Tensor, d: Tensor, q: Tensor, key_b: Tensor, value: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    key, b = key_b.chunk(2, dim=1)  # (B, D, M) each
    p = torch.softmax(q.mT @ key, dim=2)  # (B, n, M)
    u = d.mT @ value  # (B, n, M)
    u = u - (p * u).sum(dim=2, keepdim=True)
    s = torch.cat([a, q], dim=1).mT @ key_b  # (B, n, M)
    s = s - (p * s).sum(dim=2, keepdim=True)
    pu, ps = p * u, p * s  # (B, n, M)
    r = torch.addcmul(pu * s, p, d.mT @ c)  # (B, n, M)
    g = torch.addcmul(r, p, r.sum(dim=2, keepdim=True), value=-1)  # (B, n, M)
    return (
        torch.baddbmm(value @ ps.mT, c, p.mT),  # (B, E, n)
        torch.baddbmm(key @ g.mT, b, pu.mT),  # (B, D, n)
        torch.baddbmm(q @ g, a, pu),  # (B, D, M)
        d @ ps,  # (B, E, M)
    )
