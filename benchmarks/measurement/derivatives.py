"""Derivatives of attention with PyTorch's signature, of PyTorch's plain path and of the plain equation.

PyTorch's fused kernels have the first derivative alone, so the path that has all is compared. One head of 64 channels.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.func import grad, jvp
from torch.nn.attention import SDPBackend

from measurement.contenders import Attention, plain, sdpa
from measurement.peak_memory import allocated_by, raised_by
from measurement.stopwatch import Run
from torch_sagan import functional

CHANNELS = 64
SMALL = 256  # positions of a first pass, at which libraries allocate buffers
MATRICES = 16  # that the plain equation needs at once, at most

Points = tuple[Tensor, ...]

CONTENDERS: dict[str, Attention] = {
    "plain": plain,
    "math": partial(sdpa, SDPBackend.MATH),
    "ours": partial(functional.scaled_dot_product_attention, scale=1.0),
}


def points(n: int, device: torch.device) -> Points:
    """Query, key and value (1, 1, N, E)."""
    torch.manual_seed(0)
    return tuple(torch.randn(1, 1, n, CHANNELS, device=device) / CHANNELS**0.25 for _ in range(3))


def first(attention: Attention, x: Points) -> Run:
    """The gradients of query, key and value."""
    leaves = [tensor.clone().requires_grad_() for tensor in x]
    return lambda: torch.autograd.grad(attention(*leaves).sum(), leaves)


def second(attention: Attention, x: Points) -> Run:
    """Those of a gradient penalty."""
    leaves = [tensor.clone().requires_grad_() for tensor in x]

    def run() -> object:
        gradients = torch.autograd.grad(attention(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(torch.stack([gradient.square().sum() for gradient in gradients]).sum(), leaves)

    return run


def forward(attention: Attention, x: Points) -> Run:
    """The result and its tangent."""
    directions = tuple(map(torch.ones_like, x))
    return lambda: jvp(attention, x, directions)


def hessian_vector(attention: Attention, x: Points) -> Run:
    """The gradients and their tangents."""
    directions = tuple(map(torch.ones_like, x))
    gradients = grad(lambda *y: attention(*y).square().sum(), (0, 1, 2))
    return lambda: jvp(gradients, x, directions)


PASSES: dict[str, Callable[[Attention, Points], Run]] = {
    "gradient": first,
    "gradient penalty": second,
    "jvp": forward,
    "Hessian-vector product": hessian_vector,
}


def fits(n: int, device: torch.device) -> bool:
    """Whether the plain equation takes less than half of the memory that is free."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        with open("/proc/meminfo") as file:
            free = 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    return MATRICES * 4 * n * n < free / 2


def peak(contender: str, derivative: str, n: int, device: torch.device) -> float:
    """MiB by which it raises the peak of its device's memory: on a CPU that of a process of its own."""
    if device.type == "cuda":
        return allocated_by(PASSES[derivative](CONTENDERS[contender], points(n, device)))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_here, (contender, derivative, n))


def _peak_here(contender: str, derivative: str, n: int) -> float:
    make, attention = PASSES[derivative], CONTENDERS[contender]
    make(attention, points(SMALL, torch.device("cpu")))()
    return raised_by(make(attention, points(n, torch.device("cpu"))))
