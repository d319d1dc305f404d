"""Functions in blocks of queries: derivatives in every mode, in every order that is composed of them, without a matrix.

Attention of `torch.func`, forward mode and masks is computed by them. It is compared with PyTorch's derivatives of the
plain equation, whose size for three queries in a block is small; that nothing larger is kept is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

from attention_paths import inputs
from numerics import Largest, plain
from torch_sagan.attention import blocks, cuda, equation, tiles
from torch_sagan.functional import scaled_dot_product_attention

# Parts of torch that forward mode itself uses, and that it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")

Attention = Callable[..., Tensor]
Points = tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of three queries, however small the matrix is."""
    monkeypatch.setattr(blocks, "BLOCK_QUERIES", 3)
    monkeypatch.setitem(equation.SMALL_MATRIX, "cpu", 0)


def tensors(n: int = 7) -> Points:
    return tuple(x.detach() for x in inputs(2, 2, 3, n, 5))


def directions(points: Points) -> Points:
    torch.manual_seed(1)
    return tuple(torch.randn_like(x) for x in points)


def loss(attention: Attention) -> Callable[..., Tensor]:
    return lambda *x: attention(*x).sin().square().sum()


def gradients(attention: Attention, argnums: Any = (0, 1, 2)) -> Callable[..., Any]:
    return grad(loss(attention), argnums)


def along(function: Callable[..., Any], x: Points) -> Any:
    return jvp(function, x, directions(x))


def of_squares(attention: Attention) -> Callable[..., Tensor]:
    """A gradient penalty."""
    return lambda *x: sum(g.square().sum() for g in gradients(attention)(*x))


def tangent(attention: Attention) -> Callable[..., Tensor]:
    return lambda *x: along(loss(attention), x)[1]


