"""The residual networks against the tables of docs/variants.md: shapes are derived from the page, not from the code."""

from __future__ import annotations

import re
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

from torch_sagan import SAGANDiscriminator, SAGANGenerator, SelfAttention2d, spectral_norms
from torch_sagan.networks.blocks import PooledConv2d, UpsampledConv2d

both_kernels = pytest.mark.usefixtures("kernels")  # the branch of the CPU and that of CUDA

PAGE = (Path(__file__).parents[2] / "docs" / "variants.md").read_text(encoding="utf-8")
CLASSES = 1000

Shapes = list[tuple[int, ...]]


def documented(network: str) -> tuple[int, list[tuple[str, int, int, int]]]:
    """The number of parameters that the page states, and its rows (part, in, out, width of the map)."""
    title = re.search(rf"\*\*{network}\*\*, ([\d,]+) parameters\n\n(.*?)\n\n", PAGE, re.DOTALL)
    assert title is not None
    rows = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+)×\d+ \|$", title[2], re.MULTILINE)
    return int(title[1].replace(",", "")), [(part, int(i), int(o), int(size)) for part, i, o, size in rows]


def convolution(i: int, o: int, kernel: int) -> Shapes:
    return [(o, i, kernel, kernel), (o,)]


def shapes_of(part: str, i: int, o: int, size: int) -> Shapes:
    """The rules under the tables."""
    if part == "latent":
        return [(o * size * size, i), (o * size * size,)]
    if part == "up":
        return (
            [(CLASSES, i)] * 2 + convolution(i, o, 3) + [(CLASSES, o)] * 2 + convolution(o, o, 3) + convolution(i, o, 1)
        )
    if part == "down":
        return convolution(i, o, 3) + convolution(o, o, 3) + convolution(i, o, 1)
    if part == "last":
        return convolution(i, o, 3) + convolution(o, o, 3)
    if part == "attention":
        return [(i // 8, i, 1, 1)] * 2 + [(i // 2, i, 1, 1), (i, i // 2, 1, 1), (1,)]
    if part == "image":
        return [(i,), (i,), *convolution(i, o, 3)]
    assert part == "head"
    return [(o, i), (o,), (CLASSES, i)]


def build(network: str, **options: object) -> nn.Module:
    kind = SAGANGenerator if network == "Generator" else SAGANDiscriminator
    return kind(128, architecture="resnet", num_classes=CLASSES, **options)


@pytest.mark.parametrize(("network", "rows"), [("Generator", 8), ("Discriminator", 8)])
def test_every_weight_of_the_residual_network(network: str, rows: int) -> None:
    total, table = documented(network)
    assert len(table) == rows
    expected = Counter(shape for row in table for shape in shapes_of(*row))
    with torch.device("meta"):  # 80 million numbers need not exist
        model = build(network)
    actual = Counter(tuple(parameter.shape) for parameter in model.parameters())
    assert actual == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == total


@both_kernels
@pytest.mark.parametrize("network", ["Generator", "Discriminator"])
def test_maps_of_the_residual_network(network: str) -> None:
    """The outputs of each block and of the attention have the order and sizes of the table."""
    _, table = documented(network)
    model = build(network, base_channels=8).eval()
    seen = []
    for block in [*model.blocks, *model.attention.values()]:
        block.register_forward_hook(lambda _, __, y: seen.append((y.shape[1] * 8, y.shape[2])))
    labels = torch.tensor([3])
    model(torch.randn(1, 128), labels) if network == "Generator" else model(torch.randn(1, 3, 128, 128), labels)
    assert seen == [(o, size) for part, _, o, size in table if part in ("latent", "up", "down", "attention")]


@pytest.mark.parametrize("network", ["Generator", "Discriminator"])
def test_every_weight_is_normalized_and_starts_xavier(network: str) -> None:
    model = build(network, base_channels=8)
    normalized = set(spectral_norms(model))
    weighted = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.Embedding))
    }
    assert normalized == weighted
    for name in weighted:
        layer = model.get_submodule(name.removesuffix(".weight"))
        original = layer.parametrizations.weight.original
        fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(original)
        bound = (6 / (fan_in + fan_out)) ** 0.5
        assert original.abs().max() <= bound
        if original.numel() > 200:  # in fewer numbers the largest may lie lower
            assert original.abs().max() > 0.9 * bound
        if getattr(layer, "bias", None) is not None:
            assert not layer.bias.any()
    (attention,) = model.attention.values()
    assert isinstance(attention, SelfAttention2d)
    assert attention.pool == 2


