"""Exact softmax attention by PyTorch's fused CUDA kernels, which do not materialise the attention matrix.

They take half precision and float32. In float64 PyTorch falls back to plain operations, which materialise the matrix.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_sagan.double_backward import differentiable_gradients

__all__ = ["fused_attention"]

# The kernels need channels in multiples of 16 bytes. That is 8 channels in half precision; in float32, 4 would do.
ALIGNMENT = 8


def fused_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention as :func:`torch_sagan.functional.attention` defines it, for CUDA tensors.

    Args:
        query: (B, D, N).
        key: (B, D, M).
        value: (B, E, M).

    Returns:
        (B, E, N).
    """
    # FusedAttention adds the second derivative, which compiled code cannot have.
    if torch.compiler.is_compiling():
        return _call_kernel(query, key, value)  # (B, E, N)
    attended: Tensor = FusedAttention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return attended  # (B, E, N)


class FusedAttention(torch.autograd.Function):
    """PyTorch's fused kernel, with the second derivative that it lacks.

    The kernel runs in a private autograd graph: the forward builds it, the first backward uses and frees it, and a
    repeated backward builds it again.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.graph = _graph(query, key, value)
        attended: Tensor = ctx.graph[-1].detach()
        return attended

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        (d_attended,) = gradients
        *inputs, attended = ctx.graph or _graph(*ctx.saved_tensors)
        ctx.graph = None  # otherwise its padded copies would stay in memory until the outer graph is freed
        d_query, d_key, d_value = torch.autograd.grad(attended, inputs, d_attended.to(attended.dtype))
        if torch.is_grad_enabled():
            return differentiable_gradients((d_query, d_key, d_value), d_attended, *ctx.saved_tensors)
        return d_query, d_key, d_value


def _graph(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Detached query, key and value, and the result with a graph that leads to them."""
    with torch.enable_grad():
        query, key, value = (tensor.detach().requires_grad_() for tensor in (query, key, value))
        return query, key, value, _call_kernel(query, key, value)


def _call_kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = (
        F.pad(tensor.mT, (0, -tensor.shape[1] % ALIGNMENT)).unsqueeze(1).contiguous()  # (B, 1, positions, ≥ channels)
        for tensor in (query, key, value)
    )
    attended: Tensor = F.scaled_dot_product_attention(q, k, v, scale=1.0)  # (B, 1, N, ≥ E)
    return attended.squeeze(1)[..., : value.shape[1]].transpose(1, 2)  # (B, E, N)
