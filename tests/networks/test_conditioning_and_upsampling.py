"""The generator's options beside the paper: a class that is joined to the latent vector, and nearest upsampling."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_sagan import ConditionalBatchNorm2d, SAGANGenerator

CLASSES = 3


def generator(**options: object) -> SAGANGenerator:
    torch.manual_seed(0)
    options = {"z_dim": 5, "base_channels": 4, "num_classes": CLASSES, "spectral_norm": None} | options
    return SAGANGenerator(16, **options).double().eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ["dcgan", "resnet"])
def test_the_class_is_a_one_hot_vector_behind_the_latent_one(architecture: str) -> None:
    model = generator(architecture=architecture, conditioning="latent")
    z, labels = torch.randn(4, 5, dtype=torch.float64), torch.tensor([2, 0, 1, 2])
    same = generator(architecture=architecture, z_dim=5 + CLASSES, num_classes=None)
    same.load_state_dict(model.state_dict())
    joined = torch.cat([z, torch.eye(CLASSES, dtype=torch.float64)[labels]], 1)
    assert torch.equal(model(z, labels), same(joined))
    assert torch.equal(model(z[:, :, None, None], labels), same(joined))
    assert not any(isinstance(module, ConditionalBatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("architecture", ["dcgan", "resnet"])
def test_a_class_learns_from_the_images_of_that_class(architecture: str) -> None:
    model = generator(architecture=architecture, conditioning="latent").train()
    model(torch.randn(4, 5, dtype=torch.float64), torch.tensor([2, 0, 0, 2])).square().sum().backward()
    weight = model.blocks[0].conv.weight if architecture == "dcgan" else model.blocks[0].linear.weight
    assert weight.grad is not None
    of_class = (weight.grad if architecture == "dcgan" else weight.grad.mT)[5:].flatten(1).abs().sum(1)  # (3,)
    assert of_class[0] > 0
    assert of_class[1] == 0
    assert of_class[2] > 0


def test_maps_come_with_a_class_at_the_latent_vector() -> None:
    model = generator(conditioning="latent", attention_resolutions=(4, 8))
    images, maps = model(torch.randn(2, 5, dtype=torch.float64), torch.tensor([0, 1]), return_attention=True)
    assert images.shape == (2, 3, 16, 16)
    assert [tuple(attention.shape) for attention in maps] == [(2, 16, 16), (2, 64, 64)]


def test_nearest_upsampling_is_a_repetition_and_a_convolution() -> None:
    model = generator(upsampling="nearest", num_classes=None, attention_resolutions=())
    z = torch.randn(2, 5, dtype=torch.float64)
    x = model.blocks[0](z[:, :, None, None], None)  # (2, 8, 4, 4)
    for conv, rest in [
        *((block.conv, nn.Sequential(block.norm, nn.ReLU())) for block in [*model.blocks][1:]),
        (model.to_image, nn.Tanh()),
    ]:
        assert conv.kernel_size == (3, 3)
        enlarged = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = rest(F.conv2d(enlarged, conv.weight, conv.bias, padding=1))
    assert x.shape == (2, 3, 16, 16)
    # Sums of 72 numbers of about 1 in float64, in another order: a relative error of 1e-15 each.
    torch.testing.assert_close(model(z), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("upsampling", "share"), [("nearest", 0.0), ("transposed", 0.05)])
def test_what_is_even_stays_even_with_nearest_upsampling(upsampling: str, share: float) -> None:
    """A constant map becomes constant away from its edges: nothing of a checkerboard, even before any training."""
    model = generator(upsampling=upsampling, num_classes=None, base_channels=8, attention_resolutions=())
    conv = model.blocks[-1].conv
    even = torch.ones(1, conv.in_channels, 9, 9, dtype=torch.float64)
    inner = conv(even)[0, :, 3:-3, 3:-3].detach()  # (out, 12, 12)
    spread = (inner.amax((1, 2)) - inner.amin((1, 2))).max()
    if share:
        assert spread > share * inner.abs().max()
    else:
        assert spread < 1e-12  # rounding of sums in another order


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conditioning": "both"}, "conditioning must be one of 'batch_norm', 'latent', got 'both'"),
        ({"conditioning": "latent", "num_classes": None}, "conditioning 'latent': expected num_classes"),
        ({"upsampling": "bilinear"}, "upsampling must be one of 'transposed', 'nearest', got 'bilinear'"),
        ({"upsampling": "transposed", "architecture": "resnet"}, "'resnet' has 'nearest' alone"),
    ],
)
def test_what_does_not_exist_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generator(**options)


def test_nearest_is_what_the_residual_network_has() -> None:
    torch.manual_seed(0)
    ours = generator(architecture="resnet").state_dict()
    theirs = generator(architecture="resnet", upsampling="nearest").state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