@both_kernels
@pytest.mark.parametrize(
    ("size", "classes"),
    [
        pytest.param(*case, marks=[] if case in ((32, 3), (64, None)) else pytest.mark.exhaustive)
        for case in product((32, 64, 128, 256), (None, 3))
    ],
)
def test_sizes_forward_and_backward(size: int, classes: int | None) -> None:
    generator = SAGANGenerator(size, base_channels=4, z_dim=8, num_classes=classes, architecture="resnet")
    discriminator = SAGANDiscriminator(size, base_channels=4, num_classes=classes, architecture="resnet")
    labels = None if classes is None else torch.tensor([0, 2])
    images, g_maps = generator(torch.randn(2, 8), labels, return_attention=True)
    assert images.shape == (2, 3, size, size)
    logits, d_maps = discriminator(images, labels, return_attention=True)
    assert logits.shape == (2,)
    assert [m.shape for m in g_maps] == [(2, 1024, 256)]
    assert [m.shape for m in d_maps] == [(2, 1024, 256) if size > 32 else (2, 256, 64)]
    for layer in (*generator.attention.values(), *discriminator.attention.values()):
        nn.init.ones_(layer.gamma)
    discriminator(generator(torch.randn(2, 8), labels), labels).sum().backward()
    for name, parameter in (*generator.named_parameters(), *discriminator.named_parameters()):
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("architecture", ["dcgan", "resnet"])
def test_the_shortcut_and_the_blocks_are_the_released_codes(architecture: str) -> None:
    """One pass written out in the released code's order of operations; for dcgan, the reference's."""
    torch.manual_seed(0)
    generator = SAGANGenerator(
        16, base_channels=4, z_dim=6, num_classes=3, architecture=architecture, attention_resolutions=()
    ).double()
    discriminator = SAGANDiscriminator(
        16, base_channels=4, num_classes=3, architecture=architecture, attention_resolutions=()
    ).double()
    for norm in generator.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if name.endswith(("gamma", "beta", "bias")):
                parameter.normal_()
    generator.eval()
    discriminator.eval()
    z, labels = torch.randn(2, 6).double(), torch.tensor([2, 0])
    images = generator(z, labels)
    torch.testing.assert_close(images, released_generator(generator, z, labels, architecture), rtol=0, atol=1e-10)
    logits = discriminator(images, labels)
    expected = released_discriminator(discriminator, images, labels, architecture)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


def plain(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """A convolution that keeps the size, whatever the block's own does besides."""
    return nn.functional.conv2d(x, conv.weight, conv.bias, padding=conv.padding)


def conditional_norm(norm: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    mean, var = norm.norm.running_mean, norm.norm.running_var
    rows = []
    for sample, label in zip(x, labels, strict=True):
        scaled = (sample - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        rows.append(norm.gamma[label][:, None, None] * scaled + norm.beta[label][:, None, None])
    return torch.stack(rows)


def twice(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def half(x: torch.Tensor) -> torch.Tensor:
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def released_generator(g: nn.Module, z: torch.Tensor, labels: torch.Tensor, architecture: str) -> torch.Tensor:
    if architecture == "dcgan":
        x = z[:, :, None, None]
        for block in g.blocks:
            x = conditional_norm(block.norm, block.conv(x), labels).clamp(min=0)
        return g.to_image(x).tanh()
    x = g.blocks[0].linear(z).reshape(len(z), -1, 4, 4)
    for block in g.blocks[1:]:
        y = twice(conditional_norm(block.norm1, x, labels).clamp(min=0))
        y = conditional_norm(block.norm2, plain(block.conv1, y), labels).clamp(min=0)
        x = plain(block.shortcut, twice(x)) + plain(block.conv2, y)
    norm, _, last = g.to_image
    x = (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
    x = norm.weight[:, None, None] * x + norm.bias[:, None, None]
    return last(x.clamp(min=0)).tanh()


def released_discriminator(d: nn.Module, x: torch.Tensor, labels: torch.Tensor, architecture: str) -> torch.Tensor:
    head = d.to_logit
    if architecture == "dcgan":
        for block in d.blocks:
            y = block.conv(x)
            x = torch.where(y > 0, y, 0.1 * y)
        return projected(head.projection, x.reshape(len(x), -1), labels)
    first, *others = d.blocks
    x = half(plain(first.conv2, plain(first.conv1, x).clamp(min=0))) + plain(first.shortcut, half(x))
    for block in others:
        y = plain(block.conv2, plain(block.conv1, x.clamp(min=0)).clamp(min=0))
        x = half(plain(block.shortcut, x)) + half(y)
    x = x + head.conv2(head.conv1(x.clamp(min=0)).clamp(min=0))
    return projected(head.projection, x.clamp(min=0).sum((2, 3)), labels)


def projected(head: nn.Module, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    linear, embedding = head.linear, head.embedding
    return features @ linear.weight[0] + linear.bias + (embedding.weight[labels] * features).sum(1)


@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (3, 1)])
@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
@pytest.mark.parametrize("kind", ["pooled", "upsampled"])
def test_a_convolution_and_a_change_of_size_in_one(kind: str, size: tuple[int, int], kernel: int, padding: int) -> None:
    """The result and its gradients, first and second, at the border too, and where a row is left over."""
    conv = (PooledConv2d if kind == "pooled" else UpsampledConv2d)(3, 4, kernel, padding=padding).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)

    def two_steps(x: torch.Tensor) -> torch.Tensor:
        if kind == "pooled":
            return nn.functional.avg_pool2d(plain(conv, x), 2)
        return plain(conv, nn.functional.interpolate(x, scale_factor=2, mode="nearest"))

    results = []
    for function in (conv, two_steps):
        y = function(x)
        first = torch.autograd.grad(y.square().sum(), (x, conv.weight, conv.bias), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, conv.weight, conv.bias))
        results.append([y, *first, *second])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)
