"""When weights can be initialized under spectral norm, and when that is lost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from subjects import build, worst_norm
from torch_sagan import SAGANGenerator, reset_power_iteration, spectral_norm


def dcgan_init(module: nn.Module) -> None:
    """The usual initialization of a DCGAN, as it is often written."""
    name = type(module).__name__
    if "Conv" in name:
        module.weight.data.normal_(0.0, 0.02)
    elif "BatchNorm" in name:
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def init_of_the_page(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        normalized = parametrize.is_parametrized(module, "weight")
        nn.init.normal_(module.parametrizations.weight.original if normalized else module.weight, 0.0, 0.02)


def originals(module: nn.Module) -> list[Tensor]:
    return [part.original for part in module.modules() if isinstance(part, parametrize.ParametrizationList)]


def test_initialization_before_the_norm() -> None:
    layer = nn.Conv2d(64, 64, 3).apply(dcgan_init)
    spectral_norm(layer)
    assert originals(layer)[0].std().item() == pytest.approx(0.02, rel=0.1)
    assert worst_norm(layer.eval()) < 0.1


@pytest.mark.parametrize("subject", ["spectral norm", "torch's spectral norm", "generator", "discriminator"])
def test_initialization_after_the_norm_is_lost(subject: str) -> None:
    """The weight is computed, so values written into it are lost without an error, as with torch's own norm."""
    module = build(subject)
    before = [original.clone() for original in originals(module)]
    module.apply(dcgan_init)
    assert all(torch.equal(*pair) for pair in zip(originals(module), before, strict=True))
    for part in module.modules():
        if parametrize.is_parametrized(part, "weight"):
            nn.init.normal_(part.weight, 0.0, 0.02)
    assert all(torch.equal(*pair) for pair in zip(originals(module), before, strict=True))


@pytest.mark.parametrize("subject", ["spectral norm", "generator", "discriminator"])
def test_initialization_of_the_original(subject: str) -> None:
    module = build(subject).apply(init_of_the_page)
    assert all(original.std().item() == pytest.approx(0.02, rel=0.2) for original in originals(module))
    assert worst_norm(module.eval()) > 0.2
    reset_power_iteration(module)
    assert worst_norm(module) < 0.1


def test_initialization_of_conditional_batch_norm() -> None:
    """It has a gamma and a beta for each class, and no ``weight``."""
    with pytest.raises(AttributeError, match="attribute"):
        SAGANGenerator(16, z_dim=8, base_channels=8, num_classes=5).apply(dcgan_init)
