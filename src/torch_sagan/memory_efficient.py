"""Exact softmax attention that never holds the map of N×M weights, forward and backward.

On CUDA PyTorch's fused kernels do it. On the CPU those want one size for query, key and value, so here the map is
walked in tiles of queries × keys that stay in the processor's cache, and walked again in the backward (the idea of
FlashAttention, in tensor operations). A tile costs one exponential and some matrix products; the rest is folded in:

* Powers of two replace powers of e, whose exponential takes twice as long; ``log2(e)`` goes into the query.
* The forward keeps the sum of each row. With ``-log2`` of it as one more channel of the query, against a one in the
  key, the backward's matrix product and exponential give weights that are normalised already.
* A row needs its maximum subtracted only where a power of two could overflow, and a bound on the norms tells that.
  The maximum may be so large that rounding would lose what is added to it, or multiplied into the logits, so it is
  subtracted first and kept apart from the sum.
* Tiles of as many samples as there are threads are multiplied at once: each core works on a sample of its own and
  finds its tile in its own cache.

Sources: Rabe and Staats, *Self-attention Does Not Need O(n²) Memory*, arXiv:2112.05682; Dao et al.,
*FlashAttention*, arXiv:2205.14135.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from torch_sagan.double_backward import differentiable_gradients

__all__ = ["memory_efficient_attention"]

LOG2_E = math.log2(math.e)

# Chosen by measuring: smaller tiles lose time to the calls, larger ones fall out of the cache.
TILE_QUERIES = 512
TILE_KEYS = 512

# In float32 a sum of 2**27 weights of 2**100 is finite, and a weight of 2**-100 is not denormal.
SAFE_EXPONENT = 100.0

# Fused CUDA kernels want channels in multiples of 16 bytes; half precision is the strictest.
CUDA_ALIGNMENT = 8


def memory_efficient_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention as :func:`torch_sagan.functional.attention` defines it, on the CPU or on CUDA.

    Args:
        query: (B, D, N).
        key: (B, D, M).
        value: (B, E, M).

    Returns:
        (B, E, N).
    """
    if query.is_cuda:
        # A compiled graph has no double backward anyway, and takes PyTorch's operator as it is.
        if torch.compiler.is_compiling():
            return _fused(query, key, value)  # (B, E, N)
        attended: Tensor = _FusedAttention.apply(query, key, value)  # type: ignore[no-untyped-call]
        return attended  # (B, E, N)
    tiled: tuple[Tensor, Tensor, Tensor] = _tiled(query, key, value)
    return tiled[0]  # (B, E, N)


# On the CPU: operators of our own, so that a compiled graph holds two nodes instead of unrolled loops.


