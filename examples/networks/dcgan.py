"""A DCGAN for images of 32 pixels, as many people have one (Radford et al., arXiv:1511.06434). It has no attention.

It is that of PyTorch's tutorial, with half its width, one layer less in each network, and the Sigmoid at the end of D.
"""

from __future__ import annotations

from torch import Tensor, nn

Z_DIM = 100


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(Z_DIM, 128, 4, 1, 0, bias=False), nn.BatchNorm2d(128), nn.ReLU(True),  # 0 to 2: 4×4
            nn.ConvTranspose2d(128, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(True),  # 3 to 5: 8×8
            nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(True),  # 6 to 8: 16×16
            nn.ConvTranspose2d(32, 3, 4, 2, 1, bias=False), nn.Tanh(),  # 9 and 10: 32×32
        )  # fmt: skip
        self.apply(initialize)

    def forward(self, z: Tensor) -> Tensor:
        images: Tensor = self.main(z)  # (B, 3, 32, 32), from (B, 100, 1, 1)
        return images


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(3, 32, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True),  # 0 and 1: 16×16
            nn.Conv2d(32, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64), nn.LeakyReLU(0.2, True),  # 2 to 4: 8×8
            nn.Conv2d(64, 128, 4, 2, 1, bias=False), nn.BatchNorm2d(128), nn.LeakyReLU(0.2, True),  # 5 to 7: 4×4
            nn.Conv2d(128, 1, 4, 1, 0, bias=False), nn.Sigmoid(),
        )  # fmt: skip
        self.apply(initialize)

    def forward(self, images: Tensor) -> Tensor:
        probabilities: Tensor = self.main(images)  # (B, 1, 1, 1)
        return probabilities.flatten()  # (B,)


def initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
