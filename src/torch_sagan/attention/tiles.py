"""Exact softmax attention on the CPU, forward and backward, in tiles: the N×M matrix is never materialized.

PyTorch's fused CPU kernel needs query, key and value to have equally many channels. Here the attention matrix is
computed in tiles of queries × keys that stay in the processor's cache, and computed again in the backward (the idea of
FlashAttention, in tensor operations). Each tile costs its matrix products and one exponential for each weight.
Four techniques keep it from costing more:

* The weight exp(x) is computed as exp2(x · log2(e)), since exp takes twice as long as exp2. The factor log2(e) is
  multiplied into the query, which is smaller than the logits.
* The forward saves the sum of each row. The backward appends ``-log2`` of that sum to the query as one more channel,
  and a one to the key. The exponential of their product is then a normalized weight, without a division.
* The maximum of a row is subtracted only if exp2 could overflow. A bound on the logits, computed from the norms of
  queries and keys, decides this. Where the maximum is subtracted, the first two techniques change. Logits are
  multiplied by log2(e) after the subtraction: before it, large ones would lose digits to rounding. And nothing is
  appended to the query: the backward subtracts the saved maximum and divides the gradient by the saved sum. (Maximum
  and sum are saved separately: rounding max + log(sum) would lose the logarithm where the maximum is large.)
* Each batched matrix product takes as many samples as there are threads, so that each core works on one sample, with
  its tile in its own cache.

Sources: Rabe and Staats, *Self-attention Does Not Need O(n²) Memory*, arXiv:2112.05682; Dao et al.,
*FlashAttention*, arXiv:2205.14135.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from torch_sagan.attention.plain import in_float32, scaled
from torch_sagan.attention.second_derivative import as_base, register_derivatives

__all__ = ["backward_bytes", "tiled_attention"]

LOG2_E = math.log2(math.e)

# Chosen by measuring: smaller tiles cost call overhead, larger ones fall out of the cache.
TILE_QUERIES = 512
TILE_KEYS = 512

# The normal numbers of float32 go from 2**-126 to 2**128. So a weight of 2**-100 is not denormal, and a sum of 2**27
# weights of 2**100 is finite.
SAFE_EXPONENT = 100.0


def tiled_attention(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> Tensor:
    """Attention as :func:`torch_sagan.functional.attention` defines it, for tensors on the CPU.

    Args:
        query: (B, D, N).
        key: (B, D, M).
        value: (B, E, M).
        scale: what logits are multiplied by.

    Returns:
        (B, E, N).
    """
    results: tuple[Tensor, Tensor, Tensor] = _tiled(query, key, value, scale)
    return results[0]  # (B, E, N)


def backward_bytes(batch: int, d: int, e: int, n: int, m: int, itemsize: int) -> int:
    """The most bytes that the backward adds, for a query (B, D, N), a key (B, D, M) and a value (B, E, M)."""
    parts = _parts_per_sample(batch, n)
    samples = min(batch * parts, torch.get_num_threads())
    gradients_and_factors = batch * (2 * d + e + 1) * (n + m)  # the factors of the logits have one more channel
    tiles = 2 * samples * min(n // parts, TILE_QUERIES) * min(m, TILE_KEYS)
    split = batch * ((2 * d + e + 1) * n + parts * (3 * d + 2 * e + 1) * m) if parts > 1 else 0
    return itemsize * (gradients_and_factors + tiles + split)


# Operators of our own, so that a compiled graph holds two nodes instead of unrolled loops.


@torch.library.custom_op("torch_sagan::tiled_attention", mutates_args=())
@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def _tiled(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The result (B, E, N), and for the backward two numbers for each query (B, 1, N): the maximum that was subtracted
    from its logits (0 if none was), and the sum of its weights."""
    q, k, v = in_float32(query, key, value)
    q = scaled(q, scale)
    # If there are more threads than samples, the queries of each sample are split into several parts. From here on, B
    # counts the parts of all samples, and N the queries of one part.
    parts = _parts_per_sample(len(q), q.shape[2])
    subtract_max = _may_overflow(q, k)
    queries = _split(q if subtract_max else q * LOG2_E, parts)  # (B, D, N)
    keys, values = _repeat(k, parts), _repeat(v, parts)  # (B, D, M), (B, E, M)
    attended = values.new_empty(len(values), values.shape[1], queries.shape[2])  # (B, E, N)
    subtracted, total = (queries.new_zeros(len(queries), 1, queries.shape[2]) for _ in range(2))  # (B, 1, N)
    for b, n, m, (logits,) in _tiles(queries, keys, buffers=1):
        torch.bmm(queries[b, :, n].mT, keys[b, :, m], out=logits)  # (b, n, m)
        if m.start == 0:
            row_sum = logits.new_zeros(*logits.shape[:2], 1)  # (b, n, 1)
            weighted_values = logits.new_zeros(*logits.shape[:2], values.shape[1])  # (b, n, E)
            row_max = torch.full_like(row_sum, -math.inf)  # (b, n, 1)
        if subtract_max:
            old_max, row_max = row_max, torch.maximum(row_max, logits.amax(dim=2, keepdim=True))
            logits.sub_(row_max).mul_(LOG2_E)
            # The sums over earlier tiles had the old maximum subtracted: rescale them to the new one (online softmax).
            rescale = (old_max - row_max).mul_(LOG2_E).exp2_()  # (b, n, 1)
            row_sum *= rescale
            weighted_values *= rescale
        weights = logits.exp2_()  # in place
        row_sum += weights.sum(dim=2, keepdim=True)
        weighted_values.baddbmm_(weights, values[b, :, m].mT)
        if m.stop == keys.shape[2]:
            attended[b, :, n] = (weighted_values / row_sum).mT
            total[b, :, n] = row_sum.mT
            if subtract_max:
                subtracted[b, :, n] = row_max.mT
    batch = len(query)
    return as_base(_join(attended, batch).to(value.dtype)), _join(subtracted, batch), _join(total, batch)


