"""Recalibration against an SVD, torch's update_bn and the statistics of a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as legacy_spectral_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from references import as_matrix
from torch_sagan import (
    SAGANDiscriminator,
    SAGANGenerator,
    hinge_discriminator_loss,
    recalibrate,
    spectral_norm,
    spectral_norms,
)

NORMALIZERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "sagan": spectral_norm,
    "torch": parametrizations.spectral_norm,
    "torch's hook": legacy_spectral_norm,
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "wide": lambda: nn.Linear(9, 4, dtype=torch.float64),
    "tall": lambda: nn.Linear(4, 9, dtype=torch.float64),
    "convolution": lambda: nn.Conv2d(3, 5, 3, dtype=torch.float64),
    "transposed convolution": lambda: nn.ConvTranspose2d(5, 3, 3, dtype=torch.float64),
    "complex": lambda: nn.Linear(5, 4, dtype=torch.complex128),
}


def raw(layer: nn.Module) -> Tensor:
    return layer.weight_orig if hasattr(layer, "weight_orig") else layer.parametrizations.weight.original


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def generator(num_classes: int | None = None) -> SAGANGenerator:
    """With weights that its buffers have not seen."""
    network = SAGANGenerator(16, z_dim=8, base_channels=4, num_classes=num_classes).double()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                parameter.add_(parameter.std().nan_to_num(0) * torch.randn_like(parameter))
            if name.endswith(("gamma", "beta")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return network


# --- sigma ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("kind", LAYERS)
def test_sigma_is_exact(normalizer: str, kind: str) -> None:
    if (normalizer, kind) == ("torch's hook", "complex"):
        pytest.skip("the hook forgets to conjugate")
    layer = NORMALIZERS[normalizer](LAYERS[kind]())
    with torch.no_grad():
        raw(layer).normal_()
    model = nn.Sequential(layer).eval()
    assert recalibrate(model) is model
    dim = int(kind == "transposed convolution")
    sigma = torch.linalg.svdvals(as_matrix(raw(layer), dim))[0]
    with torch.no_grad():
        layer(torch.randn(2, raw(layer).shape[1 - dim], *[4] * (raw(layer).ndim - 2), dtype=raw(layer).dtype))
    # Rounding in float64; the hook divides by u W v in the weight's own dtype as well.
    torch.testing.assert_close(layer.weight, raw(layer) / sigma, rtol=1e-12, atol=1e-12)


def test_sigma_does_not_depend_on_the_old_vectors() -> None:
    """An iteration that starts from u = e₁, as the old weight left it, would never find the larger entry."""
    layer = spectral_norm(nn.Linear(2, 2))
    with torch.no_grad():
        layer.weight = torch.diag(torch.tensor([2.0, 1.0]))
        for vector in layer.parametrizations.weight[0].buffers():
            vector.copy_(torch.tensor([1.0, 0.0]))
        raw(layer).copy_(torch.diag(torch.tensor([1.0, 2.0])))
    _ = [layer.weight for _ in range(50)]
    assert spectral_norms(layer)["weight"] == pytest.approx(2)
    recalibrate(layer)
    assert spectral_norms(layer)["weight"] == pytest.approx(1)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_a_zero_weight_leaves_unit_vectors(shape: tuple[int, int]) -> None:
    layer = spectral_norm(nn.Linear(*shape))
    nn.init.zeros_(raw(layer))
    recalibrate(layer)
    for vector in layer.parametrizations.weight[0].buffers():
        assert vector.norm().item() == pytest.approx(1)
    assert torch.equal(layer.weight, torch.zeros_like(layer.weight))


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e30), (torch.float64, 1e200), (torch.float64, 1e-200)])
def test_a_weight_whose_squares_leave_the_range(dtype: torch.dtype, scale: float) -> None:
    layer = spectral_norm(nn.Linear(6, 4, dtype=dtype), eps=0).eval()
    with torch.no_grad():
        raw(layer).normal_(std=scale)
    assert spectral_norms(layer)["weight"] != pytest.approx(1, abs=1e-3)
    recalibrate(layer)
    assert spectral_norms(layer)["weight"] == pytest.approx(1, abs=1e-5)  # rounding of float32


def test_a_vector_and_half_precision() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6)).bfloat16()
    spectral_norm(spectral_norm(model[0]), "bias")
    recalibrate(model.eval())
    # bfloat16 has 8 bits: u and v, and each entry of the weight, are off by 2⁻⁹ of themselves.
    assert spectral_norms(model)["0.weight"] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_discriminator(use_buffers: bool) -> None:
    """After the average has fallen behind large steps: before, sigma is off, with averaged buffers more so."""
    network = SAGANDiscriminator(16, base_channels=8)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=use_buffers)
    optimizer = torch.optim.Adam(network.parameters(), lr=4e-3, betas=(0.0, 0.9))
    for _ in range(30):
        optimizer.zero_grad()
        hinge_discriminator_loss(*network(torch.randn(8, 3, 16, 16)).chunk(2)).backward()
        optimizer.step()
        average.update_parameters(network)
    average.eval()
    assert max(spectral_norms(average).values()) > 1.02
    recalibrate(average)
    for norm in spectral_norms(average).values():
        assert norm == pytest.approx(1, abs=1e-5)  # rounding in float32


# --- batch statistics ----------------------------------------------------------------------------------------------


def test_statistics_are_those_of_update_bn() -> None:
    """Where sigma is right already. (update_bn would pass a batch's first element alone, and iterate.)"""
    network = SAGANGenerator(16, z_dim=8, base_channels=4, spectral_norm=None).double()
    twin = copy.deepcopy(network)
    batches = [torch.randn(6, 8, dtype=torch.float64) for _ in range(5)]
    update_bn(batches, twin)
    recalibrate(network, iter(batches))
    torch.testing.assert_close(network.state_dict(), twin.state_dict(), rtol=0, atol=0)
    assert not torch.equal(network.blocks[0].norm.running_mean, torch.zeros(32, dtype=torch.float64))


def test_evaluation_equals_batch_statistics() -> None:
    """Of one batch of which evaluation then makes the same images, but for n / (n - 1) in the variance; with labels."""
    network = generator(num_classes=3)
    z, labels = torch.randn(256, 8, dtype=torch.float64), torch.arange(256) % 3
    with torch.no_grad():
        gap = (network.eval()(z, labels) - frozen_sigma(network)(z, labels)).abs().mean()
        assert gap > 0.05
        recalibrate(network, [(z, labels)])
        # The first map has 16 positions, so n is 4096 at least.
        expected = frozen_sigma(network)(z, labels)
        torch.testing.assert_close(network.eval()(z, labels), expected, rtol=0, atol=1e-2)
        assert (network(z, labels) - expected).abs().mean() < 1e-3


def frozen_sigma(network: nn.Module) -> nn.Module:
    """A copy whose batch norms use the statistics of the batch, while everything else is in evaluation mode."""
    twin = copy.deepcopy(network).eval()
    for part in twin.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.train()
    return twin


def test_the_result_depends_on_weights_and_inputs_alone() -> None:
    first, batches = generator(), [torch.randn(4, 8, dtype=torch.float64) for _ in range(2)]
    second = copy.deepcopy(first)
    with torch.no_grad():
        for buffer in second.buffers():
            buffer.copy_(torch.ones_like(buffer))
    random = torch.get_rng_state()
    recalibrate(first, batches)
    assert torch.equal(torch.get_rng_state(), random)
    torch.manual_seed(5)
    recalibrate(second, batches)
    assert_unchanged(second, state(first))
    recalibrate(second, batches)  # and again
    assert_unchanged(second, state(first))


def test_modes_and_momenta_stay() -> None:
    network = generator().train()
    network.blocks[1].eval()
    network.blocks[0].norm.momentum = 0.25
    modes = [part.training for part in network.modules()]
    recalibrate(network, [torch.randn(4, 8, dtype=torch.float64)])
    assert [part.training for part in network.modules()] == modes
    assert [part.momentum for part in network.modules() if isinstance(part, nn.BatchNorm2d)] == [0.25, 0.1]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())


