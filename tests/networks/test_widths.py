"""Networks of given widths and depth: shapes, sizes and attention where they are asked for, and errors that say why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from torch_sagan import ConditionalBatchNorm2d, SAGANDiscriminator, SAGANGenerator, spectral_norm, spectral_norms
from torch_sagan.networks.blocks import ResidualDownBlock

CIFAR_G: dict[str, Any] = {"widths": (16,) * 4, "architecture": "resnet", "num_classes": 3}
CIFAR_D: dict[str, Any] = {"widths": (8,) * 4, "downsampling_blocks": 2, "architecture": "resnet", "num_classes": 3}


def recorded_sizes(network: SAGANGenerator | SAGANDiscriminator, *inputs: torch.Tensor) -> list[tuple[int, ...]]:
    """(channels, height, width) of what each block returns."""
    sizes: list[tuple[int, ...]] = []
    for block in network.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: sizes.append(tuple(output.shape[1:])))
    network(*inputs)
    return sizes


def test_the_generator_for_cifar10() -> None:
    """A latent block and three that double the map, equally wide throughout."""
    generator = SAGANGenerator(32, **CIFAR_G, attention_resolutions=(16,))
    sizes = recorded_sizes(generator, torch.randn(2, 128), torch.tensor([0, 2]))
    assert sizes == [(16, 4, 4), (16, 8, 8), (16, 16, 16), (16, 32, 32)]


def test_the_discriminator_for_cifar10() -> None:
    """Two blocks that halve the map, one that keeps it, and the one at the logit; the last two have no shortcut."""
    discriminator = SAGANDiscriminator(32, **CIFAR_D, attention_resolutions=(16,))
    assert recorded_sizes(discriminator, torch.randn(2, 3, 32, 32), torch.tensor([0, 2])) == [
        (8, 16, 16), (8, 8, 8), (8, 8, 8),
    ]  # fmt: skip
    names = discriminator.state_dict()
    assert any(name.startswith("blocks.1.shortcut") for name in names)
    assert not any(name.startswith(("blocks.2.shortcut", "to_logit.shortcut")) for name in names)


def test_a_block_at_the_logit_that_widens_has_a_shortcut() -> None:
    """As in the field's network for 64 pixels."""
    discriminator = SAGANDiscriminator(64, widths=(2, 4, 8, 16, 32), architecture="resnet")
    assert discriminator.state_dict()["to_logit.shortcut.bias"].shape == (32,)
    assert recorded_sizes(discriminator, torch.randn(1, 3, 64, 64))[-1] == (16, 4, 4)


@pytest.mark.parametrize("architecture", ["dcgan", "resnet"])
@pytest.mark.parametrize("image_size", [28, 64])
def test_default_widths_given_one_by_one(image_size: int, architecture: Any) -> None:
    """The same network from the same seed."""
    for build in (SAGANGenerator, SAGANDiscriminator):
        torch.manual_seed(0)
        default = build(image_size, base_channels=4, architecture=architecture)
        widths = [4, 8] if image_size == 28 else [4, 8, 16, 32]
        if architecture == "resnet":
            widths.append(widths[-1])
        if build is SAGANGenerator:
            widths.reverse()
        torch.manual_seed(0)
        given = build(image_size, widths=widths, architecture=architecture)
        assert all(
            torch.equal(a, b) for a, b in zip(default.state_dict().values(), given.state_dict().values(), strict=True)
        )


def test_attention_follows_the_first_block_of_its_size_alone() -> None:
    discriminator = SAGANDiscriminator(32, **CIFAR_D, attention_resolutions=(8,)).eval()
    x, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 2])
    _, maps = discriminator(x, labels, return_attention=True)
    assert len(maps) == 1
    calls: list[int] = []
    discriminator.attention["8"].register_forward_hook(lambda *_: calls.append(len(after)))
    after: list[int] = []
    for block in discriminator.blocks:
        block.register_forward_hook(lambda *_: after.append(1))
    discriminator(x, labels)
    assert calls == [2]


# --- the shortcut after the ReLU -------------------------------------------------------------------------------------


@pytest.mark.parametrize("downsample", [False, True])
@pytest.mark.parametrize("out_channels", [4, 6])
def test_a_shortcut_after_the_relu_is_a_relu_in_place(downsample: bool, out_channels: int) -> None:
    """Written out with a ReLU that works in place, in the order in which those frameworks call it."""
    block = ResidualDownBlock(4, out_channels, lambda m: m, downsample=downsample, shortcut_after_relu=True).double()
    relu = nn.ReLU(inplace=True)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    mine = block(x)
    with torch.no_grad():
        shortcut = x.clone()
        y = block.conv2(relu(block.conv1(relu(shortcut))))
        expected = y + block.shortcut(shortcut)
    torch.testing.assert_close(mine.detach(), expected, rtol=0, atol=1e-12)
    assert x.min() < 0  # and it leaves its own input alone


