"""The least time that attention can take on a machine, from the machine's own rates.

On a GPU, matrix units, special-function units and memory work at the same time, so no kernel is faster than the slowest
of the three: the floor is a maximum. On a CPU the same cores do one after the other, so the bound is a sum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from measurement.stopwatch import Run, Stopwatch, on_device

# What is measured: rows of a square matrix, exponentials (on a CPU their numbers stay in the cache), copied numbers.
SIZES = {"cpu": (2**11, 2**18, 2**25), "cuda": (2**13, 2**24, 2**28)}
CHAIN = 64  # exponentials of each number that are computed on CUDA, where one would take as long as reading the number


class Rates(NamedTuple):
    """The best rates of a machine, each in a second."""

    product: float  # operations of a matrix product in one dtype
    exponential: float
    copy: float  # bytes, read and written


class Work(NamedTuple):
    """What has to be done in any order of the arithmetic."""

    operations: float  # multiplications and additions
    exponentials: float
    moved: float  # bytes of the tensors that are read or written, each once


def attention_work(shape: tuple[int, int, int, int, int], itemsize: int) -> tuple[Work, Work]:
    """Forward and backward of attention on B, D, E, N, M: query (B, D, N), key (B, D, M), value (B, E, M).

    The backward computes the weights again, since storing them would take their memory.
    """
    b, d, e, n, m = shape
    tensors = itemsize * b * ((n + m) * d + (m + n) * e)  # query, key, value and result
    forward = Work(2 * b * n * m * (d + e), b * n * m, tensors)
    # It also reads the result's gradient, and writes those of query, key and value.
    backward = Work(2 * b * n * m * (3 * d + 2 * e), b * n * m, 2 * tensors + itemsize * b * n * e)
    return forward, backward


def layer_work(batch: int, channels: int, size: int) -> tuple[Work, Work]:
    """Forward and backward of the whole layer with its three projections, in float32; queries are as many as keys."""
    d, e, n = max(1, channels // 8), channels, size * size
    forward, backward = attention_work((batch, d, e, n, n), 4)
    projections, tensors = 2 * batch * n * channels * (2 * d + e), 4 * batch * n * (2 * d + 4 * e)
    return (
        Work(forward.operations + projections, forward.exponentials, tensors),
        Work(backward.operations + 2 * projections, backward.exponentials, 2 * tensors),
    )


def times(work: Work, rates: Rates) -> dict[str, float]:
    """The seconds of each kind of work at its rate."""
    return {
        "product": work.operations / rates.product,
        "exponential": work.exponentials / rates.exponential,
        "copy": work.moved / rates.copy,
    }


def measure_rates(watch: Stopwatch, dtype: torch.dtype) -> Rates:
    """The best rates of this machine, with its products in this dtype."""
    cuda = watch.device.type == "cuda"
    n, exponentials, copied = SIZES[watch.device.type]
    matrix = torch.randn(n, n, device=watch.device, dtype=dtype)
    numbers, large = torch.rand(exponentials, device=watch.device), torch.randn(copied, device=watch.device)
    into, target = torch.empty_like(numbers), torch.empty_like(large)
    chain = torch.compile(chained_exponentials) if cuda else chained_exponentials  # into one kernel
    runs: dict[str, Run] = {
        "product": lambda: matrix @ matrix,
        "exponential": (lambda: chain(numbers)) if cuda else (lambda: torch.exp2(numbers, out=into)),
        "copy": lambda: target.copy_(large),
    }
    seconds = watch(**{name: on_device(run, watch.device) for name, run in runs.items()})
    return Rates(
        2 * n**3 / seconds["product"],
        exponentials * (CHAIN if cuda else 1) / seconds["exponential"],
        2 * 4 * copied / seconds["copy"],
    )


def chained_exponentials(x: Tensor) -> Tensor:
    """`CHAIN` exponentials of each number, which never leave the range of 0.5 to 1."""
    for _ in range(CHAIN):
        x = torch.exp2(-x)
    return x
