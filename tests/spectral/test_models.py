"""Whole models: normalized, measured, restarted, and back again."""

from __future__ import annotations

import copy
import functools
import math
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as legacy_spectral_norm

from normalized_layers import (
    LAYERS,
    NORMALIZERS,
    converge,
    model,
    norm_of,
    normalized,
    normalizers,
    original,
)
from references import (
    largest_singular_value,
)
from torch_sagan import (
    SAGANDiscriminator,
    apply_spectral_norm,
    recalibrate,
    remove_spectral_norm,
    reset_power_iteration,
    spectral_norm,
    spectral_norms,
)


@pytest.mark.parametrize("implementation", ["sagan", "torch"])
@given(
    rank=st.integers(1, 3),
    transposed=st.booleans(),
    groups=st.integers(1, 3),
    inputs_each=st.integers(1, 3),
    outputs_each=st.integers(1, 3),
    kernel=st.integers(1, 3),
)
def test_any_convolution(
    implementation: str,
    rank: int,
    transposed: bool,
    groups: int,
    inputs_each: int,
    outputs_each: int,
    kernel: int,
) -> None:
    """Of any rank and number of groups: the plain convolution with W / sigma, sigma from an SVD, before and after."""
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{rank}d")
    layer = kind(groups * inputs_each, groups * outputs_each, kernel, groups=groups).double()
    plain = copy.deepcopy(layer)
    network = apply_spectral_norm(nn.Sequential(layer), implementation=implementation)
    assert 1 - 1e-9 <= spectral_norms(network)["0.weight"] < 1.4  # warmed up, and sigma is never above the true one
    converge(layer, 200)
    with torch.no_grad():
        plain.weight /= largest_singular_value(plain.weight, int(transposed))
    x = torch.randn(2, groups * inputs_each, *range(3, 3 + rank), dtype=torch.float64)
    torch.testing.assert_close(network(x), plain(x), rtol=1e-3, atol=1e-4)
    expected = network(x)
    remove_spectral_norm(network)
    assert torch.equal(network(x), expected)
    assert network[0].state_dict().keys() == plain.state_dict().keys()
    assert largest_singular_value(layer.weight, int(transposed)) == pytest.approx(1, abs=1e-3)


def test_apply_normalizes_every_layer_with_a_weight() -> None:
    network = model()
    assert apply_spectral_norm(network) is network
    assert normalized(network) == {"0", "2.0", "4"}
    assert norm_of(network[2][0])._u.shape == (6,)  # outputs of a transposed convolution
    network(torch.randn(2, 3, 8, 8)).sum().backward()
    everything = nn.ModuleList([make_layer() for make_layer, _, _ in LAYERS.values()])
    apply_spectral_norm(everything)
    assert normalized(everything) == {str(index) for index in range(len(LAYERS))}


def test_apply_to_a_single_layer() -> None:
    layer = nn.Linear(3, 4)
    assert apply_spectral_norm(layer) is layer
    assert parametrize.is_parametrized(layer, "weight")


@pytest.mark.parametrize("implementation", ["sagan", "torch"])
def test_spectral_norms_are_exact_and_change_nothing(implementation: str) -> None:
    network = model().double()
    for layer in (network[0], network[2][0], network[4]):
        spectral_norm(layer, implementation=implementation)
    network.train()
    with torch.no_grad():
        original(network[0]).mul_(3)
        original(network[4]).add_(torch.randn_like(original(network[4])))  # u and v are now behind
    state = copy.deepcopy(network.state_dict())
    found = spectral_norms(network)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert network.training
    network.eval()
    expected = {"0": (network[0], 0), "2.0": (network[2][0], 1), "4": (network[4], 0)}
    assert len(found) == 3
    for name, value in found.items():
        layer, dim = expected[name.removesuffix(".weight")]
        assert isinstance(value, float)
        assert value == pytest.approx(largest_singular_value(layer.weight, dim), rel=1e-9)
    assert max(found.values()) > 1.5


