"""`functional.scaled_dot_product_attention` against loops and against PyTorch's own, on each path that computes it.

The cases are those of PyTorch's tests that apply (classes TestTransformers, TestSDPAFailureModes and TestSDPA of
test/test_transformers.py, pytorch/pytorch at 00030eb8e81f911c48c4d7634fa6b8bb2fae1a1b), written anew: every shape of
mask, causal, scales, packed and expanded tensors, infinite masks, empty tensors, and what it refuses. Theirs compare
values and first derivatives; these compare second and forward derivatives too.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import emulated_kernels
from torch_sagan.attention import blocks, equation
from torch_sagan.functional import scaled_dot_product_attention

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")  # which forward mode itself uses

B, H, L, S, E, EV = 2, 3, 7, 5, 4, 6


@pytest.fixture(params=["without the matrix", "emulated CUDA", "materialized"], autouse=True)
def _paths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels and blocks of three queries, or the plain equation."""
    monkeypatch.setattr(blocks, "BLOCK_QUERIES", 3)
    monkeypatch.setitem(equation.SMALL_MATRIX, "cpu", 2**40 if request.param == "materialized" else 0)
    if request.param == "emulated CUDA":
        emulated_kernels.emulate(monkeypatch)


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def heads() -> list[Tensor]:
    return [random(B, H, L, E), random(B, H, S, E), random(B, H, S, EV)]


def pytorchs(*arguments: Tensor, **options: Any) -> Tensor:
    """The path that has every derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*arguments, **options)


def derivatives(attention: Callable[..., Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The result, gradients, the gradients of a penalty of these, and the tangent of the result."""
    torch.manual_seed(0)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    y = attention(*leaves)
    first = torch.autograd.grad((y * torch.randn_like(y)).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    points = tuple(leaf.detach() for leaf in leaves)
    _, tangent = torch.func.jvp(attention, points, tuple(map(torch.randn_like, points)))
    return [y.detach(), *(g.detach() for g in first), *second, tangent]


def compare(tensors: Sequence[Tensor], mask: Tensor | None = None, **options: Any) -> None:
    """With PyTorch's; a floating-point mask is differentiated too."""
    differentiable = mask is not None and mask.is_floating_point()

    def of(attention: Callable[..., Tensor]) -> list[Tensor]:
        if differentiable:
            return derivatives(lambda q, k, v, m: attention(q, k, v, attn_mask=m, **options), [*tensors, mask])
        return derivatives(lambda q, k, v: attention(q, k, v, attn_mask=mask, **options), tensors)

    for ours, theirs in zip(of(scaled_dot_product_attention), of(pytorchs), strict=True):
        # float64, sums of some dozens; logits up to the largest scale below.
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10 * (1 + float(theirs.abs().max())))


def loops(query: Tensor, key: Tensor, value: Tensor, added: Tensor, scale: float) -> Tensor:
    """One query (L, E) after the other, one key after the other; `added` is (L, S)."""
    rows = []
    for i in range(len(query)):
        exponentials = [math.exp(scale * float(query[i] @ key[j]) + float(added[i, j])) for j in range(len(key))]
        total = sum(exponentials)
        rows.append(sum(w / total * value[j] for j, w in enumerate(exponentials)) if total else torch.zeros(EV))
    return torch.stack([row.double() for row in rows])


@pytest.mark.parametrize("kind", ["none", "keys", "keys added", "boolean", "added", "causal"])
def test_loops(kind: str) -> None:
    query, key, value = heads()
    hidden = torch.rand(B, H, L, S) < 0.4
    if kind.startswith("keys"):
        hidden = hidden[:, :, :1].expand(-1, -1, L, -1)
    hidden = torch.ones(L, S, dtype=torch.bool).triu(1).expand(B, H, -1, -1) if kind == "causal" else hidden
    added = torch.zeros(B, H, L, S, dtype=torch.float64) if kind == "none" else -hidden.double() * math.inf
    added = added.nan_to_num(nan=0.0, neginf=-math.inf)
    mask = None if kind in ("none", "causal") else ~hidden[..., : 1 if "keys" in kind else L, :]
    if "added" in kind:
        bias = random(B, H, *mask.shape[2:])
        added, mask = added + bias, bias.masked_fill(~mask, -math.inf)
    y = scaled_dot_product_attention(query, key, value, mask, is_causal=kind == "causal", scale=0.7)
    for b, h in itertools.product(range(B), range(H)):
        torch.testing.assert_close(y[b, h], loops(query[b, h], key[b, h], value[b, h], added[b, h], 0.7))


SHAPES = [*itertools.product([L, 1], [S, 1]), *itertools.product([B, 1], [H, 1], [L, 1], [S, 1]), (B, H, L, S)[1:]]
# Of masks that differ by query, those of keys, and those that are alike for all keys.
REPRESENTATIVE = {(L, S), (1, S), (B, 1, 1, S), (1, H, L, 1), (1, 1)}


