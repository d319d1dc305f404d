"""Attention on the device, against its equation in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from numerics import HAS_GPU, TOLERANCE, dtypes, error, plain, reference, taken
from torch_sagan import functional


class Shape(NamedTuple):
    """B maps of N queries and M keys, of D channels, and values of E."""

    b: int
    d: int
    e: int
    n: int
    m: int


def shapes() -> dict[str, Shape]:
    """The classes of shapes that the layer has in networks, and those that need care."""
    found = {}
    for channels, sizes in {64: (4, 8, 16, 32, 64), 128: (8, 16, 32, 64), 256: (8, 16, 32), 512: (4, 8, 32)}.items():
        for size in sizes:
            batch, n = 64 if size <= 16 else 16 if size <= 32 else 4, size * size
            found[f"{channels}, {size}×{size}"] = Shape(batch, channels // 8, channels, n, n)
            if size >= 8:  # of the released code: pooled keys, values of half as many channels
                pooled = Shape(batch, channels // 8, channels // 2, n, n // 4)
                found[f"{channels}, {size}×{size}, pooled"] = pooled
    return found | {
        "3 channels": Shape(8, 1, 3, 63, 63),  # no width fits the alignment
        "20 channels": Shape(8, 2, 20, 25, 25),
        "l2": Shape(16, 33, 256, 256, 256),
        "14×14": Shape(16, 8, 64, 196, 196),  # numbers of positions that are no multiple of a tile
        "14×14, wide": Shape(16, 32, 256, 196, 196),
        "64 keys of 128": Shape(4, 32, 128, 192, 192),
        "one key": Shape(4, 8, 64, 16, 1),
        "one query": Shape(4, 8, 64, 1, 16),
        "1024 channels": Shape(4, 128, 1024, 16, 16),
        "2048 channels": Shape(16, 256, 2048, 16, 16),
        "256 maps": Shape(256, 8, 64, 64, 64),
        "256 maps of 32×32": Shape(256, 8, 64, 1024, 1024),
        "128×128": Shape(1, 8, 64, 16384, 16384),
    }


def marks(shape: Shape) -> list[pytest.MarkDecorator]:
    """On the CPU, what takes longer than a fraction of a second is exhaustive, and longer than one is skipped."""
    products = shape.b * shape.n * shape.m * (shape.d + shape.e)
    if HAS_GPU or products <= 2**26:
        return []
    return [pytest.mark.exhaustive if products <= 2**28 else pytest.mark.skip("too slow without a GPU")]


SHAPES = [pytest.param(shape, id=name, marks=marks(shape)) for name, shape in shapes().items()]
of_each_dtype = pytest.mark.parametrize("dtype", dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, logits: float = 1.0) -> list[Tensor]:
    """Query, key and value, whose logits have this standard deviation."""
    b, d, e, n, m = shape
    sizes = ((d, n, logits * d**-0.25), (d, m, d**-0.25), (e, m, 1.0))
    return [(x * torch.randn(b, c, s, device=device)).to(dtype).requires_grad_() for c, s, x in sizes]


def result_and_gradients(tensors: list[Tensor], gradient: Tensor) -> list[Tensor]:
    y = functional.attention(*tensors)
    return [y, *torch.autograd.grad(y, tensors, gradient)]


@of_each_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_equation(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    """The result and the gradients, for logits of normal size and for large ones, whose rows have few large weights."""
    for logits in (1.0, 4.0):
        tensors = inputs(shape, dtype, device, logits)
        gradient = torch.randn(shape.b, shape.e, shape.n, device=device).to(dtype)
        results = result_and_gradients(tensors, gradient)
        assert all(result.dtype == dtype for result in results)
        errors = [error(x, *expected) for x, expected in zip(results, reference(*tensors, gradient), strict=True)]
        assert max(errors) < TOLERANCE[dtype], f"result, query, key, value, logits of {logits}: {errors}"


@of_each_dtype
@pytest.mark.parametrize("m", [64, 192, 256, pytest.param(1024, marks=[] if HAS_GPU else pytest.mark.exhaustive)])
def test_rows_of_very_negative_logits(m: int, dtype: torch.dtype, device: torch.device) -> None:
    """All logits near -120, whose exponential is 0 in float32. Some kernels return NaN, for 64 mod 128 keys."""
    tensors = [0.1 * torch.randn(4, c, m, device=device) for c in (32, 32, 128)]
    tensors[0][:, 0], tensors[1][:, 0] = 1.0, -120.0
    tensors = [x.to(dtype).requires_grad_() for x in tensors]
    gradient = torch.randn(4, 128, m, device=device).to(dtype)
    results = result_and_gradients(tensors, gradient)
    for x, expected in zip(results, reference(*tensors, gradient), strict=True):
        assert error(x, *expected) < TOLERANCE[dtype]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # parts of torch that its profiler uses
@of_each_dtype
@pytest.mark.parametrize("name", ["64, 16×16", "256, 8×8", "256, 8×8, pooled", "2048 channels"])
def test_the_kernel_of_the_dtype_runs(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """FlashAttention in half precision, the memory-efficient kernel in float32; not cuDNN's, nor plain operations."""
    shape = shapes()[name]._replace(b=2)
    tensors = inputs(shape, dtype, device)
    gradient = torch.randn(shape.b, shape.e, shape.n, device=device).to(dtype)
    result_and_gradients(tensors, gradient)
    with torch.profiler.profile() as profile:
        result_and_gradients(tensors, gradient)
        if HAS_GPU:
            torch.cuda.synchronize()
    names = {event.key for event in profile.key_averages()}
    kind, kernels = ("efficient", "fmha_cutlass") if dtype == torch.float32 else ("flash", "flash_")
    operator = f"aten::_scaled_dot_product_{kind}_attention"
    assert {name for name in names if "scaled_dot_product" in name} == {operator, f"{operator}_backward"}
    if HAS_GPU:
        assert any(kernels in name for name in names), names
        assert not any("softmax" in name.lower() and kernels not in name for name in names), names