@normalizers
@pytest.mark.parametrize("implementation", ["sagan", "torch"])
def test_normalized_already(normalizer: str, implementation: str) -> None:
    """A warning names them and they are not normalized twice; if they are excluded, there is no warning."""
    network = model()
    NORMALIZERS[normalizer](network[0])
    NORMALIZERS[normalizer](network[2][0])
    quiet = copy.deepcopy(network)
    keys = set(network[0].state_dict())
    with pytest.warns(UserWarning, match=r"already, and left alone: '0', '2\.0' \(.*exclude") as caught:
        apply_spectral_norm(network, implementation=implementation)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert set(network[0].state_dict()) == keys
    assert set(spectral_norms(network)) == {"0.weight", "2.0.weight", "4.weight"}
    apply_spectral_norm(quiet, exclude=["0", "2"], implementation=implementation)
    assert quiet.state_dict().keys() == network.state_dict().keys()
    with pytest.raises(ValueError, match=r"'weight' of .*Conv2d is spectrally normalized already"):
        spectral_norm(network[0], implementation=implementation)


def test_a_warning_made_an_error_leaves_the_model_as_it_was() -> None:
    network = model()
    spectral_norm(network[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="already"):
            apply_spectral_norm(network)
    assert normalized(network) == {"0"}


def test_the_rest_of_the_discriminator() -> None:
    """The reference's discriminator has plain attention projections and a plain last layer."""
    discriminator = SAGANDiscriminator(32, base_channels=8)
    before = set(spectral_norms(discriminator))
    plain = {
        f"{name}.weight"
        for name, layer in discriminator.named_modules()
        if isinstance(layer, nn.Conv2d) and not parametrize.is_parametrized(layer)
    }
    assert before
    assert any("query" in name for name in plain)
    with pytest.warns(UserWarning, match=re.escape(min(before).removesuffix(".weight"))):
        apply_spectral_norm(discriminator)
    assert set(spectral_norms(discriminator)) == before | plain
    assert discriminator(torch.randn(2, 3, 32, 32)).shape == (2,)


@normalizers
def test_exact_norms_and_reset_of_every_kind(normalizer: str) -> None:
    layer = NORMALIZERS[normalizer](nn.ConvTranspose2d(4, 3, 3).double())
    network = nn.Sequential(layer).train()
    network(torch.randn(1, 4, 5, 5, dtype=torch.float64))
    raw = layer.weight_orig if normalizer == "legacy" else original(layer)
    with torch.no_grad():
        raw.normal_(std=2.0)
    state = copy.deepcopy(network.state_dict())
    stale = spectral_norms(network)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    network.eval()(torch.randn(1, 4, 5, 5, dtype=torch.float64))
    assert stale == {"0.weight": pytest.approx(largest_singular_value(layer.weight, 1))}
    assert not 0.9 < stale["0.weight"] < 1.4
    reset_power_iteration(network)
    assert 1 - 1e-9 <= spectral_norms(network)["0.weight"] < 1.4
    network(torch.randn(1, 4, 5, 5, dtype=torch.float64))
    assert 1 - 1e-9 <= largest_singular_value(layer.weight, 1) < 1.4


def tied() -> nn.ModuleDict:
    network = nn.ModuleDict({"in": nn.Embedding(5, 3), "middle": nn.Linear(3, 3), "out": nn.Linear(3, 5)})
    network["out"].weight = network["in"].weight
    return network


@pytest.mark.parametrize("arguments", [{}, {"exclude": "out"}, {"include": "out"}, {"include": ["in", "out"]}])
def test_tied_weights_are_not_untied(arguments: dict[str, object]) -> None:
    network = tied()
    with pytest.raises(ValueError, match=r"'in\.weight' and 'out\.weight' are one parameter.*exclude"):
        apply_spectral_norm(network, **arguments)
    assert normalized(network) == set()
    apply_spectral_norm(network, exclude=["in", "out"])
    assert normalized(network) == {"middle"}
    assert network["in"].weight is network["out"].weight


def test_tied_within_a_single_layer() -> None:
    layer = nn.Linear(3, 3)
    layer.register_parameter("also", layer.weight)
    with pytest.raises(ValueError, match=r"'weight' and 'also' are one parameter"):
        apply_spectral_norm(layer)


def test_tied_to_what_is_normalized_already() -> None:
    network = tied()
    spectral_norm(network["in"])
    with pytest.raises(
        ValueError, match=r"'in\.parametrizations\.weight\.original' and 'out\.weight' are one parameter"
    ):
        apply_spectral_norm(network)


@pytest.mark.parametrize("other", [parametrizations.weight_norm, parametrizations.orthogonal])
@pytest.mark.parametrize("implementation", ["sagan", "torch"])
def test_on_top_of_another_parametrization(other: Callable[[nn.Module], nn.Module], implementation: str) -> None:
    """The output of the other parametrization is normalized, and u and v are warmed up on it."""
    layer = other(nn.Linear(5, 5).double())
    network = apply_spectral_norm(nn.Sequential(layer, nn.Linear(5, 4)), implementation=implementation)
    assert len(layer.parametrizations.weight) == 2
    with torch.no_grad():
        for parameter in layer.parametrizations.weight.parameters():
            parameter.copy_(torch.randn_like(parameter))
    reset_power_iteration(network)
    network.train()
    for _ in range(100):
        out = layer(torch.randn(2, 5, dtype=torch.float64))
    assert spectral_norms(network)["0.weight"] == pytest.approx(1, abs=1e-3)
    layer.eval()
    assert largest_singular_value(layer.weight) == pytest.approx(1, abs=1e-3)
    out.square().sum().backward()
    for parameter in layer.parametrizations.weight.parameters():
        assert parameter.grad.abs().max() > 0
    with pytest.raises(ValueError, match=r"'0\.weight' has 2 parametrizations, expected one"):
        remove_spectral_norm(network)
    assert normalized(network) == {"0", "1"}


@pytest.mark.parametrize("implementation", ["sagan", "torch"])
def test_reset_warms_up_on_what_the_norm_sees(implementation: str) -> None:
    """Weight norm's magnitudes turn the singular vectors; those of its directions alone would be wrong."""
    layer = parametrizations.weight_norm(nn.Linear(6, 4).double())
    spectral_norm(layer, implementation=implementation)
    with torch.no_grad():
        layer.parametrizations.weight.original0.copy_(torch.tensor([[1.0], [1.0], [1.0], [100.0]]))
    layer.eval()
    assert largest_singular_value(layer.weight) > 1.5
    reset_power_iteration(layer)
    assert largest_singular_value(layer.weight) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_remove_from_a_whole_model(training: bool) -> None:
    """All three kinds at once: exactly what evaluation computes, and the keys of a plain model."""
    plain, network = model(), model()
    spectral_norm(network[0])
    spectral_norm(network[0], "bias")
    legacy_spectral_norm(network[2][0])
    spectral_norm(network[4], implementation="torch")
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        network(x)
        # So far from u and v that an iteration would show.
        for raw in (original(network[0]), network[2][0].weight_orig, original(network[4])):
            raw.normal_()
    expected = copy.deepcopy(network).eval()(x)
    network.train(training)
    assert remove_spectral_norm(network) is network
    assert {module.training for module in network.modules()} == {training}
    assert torch.equal(network.eval()(x), expected)
    assert network.state_dict().keys() == plain.state_dict().keys()
    assert [type(module) for module in network.modules()] == [type(module) for module in plain.modules()]
    assert not any(module._forward_pre_hooks for module in network.modules())
    plain.load_state_dict(network.state_dict())
    assert torch.equal(plain.eval()(x), expected)


def test_remove_one_name_of_a_model() -> None:
    network = nn.Sequential(spectral_norm(spectral_norm(nn.Linear(3, 4)), "bias"), spectral_norm(nn.Linear(4, 4)))
    remove_spectral_norm(network, "bias")
    assert set(spectral_norms(network)) == {"0.weight", "1.weight"}
    with pytest.raises(ValueError, match="Sequential has no spectrally normalized 'bias'"):
        remove_spectral_norm(network, "bias")
    remove_spectral_norm(network, name="weight")
    with pytest.raises(ValueError, match="Sequential has no spectrally normalized weight"):
        remove_spectral_norm(network)


def test_removing_changes_nothing_when_one_cannot_be() -> None:
    network = nn.Sequential(nn.Linear(3, 3), parametrizations.orthogonal(nn.Linear(3, 3)))
    legacy_spectral_norm(network[0])
    spectral_norm(network[1])
    before = set(network.state_dict())
    with pytest.raises(ValueError, match=r"'1\.weight' has 2 parametrizations.*remove_parametrizations"):
        remove_spectral_norm(network)
    assert set(network.state_dict()) == before


@normalizers
@pytest.mark.parametrize("trainable", [True, False])
def test_parameters_stay_the_same_objects(normalizer: str, trainable: bool) -> None:
    """An existing optimizer keeps updating the weights, normalized and after removal; frozen ones stay frozen."""
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).requires_grad_(trainable)
    before = set(network.parameters())
    for layer in network:
        NORMALIZERS[normalizer](layer)
    assert set(network.parameters()) == before
    remove_spectral_norm(network)
    assert set(network.parameters()) == before
    assert {parameter.requires_grad for parameter in network.parameters()} == {trainable}
    apply_spectral_norm(network)
    assert set(network.parameters()) == before


