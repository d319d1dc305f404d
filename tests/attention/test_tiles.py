"""Attention on the CPU in tiles, against the plain equation: borders of tiles, size of logits, PyTorch's contract."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from attention_paths import TILE, inputs
from numerics import plain
from torch_sagan.attention import second_derivative, tiles

tiled = tiles.tiled_attention


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


def tiled_and_exact(query: Tensor, key: Tensor, value: Tensor, gradient: Tensor) -> list[list[Tensor]]:
    """The result and the gradients in tiles and float32, and by the plain equation in float64."""
    results = []
    for attention, dtype in (tiled, torch.float32), (plain, torch.float64):
        tensors = [t.to(dtype).requires_grad_() for t in (query, key, value)]
        y = attention(*tensors)
        results.append([y, *torch.autograd.grad(y, tensors, gradient.to(dtype))])
    return results


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
    results = tiled_and_exact(query, key, value, gradient)
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


def test_operators_return_the_dtype_that_they_are_given() -> None:
    """As compiled programs expect it; in eager mode autograd would cast gradients that differ."""
    tensors = [tensor.detach() for tensor in inputs(dtype=torch.bfloat16)]
    y, *sums = tiles._tiled(*tensors, 1.0)
    assert [x.dtype for x in (y, *sums)] == [torch.bfloat16, torch.float32, torch.float32]
    gradients = tiles._tiled_backward(torch.ones_like(y), *tensors, 1.0, y, *sums)
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16] * 3


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


def test_not_a_number_is_not_hidden() -> None:
    query, key, value = (t.detach() for t in inputs(1, 2, 3, 4, 5))
    query[0, 0, 1] = float("nan")
    y = tiled(query, key, value)
    assert y[..., 1].isnan().all()
    assert y[..., [0, 2, 3]].isfinite().all()


@pytest.mark.exhaustive  # a compiler
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


@pytest.mark.exhaustive  # a compiler
# PyTorch's own check reads the gradients of intermediate tensors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_operators_keep_pytorchs_contract() -> None:
    """Schema, shapes without data, and autograd registration, as PyTorch itself checks them."""
    tensors = inputs(1, 2, 3, 9, 7, dtype=torch.float32)
    torch.library.opcheck(tiles._tiled, (*tensors, 0.5))
    y, *sums = tiles._tiled(*(t.detach() for t in tensors), 0.5)
    torch.library.opcheck(tiles._tiled_backward, (torch.randn_like(y), *(t.detach() for t in tensors), 0.5, y, *sums))
    gradients = [torch.randn_like(t) for t in tensors]
    torch.library.opcheck(second_derivative._with_derivative, (*gradients, torch.randn_like(y), *tensors, 0.5))


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # parts of torch that its profiler uses
def test_the_profiler_names_the_operators() -> None:
    tensors = inputs()
    with torch.profiler.profile() as profile:
        tiled(*tensors).sum().backward()
    # Not the operators themselves, which torch 2.15 no longer lists, but the functions that autograd makes of them.
    forward = "GeneratedBackwardFor_torch_sagan_tiled_attention_default"
    assert {forward, f"{forward}Backward"} <= {event.key for event in profile.key_averages()}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("largest", [60.0, 80.0, 200.0, 500.0])
def test_logits_around_the_largest_that_exp2_takes(largest: float) -> None:
    """exp2 overflows in float32 from 128 on, which is a logit of 89."""
    query, key, value = (t.detach() for t in inputs(2, 3, 4, 2 * TILE + 1, TILE + 1, dtype=torch.float32))
    query *= largest / (query.mT @ key).amax()
    gradient = torch.randn(2, 4, 2 * TILE + 1)
    results = tiled_and_exact(query, key, value, gradient)
    for mine, exact in zip(*results, strict=True):
        # float32 rounds such a logit by 3e-5, and so the weights; gradients are sums of some dozens.
        torch.testing.assert_close(mine.double(), exact, rtol=1e-3, atol=1e-3 * float(exact.detach().abs().max()))


def test_many_small_logits_are_not_taken_for_large_ones() -> None:
    """The maximum is subtracted where a logit may be large, which does not depend on the number of positions."""
    ones = torch.ones(1, 4, 4096)
    assert not tiles._may_overflow(ones, ones)
    ones[..., 7] = 9.0  # one column is enough: its logit is 324
    assert tiles._may_overflow(ones, ones)
