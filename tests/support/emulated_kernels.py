"""The CUDA branch of attention on the CPU: PyTorch's fused kernels, computed there with real values.

The operators are PyTorch's own, which on CUDA alone have a kernel. Here each gets one for CPU tensors, in plain
arithmetic. It refuses what the real kernels refuse (channels with gaps, unaligned lengths and addresses, dtypes that
differ) and returns what they return: the same layout, a logarithm padded to a multiple of 32 queries, and gradients
with the strides of their tensors, in one storage where those share one. It takes float64 as well, which the real ones
refuse, so that derivatives can be compared with finite differences.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from torch_sagan.attention import cuda, equation

KERNELS = torch.library.Library("aten", "IMPL")
ALIGNMENT = 16  # bytes


def check(*tensors: Tensor) -> None:
    """What the kernels ask for, of tensors (B, heads, positions, channels)."""
    first, *_ = tensors
    assert first.is_floating_point(), f"no kernel for {first.dtype}"
    for tensor in tensors:
        multiple = ALIGNMENT // tensor.itemsize
        assert tensor.dtype == first.dtype, "query, key and value should have the same dtype"
        assert tensor.ndim == 4
        assert tensor.stride(3) == 1, "the last dimension must be contiguous"
        assert tensor.shape[3] % multiple == 0, f"{tensor.shape[3]} channels are not aligned"
        assert tensor.stride(0) % multiple == tensor.stride(2) % multiple == 0, "rows are not aligned"
        assert tensor.data_ptr() % ALIGNMENT == 0, "the address is not aligned"


def accumulated(tensor: Tensor) -> Tensor:
    """In the precision in which the kernels multiply and add: at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@torch.autocast("cpu", enabled=False)
def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert attn_bias is None
    assert scale is not None
    assert (dropout_p, is_causal, compute_log_sumexp) == (0.0, False, True)
    check(query, key, value)
    logits = scale * (accumulated(query) @ accumulated(key).mT)  # (B, 1, N, M)
    batch, heads, n = logits.shape[:3]
    rows = value.new_empty(batch, n, heads, value.shape[3])
    rows.copy_((torch.softmax(logits, dim=3) @ accumulated(value)).transpose(1, 2))
    logsumexp = torch.full((batch, heads, 32 * math.ceil(n / 32)), math.inf, dtype=logits.dtype)
    logsumexp[..., :n] = logits.logsumexp(dim=3)
    return rows.transpose(1, 2), logsumexp, *(torch.empty((), dtype=torch.int64) for _ in range(2))


@torch.autocast("cpu", enabled=False)
def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    philox_seed: Tensor,
    philox_offset: Tensor,
    dropout_p: float,
    grad_input_mask: list[bool],
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert attn_bias is None or attn_bias.numel() == 0
    assert scale is not None
    assert (dropout_p, is_causal) == (0.0, False)
    assert list(grad_input_mask) == [True, True, True, False]
    check(query, key, value, out, grad_out)
    n = query.shape[2]
    assert logsumexp.shape[2] == 32 * math.ceil(n / 32)
    gradients = derivatives(query, key, value, grad_out, out, logsumexp[..., :n], scale)
    into = like_kernel(*(tensor.transpose(1, 2) for tensor in (query, key, value)))
    for target, gradient in zip(into, gradients, strict=True):
        target.copy_(gradient.transpose(1, 2))
    d_query, d_key, d_value = (target.transpose(1, 2) for target in into)
    return d_query, d_key, d_value, query.new_empty(0)


def like_kernel(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Where the kernel writes the gradients of tensors (B, positions, heads, channels)."""
    storage, *others = (tensor.untyped_storage().data_ptr() for tensor in (query, key, value))
    batch, n, heads, channels = query.shape
    if query.shape[1::2] == key.shape[1::2] == value.shape[1::2] and others == [storage, storage]:
        return query.new_empty(batch, n, 3, heads, channels).unbind(2)
    strided = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) for x in (query, key, value)]
    if key.shape[3] == value.shape[3] and others[0] == others[1]:
        strided[1:] = key.new_empty(batch, key.shape[1], 2, heads, key.shape[3]).unbind(2)
    return tuple(strided)


@torch.autocast("cpu", enabled=False)
def flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor | int | None, ...]:
    check_flash(query, key, value)
    assert (dropout_p, is_causal, return_debug_mask) == (0.0, False, False)
    assert scale is not None
    logits = scale * (accumulated(query) @ accumulated(key).mT)  # (B, heads, N, M)
    batch, heads, n = logits.shape[:3]
    rows = value.new_empty(batch, n, heads, value.shape[3])
    rows.copy_((torch.softmax(logits, dim=3) @ accumulated(value)).transpose(1, 2))
    random = torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64)
    return rows.transpose(1, 2), logits.logsumexp(dim=3), None, None, n, key.shape[2], *random, value.new_empty(0)


@torch.autocast("cpu", enabled=False)
def flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    check_flash(query, key, value, out, grad_out)
    assert (dropout_p, is_causal) == (0.0, False)
    assert scale is not None
    assert (max_q, max_k) == (query.shape[2], key.shape[2])
    assert logsumexp.shape == query.shape[:3]
    gradients = derivatives(query, key, value, grad_out, out, logsumexp, scale)
    # Each in memory of its own, in the order (B, N, heads, channels).
    into = [x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (query, key, value)]
    return tuple(target.copy_(gradient) for target, gradient in zip(into, gradients, strict=True))


def check_flash(*tensors: Tensor) -> None:
    check(*tensors)
    (width,) = {tensor.shape[3] for tensor in tensors}
    assert width <= 256
    assert width % 8 == 0
    assert tensors[0].dtype in (torch.float16, torch.bfloat16)


def derivatives(
    q: Tensor, k: Tensor, v: Tensor, d: Tensor, o: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, ...]:
    q, k, v, d, o = map(accumulated, (q, k, v, d, o))
    weights = (scale * (q @ k.mT) - logsumexp[..., None]).exp()  # (B, heads, N, M)
    d_logits = scale * weights * (d @ v.mT - (d * o).sum(dim=3, keepdim=True))
    return d_logits @ k, d_logits.mT @ q, weights.mT @ d


KERNELS.impl("_scaled_dot_product_flash_attention", flash_forward, "CPU")
KERNELS.impl("_scaled_dot_product_flash_attention_backward", flash_backward, "CPU")
KERNELS.impl("_scaled_dot_product_efficient_attention", forward, "CPU")
KERNELS.impl("_scaled_dot_product_efficient_attention_backward", backward, "CPU")


def emulate(patch: pytest.MonkeyPatch) -> None:
    """Send tensors on the CPU to the kernel for CUDA."""
    patch.setitem(equation.KERNELS, "cpu", cuda.fused_attention)
    patch.setitem(equation.SMALL_MATRIX, "cpu", 0)  # as on CUDA without TF32


@pytest.fixture(params=["cpu", "cuda"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test takes the branch of the CPU, then that of CUDA."""
    if request.param == "cuda":
        emulate(monkeypatch)
