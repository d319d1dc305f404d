"""Derivatives of attention of first and higher order, on every path, and what they keep in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attention_paths import TILE, inputs, paths
from numerics import plain
from torch_sagan import SelfAttention2d, gradient_penalty
from torch_sagan.attention import blocks, equation, tiles

tiled = tiles.tiled_attention


@paths
@pytest.mark.usefixtures("small_tiles")
def test_first_and_second_derivatives(attention: Callable[..., Tensor]) -> None:
    tensors = inputs(2, 2, 3, TILE + 2, 4)
    # Every entry costs a full pass: the first derivative over all of them, the second over a map of one sample.
    assert torch.autograd.gradcheck(attention, tensors)
    assert torch.autograd.gradgradcheck(attention, inputs(1, 2, 2, 5, 4))


def derivatives(attention: Callable[..., Tensor], tensors: list[Tensor], order: int) -> list[Tensor]:
    """Of random sums of the result, then of its first derivatives, and so on."""
    torch.manual_seed(0)
    results = [attention(*tensors)]
    for k in range(1, order + 1):
        total = sum((result * torch.randn(result.shape, dtype=result.dtype)).sum() for result in results)
        results = list(torch.autograd.grad(total, tensors, create_graph=k < order))
    return results


@paths
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(("n", "scale"), [(1, 1.0), (3, 1.0), (13, 1.0), (24, 30.0)])
def test_higher_derivatives_across_blocks(attention: Callable[..., Tensor], n: int, scale: float, order: int) -> None:
    """The second is the formula, block by block; the third is PyTorch's derivative of that."""
    tensors = inputs(2, 3, 5, n, 17, scale=scale)
    for mine, other in zip(derivatives(attention, tensors, order), derivatives(plain, tensors, order), strict=True):
        # Sums of some hundred products of logits as large as the scale, in float64.
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11 * float(other.abs().max()))


@paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_derivatives_in_low_precision(attention: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """The first derivatives are rounded to the dtype on their way, and the second once more."""
    tensors = inputs(dtype=dtype)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    torch.manual_seed(0)
    incoming = torch.randn(2, 5, 40).to(dtype)
    seconds = []
    for path, leaves in (attention, tensors), (plain, doubles):
        y = path(*leaves)
        with torch.autocast("cpu", torch.bfloat16, enabled=path is attention):  # which must not reach inside
            gradients = torch.autograd.grad(y, leaves, incoming.to(y.dtype), create_graph=True)
            seconds.append(torch.autograd.grad(gradients, leaves, [torch.ones_like(g) for g in gradients]))
    for mine, other in zip(*seconds, strict=True):
        assert mine.dtype == dtype
        # Up to eight roundings of values of the result's size.
        torch.testing.assert_close(
            mine.double(), other, rtol=0, atol=8 * torch.finfo(dtype).eps * float(other.abs().max())
        )


@paths
@pytest.mark.parametrize("create_graph", [False, True])
def test_batched_gradients(attention: Callable[..., Tensor], create_graph: bool) -> None:
    """``is_grads_batched``, also where the batch of gradients is differentiated again."""
    tensors = inputs(2, 2, 3, 7, 5)
    incoming = torch.randn(3, 2, 3, 7, dtype=torch.float64)
    results = []
    for path in attention, plain:
        gradients = torch.autograd.grad(
            path(*tensors), tensors, incoming, is_grads_batched=True, create_graph=create_graph
        )
        results.append(list(gradients))
        if create_graph:
            results[-1] += torch.autograd.grad(sum(g.square().sum() for g in gradients), tensors)
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


class LargestTensor(TorchDispatchMode):
    """How many entries the largest result of any operation has, and how often each operation is called."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        self.operations[operation.overloadpacket.__name__] += 1
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_a_gradient_penalty_never_materializes_the_attention_matrix() -> None:
    n = 2048
    tensors = inputs(1, 2, 4, n, n, dtype=torch.float32)
    largest = {}
    for path in tiled, plain:
        with LargestTensor() as seen:
            gradients = torch.autograd.grad(path(*tensors).square().sum(), tensors, create_graph=True)
            sum(g.square().sum() for g in gradients).backward(inputs=tensors)
        largest[path] = seen.numel
    assert largest[plain] == n * n
    assert largest[tiled] == blocks.BLOCK_QUERIES * n


def test_blocks_of_the_second_derivative_are_as_large_as_memory_allows() -> None:
    """Away from the CPU: eight blocks for one map of 128×128, where blocks of the CPU's size would be 256."""
    with torch.device("meta"):
        tensors = [torch.empty(1, c, 128 * 128, requires_grad=True) for c in (4, 4, 32)]
        with LargestTensor() as seen:
            gradients = torch.autograd.grad(equation.attention(*tensors).sum(), tensors, create_graph=True)
            sum(g.square().sum() for g in gradients).backward(inputs=tensors)
    assert seen.numel == blocks.BLOCK_ENTRIES
    assert seen.operations["_softmax"] == 128**4 / blocks.BLOCK_ENTRIES


@pytest.mark.usefixtures("small_tiles")
def test_gradient_penalty_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty WGAN-GP steps reduce a large penalty to less than a tenth."""
    monkeypatch.setitem(equation.SMALL_MATRIX, "cpu", 0)
    torch.manual_seed(0)
    layer = SelfAttention2d(4)
    with torch.no_grad():
        layer.gamma.fill_(0.5)
    discriminator = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1), layer, torch.nn.Flatten(), torch.nn.Linear(4 * 36, 1), torch.nn.Flatten(0)
    )
    with torch.no_grad():
        discriminator[3].weight.mul_(100)
    adam = torch.optim.Adam(discriminator.parameters(), 2e-2)
    real, fake = torch.randn(8, 1, 6, 6), torch.randn(8, 1, 6, 6)
    penalties = []
    for _ in range(50):
        penalty = gradient_penalty(discriminator, real, fake)
        adam.zero_grad()
        penalty.backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())
        adam.step()
        penalties.append(penalty.item())
    assert penalties[-1] < 0.1 * penalties[0]
    assert layer.query.weight.grad.abs().sum() > 0
