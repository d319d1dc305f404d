"""Exact softmax attention over positions, as pure functions, and which kernel computes it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from torch_sagan._torch import (
    is_autocast,
    is_exporting,
    is_traced,
    no_autocast,
    only_plain_operations,
    plain_tensor,
)
from torch_sagan.attention.cuda import fused_attention, has_kernel
from torch_sagan.attention.forward_mode import attention_in_blocks
from torch_sagan.attention.plain import in_float32, scaled
from torch_sagan.attention.tiles import tiled_attention

__all__ = [
    "attention",
    "attention_and_map",
    "attention_map",
    "in_one_dtype",
    "kernel_for",
    "l2_as_dot_product",
    "takes_blocks",
]

# The kernels that do not materialize the attention matrix, by the type of the device. On the meta device, where nothing
# is computed, operations and costs are counted as on CUDA.
Kernel = Callable[..., Tensor]
KERNELS: dict[str, Kernel] = {"cpu": tiled_attention, "cuda": fused_attention, "meta": fused_attention}

# Attention matrices of up to this many entries in the whole batch are faster than the kernel (measured). On CUDA that
# holds for float32 alone, and where its products may be TF32: the kernel makes three of them for each. Larger matrices
# would be faster too, by up to a half, but this many take 256 MiB, and the backward needs several.
SMALL_MATRIX = {"cpu": 2**20, "cuda": 2**26, "meta": 0}
SMALL_ELSEWHERE = 2**26  # on devices without a kernel


def attention_map(query: Tensor, key: Tensor) -> Tensor:
    r"""What every query position attends to: :math:`\beta_{ji} = \operatorname{softmax}_i(f_i^\top g_j)`.

    There is no :math:`1/\sqrt{D}`: the paper has none. Logits and softmax are computed in float32 at least.

    Args:
        query: g, (B, D, N), one column per query position j.
        key: f, (B, D, M), one column per key position i.

    Returns:
        (B, N, M), in the dtype of the query; each row is a distribution over the keys and sums to 1.

    Source: Zhang et al., arXiv:1805.08318, equation 1.
    """
    return _weights(plain_tensor(query), plain_tensor(key)).to(query.dtype)  # (B, N, M)


def attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float = 1.0) -> Tensor:
    r"""Exact softmax attention over positions: :math:`o_j = \sum_i \beta_{ji} h_i`.

    The attention matrix is not materialized, so memory grows with N + M, for derivatives of every order, in reverse and
    in forward mode, and for what ``torch.func`` composes of them. The exceptions are matrices so small that they are
    faster, exported and traced programs, and programs that are compiled for a device or dtype without a kernel. Kernels
    compute it on the CPU and on CUDA. Where they cannot (float64 on CUDA, other devices, AMD's GPUs among them,
    forward mode, ``torch.func``), it is computed in blocks of queries. Logits and softmax are computed in float32 at
    least.

    The weights :math:`\beta_{ji}` are those of :func:`attention_map`, and :math:`h_i` is column i of ``value``.

    Args:
        query: g, (B, D, N).
        key: f, (B, D, M).
        value: h, (B, E, M). E may differ from D.
        scale: what logits are multiplied by before the softmax. The paper has none.

    Returns:
        (B, E, N), in the dtype of the arguments, or of autocast where that is on. The backward of a kernel needs it, as
        that of PyTorch's does: do not change it in place before a backward, but a clone. (The layer's result may be.)

    Raises:
        ValueError: for shapes that do not match.
        TypeError: for integers, or for different dtypes outside of autocast.

    Source: Zhang et al., arXiv:1805.08318, equation 2 without the output projection.
    """
    query, key, value = _prepared(query, key, value)
    kernel = kernel_for(query, key, value)
    if kernel:
        return kernel(query, key, value, scale)  # (B, E, N)
    if not takes_blocks(query, key):
        return _attend(query, key, value, scale)[0]  # (B, E, N)
    q, k, v = in_float32(query, key, value)
    return attention_in_blocks(scaled(q, scale), k, v).to(value.dtype)  # (B, E, N)


def attention_and_map(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`attention` returns, (B, E, N), with the map (B, N, M) that :func:`attention_map` returns."""
    query, key, value = _prepared(query, key, value)
    return _attend(query, key, value)


