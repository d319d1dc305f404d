"""Attention without the attention matrix, against the plain equation: every path, border and derivative."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import emulated_kernels
from torch_sagan import SAGANDiscriminator, gradient_penalty
from torch_sagan.attention import cuda, equation, second_derivative, tiles
from torch_sagan.attention.layer import SelfAttention2d

TILE = 16  # in most tests, so that small maps straddle the borders of tiles


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return value @ torch.softmax(query.transpose(1, 2) @ key, dim=-1).transpose(1, 2)


def inputs(
    batch: int = 2,
    d: int = 3,
    e: int = 5,
    n: int = 40,
    m: int = 23,
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    shapes = [(batch, d, n), (batch, d, m), (batch, e, m)]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    tensors[0] *= scale
    return [t.to(dtype).requires_grad_() for t in tensors]


tiled = tiles.tiled_attention


fused = cuda.fused_attention  # on the CPU by the kernels of emulated_kernels

paths = pytest.mark.parametrize("attention", [tiled, fused], ids=["tiled", "fused"])


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_QUERIES", TILE)
    monkeypatch.setattr(tiles, "TILE_KEYS", TILE)
    monkeypatch.setattr(second_derivative, "BLOCK_QUERIES", 3)


@pytest.fixture
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


borders = st.sampled_from([1, 2, TILE - 1, TILE, TILE + 1, 2 * TILE, 2 * TILE + 1, 3 * TILE - 1])


@pytest.mark.usefixtures("small_tiles", "threads")
@pytest.mark.parametrize("threads", [1, 2, 6], indirect=True)
def test_equals_the_equation_across_tile_borders() -> None:
    @given(
        batch=st.integers(1, 5),
        d=st.integers(1, 4),
        e=st.integers(1, 6),
        n=borders,
        m=borders,
        scale=st.sampled_from([1e-3, 1.0, 30.0]),
    )
    def check(batch: int, d: int, e: int, n: int, m: int, scale: float) -> None:
        ours, theirs = (inputs(batch, d, e, n, m, scale=scale) for _ in range(2))
        for mine, other in zip(ours, theirs, strict=True):
            other.data.copy_(mine.data)
        gradient = torch.randn(batch, e, n, dtype=torch.float64)
        y, expected = tiled(*ours), plain(*theirs)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        y.backward(gradient)
        expected.backward(gradient)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-10 * max(1.0, scale))

    check()


@paths
def test_large_maps_with_the_real_tiles(attention: Callable[..., Tensor]) -> None:
    ours = inputs(3, 4, 7, tiles.TILE_QUERIES + 90, tiles.TILE_KEYS + 1)
    gradient = torch.randn(3, 7, tiles.TILE_QUERIES + 90, dtype=torch.float64)
    y = attention(*ours)
    torch.testing.assert_close(y, plain(*ours), rtol=1e-10, atol=1e-10)
    for mine, other in zip(
        torch.autograd.grad(y, ours, gradient), torch.autograd.grad(plain(*ours), ours, gradient), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


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


def test_every_tensor_is_kept_once_for_the_backward() -> None:
    """Query, key, value, the result, and one number for each query, padded to a multiple of 32."""
    b, d, e, n, m = 2, 8, 16, 64, 32
    tensors = inputs(b, d, e, n, m, dtype=torch.float32)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        fused(*tensors)
    assert sum(kept.values()) == 4 * b * (d * n + d * m + e * m + e * n + n)


@paths
def test_a_gradient_outside_autocast_is_that_inside(attention: Callable[..., Tensor]) -> None:
    tensors = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(*tensors)
        incoming = torch.randn(y.shape).to(y.dtype)
        inside = torch.autograd.grad(y, tensors, incoming, retain_graph=True)
    outside = torch.autograd.grad(y, tensors, incoming)
    for mine, other in zip(outside, inside, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_region_once(monkeypatch: pytest.MonkeyPatch, use_reentrant: bool) -> None:
    """Two passes in all, whatever the number of attention layers; the gradients are those without checkpointing."""
    emulated_kernels.emulate(monkeypatch)
    layers = torch.nn.Sequential(SelfAttention2d(8), torch.nn.Conv2d(8, 8, 1), SelfAttention2d.official(8))
    for layer in (layers[0], layers[2]):
        torch.nn.init.constant_(layer.gamma, 0.5)
    passes = []
    layers[1].register_forward_hook(lambda *_: passes.append(1))
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    leaves = [x, *layers.parameters()]
    expected = torch.autograd.grad(layers(x).square().sum(), leaves)
    passes.clear()
    checkpoint(layers, x, use_reentrant=use_reentrant).square().sum().backward()
    assert len(passes) == 2
    for leaf, other in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, other)


def test_the_documented_checkpointing_makes_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block of docs/ecosystem.md, through the branch of CUDA."""
    emulated_kernels.emulate(monkeypatch)
    passes = []
    forward = SAGANDiscriminator.forward
    monkeypatch.setattr(SAGANDiscriminator, "forward", lambda *a, **k: (passes.append(1), forward(*a, **k))[1])
    page = (Path(__file__).parents[2] / "docs" / "ecosystem.md").read_text(encoding="utf-8")
    (block,) = (part for part in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "iteration_stopped" in part)
    names: dict[str, Any] = {"torch": torch}
    exec(block, names)
    assert len(passes) == 2
    for name, parameter in names["discriminator"].named_parameters():
        assert parameter.grad is not None, name


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
    assert largest[tiled] == second_derivative.BLOCK_QUERIES * n


