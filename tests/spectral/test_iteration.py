"""The power iteration against NumPy, and the derivatives of the division by sigma against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from normalized_layers import LAYERS, batched, inputs, layers, make, original
from references import as_matrix, largest_singular_value, power_iteration_by_numpy, spectral_gradient
from torch_sagan import SpectralNorm, functional, spectral_norm


def unit(size: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(size, dtype=torch.float64), dim=0)


# --- power iteration -------------------------------------------------------------------------------------------------


@given(rows=st.integers(1, 8), columns=st.integers(1, 8), n_iterations=st.integers(1, 4))
def test_power_iteration_is_the_equation(rows: int, columns: int, n_iterations: int) -> None:
    matrix, u, v = torch.randn(rows, columns, dtype=torch.float64), unit(rows), unit(columns)
    actual = functional.power_iteration(matrix, u, v, n_iterations=n_iterations)
    expected = power_iteration_by_numpy(matrix, u, v, n_iterations)
    for vector, oracle in zip(actual[:2], expected, strict=True):
        torch.testing.assert_close(vector, oracle, rtol=0, atol=1e-9)
    assert float(actual[2]) == pytest.approx(float(expected[0] @ matrix @ expected[1]), abs=1e-9)


def test_no_iteration_is_an_estimate() -> None:
    matrix, u, v = torch.randn(5, 3, dtype=torch.float64), unit(5), unit(3)
    same_u, same_v, sigma = functional.power_iteration(matrix, u, v, n_iterations=0)
    assert torch.equal(same_u, u)
    assert torch.equal(same_v, v)
    assert float(sigma) == pytest.approx(float(u @ matrix @ v), abs=1e-12)


def test_power_iteration_starts_from_u() -> None:
    """v = normalize(Wᵀu) comes first, so the v that is passed in does not matter unless Wᵀu vanishes."""
    matrix, u = torch.randn(5, 3, dtype=torch.float64), unit(5)
    first = functional.power_iteration(matrix, u, unit(3))
    second = functional.power_iteration(matrix, u, unit(3))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    torch.testing.assert_close(first[1], torch.nn.functional.normalize(matrix.T @ u, dim=0))


def test_power_iteration_finds_sigma() -> None:
    matrix = torch.randn(12, 30, dtype=torch.float64)
    u, v, sigma = functional.power_iteration(matrix, unit(12), unit(30), n_iterations=500)
    assert float(u @ matrix @ v) == pytest.approx(float(sigma), rel=1e-12)
    assert float(sigma) == pytest.approx(largest_singular_value(matrix), rel=1e-9)


def test_power_iteration_makes_fresh_tensors() -> None:
    """In place, the second of two forward passes would spoil the first one's backward."""
    matrix, u, v = torch.randn(4, 6), torch.randn(4), torch.randn(6)
    before = [t.clone() for t in (matrix, u, v)]
    new_u, new_v, _ = functional.power_iteration(matrix, u, v)
    for tensor, old in zip((matrix, u, v), before, strict=True):
        assert torch.equal(tensor, old)
    assert {new_u.data_ptr(), new_v.data_ptr()}.isdisjoint({u.data_ptr(), v.data_ptr()})
    assert not torch.equal(new_u, u)
    assert not torch.equal(new_v, v)


@pytest.mark.parametrize("scale", [0.0, 1e-20])
def test_power_iteration_keeps_u_and_v_where_there_is_no_direction(scale: float) -> None:
    u, v = unit(3), unit(4)
    new_u, new_v, _ = functional.power_iteration(torch.full((3, 4), scale).double(), u, v, n_iterations=3)
    assert torch.equal(new_u, u)
    assert torch.equal(new_v, v)


def test_power_iteration_leaves_the_null_space() -> None:
    """Wᵀu = 0 with W ≠ 0: the old v is kept, and recovers."""
    matrix = torch.tensor([[3.0, 0.0], [0.0, 0.0]]).double()
    u = torch.tensor([0.0, 1.0]).double()
    v = torch.tensor([0.6, 0.8]).double()
    new_u, new_v, _ = functional.power_iteration(matrix, u, v)
    assert torch.equal(new_v, v)
    torch.testing.assert_close(new_u, torch.tensor([1.0, 0.0]).double())
    new_u, new_v, _ = functional.power_iteration(matrix, new_u, new_v)
    assert float(new_u @ matrix @ new_v) == pytest.approx(3.0)


