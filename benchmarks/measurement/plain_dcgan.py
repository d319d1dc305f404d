"""A class-conditional DCGAN as one writes it in forty lines, with PyTorch's spectral norm in D: a baseline.

Radford et al., arXiv:1511.06434, for 28 pixels: transposed convolutions, batch norm and ReLU in G, strided convolutions
and leaky ReLU in D. The class is a one-hot vector beside z, and as many constant maps beside the image. Hinge loss,
Adam.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

Z_DIM, WIDTH = 100, 32


class Generator(nn.Module):
    """z (B, 100) and classes (B,) -> images (B, 1, 28, 28) in [-1, 1]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(Z_DIM + classes, 2 * WIDTH, 7, bias=False), nn.BatchNorm2d(2 * WIDTH), nn.ReLU(),
            nn.ConvTranspose2d(2 * WIDTH, WIDTH, 4, 2, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU(),
            nn.ConvTranspose2d(WIDTH, 1, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip
        self.classes = classes

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        joined = torch.cat([z, F.one_hot(labels, self.classes)], 1)  # (B, 100 + K)
        images: Tensor = self.layers(joined[:, :, None, None])  # (B, 1, 28, 28)
        return images


class Discriminator(nn.Module):
    """Images (B, 1, 28, 28) and classes (B,) -> logits (B,)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            spectral_norm(nn.Conv2d(1 + classes, WIDTH, 4, 2, 1)), nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(WIDTH, 2 * WIDTH, 4, 2, 1)), nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(2 * WIDTH, 1, 7)), nn.Flatten(0),
        )  # fmt: skip
        self.classes = classes

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        maps = F.one_hot(labels, self.classes)[:, :, None, None].expand(-1, -1, *images.shape[2:])
        logits: Tensor = self.layers(torch.cat([images, maps], 1))  # (B,)
        return logits


def train(batches: Iterator[tuple[Tensor, Tensor]], classes: int, lr: float, seed: int) -> Iterator[Generator]:
    """G after each step, on batches of images (B, 1, 28, 28) in [-1, 1] and their classes (B,)."""
    torch.manual_seed(seed)
    g, d = Generator(classes), Discriminator(classes)
    g_adam, d_adam = (torch.optim.Adam(network.parameters(), lr, betas=(0.0, 0.9)) for network in (g, d))
    for real, labels in batches:
        fake = g(torch.randn(len(real), Z_DIM), labels)
        loss = F.relu(1 - d(real, labels)).mean() + F.relu(1 + d(fake.detach(), labels)).mean()
        d_adam.zero_grad()
        loss.backward()
        d_adam.step()
        g_adam.zero_grad()
        (-d(fake, labels).mean()).backward()
        g_adam.step()
        yield g