def test_blocks_of_the_second_derivative_are_as_large_as_memory_allows() -> None:
    """Away from the CPU: eight blocks for one map of 128×128, where blocks of the CPU's size would be 256."""
    with torch.device("meta"):
        tensors = [torch.empty(1, c, 128 * 128, requires_grad=True) for c in (4, 4, 32)]
        with LargestTensor() as seen:
            gradients = torch.autograd.grad(equation.attention(*tensors).sum(), tensors, create_graph=True)
            sum(g.square().sum() for g in gradients).backward(inputs=tensors)
    assert seen.numel == second_derivative.BLOCK_ENTRIES
    assert seen.operations["_softmax"] == 128**4 / second_derivative.BLOCK_ENTRIES


@paths
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("scale", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_do_not_overflow(attention: Callable[..., Tensor], scale: float, dtype: torch.dtype) -> None:
    query = torch.tensor([[[1.0, -1.0, 0.0] * TILE]], dtype=dtype)  # (1, 1, N)
    key = scale * torch.linspace(-1, 1, 2 * TILE + 3, dtype=dtype).view(1, 1, -1)
    value = torch.randn(1, 4, 2 * TILE + 3, dtype=dtype)
    tensors = [t.requires_grad_() for t in (query, key, value)]
    y = attention(*tensors)
    # The weights are one-hot at the largest key, one-hot at the smallest, and uniform.
    largest, smallest = (value[..., -1], value[..., 0]) if scale > 0 else (value[..., 0], value[..., -1])
    expected = torch.stack([largest, smallest, value.mean(-1)] * TILE, dim=-1)
    torch.testing.assert_close(y, expected)
    gradients = torch.autograd.grad(y.sum(), tensors)
    others = torch.autograd.grad(plain(*tensors).sum(), tensors)
    for mine, other in zip(gradients, others, strict=True):
        assert mine.isfinite().all()
        # A logit of 1e4 is itself rounded to 1e-3 in float32; the rest is the dtype's own rounding.
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=float(other.abs().max()) * 1e-3 + 1e-3)