def test_spectral_norms_of_a_complex_weight() -> None:
    layer = spectral_norm(nn.Linear(3, 4, dtype=torch.complex64)).eval()
    expected = torch.linalg.svdvals(layer.weight.to(torch.complex128))[0].item()
    assert spectral_norms(layer)["weight"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@normalizers
def test_spectral_norms_of_a_weight_that_is_not_finite(normalizer: str, value: float) -> None:
    """It is listed with the others, whose norms do not change, so that a diverged layer can be found."""
    network = nn.Sequential(*(NORMALIZERS[normalizer](nn.Linear(3, 3)) for _ in range(2)))
    with torch.no_grad():
        next(p for p in network[1].parameters() if p.ndim == 2)[0, 0] = value
    norms = spectral_norms(network.eval())
    assert 0 < norms["0.weight"] < math.inf
    assert math.isnan(norms["1.weight"])


def test_spectral_norms_of_a_model_without_any() -> None:
    assert spectral_norms(model()) == {}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("initialize", [functools.partial(nn.init.normal_, std=2.0), nn.init.zeros_])
def test_reset_after_new_weights(training: bool, initialize: Callable[[Tensor], Tensor]) -> None:
    """Weights that were initialized without updating u and v: sigma is wrong before the reset and right after it."""
    network = apply_spectral_norm(model()).train(training)
    for layer in (network[0], network[2][0], network[4]):
        initialize(original(layer))
    stale = max(spectral_norms(network.eval()).values())
    network.train(training)
    reset_power_iteration(network)
    assert network.training is training
    fresh = spectral_norms(network.eval())
    if initialize is nn.init.zeros_:
        assert set(fresh.values()) == {0.0}
    else:
        assert stale > 2
        for value in fresh.values():
            assert 0.999 < value < 1.3


@normalizers
@pytest.mark.parametrize("function", [reset_power_iteration, recalibrate])
def test_u_and_v_stay_outside_the_graph(normalizer: str, function: Callable[[nn.Module], object]) -> None:
    layer = NORMALIZERS[normalizer](nn.Linear(3, 4))
    function(layer)
    assert not any(buffer.requires_grad for buffer in layer.buffers())
    layer(torch.randn(2, 3)).sum().backward()


@pytest.mark.parametrize("implementation", ["sagan", "torch"])
def test_a_vector_has_no_u_and_v_to_reset(implementation: str) -> None:
    layer = spectral_norm(spectral_norm(nn.Linear(3, 4)), "bias", implementation=implementation)
    reset_power_iteration(layer)
    assert spectral_norms(layer)["bias"] == pytest.approx(1)


def test_sigma_of_a_network_in_training() -> None:
    """Twenty optimizer steps on a loss: every weight still has a largest singular value of about 1."""
    network = apply_spectral_norm(model())
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2, betas=(0.0, 0.9))
    start = copy.deepcopy(network.state_dict())
    for _ in range(40):
        optimizer.zero_grad()
        network(torch.randn(4, 3, 8, 8)).square().mean().neg().backward()
        optimizer.step()
    moved = original(network[4]) - start["4.parametrizations.weight.original"]
    assert moved.norm() > 0.5
    for value in spectral_norms(network.eval()).values():
        assert value == pytest.approx(1, abs=0.1)


