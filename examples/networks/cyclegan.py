"""A small CycleGAN for images of 32 pixels (Zhu et al., arXiv:1703.10593), layer for layer as many people have it.

It has no attention.
"""

from __future__ import annotations

from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels), nn.ReLU(True),
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.conv_block(x)  # (B, C, H, W)
        return y


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.ReflectionPad2d(3), nn.Conv2d(3, 16, 7), nn.InstanceNorm2d(16), nn.ReLU(True),  # 0 to 3: 32×32
            nn.Conv2d(16, 32, 3, 2, 1), nn.InstanceNorm2d(32), nn.ReLU(True),  # 4 to 6: 16×16
            nn.Conv2d(32, 64, 3, 2, 1), nn.InstanceNorm2d(64), nn.ReLU(True),  # 7 to 9: 8×8
            Block(64), Block(64), Block(64),  # 10 to 12
            nn.ConvTranspose2d(64, 32, 3, 2, 1, 1), nn.InstanceNorm2d(32), nn.ReLU(True),  # 13 to 15: 16×16
            nn.ConvTranspose2d(32, 16, 3, 2, 1, 1), nn.InstanceNorm2d(16), nn.ReLU(True),  # 16 to 18: 32×32
            nn.ReflectionPad2d(3), nn.Conv2d(16, 3, 7), nn.Tanh(),
        )  # fmt: skip
        self.apply(initialize)

    def forward(self, images: Tensor) -> Tensor:
        translated: Tensor = self.model(images)  # (B, 3, 32, 32)
        return translated


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(3, 16, 4, 2, 1), nn.LeakyReLU(0.2, True),  # 0 and 1: 16×16
            nn.Conv2d(16, 32, 4, 2, 1), nn.InstanceNorm2d(32), nn.LeakyReLU(0.2, True),  # 2 to 4: 8×8
            nn.Conv2d(32, 64, 4, 1, 1), nn.InstanceNorm2d(64), nn.LeakyReLU(0.2, True),  # 5 to 7: 7×7
            nn.Conv2d(64, 1, 4, 1, 1),
        )  # fmt: skip
        self.apply(initialize)

    def forward(self, images: Tensor) -> Tensor:
        realness: Tensor = self.model(images)  # (B, 1, 6, 6), of each patch: 1 is real, 0 is not
        return realness


def initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
