"""Exact softmax attention on CUDA by PyTorch's fused kernels: the N×M matrix is never materialized.

``torch.nn.functional.scaled_dot_product_attention`` picks a kernel by shape, dtype, card and version. Here kernels are
called by name, forward and backward:

* Half precision on Ampere and later goes to FlashAttention. It wants query and value of one width, at most 256: the
  narrower ones are padded with zeros, and a wider value is split into heads that share query and key. On an H200 it is
  1.4 to 3.0 times as fast as the memory-efficient kernel, forward and backward, and for values of 256 and 512 channels
  4 times.
* All else goes to the memory-efficient kernel, which takes any widths. It multiplies float32 as three products of TF32,
  which keep its precision.
* cuDNN, which PyTorch prefers on Hopper, is never taken. On large maps it takes a third to a half less time, but its
  backward returns NaN for rows whose logits all lie below -88 if the keys are 64 more than a multiple of 128
  (cudnn-frontend issue 628), which logits without 1/√D reach, and some versions refuse it for values of 256 channels.

Both compute logits and softmax in float32, and subtract each row's maximum. A forward and a backward that are operators
of our own have a second derivative and keep query, key and value once. Activation checkpointing and compilers take them
as they are.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_sagan.attention.second_derivative import as_base, register_derivatives

__all__ = ["backward_bytes", "fused_attention", "has_kernel"]

ALIGNMENT = 16  # rows of channels have a length and an address in multiples of so many bytes
WIDEST = 256  # the most channels that FlashAttention takes
AMPERE = (8, 0)  # the first compute capability with FlashAttention, and whose tensor cores multiply bfloat16

_aten = torch.ops.aten


def has_kernel(dtype: torch.dtype) -> bool:
    """Whether :func:`fused_attention` takes this dtype. AMD's build of PyTorch has other kernels under these names."""
    return dtype in (torch.float32, torch.float16, torch.bfloat16) and torch.version.hip is None


def fused_attention(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> Tensor:
    """Attention as :func:`torch_sagan.functional.attention` defines it, for CUDA tensors.

    Args:
        query: (B, D, N), in a dtype that :func:`has_kernel` names.
        key: (B, D, M).
        value: (B, E, M).
        scale: what logits are multiplied by.

    Returns:
        (B, E, N).
    """
    results: tuple[Tensor, Tensor] = _fused(query, key, value, scale)
    return results[0]  # (B, E, N)


def backward_bytes(batch: int, d: int, e: int, n: int, m: int, itemsize: int) -> int:
    """The most bytes that the backward adds: gradients, and the kernel's arguments as rows of channels."""
    return 2 * itemsize * batch * (d + e) * (n + m)


def _forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The result (B, E, N), and for the backward the logarithms of the rows' sums of exponentials (B, heads, ≥ N)."""
    if _takes_flash(query):
        heads, width = _heads(query, value)
        q, k, v = (_padded(tensor, heads, width) for tensor in (query, key, value))  # (B, heads, N or M, width)
        attended, logsumexp, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)
    else:
        q, k, v = (_rows(tensor) for tensor in (query, key, value))  # (B, 1, N, ≥ D), (B, 1, M, ≥ D), (B, 1, M, ≥ E)
        attended, logsumexp, _, _ = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)
    return as_base(_channels(attended, value)), logsumexp


