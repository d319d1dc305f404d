"""Models nested like common public ones, and one with everything that is unusual."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from torch_sagan import SAGANGenerator
from torch_sagan.attention.layer import SelfAttention


class ResidualBlock(nn.Module):
    """As in CycleGAN: a Sequential beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels), nn.ReLU(True),
            nn.Dropout(0.5), nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class Wrapped(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def residual_generator() -> nn.Module:
    return Wrapped(
        nn.ReflectionPad2d(3), nn.Conv2d(3, 4, 7), nn.InstanceNorm2d(4), nn.ReLU(True),
        nn.Conv2d(4, 8, 3, 2, 1), nn.InstanceNorm2d(8), nn.ReLU(True),
        nn.Conv2d(8, 16, 3, 2, 1), nn.InstanceNorm2d(16), nn.ReLU(True),
        ResidualBlock(16), ResidualBlock(16), ResidualBlock(16),
        nn.ConvTranspose2d(16, 8, 3, 2, 1, 1), nn.InstanceNorm2d(8), nn.ReLU(True),
        nn.ConvTranspose2d(8, 4, 3, 2, 1, 1), nn.InstanceNorm2d(4), nn.ReLU(True),
        nn.ReflectionPad2d(3), nn.Conv2d(4, 3, 7), nn.Tanh(),
    )  # fmt: skip


def patch_discriminator() -> nn.Module:
    return Wrapped(
        nn.Conv2d(3, 4, 4, 2, 1), nn.LeakyReLU(0.2, True),
        nn.Conv2d(4, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(0.2, True),
        nn.Conv2d(8, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.LeakyReLU(0.2, True),
        nn.Conv2d(16, 32, 4, 1, 1, bias=False), nn.BatchNorm2d(32), nn.LeakyReLU(0.2, True),
        nn.Conv2d(32, 1, 4, 1, 1),
    )  # fmt: skip


def dcgan_generator() -> nn.Module:
    return Wrapped(
        nn.ConvTranspose2d(3, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(True),
        nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(True),
        nn.ConvTranspose2d(16, 3, 4, 2, 1, bias=False), nn.Tanh(),
    )  # fmt: skip


class SkipBlock(nn.Module):
    """As in pix2pix: the activation on the way down writes into what the skip connection carries."""

    def __init__(self, outer: int, inner: int, inside: nn.Module | None) -> None:
        super().__init__()
        down = [nn.LeakyReLU(0.2, True), nn.Conv2d(outer, inner, 4, 2, 1, bias=False), nn.BatchNorm2d(inner)]
        up_channels = inner if inside is None else 2 * inner
        up = [nn.ReLU(True), nn.ConvTranspose2d(up_channels, outer, 4, 2, 1, bias=False), nn.BatchNorm2d(outer)]
        self.model = nn.Sequential(*down, *([] if inside is None else [inside]), *up)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.model(x)], 1)


def unet() -> nn.Module:
    inside = SkipBlock(4, 8, SkipBlock(8, 16, SkipBlock(16, 16, None)))
    return Wrapped(nn.Conv2d(3, 4, 4, 2, 1), inside, nn.ReLU(True), nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Tanh())


def speech_discriminator() -> nn.Module:
    """As in HiFi-GAN: grouped convolutions over the samples of a waveform, and weight norm."""
    layers: list[nn.Module] = []
    for channels, kernel, stride, groups in ((1, 15, 1, 1), (8, 41, 4, 4), (16, 41, 4, 8), (32, 5, 1, 1)):
        wide = max(8, 2 * channels)
        conv = nn.Conv1d(channels, wide, kernel, stride, kernel // 2, groups=groups)
        layers += [parametrizations.weight_norm(conv), nn.LeakyReLU(0.1)]
    return Wrapped(*layers, nn.Conv1d(64, 1, 3, 1, 1))


class VolumeUNet(nn.Module):
    """As in MONAI: blocks of a convolution, a norm and a PReLU, with skip connections."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = self.block(1, 8, 1), self.block(8, 16, 2)
        self.bottom = self.block(16, 16, 1)
        self.up = nn.ConvTranspose3d(32, 8, 2, 2)
        self.head = nn.Sequential(nn.GroupNorm(4, 16), nn.Conv3d(16, 2, 1))

    def block(self, before: int, after: int, stride: int) -> nn.Module:
        return nn.Sequential(nn.Conv3d(before, after, 3, stride, 1), nn.InstanceNorm3d(after), nn.PReLU())

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x)
        coarse = self.down(fine)
        coarse = torch.cat([coarse, self.bottom(coarse)], 1)
        return self.head(torch.cat([fine, self.up(coarse)], 1))


class Pyramid(nn.Module):
    """A block that is used twice, one that returns a tuple, one that returns no feature map, and an unused one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.act = nn.ReLU()
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), self.act)
        self.narrow = nn.Conv2d(8, 4, 1)
        self.split = Split()
        self.head = nn.Linear(4, 2)
        self.spare = nn.ModuleList([nn.Conv2d(3, 3, 1)])

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        x = self.block(self.block(self.stem(x) * scale))
        a, b = self.split(self.act(self.narrow(x)))
        return self.head((a + b).mean((2, 3)))


class Split(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.flip(3)


class Restless(nn.Module):
    """Changes buffers, replaces them, and draws numbers, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.last = torch.randn(4)
        return x + torch.rand_like(x)


class Example(NamedTuple):
    make: Callable[[], nn.Module]
    after: list[str]
    shape: tuple[int, ...]


# Attention sees 32×32 positions at most: whole maps of 128×128 take a gigabyte per sample.
MODELS = {
    "residual generator": Example(
        residual_generator, ["model.9", "model.12", "model.18", "model.10.conv_block"], (3, 32, 32)
    ),
    "patch discriminator": Example(patch_discriminator, ["model.4", "model.7", "model.10"], (3, 32, 32)),
    "dcgan generator": Example(dcgan_generator, ["model.0", "model.1", "model.5"], (3, 8, 8)),
    "unet": Example(
        unet,
        ["model.0", "model.1.model.0", "model.1.model.3.model.3", "model.1.model.3", "model.1.model.4"],
        (3, 32, 32),
    ),
    "speech discriminator": Example(speech_discriminator, ["model.0", "model.3", "model.6"], (1, 256)),
    "volume unet": Example(VolumeUNet, ["stem", "down.1", "bottom.2", "up", "head.0"], (1, 8, 6, 8)),
    "whole Sequential": Example(residual_generator, ["model"], (3, 32, 32)),
    "own generator": Example(
        partial(SAGANGenerator, 16, base_channels=4, z_dim=8), ["blocks.0", "blocks.1.conv"], (8,)
    ),
}


def inserted(model: nn.Module) -> list[SelfAttention]:
    paths = [path for path, _ in model.named_modules() if path.split(".")[-1] == "inserted_attention"]
    return [model.get_submodule(path) for path in paths]


def wake(model: nn.Module) -> nn.Module:
    for layer in inserted(model):
        nn.init.ones_(layer.gamma)
    return model