# --- errors --------------------------------------------------------------------------------------------------------


class Unused(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self[0](x)
        return y


def test_errors_leave_the_model_as_it_was() -> None:
    network, z = generator().train(), torch.randn(4, 8, dtype=torch.float64)
    unused = Unused(spectral_norm(nn.Linear(8, 8)), nn.BatchNorm1d(8)).double()
    with torch.no_grad():
        raw(unused[0]).normal_()
    for model, inputs, error, message in [
        (network, None, ValueError, "SAGANGenerator has batch norm, whose statistics need inputs"),
        (network, [], ValueError, "inputs holds no batch"),
        (network, z, TypeError, "inputs takes batches, such as a list of tensors, got one tensor"),
        (network, [z, z[:, :7]], ValueError, r"expected z \(B, 8\)"),
        (network, [(z, torch.zeros(4))], ValueError, "not conditional"),
        (unused, [z], ValueError, "'1' is not reached"),
        (nn.Linear(8, 8), [z], ValueError, "Linear has no batch norm with running statistics: leave inputs out"),
    ]:
        before = state(model)
        with pytest.raises(error, match=message) as raised:
            recalibrate(model, inputs)
        assert "\n" not in str(raised.value)
        assert_unchanged(model, before)
        assert all(part.training for part in model.modules())
        assert all(part.momentum == 0.1 for part in model.modules() if isinstance(part, nn.BatchNorm2d))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(value: float) -> None:
    model = nn.Sequential(spectral_norm(nn.Linear(3, 4)), spectral_norm(nn.Linear(4, 4)))
    with torch.no_grad():
        raw(model[1])[0, 0] = value
    before = state(model)
    with pytest.raises(ValueError, match=r"'1\.weight' holds infinities or NaN"):
        recalibrate(model)
    torch.testing.assert_close(state(model), before, rtol=0, atol=0, equal_nan=True)
