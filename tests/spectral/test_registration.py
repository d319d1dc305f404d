"""Where spectral norm of one weight is put, how it is taken away, and the errors of both."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from normalized_layers import (
    LAYERS,
    converge,
    inputs,
    layers,
    make,
    norm_of,
    original,
)
from references import (
    largest_singular_value,
)
from torch_sagan import (
    SpectralNorm,
    apply_spectral_norm,
    functional,
    operator_norms,
    remove_spectral_norm,
    spectral_norm,
    spectral_norms,
)


@layers
def test_dim_of_each_layer(kind: str) -> None:
    layer = make(kind)
    outputs = LAYERS[kind][1]
    assert norm_of(layer)._u.shape == (original(layer).shape[outputs],)
    assert norm_of(layer)._v.shape == (original(layer).numel() // original(layer).shape[outputs],)
    assert layer(inputs(kind)).isfinite().all()


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_dim_can_be_chosen(dim: int) -> None:
    layer = make("transposed conv2d", dim=dim)
    assert norm_of(layer)._u.shape == (original(layer).shape[dim],)
    converge(layer)
    assert largest_singular_value(layer.weight, dim % 4) == pytest.approx(1, abs=1e-5)


def test_positional_arguments_are_those_of_torch() -> None:
    ours = spectral_norm(nn.Linear(7, 5), "weight", 2, 1e-6, 1)
    theirs = spectral_norm(nn.Linear(7, 5), "weight", 2, 1e-6, 1, implementation="torch")
    for layer in (ours, theirs):
        norm = norm_of(layer)
        assert (norm.n_power_iterations, norm.eps, norm.dim) == (2, 1e-6, 1)
    with pytest.raises(TypeError, match="positional"):
        spectral_norm(nn.Linear(7, 5), "weight", 2, 1e-6, 1, "torch")


def test_defaults_are_those_of_torch() -> None:
    theirs = inspect.signature(parametrizations.spectral_norm).parameters
    for ours in (spectral_norm, apply_spectral_norm, SpectralNorm):
        for name, parameter in inspect.signature(ours).parameters.items():
            if name in ("name", "n_power_iterations", "eps"):
                assert parameter.default == theirs[name].default, ours
    for function in (functional.power_iteration, functional.spectral_normalize):
        assert inspect.signature(function).parameters["eps"].default == theirs["eps"].default
    assert inspect.signature(functional.power_iteration).parameters["n_iterations"].default == 1
    assert inspect.signature(functional.spectral_normalize).parameters["dim"].default == 0


def test_repr() -> None:
    assert repr(SpectralNorm(torch.ones(2, 3), n_power_iterations=2, dim=-1)) == (
        "SpectralNorm(n_power_iterations=2, dim=1, eps=1e-12)"
    )


@layers
def test_implementation_of_torch(kind: str) -> None:
    layer = make(kind, implementation="torch")
    theirs = parametrizations.spectral_norm(LAYERS[kind][0]().double())
    assert type(norm_of(layer)) is type(norm_of(theirs))
    assert norm_of(layer).dim == LAYERS[kind][1]
    ours = make(kind)
    ours.load_state_dict(layer.state_dict(), strict=True)
    torch.testing.assert_close(ours.eval().weight, layer.eval().weight)


def test_returns_the_module_and_takes_other_names() -> None:
    attention = nn.MultiheadAttention(4, 2)
    assert spectral_norm(attention, "in_proj_weight") is attention
    assert parametrize.is_parametrized(attention, "in_proj_weight")
    attention.eval()
    assert 0.99 < largest_singular_value(attention.in_proj_weight) < 1.3


def test_a_weight_of_a_recurrent_layer() -> None:
    """Whole models leave these alone, but a call by name reaches them, and the output follows."""
    plain = nn.LSTM(3, 4)
    layer = spectral_norm(copy.deepcopy(plain), "weight_hh_l0").eval()
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        plain.weight_hh_l0.copy_(layer.weight_hh_l0)
    torch.testing.assert_close(layer(x)[0], plain(x)[0])
    assert 0.99 < largest_singular_value(plain.weight_hh_l0) < 1.3


def test_on_a_vector() -> None:
    """As with torch's, a bias is divided by its length, and each weight comes off on its own."""
    layer = spectral_norm(spectral_norm(nn.Linear(5, 7).double()), "bias")
    bias = layer.parametrizations.bias.original
    torch.testing.assert_close(layer.bias, bias / bias.norm())
    assert layer(torch.randn(3, 5, dtype=torch.float64)).isfinite().all()
    parametrize.remove_parametrizations(layer, "bias")
    assert "bias" in layer._parameters
    assert "weight" not in layer._parameters
    parametrize.remove_parametrizations(layer, "weight")
    assert not hasattr(layer, "parametrizations")
    assert not parametrize.is_parametrized(layer)
    assert "weight" in layer._parameters


