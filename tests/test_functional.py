"""``torch_sagan.functional``: attention against nested loops and closed forms."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from references import attention_by_loops
from torch_sagan import functional
from torch_sagan.attention import equation

pytestmark = pytest.mark.usefixtures("kernels")  # the branch of the CPU and that of CUDA

one_kernel = pytest.mark.parametrize("kernels", ["cpu"], indirect=True)  # it is not reached

SIZES = st.integers(1, 6)


def draw(batch: int, qk: int, values: int, queries: int, keys: int, requires_grad: bool = False) -> list[Tensor]:
    """A query (B, D, N), a key (B, D, M) and a value (B, E, M)."""
    shapes = [(batch, qk, queries), (batch, qk, keys), (batch, values, keys)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=requires_grad) for shape in shapes]


# --- attention -----------------------------------------------------------------------------------------------------


@given(batch=st.integers(1, 3), qk=SIZES, values=SIZES, queries=st.integers(1, 9), keys=st.integers(1, 9))
def test_attention_is_the_equation(batch: int, qk: int, values: int, queries: int, keys: int) -> None:
    query, key, value = draw(batch, qk, values, queries, keys)
    out, weights = attention_by_loops(query, key, value)
    torch.testing.assert_close(functional.attention(query, key, value), out, rtol=0, atol=1e-12)
    torch.testing.assert_close(functional.attention_map(query, key), weights, rtol=0, atol=1e-12)


def test_closed_form() -> None:
    """Logits 0 and log 3 give weights 1/4 and 3/4: nothing divides by the root of the channel count."""
    query = torch.full((1, 4, 1), 0.5, dtype=torch.float64)
    key = torch.stack([torch.zeros(4), torch.full((4,), 0.5 * math.log(3))], dim=1).double()[None]
    value = torch.tensor([[[8.0, 16.0]]], dtype=torch.float64)
    torch.testing.assert_close(functional.attention_map(query, key), torch.tensor([[[0.25, 0.75]]]).double())
    torch.testing.assert_close(functional.attention(query, key, value), torch.tensor([[[14.0]]]).double())


def test_softmax_runs_over_the_keys() -> None:
    query, key, _ = draw(2, 3, 1, 4, 4)
    weights = functional.attention_map(query, key)
    torch.testing.assert_close(weights.sum(dim=2), torch.ones(2, 4, dtype=torch.float64))
    assert (weights.sum(dim=1) - 1).abs().max() > 0.05  # square, so only the sums tell the two axes apart


def test_order_of_positions() -> None:
    """Queries carry their outputs along; keys with their values may stand in any order."""
    query, key, value = draw(2, 3, 5, 7, 6)
    out = functional.attention(query, key, value)
    rows, columns = torch.randperm(7), torch.randperm(6)
    torch.testing.assert_close(functional.attention(query[..., rows], key, value), out[..., rows])
    torch.testing.assert_close(functional.attention(query, key[..., columns], value[..., columns]), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_extreme_logits_are_finite(dtype: torch.dtype) -> None:
    """Logits of ±1e4 are a choice of one key, not an overflow."""
    query = torch.tensor([[[100.0, -100.0]]], dtype=dtype)
    key = torch.tensor([[[-100.0, 0.0, 100.0]]], dtype=dtype)
    value = torch.tensor([[[1.0, 2.0, 3.0]]], dtype=dtype)
    assert functional.attention(query, key, value).tolist() == [[[3.0, 1.0]]]
    assert functional.attention_map(query, key).tolist() == [[[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_the_dtype(dtype: torch.dtype) -> None:
    query, key, value = (t.to(dtype) for t in draw(2, 4, 8, 9, 5))
    out, weights = attention_by_loops(query, key, value)
    tolerance = 4 * torch.finfo(dtype).eps * float(value.abs().max())
    for actual, expected in [
        (functional.attention(query, key, value), out),
        (functional.attention_map(query, key), weights),
    ]:
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance)


@pytest.fixture(params=["plain", "kernel", "autocast", "transformed", "compiled", "meta"])
def attention_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Tensor]]:
    """Attention on each of the paths that an input can take on the CPU, and on the meta device."""
    small = 0 if request.param in ("kernel", "compiled") else 2**40
    monkeypatch.setitem(equation.SMALL_MATRIX, "cpu", small)
    if request.param == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            yield functional.attention
    elif request.param == "transformed":
        yield lambda *tensors: torch.func.vjp(functional.attention, *tensors)[0]
    elif request.param == "meta":
        yield lambda *tensors: functional.attention(*(tensor.to("meta") for tensor in tensors))
    else:
        compiled = torch.compile(functional.attention, backend="eager")
        yield compiled if request.param == "compiled" else functional.attention


@one_kernel
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of the compiler's own modules
@pytest.mark.parametrize(
    "shapes",
    [
        [(2, 3, 4), (2, 3, 5), (2, 6, 7)],  # a value longer than the key
        [(2, 3, 4), (2, 3, 7), (2, 6, 5)],
        [(1, 3, 4), (2, 3, 5), (2, 6, 5)],
        [(2, 3, 4), (1, 3, 5), (2, 6, 5)],
        [(2, 3, 4), (2, 3, 5), (1, 6, 5)],
        [(2, 3, 4), (2, 1, 5), (2, 6, 5)],
        [(3, 4), (3, 5), (6, 5)],
        [(1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 6, 5)],
    ],
    ids=str,
)
def test_shapes_that_do_not_fit(attention_path: Callable[..., Tensor], shapes: list[tuple[int, ...]]) -> None:
    message = (
        f"expected query (B, D, N), key (B, D, M) and value (B, E, M), got {shapes[0]}, {shapes[1]} and {shapes[2]}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as raised:
        attention_path(*(torch.randn(shape) for shape in shapes))
    assert raised.type is ValueError


@one_kernel
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.int64, torch.int64, torch.int64),
        (torch.float32, torch.float32, torch.int64),
        (torch.float32, torch.float32, torch.float64),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
    ids=str,
)
def test_dtypes_that_do_not_fit(
    attention_path: Callable[..., Tensor], dtypes: tuple[torch.dtype, ...], request: pytest.FixtureRequest
) -> None:
    tensors = [torch.ones(shape, dtype=dtype) for shape, dtype in zip([(2, 3, 4)] * 3, dtypes, strict=True)]
    if "autocast" in request.node.name and not {torch.int64, torch.float64} & set(dtypes):
        assert attention_path(*tensors).dtype == torch.bfloat16  # which it casts to
        return
    if "transformed" in request.node.name and torch.int64 in dtypes:
        pytest.skip("torch refuses to differentiate integers")
    message = f"expected query, key and value in one floating-point dtype, got {dtypes[0]}, {dtypes[1]} and {dtypes[2]}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        attention_path(*tensors)


@pytest.mark.parametrize("values", [3, 2], ids=["value sizes differ", "one size for all"])
def test_derivatives(values: int) -> None:
    """One size for all is where torch may take a fused kernel, which has no second derivative of its own."""
    inputs = draw(1, 2, values, 3, 4, requires_grad=True)
    torch.autograd.gradcheck(functional.attention, inputs)
    torch.autograd.gradgradcheck(functional.attention, inputs)
    torch.autograd.gradcheck(functional.attention_map, inputs[:2])
    torch.autograd.gradgradcheck(functional.attention_map, inputs[:2])


def test_double_backward_in_float32() -> None:
    inputs = [t.detach().float().requires_grad_() for t in draw(2, 8, 8, 16, 16)]
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    seconds = []
    for query, key, value in (inputs, doubles):
        (grad,) = torch.autograd.grad(functional.attention(query, key, value).square().sum(), query, create_graph=True)
        seconds.append(torch.autograd.grad(grad.square().sum(), (query, key, value)))
    for single, double in zip(*seconds, strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-3 * float(double.abs().max()))
