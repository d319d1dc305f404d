"""Attention on CUDA as PyTorch offers it, each way in its strongest form, and as this library computes it.

Tensors are rows: query (B, 1, N, D), key (B, 1, M, D), value (B, 1, M, E), all contiguous. That is how 1×1 convolutions
of a channels-last feature map leave them, and how the peers want them, so none of them transposes anything.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from measurement.floors import Rates, attention_work, times
from measurement.peak_memory import allocated_by
from measurement.stopwatch import Run, Stopwatch, on_device
from torch_sagan.attention import equation

# B, D, E, N, M as the networks have them: those of D and G by default, of D and G of the paper's at 128 pixels (with
# pooled keys) and of that G with attention at 64×64; then single images and larger maps.
CUDA_SHAPES = [
    (128, 64, 512, 16, 16), (128, 32, 256, 64, 64), (64, 16, 128, 256, 256), (64, 8, 64, 1024, 1024),
    (512, 16, 64, 1024, 256), (256, 32, 128, 1024, 256), (256, 16, 64, 4096, 1024),
    (1, 8, 64, 256, 256), (1, 8, 64, 1024, 1024), (8, 8, 64, 1024, 1024), (1, 8, 64, 4096, 4096),
    (16, 8, 64, 4096, 4096), (1, 4, 32, 16384, 16384),
]  # fmt: skip

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Contender(NamedTuple):
    """A way to compute attention, and the widths of its rows, from D and E."""

    attend: Attention
    widths: Callable[[int, int], tuple[int, int]] = lambda d, e: (d, e)


def contenders() -> dict[str, Contender]:
    """All of them, by name. Some refuse some shapes, dtypes or devices."""
    from torch.nn.attention.flex_attention import flex_attention  # loads a part of the compiler

    return {
        "plain": Contender(plain),
        "plain, compiled": Contender(torch.compile(plain, dynamic=False)),
        "math": Contender(partial(sdpa, SDPBackend.MATH)),
        "flash": Contender(partial(sdpa, SDPBackend.FLASH_ATTENTION), lambda d, e: (max(d, e), max(d, e))),
        "efficient": Contender(partial(sdpa, SDPBackend.EFFICIENT_ATTENTION)),
        "cudnn": Contender(partial(sdpa, SDPBackend.CUDNN_ATTENTION)),
        "flex": Contender(  # its kernels multiply at least 16 channels
            partial(torch.compile(flex_attention, dynamic=False), scale=1.0), lambda d, e: (max(d, 16), max(e, 16))
        ),
        "ours": Contender(ours),
    }


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The plain equation, which materializes the attention matrix."""
    return torch.softmax(query @ key.mT, dim=3) @ value


def sdpa(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's scaled_dot_product_attention by this backend; RuntimeError where it does not take these tensors."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value, scale=1.0)


def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """This library's kernel, also for small matrices, from rows that it takes as they are."""
    kernel = equation.KERNELS["cuda"]
    return kernel(*(rows.squeeze(1).mT for rows in (query, key, value))).mT.unsqueeze(1)


def runs(
    contender: Contender, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Run, Run]:
    """The forward of a training pass, and forward + backward, on B, D, E, N, M."""
    b, d, e, n, m = shape
    qk_width, value_width = contender.widths(d, e)
    torch.manual_seed(0)
    tensors = [
        # Zeros on the right, as a projection with additional zero rows would give them.
        F.pad(torch.randn(b, 1, rows, channels, device=device), (0, width - channels)).to(dtype).requires_grad_()
        for rows, channels, width in ((n, d, qk_width), (m, d, qk_width), (m, e, value_width))
    ]
    gradient = torch.ones(b, 1, n, value_width, device=device, dtype=dtype)

    def forward() -> Tensor:
        return contender.attend(*tensors)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), tensors, gradient)

    return forward, both


def compare(
    watch: Stopwatch, shape: tuple[int, int, int, int, int], dtype: torch.dtype, rates: Rates
) -> list[dict[str, Any]]:
    """A row for each contender on B, D, E, N, M: times on the device, their shares of the floor, peak extra memory."""
    torch.compiler.reset()  # a function that was compiled for several shapes would not be compiled again
    floors = [max(times(work, rates).values()) for work in attention_work(shape, dtype.itemsize)]
    forward: dict[str, Run] = {}
    both: dict[str, Run] = {}
    memory: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name, contender in contenders().items():
        try:
            passes = runs(contender, shape, dtype, watch.device)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # all that a backend does not like
                memory[name] = allocated_by(passes[1])
                forward[name], both[name] = (on_device(run, watch.device) for run in passes)
        except Exception as error:  # of a kernel, of a compiler, or for want of memory
            if name == "ours":
                raise
            refused[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"
    seconds = watch(**forward), watch(**both)
    rows = []
    for name, of_forward in seconds[0].items():
        of_both = seconds[1][name]
        row = {"by": name, "forward µs": 1e6 * of_forward, "of its floor": f"{floors[0] / of_forward:.0%}"}
        row |= {"both µs": 1e6 * of_both, "of their floor": f"{sum(floors) / of_both:.0%}"}
        rows.append(row | {"this/ours": of_both / seconds[1]["ours"], "MiB": memory[name], "refused": ""})
    return rows + [{"by": name, "refused": why} for name, why in refused.items()]


def small_matrix(rows: Iterable[dict[str, Any]]) -> str:
    """Which ``equation.SMALL_MATRIX`` rows of `compare` suggest, each with its shape B, D, E, N, M."""
    ratios = []
    for row in rows:
        if row["by"] == "plain" and not row["refused"]:
            b, _, _, n, m = row["B, D, E, N, M"]
            ratios.append((b * n * m, row["this/ours"]))
    largest = max((entries for entries, ratio in ratios if ratio < 1), default=0)
    return (
        f'SMALL_MATRIX["cuda"] is {equation.SMALL_MATRIX["cuda"]}; these times suggest {materialize_up_to(ratios)}.'
        " Up to so many entries B·N·M the plain equation, forward + backward, was faster in every shape."
        f" The largest at which it was faster in one: {largest}."
    )


def materialize_up_to(ratios: Iterable[tuple[int, float]]) -> int:
    """The largest attention matrix, in entries, up to which the plain equation is always faster; 0 if there is none.

    Args:
        ratios: of each shape the entries of its matrices, and the plain equation's time divided by ours.
    """
    largest = 0
    for entries, ratio in sorted(ratios, key=lambda pair: (pair[0], -pair[1])):  # of equal sizes the slowest first
        if ratio >= 1:
            break
        largest = entries
    return largest