@of_each_dtype
@pytest.mark.parametrize(("d", "e"), [(1, 8), (3, 5), (8, 64), (32, 256)])
def test_the_attention_matrix_is_not_stored(d: int, e: int, dtype: torch.dtype, device: torch.device) -> None:
    n = 8192 if HAS_GPU else 1024  # so many that tensors of (B, E, N) are small beside it
    tensors = inputs(Shape(1, d, e, n, n), dtype, device)
    gradient = torch.randn(1, e, n, device=device).to(dtype)
    result_and_gradients(
        inputs(Shape(1, d, e, 64, 64), dtype, device), gradient[..., :64]
    )  # libraries take memory once
    assert taken(device, lambda: result_and_gradients(tensors, gradient)) < n * n * dtype.itemsize / 2


def second_derivatives(attention: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a random sum of the result, then of one of its gradients."""
    random = torch.Generator().manual_seed(0)

    def total(results: Iterable[Tensor]) -> Tensor:
        return torch.stack([(x * torch.randn(x.shape, generator=random).to(x)).float().sum() for x in results]).sum()

    gradients = torch.autograd.grad(total([attention(*tensors)]), tensors, create_graph=True)
    return torch.autograd.grad(total(gradients), tensors)


# The first derivatives, from which the second come, are rounded as well, and their errors add up.
SECOND = {dtype: 2 * tolerance for dtype, tolerance in TOLERANCE.items()}


@of_each_dtype
@pytest.mark.parametrize("name", ["3 channels", "64, 16×16", "64, 16×16, pooled", "256, 8×8", "14×14"])
def test_second_derivatives(name: str, dtype: torch.dtype, device: torch.device) -> None:
    tensors = inputs(shapes()[name]._replace(b=2), dtype, device)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    ours, theirs = second_derivatives(functional.attention, tensors), second_derivatives(plain, exact)
    errors = list(map(error, ours, theirs))
    assert max(errors) < SECOND[dtype], f"query, key, value: {errors}"


def test_second_derivatives_store_no_attention_matrix(device: torch.device) -> None:
    """On a GPU their blocks are of fixed size, so that on a large map the whole takes little; plain, ten matrices."""
    n, matrices = (16384, 2.0) if HAS_GPU else (1024, 0.5)
    tensors = inputs(Shape(1, 8, 64, n, n), torch.float32, device)
    assert taken(device, lambda: second_derivatives(functional.attention, tensors)) < 4 * n * n * matrices
