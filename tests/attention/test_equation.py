"""Every path of attention against the plain equation, and which one is taken."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from attention_paths import TILE, inputs, packed, paths, stacked
from numerics import plain
from torch_sagan.attention import cuda, equation, tiles
from torch_sagan.attention.layer import SelfAttention2d


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


@paths
def test_one_tensor_for_query_key_and_value(attention: Callable[..., Tensor]) -> None:
    x = torch.randn(2, 9, 8, dtype=torch.float64).mT.requires_grad_()
    y, expected = attention(x, x, x), plain(x, x, x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), x)[0], torch.autograd.grad(expected.square().sum(), x)[0]
    )


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
        assert (equation.kernel_for(*tensors) is None) == plain_equation


each_path = pytest.mark.parametrize("path", ["plain", "tiled", "fused"])


def take(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `equation.attention` take this path on the CPU."""
    monkeypatch.setitem(equation.SMALL_MATRIX, "cpu", 2**40 if path == "plain" else 0)
    monkeypatch.setitem(equation.KERNELS, "cpu", cuda.fused_attention if path == "fused" else tiles.tiled_attention)


@each_path
def test_autocast(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is cast to its dtype, as by PyTorch's own attention; also where only some of the tensors are in it."""
    take(path, monkeypatch)
    query, key, value = inputs(2, 8, 8, 9, 9, dtype=torch.float32)
    low = [tensor.detach().bfloat16() for tensor in (query, key, value)]
    with torch.autocast("cpu", torch.bfloat16):
        y = equation.attention(query, key.bfloat16(), value)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, equation.attention(*low))
    gradients = torch.autograd.grad(y.float().square().sum(), (query, key, value))
    assert [g.dtype for g in gradients] == [torch.float32] * 3


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_path
def test_logits_are_in_float32(path: str, dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits beyond 65504 are finite, and those of 256 and 257, which bfloat16 cannot tell apart, are two."""
    take(path, monkeypatch)
    query = torch.tensor([[[1.0, 300.0], [1.0, 300.0]]], dtype=dtype)  # (1, 2, N)
    key = torch.tensor([[[256.0, 256.0, -300.0], [0.0, 1.0, 0.0]]], dtype=dtype)  # logits 256, 257, -300; 300 times
    value = torch.tensor([[[0.0, 1.0, 5.0]]], dtype=dtype)
    share = 1 / (1 + math.exp(-1))
    with torch.autocast("cpu", dtype, enabled=autocast):
        results = equation.attention(query, key, value), *equation.attention_and_map(query, key, value)
        results += (equation.attention_map(query, key),)
    weights = [[[1 - share, share, 0.0], [0.0, 1.0, 0.0]]]
    for result, expected in zip(results, ([[[share, 1.0]]], [[[share, 1.0]]], weights, weights), strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(
            result.double(), torch.tensor(expected).double(), rtol=0, atol=torch.finfo(dtype).eps
        )


@pytest.mark.parametrize("autocast", [False, True])
def test_squared_distances_leave_the_range_of_float16(autocast: bool) -> None:
    features = torch.tensor([[[300.0, 300.5, -300.0]]], dtype=torch.float16)  # squares of 90000
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        query, key = equation.l2_as_dot_product(features, features)
    distances = (features.double().mT - features.double()).square()
    torch.testing.assert_close(
        equation.attention_map(query, key).double(), torch.softmax(-distances, 2), rtol=0, atol=1e-2
    )


@each_path
@pytest.mark.parametrize("batch", [1, 4])  # fewer than threads, or more
def test_the_result_may_be_changed_in_place(path: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no view of several results, with autograd and without."""
    take(path, monkeypatch)
    tensors = inputs(batch, 2, 3, 6, 5, dtype=torch.float32)
    expected = torch.relu(plain(*tensors) + 1)
    for autograd in (True, False):
        with torch.set_grad_enabled(autograd):
            y = equation.attention(*tensors)
            assert y.requires_grad == autograd
            y += 1
            torch.testing.assert_close(y.relu_(), expected)


@pytest.mark.parametrize("path", ["tiled", "fused"])
def test_a_result_that_the_backward_needs_is_not_changed_unnoticed(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with PyTorch's kernels, that is an error, not a wrong gradient; and a clone may be changed."""
    take(path, monkeypatch)
    tensors = inputs(2, 2, 3, 6, 5, dtype=torch.float32)
    expected = torch.autograd.grad((2 * plain(*tensors)).sin().sum(), tensors)
    torch.testing.assert_close(
        torch.autograd.grad(equation.attention(*tensors).clone().mul_(2).sin().sum(), tensors), expected
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        equation.attention(*tensors).mul_(2).sin().sum().backward()


def test_a_large_attention_matrix_is_not_materialized(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small one is materialized, and so is one that is returned. This tests the choice, not the arithmetic."""
    taken = []
    monkeypatch.setitem(equation.KERNELS, "cpu", lambda *tensors: (taken.append(1), tiles.tiled_attention(*tensors))[1])
    layer = SelfAttention2d(8)
    side = int(equation.SMALL_MATRIX["cpu"] ** 0.25) + 1
    x = torch.randn(1, 8, side, side)
    large = layer(x)
    assert len(taken) == 1
    with_map, _ = layer(x, return_attention=True)
    layer(x[:, :, : side - 2, : side - 2])
    assert len(taken) == 1
    torch.testing.assert_close(large, with_map)


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


def test_flops_of_a_network_are_proportional_to_the_batch() -> None:
    """The attention matrix of one sample is materialized, those of a batch are not."""
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