TRANSFORMS: dict[str, Callable[[Attention, Points], Any]] = {
    "grad": lambda a, x: gradients(a)(*x),
    "vjp": lambda a, x: vjp(a, *x)[1](torch.ones(2, 3, 7, dtype=torch.float64)),
    "jvp": lambda a, x: along(a, x),
    "jvp of some": lambda a, x: jvp(lambda key: a(x[0], key, x[2]), x[1:2], directions(x)[1:2]),
    "jvp of grad": lambda a, x: along(gradients(a), x),
    "grad of jvp": lambda a, x: grad(tangent(a), (0, 1, 2))(*x),
    "grad of grad": lambda a, x: grad(of_squares(a), (0, 1, 2))(*x),
    "jvp of jvp": lambda a, x: along(tangent(a), x),
    "jacfwd": lambda a, x: jacfwd(a, (0, 1, 2))(*x),
    "jacrev": lambda a, x: jacrev(a, (0, 1, 2))(*x),
    "hessian": lambda a, x: hessian(loss(a), (0, 2))(*x),
    "jacfwd of jacfwd": lambda a, x: jacfwd(jacfwd(loss(a), 0), 1)(*x),
    "jacrev of jacrev": lambda a, x: jacrev(jacrev(loss(a), 0), 1)(*x),
    "jacrev of jacfwd": lambda a, x: jacrev(jacfwd(loss(a), 0), 1)(*x),
    "vmap": lambda a, x: vmap(a, (None, 0, None))(x[0], torch.stack([x[1], -x[1]]), x[2]),
    "vmap of vmap": lambda a, x: vmap(vmap(a, (None, 0, None)), (0, None, 0))(
        torch.stack([x[0], -x[0]]), torch.stack([x[1], -x[1]]), torch.stack([x[2], -x[2]])
    ),
    "vmap of grad": lambda a, x: vmap(lambda *s: gradients(a)(*(t[None] for t in s)))(*x),
    "vmap of jvp": lambda a, x: vmap(lambda *s: along(a, tuple(t[None] for t in s)), randomness="same")(*x),
    "vmap of jvp of grad": lambda a, x: vmap(
        lambda *s: along(gradients(a), tuple(t[None] for t in s)), randomness="same"
    )(*x),
    "grad of vmap": lambda a, x: gradients(lambda q, k, v: vmap(a, (None, None, 0))(q, k, torch.stack([v, -v])))(*x),
    "jvp of vmap": lambda a, x: along(lambda q, k, v: vmap(a, (None, None, 0))(q, k, torch.stack([v, -v])), x),
    "third": lambda a, x: along(grad(tangent(a), (0, 1, 2)), x),
    "fourth": lambda a, x: along(lambda *y: along(grad(tangent(a), (0, 1, 2)), y)[1], x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_every_transform_of_torch_func(transform: str) -> None:
    x = tensors()
    ours, theirs = (tree_leaves(TRANSFORMS[transform](a, x)) for a in (equation.attention, plain))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-10)  # float64, sums of some dozens


def dual(points: Points) -> list[Tensor]:
    return [forward_ad.make_dual(*pair) for pair in zip(points, directions(points), strict=True)]


def of_dual(tensor: Tensor) -> Tensor:
    tangent = forward_ad.unpack_dual(tensor).tangent
    assert tangent is not None
    return tangent


def test_dual_tensors() -> None:
    """`torch.autograd.forward_ad`, in the forward, through the backward, and differentiated in reverse afterwards."""
    x = tensors()
    leaves = tuple(t.clone().requires_grad_() for t in x)
    with forward_ad.dual_level():
        duals = dual(leaves)
        y = equation.attention(*duals)
        score = y.sin().square().sum()
        forward, slope = of_dual(y), of_dual(score)
        through = [of_dual(g) for g in torch.autograd.grad(score, duals, create_graph=True)]
    torch.testing.assert_close(forward, along(plain, x)[1])
    torch.testing.assert_close(tuple(through), along(gradients(plain), x)[1])
    torch.testing.assert_close(torch.autograd.grad(slope, leaves), grad(tangent(plain), (0, 1, 2))(*x))


@pytest.mark.parametrize("attention", [tiles.tiled_attention, cuda.fused_attention, equation.attention])
@pytest.mark.parametrize("before", [True, False])
def test_a_tangent_that_comes_with_the_gradient(attention: Attention, before: bool) -> None:
    """Query, key and value have none, what follows has one: that of their gradients is not lost.

    The forward may have been computed by the kernel, before the dual level or in it.
    """
    leaves = tuple(t.requires_grad_() for t in tensors())
    weight, direction = torch.randn(2, 2, 3, 7, dtype=torch.float64)
    y = attention(*leaves, scale=0.5) if before else None
    with forward_ad.dual_level():
        y = attention(*leaves, scale=0.5) if y is None else y
        given = torch.autograd.grad(y, leaves, forward_ad.make_dual(weight, direction), create_graph=True)
        ours = [of_dual(g) for g in given]
    query, key, value = leaves
    theirs = torch.autograd.grad(plain(0.5 * query, key, value), leaves, direction)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_finite_differences() -> None:
    def attention(*x: Tensor) -> Tensor:
        return equation.attention(*x, scale=-0.7)

    x = inputs(1, 1, 2, 4, 2)
    assert gradcheck(attention, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(attention, x, check_fwd_over_rev=True)


def test_autocast_does_not_reach_inside() -> None:
    """Neither into the forward nor into a derivative."""
    x = tuple(t.bfloat16() for t in tensors())
    for transform in "jvp", "jvp of grad":
        outside = TRANSFORMS[transform](equation.attention, x)
        with torch.autocast("cpu", torch.bfloat16):
            inside = TRANSFORMS[transform](equation.attention, x)
        for mine, other in zip(tree_leaves(inside), tree_leaves(outside), strict=True):
            assert torch.equal(mine, other)


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transform", ["grad", "jvp", "jvp of grad", "grad of jvp", "grad of grad", "jvp of jvp", "third"]
)
def test_no_matrix(transform: str) -> None:
    """The largest tensor of all has a block's queries, and the pass keeps less than half a matrix in all."""
    n, block = 24, blocks.BLOCK_QUERIES
    x = tuple(t.detach() for t in inputs(1, 1, 1, n, n))
    largest = {}
    for attention in equation.attention, plain:
        with Largest() as seen:
            TRANSFORMS[transform](attention, x)
        largest[attention] = seen.bytes // 8
    assert largest[plain] >= n * n
    assert largest[equation.attention] <= block * n


def test_nothing_of_a_block_is_kept() -> None:
    """Neither for the backward nor for the backward of that, by kernels or by blocks: all tensors are of positions."""
    n = 24
    x = inputs(1, 1, 1, n, n)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    for attention in equation.attention, partial(scaled_dot_product_attention, is_causal=True):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = attention(*x)
            if attention is equation.attention:
                torch.autograd.grad(y.square().sum(), x, create_graph=True)
        assert kept
        assert max(kept) <= n