# --- beside a thread that trains the model ---------------------------------------------------------------------------


class Halved(nn.Module):
    """A parametrization that does something else in training, and keeps count of it, as another spectral norm would."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("uses", torch.zeros(()))

    def forward(self, weight: Tensor) -> Tensor:
        if self.training:
            self.uses += 1
            return weight
        return weight / 2


@contextmanager
def modes_are_fixed(network: nn.Module) -> Iterator[None]:
    """Whoever sets the mode of one of the network's modules fails."""
    modules = set(network.modules())
    set_attribute = nn.Module.__setattr__

    def checked(module: nn.Module, name: str, value: object) -> None:
        assert name != "training" or module not in modules, f"the mode of {type(module).__name__} was set"
        set_attribute(module, name, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "__setattr__", checked)
        yield


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("function", [spectral_norms, reset_power_iteration, remove_spectral_norm])
@normalizers
def test_no_mode_changes_not_even_for_a_moment(
    normalizer: str, function: Callable[[nn.Module], object], training: bool
) -> None:
    network = model().train(training)
    for layer in (network[0], network[2][0], network[4]):
        NORMALIZERS[normalizer](layer)
    with modes_are_fixed(network):
        function(network)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("implementation", ["sagan", "torch"])
@pytest.mark.parametrize("above", [False, True])
def test_other_parametrizations_are_read_as_in_evaluation(training: bool, implementation: str, above: bool) -> None:
    layer = nn.Linear(5, 4).double().train(training)
    if not above:
        parametrize.register_parametrization(layer, "weight", Halved())
    spectral_norm(layer, implementation=implementation)
    if above:
        parametrize.register_parametrization(layer, "weight", Halved())
    state = copy.deepcopy(layer.state_dict())
    with modes_are_fixed(layer):
        norms = spectral_norms(layer)
    torch.testing.assert_close(layer.state_dict(), state, rtol=0, atol=0)
    assert norms["weight"] == pytest.approx(largest_singular_value(copy.deepcopy(layer).eval().weight))


def test_measured_while_another_thread_trains() -> None:
    """Every pass of that thread iterates, once."""
    network = apply_spectral_norm(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))).double()
    twin, stop = copy.deepcopy(network), threading.Event()
    x = torch.randn(2, 8, dtype=torch.float64)

    def measure() -> None:
        while not stop.is_set():
            spectral_norms(network)

    thread = threading.Thread(target=measure)
    thread.start()
    for _ in range(100):
        network(x)
    stop.set()
    thread.join()
    for _ in range(100):
        twin(x)
    torch.testing.assert_close(network.state_dict(), twin.state_dict(), rtol=0, atol=0)