def test_twice_on_one_weight() -> None:
    """PyTorch stacks a second, useless one; here that is an error, for either implementation."""
    layer = spectral_norm(nn.Linear(5, 7))
    with pytest.raises(ValueError, match="already"):
        spectral_norm(layer, implementation="torch")
    assert len(layer.parametrizations.weight) == 1


@layers
@pytest.mark.parametrize("implementation", ["sagan", "torch"])
def test_remove_keeps_the_normalized_weight(kind: str, implementation: str) -> None:
    layer = make(kind, implementation=implementation)
    x = inputs(kind)
    for _ in range(3):
        before = layer(x).detach()
    layer.eval()
    assert remove_spectral_norm(layer) is layer
    assert not parametrize.is_parametrized(layer)
    assert type(layer) is type(LAYERS[kind][0]())
    assert isinstance(layer.weight, nn.Parameter)
    assert set(layer.state_dict()) == set(LAYERS[kind][0]().state_dict())
    assert torch.equal(layer(x), before)
    spectral_norm(layer, implementation=implementation)  # and it can come back
    assert parametrize.is_parametrized(layer, "weight")


def test_remove_in_training_makes_no_iteration() -> None:
    layer = make("conv2d").train()
    with torch.no_grad():
        original(layer).normal_()
    expected = copy.deepcopy(layer).eval().weight.detach()
    remove_spectral_norm(layer)
    assert layer.training
    assert torch.equal(layer.weight, expected)


def test_remove_by_name() -> None:
    attention = spectral_norm(nn.MultiheadAttention(4, 2), "in_proj_weight")
    remove_spectral_norm(attention, "in_proj_weight")
    assert isinstance(attention.in_proj_weight, nn.Parameter)


@layers
def test_a_copy_is_another_module(kind: str) -> None:
    """PyTorch keeps the property of a parametrized weight in a class, which both have: each gets its own."""
    layer, x = make(kind).eval(), inputs(kind)
    expected = layer(x).detach()
    copied = copy.deepcopy(layer)
    remove_spectral_norm(copied)
    assert torch.equal(layer(x), expected)
    assert torch.equal(copied(x), expected)
    if getattr(layer, "bias", None) is not None:
        other = spectral_norm(copy.deepcopy(layer), "bias", dim=0).eval()
        assert torch.equal(layer(x), expected)
        assert not torch.equal(other(x), expected)


def test_removing_what_is_not_there() -> None:
    layer = spectral_norm(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="bias"):
        remove_spectral_norm(layer, "bias")
    remove_spectral_norm(layer)
    with pytest.raises(ValueError, match="weight"):
        remove_spectral_norm(layer)
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="weight"):
        remove_spectral_norm(layer)


def test_a_weight_that_is_computed() -> None:
    """Pruning keeps the parameter under another name; dividing what is computed from it would last one forward pass."""
    layer = prune.random_unstructured(nn.Linear(3, 4), "weight", amount=2)
    with pytest.raises(ValueError, match="'weight' of Linear is not a parameter"):
        spectral_norm(layer)


def test_a_weight_without_a_shape() -> None:
    layer = nn.LazyConv2d(4, 3)
    with pytest.raises(ValueError, match=r"'weight' of LazyConv2d has no shape yet: run one forward pass first"):
        spectral_norm(layer)
    layer(torch.randn(1, 2, 5, 5))
    assert 0.99 < spectral_norms(spectral_norm(layer))["weight"] < 1.4


def test_a_weight_of_integers() -> None:
    with pytest.raises(TypeError, match=r"floating-point or complex weight, got torch\.int8"):
        SpectralNorm(torch.ones(3, 4, dtype=torch.int8))


@pytest.mark.parametrize("implementation", ["sagan", "torch"])
def test_both_implementations_refuse_the_same_weights(implementation: str) -> None:
    layer = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"a weight of shape \(3, 4\) has no dimension 2"):
        spectral_norm(layer, dim=2, implementation=implementation)
    layer.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"floating-point or complex weight, got torch\.int8"):
        spectral_norm(layer, implementation=implementation)