def test_eps_is_the_smallest_norm_that_counts() -> None:
    matrix, u, v = torch.full((3, 4), 0.01).double(), unit(3).abs(), unit(4).abs()
    kept = functional.power_iteration(matrix, u, v, eps=0.1)
    assert torch.equal(kept[0], u)
    assert torch.equal(kept[1], v)
    moved = functional.power_iteration(matrix, u, v, eps=1e-6)
    torch.testing.assert_close(moved[1], torch.full((4,), 0.5).double())


# --- numbers at the ends of the range ---------------------------------------------------------------------------------

SCALES = [(torch.float32, scale) for scale in (1e-42, 1e-30, 1e30, 1e37)]
SCALES += [(torch.float64, scale) for scale in (1e-310, 1e-200, 1e200, 1e306)]


@pytest.mark.parametrize(("dtype", "scale"), SCALES, ids=str)
def test_weights_whose_squares_leave_the_range(dtype: torch.dtype, scale: float) -> None:
    """Every weight whose sigma is a number of its dtype, subnormal ones too, iterates as one of the size of 1."""
    matrix = torch.randn(6, 8, dtype=torch.float64)
    u, v = unit(6), unit(8)
    expected = functional.power_iteration(matrix, u, v, n_iterations=3)
    weight = (scale * matrix).to(dtype)
    actual = functional.power_iteration(weight, u.to(dtype), v.to(dtype), n_iterations=3, eps=0)
    # Subnormal numbers have few digits: 1e-42 is 714 times the least float32, 1e-310 2e13 times the least float64.
    rounding = max(64 * torch.finfo(dtype).eps, 4 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / scale)
    for vector, oracle in zip(actual[:2], expected[:2], strict=True):
        torch.testing.assert_close(vector.double(), oracle, rtol=0, atol=rounding)
    assert float(actual[2]) / scale == pytest.approx(float(expected[2]), rel=rounding)
    normalized = functional.spectral_normalize(weight, *actual, eps=0)
    torch.testing.assert_close(normalized.double(), matrix / expected[2], rtol=rounding, atol=4 * rounding)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_gradients_of_weights_whose_squares_leave_the_range(scale: float) -> None:
    """In float32 they are those of float64."""
    weight, incoming = scale * torch.randn(6, 8), torch.randn(6, 8)
    u, v, sigma = functional.power_iteration(weight, unit(6).float(), unit(8).float(), eps=0)
    leaf = weight.requires_grad_()
    functional.spectral_normalize(leaf, u, v, sigma, eps=0).backward(incoming)
    expected = spectral_gradient(incoming.double(), weight.double(), u.double(), v.double())
    torch.testing.assert_close(leaf.grad.double() * scale, expected * scale, rtol=1e-5, atol=1e-5)  # of float32


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("transformed", [False, True])
def test_a_weight_that_is_not_finite_is_returned_and_keeps_u_and_v(value: float, transformed: bool) -> None:
    weight, u, v = torch.randn(3, 4), unit(3).float(), unit(4).float()
    weight[1, 2] = value
    new_u, new_v, sigma = functional.power_iteration(weight, u, v, n_iterations=2)
    assert torch.equal(new_u, u)
    assert torch.equal(new_v, v)

    def normalize(weight: Tensor) -> Tensor:
        return functional.spectral_normalize(weight, u, v, sigma)

    result = torch.func.vjp(normalize, weight)[0] if transformed else normalize(weight)
    torch.testing.assert_close(result, weight, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("transformed", [False, True])
def test_a_sigma_beyond_the_range_counts_as_not_finite(transformed: bool) -> None:
    """Division by an infinite sigma would make the weight zero without a word."""
    weight, u, v = torch.full((64, 64), 3e38), torch.full((64,), 0.125), torch.full((64,), 0.125)

    def normalize(weight: Tensor) -> Tensor:
        return functional.spectral_normalize(weight, u, v, functional.power_iteration(weight, u, v)[2])

    result = torch.func.vjp(normalize, weight)[0] if transformed else normalize(weight)
    assert torch.equal(result, weight)


# --- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "dim"), [((3, 4), 0), ((3, 4), 1), ((2, 3, 2, 2), 0), ((2, 3, 2, 2), 1)])
def test_gradient_formula(shape: tuple[int, ...], dim: int) -> None:
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    norm = SpectralNorm(weight, dim=dim).eval()
    incoming = torch.randn(shape, dtype=torch.float64)
    norm(weight).backward(incoming)
    expected = spectral_gradient(incoming, weight, norm._u, norm._v, dim)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("shape", "dim"), [((3, 4), 0), ((2, 3, 2), 1), ((3, 1), 0)])