@pytest.mark.parametrize("boolean", [True, False], ids=["boolean", "added"])
@pytest.mark.parametrize(
    "shape",
    [shape if shape in REPRESENTATIVE else pytest.param(shape, marks=pytest.mark.exhaustive) for shape in SHAPES],
)
def test_masks_of_every_shape(shape: tuple[int, ...], boolean: bool) -> None:
    compare(heads(), torch.rand(shape) < 0.6 if boolean else random(*shape))


@pytest.mark.parametrize("shape", [(L, S), (1, S)])
def test_infinite_masks(shape: tuple[int, ...]) -> None:
    """Added to logits: some rows have no key, some have all."""
    mask = random(B, 1, *shape).masked_fill(torch.rand(B, 1, *shape) < 0.5, -math.inf)
    mask[0, :, 0] = -math.inf
    compare(heads(), mask)


def test_a_query_without_a_key() -> None:
    """Zero, as are all derivatives; also where no query has one."""
    for mask in (torch.zeros(L, S, dtype=torch.bool), torch.zeros(1, S, dtype=torch.bool)):
        y, *others = derivatives(lambda q, k, v, m=mask: scaled_dot_product_attention(q, k, v, m), heads())
        assert y.shape == (B, H, L, EV)
        assert not any(result.any() for result in (y, *others))


@pytest.mark.parametrize(("n_queries", "n_keys"), [(7, 7), (7, 3), (3, 7), (1, 4)])
def test_causal(n_queries: int, n_keys: int) -> None:
    compare([random(B, n_queries, E), random(B, n_keys, E), random(B, n_keys, EV)], is_causal=True)


@pytest.mark.parametrize("scale", [None, 1.0, 0.3, 0.0, -1e4])
def test_scales(scale: float | None) -> None:
    compare(heads(), scale=scale)


@pytest.mark.parametrize(
    "shapes",
    [
        [(L, E), (S, E), (S, EV)],
        [(B, L, E), (B, S, E), (B, S, EV)],
        [(B, H, 2, L, E), (B, H, 2, S, E), (B, H, 2, S, EV)],
        [(B, 1, L, E), (B, H, S, E), (H, S, EV)],
        [(L, E), (B, H, S, E), (B, 1, S, EV)],
    ],
    ids=str,
)
def test_leading_dimensions_are_broadcast(shapes: list[tuple[int, ...]]) -> None:
    tensors = [random(*shape) for shape in shapes]
    compare(tensors)
    compare(tensors, torch.rand(L, S) < 0.6)
    compare(tensors, random(1, S))


@pytest.mark.parametrize(("of_key", "of_value"), [(2, 2), (1, 4), (4, 2)])
def test_grouped_heads(of_key: int, of_value: int) -> None:
    tensors = [random(B, 4, L, E), random(B, of_key, S, E), random(B, of_value, S, EV)]
    compare(tensors, enable_gqa=True)
    compare(tensors, random(4, 1, S), enable_gqa=True)


def parts(packed: Tensor) -> list[Tensor]:
    """Query, key and value (B, H, L, E), with gaps, of what one projection gives."""
    return [part.view(B, L, H, E).transpose(1, 2) for part in packed.chunk(3, dim=2)]


def test_packed_and_expanded() -> None:
    """Slices of one projection, a tensor without a stride, and one for all three."""
    packed = random(B, L, 3 * H * E)
    arranged = parts(packed)
    expanded = arranged[0], random(1, 1, 1, E).expand(B, H, S, E), random(B, 1, S, EV).expand(B, H, S, EV)
    for tensors in (arranged, expanded, [arranged[0]] * 3):
        torch.testing.assert_close(scaled_dot_product_attention(*tensors), pytorchs(*tensors))
    packed.requires_grad_()
    ours, theirs = (
        torch.autograd.grad(attention(*parts(packed)).square().sum(), packed)
        for attention in (scaled_dot_product_attention, pytorchs)
    )
    torch.testing.assert_close(ours, theirs)
    assert scaled_dot_product_attention(*arranged).is_contiguous()


@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
@pytest.mark.parametrize("kind", ["none", "keys", "full", "causal"])
def test_nothing(kind: str, empty: str) -> None:
    b, n, m = (0 if empty == name else size for name, size in {"batch": B, "queries": L, "keys": S}.items())
    leaves = [random(b, n, E).requires_grad_(), random(b, m, E).requires_grad_(), random(b, m, EV).requires_grad_()]
    mask = {"keys": torch.ones(1, m, dtype=torch.bool), "full": torch.ones(n, m, dtype=torch.bool)}.get(kind)
    y = scaled_dot_product_attention(*leaves, mask, is_causal=kind == "causal")
    assert torch.equal(y, torch.zeros(b, n, EV))
    for gradient in torch.autograd.grad(y.sum(), leaves, create_graph=True):
        assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["none", "keys", "full", "causal"])
