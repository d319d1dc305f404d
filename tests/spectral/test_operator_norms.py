"""What a model's layers do to feature maps, as it is called: rows, their table, and a model that stays as it was."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as legacy_spectral_norm

from torch_sagan import (
    OperatorNorm,
    OperatorNorms,
    SAGANDiscriminator,
    SAGANGenerator,
    apply_spectral_norm,
    operator_norms,
    spectral_norm,
)


def test_a_normalized_convolution_has_another_norm() -> None:
    """The matrix has norm 1, and the convolution 1.5."""
    layer = spectral_norm(nn.Conv2d(32, 32, 3, padding=1))
    (row,) = operator_norms(layer, torch.zeros(1, 32, 8, 8)).layers
    assert 1.4 < row.lower <= row.upper < 1.06 * row.lower


def test_the_rows_of_a_model() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 5), nn.Linear(5, 5))
    model.append(model[4])  # one layer twice
    found = operator_norms(model, torch.zeros(2, 2, 8, 8))
    assert isinstance(found, OperatorNorms)
    assert [row[:3] for row in found.layers] == [
        ("0", "Conv2d", (2, 8, 8)), ("3", "Linear", (27,)), ("4", "Linear", (5,))
    ]  # fmt: skip
    for row, layer in zip(found.layers[1:], (model[3], model[4]), strict=True):
        norm = float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2))
        assert (row.lower, row.upper) == (pytest.approx(norm), pytest.approx(norm))
    assert found.bound == pytest.approx(math.prod(row.upper for row in (*found.layers, found.layers[2])))


def test_the_table() -> None:
    rows = OperatorNorm("a", "Conv2d", (3, 8, 8), 1.0, 1.25), OperatorNorm("b.c", "Linear", (12,), 0.5, 0.5)
    assert str(OperatorNorms(rows, 0.625, ())) == (
        "layer          input  norm at least  at most\n"
        "a      Conv2d  3×8×8  1.0000         1.2500\n"
        "b.c    Linear  12     0.5000         0.5000\n"
        "Lipschitz constant of the model: at most 0.625"
    )


NORMALIZERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda layer: layer,
    "sagan": spectral_norm,
    "torch": parametrizations.spectral_norm,
    "torch's hook": legacy_spectral_norm,
    "convolution": lambda layer: spectral_norm(layer, of="convolution", input_size=6),
}


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("training", [True, False])
def test_weights_are_those_of_evaluation_and_nothing_changes(normalizer: str, training: bool) -> None:
    layer = NORMALIZERS[normalizer](nn.Conv2d(3, 4, 3, padding=1).double())
    model = nn.Sequential(layer, nn.Dropout(), nn.BatchNorm2d(4)).double().train(training)
    state, hooks = copy.deepcopy(model.state_dict()), [len(module._forward_hooks) for module in model.modules()]
    states = random.getstate(), torch.get_rng_state().tolist()
    (row,) = operator_norms(model, torch.ones(1, 3, 6, 6, dtype=torch.float64)).layers
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert {module.training for module in model.modules()} == {training}
    assert states == (random.getstate(), torch.get_rng_state().tolist())
    eye = torch.eye(108, dtype=torch.float64).view(108, 3, 6, 6)
    model.eval()
    images = (layer(eye) - layer(torch.zeros(1, 3, 6, 6, dtype=torch.float64))).flatten(1).detach()
    assert row.upper == pytest.approx(float(torch.linalg.matrix_norm(images, 2)), rel=1e-6)


@pytest.mark.parametrize("architecture", ["dcgan", "resnet"])
@pytest.mark.parametrize("num_classes", [None, 3])
def test_both_discriminators_are_bounded(architecture: str, num_classes: int | None) -> None:
    """Where attention is the identity: every layer has a row, and no two images are further apart than the bound."""
    model = SAGANDiscriminator(16, base_channels=4, architecture=architecture, num_classes=num_classes).double().eval()
    labels = [torch.zeros(1, dtype=torch.int64)] if num_classes else []
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    found = operator_norms(model, (x, *labels))
    assert found.unbounded == ()
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert sorted(row.path for row in found.layers) == sorted(layers)
    for distance in (1e-3, 1.0):
        other = x + distance * torch.randn_like(x)
        moved = (model(other, *labels) - model(x, *labels)).abs()
        assert float(moved.detach()) <= found.bound * float((other - x).norm())


@pytest.mark.parametrize("architecture", ["dcgan", "resnet"])
def test_a_generator_is_bounded_in_evaluation(architecture: str) -> None:
    model = SAGANGenerator(16, z_dim=8, base_channels=2, architecture=architecture)
    found = operator_norms(model, torch.randn(1, 8))
    assert found.unbounded == ()
    assert 0 < found.bound < math.inf


def test_in_inference_mode() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)), torch.randn(1, 3, 5, 5)
    expected = operator_norms(model, x)
    with torch.inference_mode():
        assert operator_norms(model, x) == expected
        made_here = spectral_norm(nn.Conv2d(3, 4, 3), of="convolution", input_size=5)
        made_here(x)
        assert operator_norms(made_here, x).layers[0].lower == pytest.approx(1, abs=1e-3)


def test_a_compiled_model_is_measured_as_it_is_written() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(1, 3, 5, 5)
    expected = operator_norms(model, x)
    model.compile(backend="eager")
    model(x)
    assert operator_norms(model, x) == expected


def test_layers_of_integers_alone_are_measured() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    found = operator_norms(model, torch.tensor([1, 2]))
    assert [row.path for row in found.layers] == ["1"]
    assert found.bound == math.inf
    assert found.unbounded == ("0: integers that depend on the input",)


def test_the_same_model_under_the_norm_of_its_convolutions_has_a_product_of_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 8, 3, padding=1), nn.Tanh())
    x = torch.randn(1, 3, 8, 8)
    apply_spectral_norm(model, of="convolution", example_input=x)
    assert operator_norms(model, x).bound == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"tolerance": 0.0}, ValueError, "tolerance must be positive, got 0.0"),
        ({"dense_up_to": 0}, ValueError, "dense_up_to must be at least 1, got 0"),
        ({"example_input": "x"}, TypeError, "example_input takes a tensor, a tuple .*, got str"),
    ],
)
def test_arguments(settings: dict[str, object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        operator_norms(nn.Linear(3, 4), **{"example_input": torch.zeros(1, 3)} | settings)


def test_weights_that_are_not_finite() -> None:
    layer = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = math.nan
    handles: Tensor = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match="0: a weight holds infinities or NaN"):
        operator_norms(nn.Sequential(layer), handles)
    assert not layer._forward_hooks  # after an error too