def _backward(
    d_attended: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float, attended: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, each in its own dtype."""
    given = d_attended, query, key, value, attended
    if _takes_flash(query):
        heads, width = _heads(query, value)
        d_o, q, k, v, o = (_padded(tensor, heads, width) for tensor in given)
        unused = q.new_empty(2, dtype=torch.uint64)  # the random state of dropout, of which there is none
        gradients = _aten._scaled_dot_product_flash_attention_backward(
            d_o, q, k, v, o, logsumexp, None, None, q.shape[2], k.shape[2], 0.0, False, unused, unused[0], scale=scale
        )
        d_query, d_key = (gradient.sum(dim=1, keepdim=True) if heads > 1 else gradient for gradient in gradients[:2])
        gradients = d_query, d_key, gradients[2]
    else:
        # Contiguous, since the kernel gives each gradient the strides of its tensor. Rows that are slices of wider
        # ones, such as the channels-last output of one convolution, would have gradients with gaps.
        d_o, q, k, v, o = (_rows(tensor).contiguous() for tensor in given)
        unused = q.new_empty((), dtype=torch.int64)
        *gradients, _ = _aten._scaled_dot_product_efficient_attention_backward(
            d_o, q, k, v, None, o, logsumexp, unused, unused, 0.0, [True, True, True, False], scale=scale
        )
    d_query, d_key, d_value = (_channels(_unshared(d), x) for d, x in zip(gradients, (query, key, value), strict=True))
    return d_query, d_key, d_value


# The kernels know what tensors without data would give.
_fused = torch.library.custom_op("torch_sagan::fused_attention", _forward, mutates_args=())
_fused.register_fake(_forward)
_fused_backward = torch.library.custom_op("torch_sagan::fused_attention_backward", _backward, mutates_args=())
_fused_backward.register_fake(_backward)
register_derivatives(_fused, _fused_backward)


def _takes_flash(query: Tensor) -> bool:
    if query.dtype not in (torch.float16, torch.bfloat16) or query.shape[1] > WIDEST:
        return False
    # Some builds of PyTorch leave it out.
    return not (_before_ampere(query) or (query.is_cuda and not torch.backends.cuda.is_flash_attention_available()))


def _before_ampere(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) < AMPERE


def _heads(query: Tensor, value: Tensor) -> tuple[int, int]:
    """Into how many heads FlashAttention's value is split, and the width of each, which is also that of the query."""
    heads = math.ceil(value.shape[1] / WIDEST)
    width = max(query.shape[1], math.ceil(value.shape[1] / heads))
    return heads, 8 * math.ceil(width / 8)


def _padded(tensor: Tensor, heads: int, width: int) -> Tensor:
    """(B, C, N) -> (B, heads, N, width): each head with all channels where they fit into one, or with its part."""
    batch, channels, positions = tensor.shape
    if channels <= width:
        rows = tensor.mT  # (B, N, C)
        rows = F.pad(rows, (0, width - channels)) if channels < width else _aligned(rows)
        return rows.unsqueeze(1) if heads == 1 else rows.unsqueeze(1).repeat(1, heads, 1, 1)
    rows = F.pad(tensor.mT, (0, heads * width - channels)).contiguous()  # (B, N, heads · width)
    return rows.view(batch, positions, heads, width).transpose(1, 2)


def _rows(tensor: Tensor) -> Tensor:
    """(B, C, N) -> (B, 1, N, ≥ C) as the memory-efficient kernel reads it, which is a view where it can be."""
    if tensor.dtype == torch.bfloat16 and _before_ampere(tensor):
        tensor = tensor.float()
    rows = tensor.mT  # (B, N, C)
    missing = -rows.shape[2] % (ALIGNMENT // tensor.itemsize)
    return (F.pad(rows, (0, missing)) if missing else _aligned(rows)).unsqueeze(1)


def _aligned(rows: Tensor) -> Tensor:
    """Rows without gaps between channels, from aligned addresses: the same tensor where it is so already."""
    multiple = ALIGNMENT // rows.itemsize
    if rows.stride(2) == 1 and not any(n % multiple for n in (rows.stride(0), rows.stride(1), rows.storage_offset())):
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def _channels(rows: Tensor, like: Tensor) -> Tensor:
    """(B, heads, N, width) -> (B, C, N), with the channels and the dtype of ``like``."""
    return rows.transpose(1, 2).flatten(2)[..., : like.shape[1]].mT.to(like.dtype)


def _unshared(gradient: Tensor) -> Tensor:
    """The gradient in memory of its own: those of tensors in one storage come in one storage."""
    alone = gradient.untyped_storage().nbytes() == gradient.nbytes
    return gradient if alone else gradient.clone(memory_format=torch.contiguous_format)
