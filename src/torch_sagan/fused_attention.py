"""Exact softmax attention on CUDA by PyTorch's memory-efficient kernel: the N×M matrix is never materialized.

``torch.nn.functional.scaled_dot_product_attention`` picks one of several kernels by shape, dtype, device and version.
Here the memory-efficient one is called by its own name, forward and backward, for these reasons:

* It takes queries and values of different widths, with values of any width. FlashAttention takes neither.
* It computes logits and softmax in float32, and subtracts each row's maximum. On Hopper, from cuDNN 9.15 on, PyTorch
  would send half precision to cuDNN, whose backward returns NaN for rows whose logits all lie below -88 if the keys are
  64 more than a multiple of 128 (cudnn-frontend issue 628). Logits without 1/√D get there. Some versions refuse
  its backward for values of 256 channels, the width of the default discriminator's 8×8 layer.
* A forward and a backward that are operators of our own have a second derivative and keep query, key and value once.
  Activation checkpointing and compilers take them as they are.

Half precision is multiplied by the tensor cores; so is float32, as three products of TF32, which keep its precision.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_sagan.dispatch import is_autocast
from torch_sagan.double_backward import register_derivatives

__all__ = ["fused_attention", "has_kernel"]

# The kernel reads rows of channels, whose length and beginning it needs in multiples of so many bytes.
ALIGNMENT = 16

AMPERE = (8, 0)  # the first compute capability whose tensor cores multiply bfloat16


def has_kernel(dtype: torch.dtype) -> bool:
    """Whether :func:`fused_attention` takes this dtype. AMD's build of PyTorch has other kernels under this name."""
    return dtype in (torch.float32, torch.float16, torch.bfloat16) and torch.version.hip is None


def fused_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention as :func:`torch_sagan.functional.attention` defines it, for CUDA tensors.

    Args:
        query: (B, D, N), in a dtype that :func:`has_kernel` names.
        key: (B, D, M).
        value: (B, E, M).

    Returns:
        (B, E, N), in the dtype of autocast where that is on.
    """
    device = query.device.type
    if is_autocast(device):  # it does not know operators of our own
        query, key, value = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (query, key, value))
    results: tuple[Tensor, Tensor] = _fused(query, key, value)
    return results[0]  # (B, E, N)


def _forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The result (B, E, N), and for the backward the logarithm of each row's sum of exponentials (B, 1, ≥ N)."""
    q, k, v = (_rows(tensor) for tensor in (query, key, value))  # (B, 1, N, ≥ D), (B, 1, M, ≥ D), (B, 1, M, ≥ E)
    attended, logsumexp, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=1.0)
    return _channels(attended, value), logsumexp


def _backward(
    d_attended: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, each in its own dtype."""
    # Contiguous, since the kernel gives each gradient the strides of its tensor. Rows that are slices of wider ones,
    # such as the channels-last output of one convolution, would have gradients with gaps, of several times the memory.
    d_o, q, k, v, o = (_rows(tensor).contiguous() for tensor in (d_attended, query, key, value, attended))
    unused = q.new_empty((), dtype=torch.int64)  # the random state of dropout, of which there is none
    gradients = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        d_o, q, k, v, None, o, logsumexp, unused, unused, 0.0, [True, True, True, False], scale=1.0
    )
    d_query, d_key, d_value = (_channels(_unshared(d), x) for d, x in zip(gradients, (query, key, value), strict=False))
    return d_query, d_key, d_value


# The kernels know what tensors without data would give.
_fused = torch.library.custom_op("torch_sagan::fused_attention", _forward, mutates_args=())
_fused.register_fake(_forward)
_fused_backward = torch.library.custom_op("torch_sagan::fused_attention_backward", _backward, mutates_args=())
_fused_backward.register_fake(_backward)
register_derivatives(_fused, _fused_backward)


def _rows(tensor: Tensor) -> Tensor:
    """(B, D, N) -> (B, 1, N, ≥ D) as the kernel reads it, which is a view where it can be."""
    if tensor.dtype == torch.bfloat16 and tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) < AMPERE:
        tensor = tensor.float()
    multiple = ALIGNMENT // tensor.itemsize
    rows = tensor.mT  # (B, N, D)
    if rows.shape[2] % multiple:
        rows = F.pad(rows, (0, -rows.shape[2] % multiple))  # (B, N, > D)
    elif rows.stride(2) != 1 or any(n % multiple for n in (rows.stride(0), rows.stride(1), rows.storage_offset())):
        rows = rows.clone(memory_format=torch.contiguous_format)
    return rows.unsqueeze(1)


def _channels(rows: Tensor, like: Tensor) -> Tensor:
    """(B, 1, N, ≥ D) -> (B, D, N), with the channels and the dtype of ``like``."""
    return rows.squeeze(1)[..., : like.shape[1]].mT.to(like.dtype)


def _unshared(gradient: Tensor) -> Tensor:
    """The gradient in memory of its own: those of tensors in one storage come in one storage."""
    alone = gradient.untyped_storage().nbytes() == gradient.nbytes
    return gradient if alone else gradient.clone(memory_format=torch.contiguous_format)
