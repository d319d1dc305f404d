"""What else changes weights: transferred parametrizations, quantization, pruning and low-rank updates of a normalized
layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import parametrize, prune

from normalized_layers import converge
from torch_sagan import apply_spectral_norm, remove_spectral_norm, spectral_norm, spectral_norms


def layer(of: str) -> nn.Module:
    settings = {"of": of, "input_size": 6} if of == "convolution" else {}
    return spectral_norm(nn.Conv2d(4, 5, 3, padding=1), **settings)


kinds = pytest.mark.parametrize("of", ["matrix", "convolution"])


@kinds
def test_transferred_parametrizations(of: str) -> None:
    """The norm, u and v and the weight are then those of both layers, in evaluation exactly."""
    source, destination = layer(of), nn.Conv2d(4, 5, 3, padding=1)
    expected = copy.deepcopy(source).eval().weight
    parametrize.transfer_parametrizations_and_params(source.eval(), destination.eval())
    assert torch.equal(source.weight, expected)
    assert torch.equal(destination.weight, expected)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor.*:UserWarning")
def test_dynamic_quantization() -> None:
    """It refuses the class that a parametrized layer has of its own; without the norm it works."""
    model = apply_spectral_norm(nn.Sequential(nn.Linear(8, 6))).eval()
    x = torch.randn(3, 8)
    expected = model(x)
    with pytest.raises(AssertionError, match=r"got .*ParametrizedLinear"):
        quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    quantized = quantize_dynamic(remove_spectral_norm(copy.deepcopy(model)), {nn.Linear})
    assert not isinstance(quantized[0], nn.Linear)
    torch.testing.assert_close(quantized(x), expected, rtol=0, atol=0.05)  # of 8 bits
    assert torch.equal(model(x), expected)


@kinds
def test_pruning(of: str) -> None:
    """Of the original: what is left is normalized. Of the weight it fails, since that is no parameter."""
    pruned = layer(of)
    with pytest.raises(TypeError, match=r"cannot assign .* to parameter 'weight_orig'"):
        prune.l1_unstructured(copy.deepcopy(pruned), "weight", amount=0.5)
    prune.l1_unstructured(pruned.parametrizations.weight, "original", amount=0.5)
    converge(pruned)
    assert float((pruned.weight == 0).float().mean().detach()) == pytest.approx(0.5, abs=0.01)
    assert spectral_norms(pruned)["weight"] == pytest.approx(1, abs=1e-3)
    prune.remove(pruned.parametrizations.weight, "original")
    assert spectral_norms(pruned)["weight"] == pytest.approx(1, abs=1e-3)


class LowRank(nn.Module):
    """W + B A, of which A and B learn."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        self.a, self.b = nn.Parameter(torch.randn(rank, columns) / rank), nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.b @ self.a).view_as(weight)


@kinds
def test_low_rank_updates(of: str) -> None:
    """Below the norm, so that their sum is normalized: after the norm it would be W / sigma + B A."""
    adapted = remove_spectral_norm(layer(of).requires_grad_(False))
    parametrize.register_parametrization(adapted, "weight", LowRank(adapted.weight, 2))
    spectral_norm(adapted, **({"of": of, "input_size": 6} if of == "convolution" else {}))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    original = adapted.parametrizations.weight.original.clone()
    for _ in range(20):
        optimizer.zero_grad()
        adapted(torch.randn(2, 4, 6, 6)).mean().neg().backward()
        optimizer.step()
    assert torch.equal(adapted.parametrizations.weight.original, original)
    assert adapted.parametrizations.weight[0].b.abs().max() > 1e-3
    converge(adapted)
    assert spectral_norms(adapted)["weight"] == pytest.approx(1, abs=1e-3)