def test_it_changes_all_blocks_but_the_first() -> None:
    torch.manual_seed(0)
    plain = SAGANDiscriminator(32, **CIFAR_D).eval()
    torch.manual_seed(0)
    after = SAGANDiscriminator(32, **CIFAR_D, shortcut_after_relu=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(plain.blocks[0](x), after.blocks[0](x))
    h = plain.blocks[0](x)
    for i in (1, 2):
        assert not torch.allclose(plain.blocks[i](h), after.blocks[i](h))
        h = plain.blocks[i](h)
    labels = torch.tensor([0, 1])
    assert not torch.allclose(plain.to_logit(h, labels), after.to_logit(h, labels))


# --- tables of classes that are normalized ---------------------------------------------------------------------------


def test_normalized_tables_by_their_equation() -> None:
    norm = ConditionalBatchNorm2d(4, num_classes=3, spectral_norm=spectral_norm).double().eval()
    x, labels = torch.randn(2, 4, 5, 5, dtype=torch.float64), torch.tensor([2, 0])
    scale, shift = norm.scale.weight[labels], norm.shift.weight[labels]  # W / sigma
    expected = (1 + scale)[:, :, None, None] * norm.norm(x) + shift[:, :, None, None]
    torch.testing.assert_close(norm(x, labels), expected, rtol=0, atol=1e-12)
    # 15 steps of warm-up on a table of three rows; the largest singular value of what it multiplies by.
    assert torch.linalg.matrix_norm(norm.scale.weight, 2).item() == pytest.approx(1, abs=1e-2)


def test_normalized_tables_can_be_made_new() -> None:
    norm = ConditionalBatchNorm2d(4, num_classes=3, spectral_norm=spectral_norm)
    norm(torch.randn(8, 4, 2, 2) + 3, torch.arange(8) % 3)
    before = norm.scale.weight.detach().clone()
    norm.reset_parameters()
    assert torch.equal(norm.norm.running_mean, torch.zeros(4))
    assert not torch.equal(norm.scale.weight, before)


def test_every_table_of_a_generator_is_normalized() -> None:
    generator = SAGANGenerator(32, **CIFAR_G, normalize_classes=True, norm_eps=1e-4)
    tables = [name for name in spectral_norms(generator) if ".scale." in name or ".shift." in name]
    assert len(tables) == 3 * 2 * 2  # blocks, norms, scale and shift
    assert {module.eps for module in generator.modules() if isinstance(module, nn.BatchNorm2d)} == {1e-4}


# --- what cannot be built --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (SAGANGenerator, {"widths": (8, 8)}, r"expected 3 numbers of channels.* sizes 4, 8, 16, got \(8, 8\)"),
        (SAGANGenerator, {"widths": (8, 8, 8), "architecture": "resnet"}, "expected 4 numbers of channels"),
        (SAGANGenerator, {"widths": (8, 0, 8)}, "expected 3 numbers of channels"),
        (SAGANGenerator, {"widths": (8, 8, 8), "base_channels": 8}, "either base_channels or widths, got both: 8 and"),
        (SAGANGenerator, {"normalize_classes": True}, "normalize_classes: expected num_classes"),
        (
            SAGANGenerator,
            {**CIFAR_G, "normalize_classes": True, "conditioning": "latent"},
            "normalize_classes: expected",
        ),
        (SAGANDiscriminator, {"widths": (8,)}, "expected 3 numbers of channels"),
        (SAGANDiscriminator, {"downsampling_blocks": 2}, "are for architecture 'resnet'"),
        (SAGANDiscriminator, {"shortcut_after_relu": True}, "are for architecture 'resnet'"),
        (SAGANDiscriminator, {**CIFAR_D, "downsampling_blocks": 4}, "expected at most 3.* got 4"),
        (SAGANDiscriminator, {**CIFAR_D, "downsampling_blocks": 0}, "downsampling_blocks must be at least 1, got 0"),
        (SAGANDiscriminator, {**CIFAR_D, "downsampling_blocks": None, "widths": (8,) * 5}, "expected 4 numbers"),
    ],
)
def test_widths_that_do_not_fit(build: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(32, **arguments)