@pytest.mark.parametrize("start", ["warmed up", "cold"])
@batched
def test_derivatives(shape: tuple[int, ...], dim: int, start: str) -> None:
    """Also far from the singular vectors, where no term of the gradient vanishes."""
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    norm = SpectralNorm(weight, dim=dim).eval()
    if start == "cold":
        for vector in (norm._u, norm._v):
            vector.copy_(nn.functional.normalize(vector + 0.4 * torch.randn_like(vector), dim=0))
    assert norm._u @ as_matrix(weight, dim) @ norm._v > 0.3 * largest_singular_value(weight, dim)
    torch.autograd.gradcheck(norm, (weight,), check_batched_grad=True)
    torch.autograd.gradgradcheck(norm, (weight,), check_batched_grad=True)


@layers
def test_batched_gradients(kind: str) -> None:
    """Several gradients in one backward pass (``is_grads_batched``) equal those of separate passes."""
    layer = make(kind).train()
    out = layer(inputs(kind))
    seeds = torch.randn(3, *out.shape, dtype=torch.float64)
    (together,) = torch.autograd.grad(out, original(layer), seeds, retain_graph=True, is_grads_batched=True)
    one_by_one = [torch.autograd.grad(out, original(layer), seed, retain_graph=True)[0] for seed in seeds]
    torch.testing.assert_close(together, torch.stack(one_by_one), rtol=1e-12, atol=1e-12)  # rounding, at about 1


def test_vectorized_jacobian() -> None:
    weight = torch.randn(3, 4, dtype=torch.float64)
    norm = SpectralNorm(weight).eval()
    jacobians = [torch.autograd.functional.jacobian(norm, weight, vectorize=each) for each in (True, False)]
    torch.testing.assert_close(*jacobians, rtol=1e-12, atol=1e-12)  # rounding, at numbers of about 1


@layers
def test_gradient_reaches_the_original(kind: str) -> None:
    layer = make(kind)
    layer(inputs(kind)).square().sum().backward()
    grad = original(layer).grad
    assert grad is not None
    assert grad.isfinite().all()
    assert grad.abs().max() > 1e-6


def test_sparse_gradient_of_an_embedding() -> None:
    """Rows that were not looked up get a gradient, too, through sigma; so it is dense."""
    dense = spectral_norm(nn.Embedding(6, 3).double()).eval()
    sparse = spectral_norm(nn.Embedding(6, 3, sparse=True).double()).eval()
    sparse.load_state_dict(dense.state_dict())
    for layer in (dense, sparse):
        layer(torch.tensor([1, 4, 4])).pow(3).sum().backward()
    torch.testing.assert_close(original(sparse).grad, original(dense).grad)
    assert original(dense).grad.abs().amin(dim=1).min() > 0


@layers
def test_equals_torchs(kind: str) -> None:
    """Same state, same outputs and gradients as torch's parametrization."""
    ours = make(kind).train()
    theirs = parametrizations.spectral_norm(LAYERS[kind][0]().double())
    x = inputs(kind)
    ours(x)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.eval()
    theirs.eval()
    outputs = [layer(x) for layer in (ours, theirs)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)
    grads = []
    for layer, out in zip((ours, theirs), outputs, strict=True):
        out.pow(3).sum().backward()
        grads.append({name: parameter.grad for name, parameter in layer.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-10, atol=1e-10)