@torch.library.custom_op("torch_sagan::tiled_attention", mutates_args=())
def _tiled(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The result (B, E, N). For the backward alone: what is subtracted from each query's logits (B, 1, N), and the sum
    of its weights after that (B, 1, N)."""
    with torch.autocast("cpu", enabled=False):
        return _walk_forward(query, key, value)


@torch.library.custom_op("torch_sagan::tiled_attention_backward", mutates_args=())
def _tiled_backward(
    d_attended: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Tensor, shift: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, each in its own dtype."""
    with torch.autocast("cpu", enabled=False):
        return _walk_backward(d_attended, query, key, value, attended, shift, total)


def _walk_forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype, batch = value.dtype, len(query)
    query, key, value = _working_precision(query, key, value)
    splits = _row_splits(query)
    may_overflow = _may_overflow(query, key)
    query = _split(query if may_overflow else query * LOG2_E, splits)  # (B, D, N)
    key, value = _repeat(key, splits), _repeat(value, splits)  # (B, D, M), (B, E, M)
    attended = value.new_empty(len(value), value.shape[1], query.shape[2])  # (B, E, N)
    shift, total = (query.new_zeros(len(query), 1, query.shape[2]) for _ in range(2))  # (B, 1, N)
    for b, n, m, (weights,) in _tiles(query, key, buffers=1):
        torch.bmm(query[b, :, n].mT, key[b, :, m], out=weights)  # (b, n, m)
        if m.start == 0:
            summed = weights.new_zeros(*weights.shape[:2], 1)  # (b, n, 1)
            weighted = weights.new_zeros(*weights.shape[:2], value.shape[1])  # (b, n, E)
            largest = torch.full_like(summed, -math.inf)  # (b, n, 1)
        if may_overflow:
            before, largest = largest, torch.maximum(largest, weights.amax(dim=2, keepdim=True))
            weights.sub_(largest).mul_(LOG2_E).exp2_()
            for sums in (summed, weighted):
                sums *= (before - largest).mul_(LOG2_E).exp2_()
        else:
            weights.exp2_()
        summed += weights.sum(dim=2, keepdim=True)
        weighted.baddbmm_(weights, value[b, :, m].mT)
        if m.stop == key.shape[2]:
            attended[b, :, n] = (weighted / summed).mT
            total[b, :, n] = summed.mT
            if may_overflow:
                shift[b, :, n] = largest.mT
    return _join(attended, batch).to(dtype), _join(shift, batch), _join(total, batch)


def _walk_backward(
    d_attended: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Tensor, shift: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dtypes, batch = (query.dtype, key.dtype, value.dtype), len(query)
    d_attended, query, key, value, attended = _working_precision(d_attended, query, key, value, attended)
    splits = _row_splits(query)
    shifted = bool(shift.any())
    if shifted:
        d_attended = d_attended / total  # instead of the weights, which then are at most 1 each
        logit_query, logit_key = query, key  # (B, D, N), (B, D, M)
    else:
        logit_query = _with_channel(query * LOG2_E, -total.log2())  # (B, D + 1, N)
        logit_key = _with_channel(key)  # (B, D + 1, M)
    delta = (d_attended * attended).sum(dim=1, keepdim=True)  # (B, 1, N)
    query, logit_query, shift, delta, d_attended = (
        _split(tensor, splits) for tensor in (query, logit_query, shift, delta, d_attended)
    )
    key, logit_key, value = (_repeat(tensor, splits) for tensor in (key, logit_key, value))
    d_query = query.new_empty(query.shape)  # (B, D, N)
    d_key = key.new_zeros(key.shape)  # (B, D, M)
    d_value = value.new_zeros(value.shape)  # (B, E, M)
    for b, n, m, (weights, d_logits) in _tiles(query, key, buffers=2):
        queries, keys, d_output = query[b, :, n], key[b, :, m], d_attended[b, :, n]
        torch.bmm(logit_query[b, :, n].mT, logit_key[b, :, m], out=weights)  # (b, n, m)
        if shifted:
            # Not above the largest, also where this product is rounded in another way than that of the forward.
            weights.sub_(shift[b, :, n].mT).mul_(LOG2_E).clamp_(max=0).exp2_()
        else:
            weights.exp2_()  # rows sum to 1
        torch.bmm(d_output.mT, value[b, :, m], out=d_logits).sub_(delta[b, :, n].mT).mul_(weights)  # (b, n, m)
        # Sums go through small contiguous tensors: PyTorch multiplies into slices one sample at a time.
        if m.start == 0:
            d_queries = torch.zeros_like(queries, memory_format=torch.contiguous_format)  # (b, D, n)
        d_queries.baddbmm_(keys, d_logits.mT)
        d_key[b, :, m] += torch.bmm(queries, d_logits)
        d_value[b, :, m] += torch.bmm(d_output, weights)
        if m.stop == key.shape[2]:
            d_query[b, :, n] = d_queries
    gradients = _join(d_query, batch), _sum_repeats(d_key, splits), _sum_repeats(d_value, splits)
    d_query, d_key, d_value = (d.to(dtype) for d, dtype in zip(gradients, dtypes, strict=True))
    return d_query, d_key, d_value


@_tiled.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (query_in_working_precision,) = _working_precision(query)
    attended = value.new_empty(value.shape[0], value.shape[1], query.shape[2])
    shift, total = (query_in_working_precision.new_empty(query.shape[0], 1, query.shape[2]) for _ in range(2))
    return attended, shift, total


@_tiled_backward.register_fake
def _(
    d_attended: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Tensor, shift: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, d_attended: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, *of_forward = ctx.saved_tensors
    with torch.no_grad():
        gradients: tuple[Tensor, Tensor, Tensor] = _tiled_backward(d_attended, query, key, value, *of_forward)
    if torch.is_grad_enabled():
        return differentiable_gradients(gradients, d_attended, query, key, value)
    return gradients


_tiled.register_autograd(_backward, setup_context=_keep_for_backward)


# What is inside of an operator cannot be seen, so each tells how many operations its matrix products take.


@register_flop_formula(torch.ops.torch_sagan.tiled_attention)
def _tiled_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * query[0] * query[2] * key[2] * (query[1] + value[1])


@register_flop_formula(torch.ops.torch_sagan.tiled_attention_backward)
def _tiled_backward_flops(
    d_attended: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any
) -> int:
    return 2 * query[0] * query[2] * key[2] * (3 * query[1] + 2 * value[1])


def _working_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _with_channel(tensor: Tensor, channel: Tensor | None = None) -> Tensor:
    """(B, D, N) -> (B, D + 1, N): one more channel, of ones unless it is given."""
    channel = tensor.new_ones(len(tensor), 1, tensor.shape[2]) if channel is None else channel
    return torch.cat([tensor, channel], dim=1)


def _may_overflow(query: Tensor, key: Tensor) -> bool:
    """Whether two to the power of a logit could leave the range in which sums and quotients are safe."""
    bound = LOG2_E * query.square().sum(dim=1).amax().sqrt() * key.square().sum(dim=1).amax().sqrt()
    return not bound <= SAFE_EXPONENT  # also where it is not a number


def _tiles(query: Tensor, key: Tensor, *, buffers: int) -> Iterator[tuple[slice, slice, slice, list[Tensor]]]:
    """Walk the map: slices of samples, queries and keys, and reused memory (samples, queries, keys) for each tile."""
    batch, n_queries, n_keys = len(query), query.shape[2], key.shape[2]
    samples = min(batch, torch.get_num_threads())
    largest = samples * min(n_queries, TILE_QUERIES) * min(n_keys, TILE_KEYS)
    memory = query.new_empty(buffers, largest)
    for b in _slices(batch, samples):
        for n in _slices(n_queries, TILE_QUERIES):
            for m in _slices(n_keys, TILE_KEYS):
                shape = (b.stop - b.start, n.stop - n.start, m.stop - m.start)
                yield b, n, m, [buffer[: math.prod(shape)].view(shape) for buffer in memory]


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


# A batch smaller than the number of threads: the queries of a sample are spread over several, with the same keys.


def _row_splits(query: Tensor) -> int:
    return math.gcd(query.shape[2], max(1, torch.get_num_threads() // len(query)))


def _split(tensor: Tensor, splits: int) -> Tensor:
    """(B, D, N) -> (B·splits, D, N / splits)."""
    batch, channels, positions = tensor.shape
    return tensor.reshape(batch, channels, splits, positions // splits).transpose(1, 2).flatten(0, 1)


def _join(tensor: Tensor, batch: int) -> Tensor:
    """(B·splits, D, N / splits) -> (B, D, N)."""
    splits, channels, positions = len(tensor) // batch, *tensor.shape[1:]
    return tensor.reshape(batch, splits, channels, positions).transpose(1, 2).reshape(batch, channels, -1)


def _repeat(tensor: Tensor, splits: int) -> Tensor:
    """(B, D, M) -> (B·splits, D, M)."""
    return tensor.repeat_interleave(splits, dim=0) if splits > 1 else tensor


def _sum_repeats(tensor: Tensor, splits: int) -> Tensor:
    """(B·splits, D, M) -> (B, D, M)."""
    return tensor.view(-1, splits, *tensor.shape[1:]).sum(dim=1) if splits > 1 else tensor


# On CUDA: PyTorch's fused kernels.


def _fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, padded_value = (
        F.pad(tensor.mT, (0, -tensor.shape[1] % CUDA_ALIGNMENT))
        .unsqueeze(1)
        .contiguous()  # (B, 1, positions, ≥ channels)
        for tensor in (query, key, value)
    )
    attended: Tensor = F.scaled_dot_product_attention(query, key, padded_value, scale=1.0)  # (B, 1, N, ≥ E)
    return attended.squeeze(1)[..., : value.shape[1]].transpose(1, 2)  # (B, E, N)


class _FusedAttention(torch.autograd.Function):
    """The fused kernel, with a graph of its own that the first backward uses up."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.graph = _fused_graph(query, key, value)
        attended: Tensor = ctx.graph[-1].detach()
        return attended

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        (d_attended,) = gradients
        *inputs, attended = ctx.graph or _fused_graph(*ctx.saved_tensors)
        ctx.graph = None  # Otherwise its padded copies live as long as the outer graph: into the next step's forward.
        d_query, d_key, d_value = torch.autograd.grad(attended, inputs, d_attended.to(attended.dtype))
        if torch.is_grad_enabled():
            return differentiable_gradients((d_query, d_key, d_value), d_attended, *ctx.saved_tensors)
        return d_query, d_key, d_value


def _fused_graph(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Detached query, key and value, and the result with a graph that leads to them."""
    with torch.enable_grad():
        query, key, value = (tensor.detach().requires_grad_() for tensor in (query, key, value))
        return query, key, value, _fused(query, key, value)
