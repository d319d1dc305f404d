"""A small CycleGAN for images of 32 pixels (Zhu et al., arXiv:1703.10593), layer for layer as many people have it.

It has no attention. Of the paper's training it leaves out the pool of earlier images and the decay of the rates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss

BATCH = 4


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
        self.apply(initialise)

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
        self.apply(initialise)

    def forward(self, images: Tensor) -> Tensor:
        realness: Tensor = self.model(images)  # (B, 1, 6, 6), of each patch: 1 is real, 0 is not
        return realness


def initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)


def train(to_b: nn.Module, to_a: nn.Module, is_b: nn.Module, is_a: nn.Module, a: Tensor, b: Tensor, steps: int) -> None:
    """Train the generators A -> B and B -> A and the discriminators of B and A on images (N, 3, 32, 32) in [-1, 1]."""
    g_adam, d_adam = (
        torch.optim.Adam(nn.ModuleList(pair).parameters(), lr=2e-4, betas=(0.5, 0.999), fused=True)
        for pair in ((to_b, to_a), (is_b, is_a))
    )
    for _ in range(steps):
        real_a, real_b = (images[torch.randint(len(images), (BATCH,))] for images in (a, b))  # (B, 3, 32, 32)
        # Instance norm keeps the images of a batch apart, so two batches can share a pass.
        fake_b, same_b = to_b(torch.cat([real_a, real_b])).chunk(2)
        fake_a, same_a = to_a(torch.cat([real_b, real_a])).chunk(2)
        fooling = (is_b(fake_b) - 1).square().mean() + (is_a(fake_a) - 1).square().mean()
        cycle = l1_loss(to_a(fake_b), real_a) + l1_loss(to_b(fake_a), real_b)
        identity = l1_loss(same_a, real_a) + l1_loss(same_b, real_b)
        g_adam.zero_grad()
        (fooling + 10 * cycle + 5 * identity).backward()
        g_adam.step()
        d_adam.zero_grad()
        for judge, real, fake in ((is_b, real_b, fake_b), (is_a, real_a, fake_a)):
            of_real, of_fake = judge(torch.cat([real, fake.detach()])).chunk(2)  # (B, 1, 6, 6)
            loss = (of_real - 1).square().mean() + of_fake.square().mean()
            (loss / 2).backward()
        d_adam.step()