@pytest.mark.usefixtures("small_tiles")
def test_rows_of_very_different_logits_keep_their_precision() -> None:
    """One row near zero, one far below: a shift for both at once would lose one of them."""
    query, key, value = inputs(1, 1, 3, 2 * TILE, 2 * TILE, dtype=torch.float32)
    with torch.no_grad():
        query[..., ::2] *= 1e4
        key.sub_(3)  # all logits of one sign
    doubles = [t.detach().double() for t in (query, key, value)]
    # float32 rounds a logit of 1e4 by about 1e-3, and so the weights
    torch.testing.assert_close(tiled(query, key, value), plain(*doubles).float(), rtol=0, atol=2e-2)
    torch.testing.assert_close(
        tiled(query, key, value)[..., 1::2],
        plain(*doubles).float()[..., 1::2],
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("offset", [2.0**21, -(2.0**21), 2.0**23])
def test_logits_with_a_huge_offset_in_common(offset: float) -> None:
    """float32 holds each logit exactly: a multiple of 1/4 near 2**21, or an integer near 2**23. Their differences are
    small, so that the softmax is not a choice of one key."""
    step = 0.5 if abs(offset) < 2**22 else 1.0
    query, key, value = (t.detach() for t in inputs(2, 3, 4, 2 * TILE + 3, 3 * TILE - 1, dtype=torch.float32))
    query, key = (step * (t / step).round().clamp(-4, 4) for t in (query, key))
    query[:, 0], key[:, 0] = 1.0, offset
    gradient = torch.randn(2, 4, 2 * TILE + 3)
    results = []
    for attention, dtype in (tiled, torch.float32), (plain, torch.float64):
        tensors = [t.to(dtype).requires_grad_() for t in (query, key, value)]
        y = attention(*tensors)
        results.append([y, *torch.autograd.grad(y, tensors, gradient.to(dtype))])
    # float32's rounding (6e-8) of sums of some dozens; the gradient of the query is a sum over keys as large as these.
    scales = [1.0, abs(offset), 1.0, 1.0]
    for mine, exact, scale in zip(*results, scales, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5 * scale)
    torch.testing.assert_close(results[0][1][:, 1:].double(), results[1][1][:, 1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("largest", [2e6, 1e7, 1e9, 1e12])
@pytest.mark.parametrize("channels", [4, 385])  # matrix products sum 384 at a time
def test_a_choice_of_one_key_at_huge_logits(channels: int, largest: float) -> None:
    query, key, value = (t.detach() for t in inputs(2, channels, 6, 600, 530, dtype=torch.float32))
    query *= largest / (query.mT @ key).abs().max()
    # Rows whose two largest logits are nearer than float32 rounds logits have no answer in float32.
    first, second = (query.mT.double() @ key.double()).topk(2, dim=2).values.unbind(2)
    decided = (first - second > 1e-6 * largest + 30).unsqueeze(1)  # (B, 1, N)
    assert decided.float().mean() > 0.9
    gradient = torch.randn(2, 6, 600) * decided
    results = []
    for attention, dtype in (tiled, torch.float32), (plain, torch.float64):
        tensors = [t.to(dtype).requires_grad_() for t in (query, key, value)]
        y = attention(*tensors)
        results.append([y * decided, *torch.autograd.grad(y, tensors, gradient.to(dtype))])
    (y, d_query, d_key, d_value), (y_exact, _, _, d_value_exact) = results
    # One weight is 1, others are 0: values are copied, and gradients of values are sums of some dozens.
    torch.testing.assert_close(y.double(), y_exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d_value.double(), d_value_exact, rtol=1e-5, atol=1e-5)
    # The gradients of query and key vanish, but for float32's rounding (6e-8) of sums of some dozens.
    assert d_query.abs().max() < 1e-5 * key.abs().max()
    assert d_key.abs().max() < 1e-5 * query.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.usefixtures("small_tiles")
def test_precision_of_each_dtype(dtype: torch.dtype, tolerance: float) -> None:
    """The tolerance is a few roundings of the dtype, for values of order one: the inside runs in float32."""
    tensors = inputs(dtype=dtype)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    y, expected = tiled(*tensors), plain(*doubles)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    gradient = torch.randn_like(expected)
    for mine, other in zip(
        torch.autograd.grad(y, tensors, gradient.to(dtype)),
        torch.autograd.grad(expected, doubles, gradient),
        strict=True,
    ):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@pytest.mark.usefixtures("small_tiles")
def test_autocast_does_not_reach_inside() -> None:
    tensors = inputs(dtype=torch.float32)
    outside = tiled(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        inside = tiled(*tensors)
        gradients = torch.autograd.grad(inside.sum(), tensors)
    assert torch.equal(inside, outside)
    for mine, other in zip(gradients, torch.autograd.grad(outside.sum(), tensors), strict=True):
        assert torch.equal(mine, other)


def packed(tensors: list[Tensor], gap: int) -> list[Tensor]:
    """The same values as slices of one channels-last map, such as one convolution gives, from `gap` on."""
    widths = [tensor.shape[1] for tensor in tensors]
    whole = tensors[0].new_full((len(tensors[0]), tensors[0].shape[2], gap + sum(widths)), 9.0)
    slices = whole[..., gap:].split(widths, dim=2)
    for part, tensor in zip(slices, tensors, strict=True):
        part.copy_(tensor.mT)
    return [part.mT for part in slices]


def stacked(tensors: list[Tensor]) -> list[Tensor]:
    """The same values in one storage, each contiguous."""
    return [part.mT for part in torch.stack([tensor.mT for tensor in tensors])]


@paths
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "arrange",
    [
        lambda tensors: [t.mT.contiguous().mT for t in tensors],
        lambda tensors: [torch.cat([t, torch.full_like(t, 9.0)], dim=2)[..., : t.shape[2]] for t in tensors],
        lambda tensors: [torch.cat([t[..., :1], t], dim=2)[..., 1:] for t in tensors],
        lambda tensors: [torch.cat([t.new_zeros(1), t.mT.flatten()])[1:].view_as(t.mT).mT for t in tensors],
        lambda tensors: packed(tensors, 0),
        lambda tensors: packed(tensors, 1),
        lambda tensors: packed(tensors, 4),
        stacked,
    ],
    ids=["rows", "sliced", "shifted", "offset", "packed", "packed by 1", "packed by 4", "stacked"],
)
@pytest.mark.parametrize("channels", [3, 8])
def test_memory_formats_and_strides_make_no_difference(
    attention: Callable[..., Tensor], arrange: Callable[[list[Tensor]], list[Tensor]], channels: int, dtype: torch.dtype
) -> None:
    """The result, the gradients, and that no two gradients share their memory."""
    tensors = inputs(2, channels, channels, 21, 21, dtype=dtype)
    leaves = [t.detach().requires_grad_() for t in arrange([t.detach() for t in tensors])]
    for leaf, tensor in zip(leaves, tensors, strict=True):
        assert torch.equal(leaf, tensor)
    y, expected = attention(*leaves), attention(*tensors)
    gradient = torch.randn_like(expected)
    # Sums of some dozens in another order.
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(y, expected, **tolerance)
    actual = torch.autograd.grad(y, leaves, gradient)
    for mine, other in zip(actual, torch.autograd.grad(expected, tensors, gradient), strict=True):
        torch.testing.assert_close(mine, other, **tolerance)
    assert len({g.untyped_storage().data_ptr() for g in actual}) == 3


def test_aligned_rows_are_read_in_place() -> None:
    """Channels-last query, key and value, slices of the result of one convolution, are not copied for the forward."""
    for part in packed([torch.randn(2, c, 9) for c in (8, 8, 64)], 0):
        rows = cuda._rows(part)
        assert (rows.data_ptr(), rows.shape, rows.stride(2)) == (part.data_ptr(), (2, 1, 9, part.shape[1]), 80)


@pytest.mark.parametrize(
    ("precision", "dtype", "n", "plain_equation"),
    [
        ("high", torch.float32, 8192, True),
        ("high", torch.float32, 8193, False),  # one entry more than 2**26 in the batch of one
        ("highest", torch.float32, 16, False),
        ("high", torch.float64, 16, True),
    ],
)
def test_the_plain_equation_where_it_is_faster_on_cuda(
    precision: str, dtype: torch.dtype, n: int, plain_equation: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With TF32, small matrices; without a kernel, all. On fake tensors, which have CUDA's device and no values."""
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    with FakeTensorMode():
        tensors = [torch.empty(1, c, n, device="cuda", dtype=dtype) for c in (8, 8, 64)]
        assert equation._should_materialize(*tensors) == plain_equation


@paths
def test_one_tensor_for_query_key_and_value(attention: Callable[..., Tensor]) -> None:
    x = torch.randn(2, 9, 8, dtype=torch.float64).mT.requires_grad_()
    y, expected = attention(x, x, x), plain(x, x, x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), x)[0], torch.autograd.grad(expected.square().sum(), x)[0]
    )


def test_the_cuda_branch_takes_the_dtype_of_autocast() -> None:
    """As PyTorch's own attention does; also where only some of the tensors are in it."""
    query, key, value = inputs(2, 8, 8, 9, 9, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = fused(query, key.bfloat16(), value)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y.float().square().sum(), (query, key, value))
    assert [g.dtype for g in gradients] == [torch.float32] * 3


def test_not_a_number_is_not_hidden() -> None:
    query, key, value = (t.detach() for t in inputs(1, 2, 3, 4, 5))
    query[0, 0, 1] = float("nan")
    y = tiled(query, key, value)
    assert y[..., 1].isnan().all()
    assert y[..., [0, 2, 3]].isfinite().all()


def test_a_large_attention_matrix_is_not_materialized(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small one is materialised, and so is one that is returned. This tests the choice, not the arithmetic."""
    taken = []
    monkeypatch.setitem(equation.KERNELS, "cpu", lambda *tensors: (taken.append(1), tiled(*tensors))[1])
    layer = SelfAttention2d(8)
    side = int(equation.SMALL_MATRIX["cpu"] ** 0.25) + 1
    x = torch.randn(1, 8, side, side)
    large = layer(x)
    assert len(taken) == 1
    with_map, _ = layer(x, return_attention=True)
    layer(x[:, :, : side - 2, : side - 2])
    assert len(taken) == 1
    torch.testing.assert_close(large, with_map)


# The compiler's own modules use parts of torch that torch has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_compiled_without_a_graph_break() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(tiled, fullgraph=True)
    tensors = inputs(dtype=torch.float32)
    y, expected = compiled(*tensors), tiled(*tensors)
    torch.testing.assert_close(y, expected)
    for mine, other in zip(
        torch.autograd.grad(y.square().sum(), tensors),
        torch.autograd.grad(expected.square().sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


def test_an_export_holds_plain_operators() -> None:
    layer = SelfAttention2d(8).eval()
    side = int(equation.SMALL_MATRIX["cpu"] ** 0.25) + 1
    x = torch.randn(1, 8, side, side)
    with torch.no_grad():
        layer.gamma.fill_(0.5)
    program = torch.export.export(layer, (x,))
    names = {str(node.target) for node in program.graph.nodes}
    assert not any("torch_sagan" in name for name in names)
    assert any("softmax" in name for name in names)
    torch.testing.assert_close(program.module()(x), layer(x))


# PyTorch's own check reads the gradients of intermediate tensors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_operators_keep_pytorchs_contract() -> None:
    """Schema, shapes without data, and autograd registration, as PyTorch itself checks them."""
    tensors = inputs(1, 2, 3, 9, 7, dtype=torch.float32)
    torch.library.opcheck(tiles._tiled, tuple(tensors))
    y, *sums = tiles._tiled(*(t.detach() for t in tensors))
    torch.library.opcheck(tiles._tiled_backward, (torch.randn_like(y), *(t.detach() for t in tensors), y, *sums))
    gradients = [torch.randn_like(t) for t in tensors]
    torch.library.opcheck(second_derivative._with_derivative, (*gradients, torch.randn_like(y), *tensors))


def test_flops_of_tiled_attention() -> None:
    """Two for each multiplication with its addition, in the matrix products: two forward, five backward."""
    b, d, e, n, m = 2, 3, 5, 40, 23
    tensors = inputs(b, d, e, n, m)
    with FlopCounterMode(display=False) as forward:
        y = tiled(*tensors)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(y.sum(), tensors)
    assert forward.get_total_flops() == 2 * b * n * m * (d + e)
    assert backward.get_total_flops() == 2 * b * n * m * (3 * d + 2 * e)


def test_flops_of_a_network_are_proportional_to_the_batch() -> None:
    """The attention matrix of one sample is materialised, those of a batch are not."""
    side = 20
    assert side**4 < equation.SMALL_MATRIX["cpu"] < 8 * side**4
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), SelfAttention2d.official(8), SelfAttention2d(8))
    counts = []
    for batch in (1, 8, 16):
        with FlopCounterMode(display=False) as counter:
            network(torch.randn(batch, 3, side, side))
        counts.append(counter.get_total_flops() / batch)
    assert counts[0] > 0
    assert counts == [counts[0]] * 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # parts of torch that its profiler uses
def test_the_profiler_names_the_operators() -> None:
    tensors = inputs()
    with torch.profiler.profile() as profile:
        tiled(*tensors).sum().backward()
    # Not the operators themselves, which torch 2.15 no longer lists, but the functions that autograd makes of them.
    forward = "GeneratedBackwardFor_torch_sagan_tiled_attention_default"
    assert {forward, f"{forward}Backward"} <= {event.key for event in profile.key_averages()}


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