def test_errors() -> None:
    with pytest.raises(ValueError, match="heavy"):
        spectral_norm(nn.Linear(3, 4), "heavy")
    with pytest.raises(ValueError, match="bias"):
        spectral_norm(nn.Linear(3, 4, bias=False), "bias")
    with pytest.raises(ValueError, match="Sequential has no parameter named 'weight'; apply_spectral_norm takes whole"):
        spectral_norm(nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(ValueError, match="jax") as error:
        spectral_norm(nn.Linear(3, 4), implementation="jax")
    assert "sagan" in str(error.value)
    assert "torch" in str(error.value)
    for iterations in (0, -1):
        with pytest.raises(ValueError, match=f"n_power_iterations.*{iterations}"):
            spectral_norm(nn.Linear(3, 4), n_power_iterations=iterations)
        with pytest.raises(ValueError, match=f"n_power_iterations.*{iterations}"):
            SpectralNorm(torch.randn(3, 4), n_power_iterations=iterations)
    for dim in (2, -3):
        with pytest.raises((ValueError, IndexError), match=f"(?i)dim.*{dim}"):
            SpectralNorm(torch.randn(3, 4), dim=dim)


# --- a new weight ----------------------------------------------------------------------------------------------------


def far_away() -> Tensor:
    """A weight of which u and v know nothing: of rank one, in another direction, and large."""
    rows, columns = torch.linalg.qr(torch.randn(5, 2))[0].T, torch.linalg.qr(torch.randn(7, 2))[0].T
    return 1000 * torch.outer(rows[0], columns[0]) + torch.outer(rows[1], columns[1])


@pytest.mark.parametrize("implementation", ["sagan", "torch"])
@pytest.mark.parametrize("below", [None, parametrizations.weight_norm])
def test_transferred_to_another_module(implementation: str, below: Callable[[nn.Module], nn.Module] | None) -> None:
    """PyTorch shares the norm, with its u and v, and its parameter; the other module's weight is thrown away. (In
    training, it reads that weight for a check, so either implementation iterates on it.)"""
    source, destination = nn.Linear(7, 5), nn.Linear(7, 5)
    with torch.no_grad():
        source.weight.copy_(far_away())
    spectral_norm(below(source) if below else source, implementation=implementation)
    expected = copy.deepcopy(source).eval().weight
    parametrize.transfer_parametrizations_and_params(source.eval(), destination.eval())
    assert torch.equal(source.weight, expected)
    assert torch.equal(destination.weight, expected)


def test_a_transferred_norm_warms_up_on_a_new_weight() -> None:
    source, destination = spectral_norm(nn.Linear(7, 5)).eval(), nn.Linear(7, 5).eval()
    parametrize.transfer_parametrizations_and_params(source, destination)
    destination.weight = far_away()
    assert largest_singular_value(destination.weight) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("weight", "kind", "message"),
    [
        (None, TypeError, "expected a tensor for a weight .* got NoneType: remove_spectral_norm first"),
        (3.0, TypeError, "got float"),
        (torch.ones(5, 8), ValueError, "expected 5 outputs with 7 weights each, got 5 with 8"),
        (torch.ones(7), ValueError, "expected 5 outputs with 7 weights each, got 7 with 1"),
        (torch.ones(5, 7, dtype=torch.int32), TypeError, r"floating-point or complex weight, got torch\.int32"),
    ],
    ids=["none", "number", "wider", "vector", "integers"],
)
def test_what_is_no_weight_changes_nothing(weight: object, kind: type[Exception], message: str) -> None:
    layer = spectral_norm(nn.Linear(7, 5))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(kind, match=message):
        layer.weight = weight
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_what_is_no_vector() -> None:
    layer = spectral_norm(nn.Linear(7, 5), "bias")
    layer.bias = torch.ones(5)
    assert layer.bias.norm().item() == pytest.approx(1)
    with pytest.raises(TypeError, match="got NoneType"):
        layer.bias = None
    with pytest.raises(ValueError, match="expected 5 outputs with 1 weights each, got 5 with 2"):
        layer.bias = torch.ones(5, 2)


def test_a_convolution_under_the_norm_of_its_kernel_is_no_silent_exception() -> None:
    """The other norm was asked for, so leaving such a layer alone would not be it; linear layers have one norm."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4 * 36, 1))
    x = torch.randn(1, 3, 8, 8)
    for index in (0, 1, 3):
        spectral_norm(model[index])
    with pytest.raises(
        ValueError, match=r"^'0': normalized by the norm of a matrix already; call remove_spectral_norm"
    ):
        apply_spectral_norm(model, of="convolution", example_input=x)
    remove_spectral_norm(model[0])
    with pytest.warns(UserWarning, match="left alone: '1', '3'"):
        apply_spectral_norm(model, of="convolution", example_input=x)
    assert operator_norms(model, x).layers[0].lower == pytest.approx(1, abs=1e-3)  # warmed up to 1e-4