# For one query q (D) with the keys K (D, M), their weights p (M) and the values V (E, M), the result o (E) and its
# gradient d (E), where ⊙ multiplies element by element:
#
#     dlogits = p ⊙ (Vᵀd − oᵀd),   dq = K dlogits,   dK = q dlogitsᵀ,   dV = d pᵀ


@torch.library.custom_op("torch_sagan::tiled_attention_backward", mutates_args=())
@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def _tiled_backward(
    d_attended: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    attended: Tensor,
    subtracted: Tensor,
    total: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, each in its own dtype."""
    d_o, q, k, v, o = in_float32(d_attended, query, key, value, attended)
    q = scaled(q, scale)
    parts = _parts_per_sample(len(q), q.shape[2])  # as in the forward
    subtract_max = bool(subtracted.any())  # if all are 0, there is nothing to subtract
    if subtract_max:
        # The weights below, exp(logit - maximum), are at most 1 and cannot overflow. Each row sums to `total`;
        # dividing the gradient by it once is cheaper than dividing the weights of every tile.
        d_o = d_o / total
        logit_query, logit_key = q, k  # (B, D, N), (B, D, M)
    else:
        logit_query = _append_channel(q * LOG2_E, -total.log2())  # (B, D + 1, N)
        logit_key = _append_channel(k)  # (B, D + 1, M)
    delta = (d_o * o).sum(dim=1, keepdim=True)  # (B, 1, N)
    queries, logit_query, row_max, delta, d_o = (
        _split(tensor, parts) for tensor in (q, logit_query, subtracted, delta, d_o)
    )
    keys, logit_key, values = (_repeat(tensor, parts) for tensor in (k, logit_key, v))
    d_query = queries.new_empty(queries.shape)  # (B, D, N)
    d_key = keys.new_zeros(keys.shape)  # (B, D, M)
    d_value = values.new_zeros(values.shape)  # (B, E, M)
    for b, n, m, (logits, d_logits) in _tiles(queries, keys, buffers=2):
        torch.bmm(logit_query[b, :, n].mT, logit_key[b, :, m], out=logits)  # (b, n, m)
        if subtract_max:
            # This product may be rounded differently from the forward's, so a logit could exceed the saved maximum.
            logits.sub_(row_max[b, :, n].mT).mul_(LOG2_E).clamp_(max=0)
        weights = logits.exp2_()  # in place
        d = d_o[b, :, n]  # (b, E, n)
        torch.bmm(d.mT, values[b, :, m], out=d_logits).sub_(delta[b, :, n].mT).mul_(weights)  # (b, n, m)
        # baddbmm_ into a slice is slow, since it multiplies one sample at a time. So d_query is summed by baddbmm_ in a
        # contiguous tensor; for d_key and d_value bmm computes each product, which is then added to the slice.
        if m.start == 0:
            d_query_block = torch.zeros_like(queries[b, :, n], memory_format=torch.contiguous_format)  # (b, D, n)
        d_query_block.baddbmm_(keys[b, :, m], d_logits.mT)
        d_key[b, :, m] += torch.bmm(queries[b, :, n], d_logits)
        d_value[b, :, m] += torch.bmm(d, weights)
        if m.stop == keys.shape[2]:
            d_query[b, :, n] = d_query_block
    return (
        scaled(_join(d_query, len(query)), scale).to(query.dtype),
        _sum_repeats(d_key, parts).to(key.dtype),
        _sum_repeats(d_value, parts).to(value.dtype),
    )


@_tiled.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    attended = value.new_empty(value.shape[0], value.shape[1], query.shape[2])
    subtracted, total = (in_float32(query)[0].new_empty(query.shape[0], 1, query.shape[2]) for _ in range(2))
    return attended, subtracted, total


@_tiled_backward.register_fake
def _(
    d_attended: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    attended: Tensor,
    subtracted: Tensor,
    total: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


register_derivatives(_tiled, _tiled_backward)


def _append_channel(tensor: Tensor, channel: Tensor | None = None) -> Tensor:
    """(B, D, N) -> (B, D + 1, N): one more channel, of ones by default."""
    channel = tensor.new_ones(len(tensor), 1, tensor.shape[2]) if channel is None else channel
    return torch.cat([tensor, channel], dim=1)


def _may_overflow(query: Tensor, key: Tensor) -> bool:
    """Whether the exponential of a logit could leave the range in which sums and quotients are safe."""
    bound = LOG2_E * query.square().sum(dim=1).amax().sqrt() * key.square().sum(dim=1).amax().sqrt()
    return not bound <= SAFE_EXPONENT  # true for NaN, too


def _tiles(query: Tensor, key: Tensor, *, buffers: int) -> Iterator[tuple[slice, slice, slice, list[Tensor]]]:
    """For each tile: its slices of samples, queries and keys, and reused buffers of its shape."""
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


# If there are more threads than samples, the queries of each sample are split into equal parts, so that more threads
# have work. All parts of a sample have the same keys and values.


def _parts_per_sample(batch: int, n_queries: int) -> int:
    return math.gcd(n_queries, max(1, torch.get_num_threads() // batch))


def _split(tensor: Tensor, parts: int) -> Tensor:
    """(B, D, N) -> (B·parts, D, N / parts)."""
    batch, channels, positions = tensor.shape
    return tensor.reshape(batch, channels, parts, positions // parts).transpose(1, 2).flatten(0, 1)


def _join(tensor: Tensor, batch: int) -> Tensor:
    """(B·parts, D, N / parts) -> (B, D, N)."""
    parts, channels, positions = len(tensor) // batch, *tensor.shape[1:]
    return tensor.reshape(batch, parts, channels, positions).transpose(1, 2).reshape(batch, channels, -1)


def _repeat(tensor: Tensor, parts: int) -> Tensor:
    """(B, D, M) -> (B·parts, D, M)."""
    return tensor.repeat_interleave(parts, dim=0) if parts > 1 else tensor


def _sum_repeats(tensor: Tensor, parts: int) -> Tensor:
    """(B·parts, D, M) -> (B, D, M)."""
    return tensor.view(-1, parts, *tensor.shape[1:]).sum(dim=1) if parts > 1 else tensor