@pytest.mark.parametrize("autocast", [False, True])
def test_logits_are_in_float32(kind: str, dtype: torch.dtype, autocast: bool) -> None:
    """Where they exceed 65504, and where bfloat16 could not tell two of them apart; also in derivatives."""
    query = torch.full((1, L, 2), 300.0)
    key = torch.tensor([[256.0, 0], [256, 1], [-300, 0]]).expand(1, 3, 2)
    options = {
        "none": {},
        "keys": {"attn_mask": torch.tensor([[True, True, True]])},
        "full": {"attn_mask": torch.ones(L, 3).tril(2) > 0},
        "causal": {"is_causal": True},
    }[kind]
    value = torch.tensor([[0.0], [1], [5]]).expand(1, 3, 1)
    exact = pytorchs(query.double(), key.double(), value.double(), scale=1 / 300, **options)
    given = [tensor if autocast else tensor.to(dtype) for tensor in (query, key, value)]
    with torch.autocast("cpu", dtype, enabled=autocast and dtype != torch.float32):
        results = derivatives(lambda *x: scaled_dot_product_attention(*x, scale=1 / 300, **options), given)
    assert results[0].dtype == dtype
    torch.testing.assert_close(results[0].double(), exact, rtol=0, atol=torch.finfo(dtype).eps)
    assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"dropout_p": 0.1}, ValueError, "expected dropout_p=0, got 0.1: dropped weights would have to be stored"),
        ({"dropout_p": -0.1}, ValueError, "expected dropout_p=0, got -0.1"),
        ({"dropout_p": float("nan")}, ValueError, "expected dropout_p=0, got nan"),
        ({"attn_mask": torch.ones(L, S), "is_causal": True}, ValueError, "expected attn_mask or is_causal, got both"),
        ({"attn_mask": torch.ones(L, S + 1)}, ValueError, "(2, 3, 7, 5), got (7, 6)"),
        ({"attn_mask": torch.ones(4, B, H, L, S)}, ValueError, "got (4, 2, 3, 7, 5)"),
        (
            {"attn_mask": torch.ones(L, S, dtype=torch.int64)},
            TypeError,
            "expected a boolean or floating-point attn_mask",
        ),
        ({"key": random(B, H, S, E + 1)}, ValueError, "got (2, 3, 7, 4), (2, 3, 5, 5) and (2, 3, 5, 6)"),
        (
            {"value": random(B, H, S + 1, EV)},
            ValueError,
            "expected query (…, L, E), key (…, S, E) and value (…, S, Ev)",
        ),
        ({"key": random(B, 2, S, E)}, ValueError, "got (2, 3, 7, 4), (2, 2, 5, 4) and (2, 3, 5, 6)"),
        ({"query": random(E)}, ValueError, "got (4,)"),
        ({"key": random(B, 2, S, E), "enable_gqa": True}, ValueError, "got (2, 2, 5, 4) for a query (2, 3, 7, 4)"),
        ({"key": random(B, H, S, E, dtype=torch.float32)}, TypeError, "got torch.float64, torch.float32"),
        ({"query": torch.ones(B, H, L, E, dtype=torch.int64)}, TypeError, "in one floating-point dtype"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else None,
)
def test_what_it_refuses(given: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = dict(zip(("query", "key", "value"), heads(), strict=True)) | given
    with pytest.raises(error, match=re.escape(message)):
        scaled_dot_product_attention(**arguments)


class Larger(TorchDispatchMode):
    """The entries of the largest result that is not a view of one tensor."""

    def __init__(self, of: Tensor | None) -> None:
        super().__init__()
        self.storage = None if of is None else of.untyped_storage().data_ptr()
        self.numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() != self.storage:
                self.numel = max(self.numel, leaf.numel())
        return results


KINDS = ("none", "keys", "keys added", "full", "added", "causal")


@pytest.mark.parametrize("mode", ["reverse", "torch.func"])
@pytest.mark.parametrize("_paths", ["without the matrix"], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_no_matrix_but_the_mask(kind: str, mode: str) -> None:
    """Forward, backward, and the backward of that, with the gradient of a mask of keys."""
    numel = largest(kind, mode, 60)
    assert numel < 60 * 60 / 10


@pytest.mark.parametrize("_paths", ["materialized"], indirect=True)
@pytest.mark.parametrize("mode", ["reverse", "torch.func"])
def test_the_matrix_is_seen(mode: str) -> None:
    assert largest("causal", mode, 60) >= 60 * 60


def largest(kind: str, mode: str, n: int) -> int:
    """The entries of the largest tensor that is not a view of the mask."""
    masks = {"keys": torch.rand(1, n) < 0.6, "full": torch.rand(n, n) < 0.6, "added": torch.randn(n, n)}
    mask = masks.get(kind)
    points = [random(n, 1) for _ in range(3)]
    if kind == "keys added":
        points.append(random(1, n))
    argnums = tuple(range(len(points)))

    def loss(query: Tensor, key: Tensor, value: Tensor, of_keys: Tensor | None = None) -> Tensor:
        attended = scaled_dot_product_attention(
            query, key, value, mask if of_keys is None else of_keys, is_causal=kind == "causal"
        )
        return attended.square().sum()

    with Larger(mask) as larger:
        if mode == "torch.func":
            torch.func.grad(lambda *x: sum(g.square().sum() for g in torch.func.grad(loss, argnums)(*x)), argnums)(
                *points
            )
        else:
            leaves = [point.requires_grad_() for point in points]
            gradients = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
            torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)
    return larger.numel
