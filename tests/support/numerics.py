"""Attention in float64, tolerances for what is computed in less, and the memory that a computation takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")

HAS_GPU = torch.cuda.is_available()

# Of the norm of an error, relative to the norm of what is summed up. A rounding changes a number by at most 2⁻⁸ in
# bfloat16 and 2⁻¹¹ in float16; several follow one another, of weights, results and gradients, and six to eight times as
# much is allowed. float32 (2⁻²⁴) allows for the rounding of logits around 100, and not for products of TF32: with 2⁻¹¹
# for each of their factors they come to 2e-4 to 5e-4.
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}
dtypes = tuple(TOLERANCE)

BLOCK_ENTRIES = 2**24  # of the attention matrix, 128 MiB in float64


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return value @ torch.softmax(query.mT @ key, dim=2).mT


def reference(query: Tensor, key: Tensor, value: Tensor, gradient: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The result and the gradients of query, key and value in float64, each with the norm that errors are relative to.

    It is that of the tensor itself, but for query and key that of the terms that cancel in their gradients: with a
    single key, these are zero.
    """
    query, key, value, gradient = (x.detach().double() for x in (query, key, value, gradient))
    results, d_query, s_query = [], [], []
    d_key, s_key, d_value = torch.zeros_like(key), torch.zeros_like(key), torch.zeros_like(value)
    block = max(1, BLOCK_ENTRIES // (len(key) * key.shape[2]))
    for q, d in zip(query.split(block, dim=2), gradient.split(block, dim=2), strict=True):
        weights = torch.softmax(q.mT @ key, dim=2)  # (B, n, M)
        results.append(value @ weights.mT)
        d_weights = d.mT @ value  # (B, n, M)
        mean = (weights * d_weights).sum(dim=2, keepdim=True)
        d_logits, terms = weights * (d_weights - mean), weights * (d_weights.abs() + mean.abs())
        d_query.append(key @ d_logits.mT)
        s_query.append(key @ terms.mT)
        d_key += q @ d_logits
        s_key += q @ terms
        d_value += d @ weights
    result = torch.cat(results, dim=2)
    pairs = (result, result), (torch.cat(d_query, 2), torch.cat(s_query, 2)), (d_key, s_key), (d_value, d_value)
    return [(tensor, size.norm()) for tensor, size in pairs]


def error(tensor: Tensor, expected: Tensor, norm: Tensor | None = None) -> float:
    """Of a tensor in any precision, relative to this norm or that of what is expected; infinite if it is not finite."""
    expected = expected.detach().double()
    difference = tensor.detach().double() - expected
    relative = difference.norm() / (expected.norm() if norm is None else norm)
    return float(relative) if difference.isfinite().all() else math.inf


def taken(device: torch.device, run: Callable[[], object]) -> int:
    """The bytes that running it takes at most; on the CPU those of the largest tensor, without what is inside of
    operators, since the emulated kernel has the attention matrix."""
    if device.type == "cpu":
        with Largest() as largest:
            run()
        return largest.bytes
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


class Largest(TorchDispatchMode):
    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        self.bytes = max([self.bytes, *(leaf.nbytes for leaf in tree_leaves(results) if isinstance(leaf, Tensor))])
        return results


def captured(run: Callable[[], T]) -> tuple[T, torch.cuda.CUDAGraph]:
    """What it returns in a CUDA graph, and the graph. It runs once before, so that libraries set themselves up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return results, graph