def l2_as_dot_product(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    r"""The query and key for :func:`attention` that give the softmax of :math:`-\lVert f_i - g_j \rVert^2`.

    .. math::
        (2 g_j, 1) \cdot (f_i, -\lVert f_i \rVert^2) \allowbreak = \lVert g_j \rVert^2 - \lVert f_i - g_j \rVert^2

    Softmax over i ignores the first term on the right. The mean key is subtracted from both beforehand: distances stay
    the same, and an offset that all positions share costs no precision.

    Args:
        query: g, (B, D, N).
        key: f, (B, D, M).

    Returns:
        Query (B, D + 1, N) and key (B, D + 1, M), in float32 at least, because squares leave the range of float16.

    Source: Kim, Papamakarios and Mnih, *The Lipschitz Constant of Self-Attention*, arXiv:2006.04710, section 3.2.
    """
    with no_autocast(query.device.type):
        query, key = in_float32(query, key)
        mean = key.mean(dim=2, keepdim=True)  # (B, D, 1)
        query, key = query - mean, key - mean
        return (
            torch.cat([2 * query, torch.ones_like(query[:, :1])], dim=1),  # (B, D + 1, N)
            torch.cat([key, -key.square().sum(dim=1, keepdim=True)], dim=1),  # (B, D + 1, M)
        )


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """The plain equation: (B, E, N) and the map (B, N, M)."""
    weights = _weights(query, key, scale)  # (B, N, M)
    with no_autocast(query.device.type):
        # In this order of the factors PyTorch's backward needs no transposed copies of the matrix.
        attended = torch.bmm(weights, in_float32(value)[0].transpose(1, 2)).transpose(1, 2)  # (B, E, N)
    return attended.to(value.dtype), weights.to(query.dtype)


def _weights(query: Tensor, key: Tensor, scale: float = 1.0) -> Tensor:
    with no_autocast(query.device.type):
        q, k = in_float32(query, key)
        # Not q.mT, which PyTorch's older exporter to ONNX does not know.
        return torch.softmax(torch.bmm(scaled(q, scale).transpose(1, 2), k), dim=2)  # (B, N, M)


def _prepared(*tensors: Tensor) -> list[Tensor]:
    """Query, key and value as every path takes them; raises for what none takes."""
    query, key, value = tensors
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if not (
        all(len(shape) == 3 for shape in shapes)
        and query.shape[0] == key.shape[0] == value.shape[0]
        and query.shape[1] == key.shape[1]
        and key.shape[2] == value.shape[2]
    ):
        raise ValueError(
            f"expected query (B, D, N), key (B, D, M) and value (B, E, M), got {shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    return in_one_dtype(query, key, value)


def in_one_dtype(*tensors: Tensor) -> list[Tensor]:
    """Query, key and value in the dtype of the result; raises where there is none."""
    query, *_ = tensors
    dtypes = [tensor.dtype for tensor in tensors]
    cast = is_autocast(query.device.type) and torch.float64 not in dtypes  # as PyTorch's own attention
    if not ((cast or len(set(dtypes)) == 1) and all(dtype.is_floating_point for dtype in dtypes)):
        raise TypeError(
            f"expected query, key and value in one floating-point dtype, got {dtypes[0]}, {dtypes[1]} and {dtypes[2]}"
        )
    dtype = torch.get_autocast_dtype(query.device.type) if cast else query.dtype
    return [plain_tensor(tensor).to(dtype) for tensor in tensors]


def takes_blocks(query: Tensor, key: Tensor) -> bool:
    """Whether attention without a kernel goes block by block: if its matrix is large, and not in programs.

    An exported program should hold plain operators that every runtime knows, and compilers do not know the derivatives.
    """
    if is_exporting() or is_traced() or torch.compiler.is_compiling():
        return False
    return _entries(query, key) > SMALL_MATRIX.get(query.device.type, SMALL_ELSEWHERE)


def kernel_for(query: Tensor, key: Tensor, value: Tensor) -> Kernel | None:
    """What computes attention of these without its matrix, (…, channels, positions) each, where that is best."""
    device = query.device.type
    if is_exporting() or device not in KERNELS or only_plain_operations(query, key, value):
        return None
    if KERNELS[device] is fused_attention and not has_kernel(query.dtype):
        return None
    small = SMALL_MATRIX[device]
    if device == "cuda" and (query.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"):
        small = 0
    return KERNELS[device] if _entries(query, key) > small else None


def _entries(query: Tensor, key: Tensor) -> int:
    """Of the attention matrices of query (…, D, N) and key (…, D, M)."""
    return math.prod(query.shape[:-2]) * query.shape[-1] * key.shape[-1]
