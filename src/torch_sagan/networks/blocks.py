"""The blocks of the two networks.

Up blocks and heads are called as ``block(x, labels)``, with labels None in a network without classes, and down blocks
as ``block(x)``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from torch_sagan.attention.layer import SelfAttention2d
from torch_sagan.networks.conditional import ProjectionHead

__all__ = [
    "UPSAMPLING",
    "BatchNormFactory",
    "DCGANHead",
    "DCGANProjectionHead",
    "DownBlock",
    "FirstResidualDownBlock",
    "LatentBlock",
    "Normalizer",
    "PooledConv2d",
    "ResidualDownBlock",
    "ResidualHead",
    "ResidualUpBlock",
    "UpBlock",
    "UpsampledConv2d",
    "spectral_norm_attention",
    "to_image",
]

Normalizer = Callable[[nn.Module], nn.Module]
BatchNormFactory = Callable[[int], nn.Module]  # of a number of channels; called as norm(x), or norm(x, labels)
Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


# The DCGAN blocks of the PyTorch reference.


class UpBlock(nn.Module):
    """A convolution that makes the map larger, batch norm, ReLU."""

    def __init__(
        self, conv: nn.Conv2d | nn.ConvTranspose2d, batch_norm: BatchNormFactory, spectral_norm: Normalizer
    ) -> None:
        super().__init__()
        channels = conv.out_channels
        self.conv: nn.Module = spectral_norm(conv)
        self.norm: nn.Module = batch_norm(channels)
        self.activation: nn.Module = nn.ReLU()

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        return self.activation(_apply_norm(self.norm, self.conv(x), labels))  # (B, out, 2H, 2W)


class DownBlock(nn.Module):
    """Half the size: 4×4 convolution of stride 2, leaky ReLU of slope 0.1."""

    def __init__(self, in_channels: int, out_channels: int, spectral_norm: Normalizer) -> None:
        super().__init__()
        self.conv: nn.Module = spectral_norm(nn.Conv2d(in_channels, out_channels, kernel_size=4, stride=2, padding=1))
        self.activation: nn.Module = nn.LeakyReLU(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.conv(x))  # (B, out, H/2, W/2)


class DCGANHead(nn.Module):
    """The logit of a feature map: a convolution over all of it, not normalized, as in the PyTorch reference."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.conv: nn.Module = nn.Conv2d(channels, 1, kernel_size=size)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        return self.conv(x).flatten()  # (B,)


class DCGANProjectionHead(nn.Module):
    """The logit of a feature map with a class: a :class:`torch_sagan.ProjectionHead` of all its values, flattened.

    Its linear part is the convolution of :class:`DCGANHead`, normalized; the class has as many weights.
    """

    def __init__(self, channels: int, size: int, num_classes: int, spectral_norm: Normalizer) -> None:
        super().__init__()
        features = channels * size * size
        self.projection: ProjectionHead = ProjectionHead(features, num_classes, spectral_norm=spectral_norm)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        return self.projection(x.flatten(1), labels)  # (B,)


# The residual blocks of the paper's released code. Weights start Xavier-uniform, biases zero, before normalization.


class LatentBlock(nn.Module):
    """The latent (B, z_dim, 1, 1) to the first feature map, by a linear layer."""

    def __init__(self, z_dim: int, out_channels: int, size: int, spectral_norm: Normalizer) -> None:
        super().__init__()
        self.shape: tuple[int, int, int] = (out_channels, size, size)
        self.linear: nn.Module = spectral_norm(_xavier(nn.Linear(z_dim, out_channels * size * size)))

    def forward(self, z: Tensor, labels: Tensor | None) -> Tensor:
        x = self.linear(z.flatten(1))  # (B, out · size²)
        return x.view(x.shape[0], *self.shape)  # (B, out, size, size)


# A convolution and the change of size beside it are one convolution of a kernel that is wider by one. It does less than
# half of the multiplications, and on a GPU the two other passes over the feature map took a third of a training step.


class UpsampledConv2d(nn.Conv2d):
    """Nearest ×2, then a convolution that keeps the size: a transposed convolution of stride 2.

    A pixel is repeated in 2×2 places, so each weight of the wider kernel is the sum of those that meet it there.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = 4 * F.avg_pool2d(self.weight, 2, stride=1, padding=1)  # (out, in, k + 1, k + 1)
        weight = weight.flip(2, 3).transpose(0, 1)  # (in, out, k + 1, k + 1)
        padding = self.kernel_size[0] // 2
        return F.conv_transpose2d(x, weight, self.bias, stride=2, padding=padding)  # (B, out, 2H, 2W)


# How a DCGAN's stage doubles its map, (in, out) -> convolution: both are one transposed 4×4 convolution of stride 2.
UPSAMPLING: dict[str, Callable[[int, int], nn.Conv2d | nn.ConvTranspose2d]] = {
    "transposed": partial(nn.ConvTranspose2d, kernel_size=4, stride=2, padding=1),
    "nearest": partial(UpsampledConv2d, kernel_size=3, padding=1),
}


class PooledConv2d(nn.Conv2d):
    """A convolution that keeps the size, then the mean of 2×2: one of stride 2 with the mean of four shifts."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.avg_pool2d(self.weight, 2, stride=1, padding=1)  # (out, in, k + 1, k + 1)
        return F.conv2d(x, weight, self.bias, stride=2, padding=self.padding)  # (B, out, H // 2, W // 2)


class ResidualUpBlock(nn.Module):
    """Twice the size: norm, ReLU, nearest ×2, 3×3, norm, ReLU, 3×3. The shortcut is nearest ×2, 1×1."""

    def __init__(
        self, in_channels: int, out_channels: int, batch_norm: BatchNormFactory, spectral_norm: Normalizer
    ) -> None:
        super().__init__()
        self.norm1: nn.Module = batch_norm(in_channels)
        self.conv1: nn.Module = spectral_norm(_xavier(UpsampledConv2d(in_channels, out_channels, 3, padding=1)))
        self.norm2: nn.Module = batch_norm(out_channels)
        self.conv2: nn.Module = spectral_norm(_conv3x3(out_channels, out_channels))
        self.shortcut: nn.Module = spectral_norm(_xavier(UpsampledConv2d(in_channels, out_channels, 1)))

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        y = self.conv1(F.relu(_apply_norm(self.norm1, x, labels)))  # (B, out, 2H, 2W)
        y = self.conv2(F.relu(_apply_norm(self.norm2, y, labels)))  # (B, out, 2H, 2W)
        return y + self.shortcut(x)  # (B, out, 2H, 2W)


class ResidualDownBlock(nn.Module):
    """Half the size: ReLU, 3×3, ReLU, 3×3, mean of 2×2. The shortcut is 1×1, mean of 2×2.

    Without ``downsample`` the size stays, no mean is taken, and where the width stays, too, the shortcut is x itself.
    With ``shortcut_after_relu`` the shortcut gets what the first ReLU returns: in networks whose ReLU works in place,
    nothing else is left of x by then.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        spectral_norm: Normalizer,
        *,
        downsample: bool = True,
        shortcut_after_relu: bool = False,
    ) -> None:
        super().__init__()
        last = PooledConv2d if downsample else nn.Conv2d
        self.shortcut_after_relu = shortcut_after_relu
        self.conv1: nn.Module = spectral_norm(_conv3x3(in_channels, out_channels))
        self.conv2: nn.Module = spectral_norm(_xavier(last(out_channels, out_channels, 3, padding=1)))
        self.shortcut: nn.Module = nn.Identity()
        if downsample or in_channels != out_channels:
            self.shortcut = spectral_norm(_xavier(last(in_channels, out_channels, 1)))

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(x)  # (B, in, H, W)
        y = self.conv2(F.relu(self.conv1(activated)))  # (B, out, H/2, W/2), or (B, out, H, W)
        return y + self.shortcut(activated if self.shortcut_after_relu else x)


class FirstResidualDownBlock(ResidualDownBlock):
    """Half the size of an image: 3×3, ReLU, 3×3, mean of 2×2. The shortcut is 1×1, mean of 2×2.

    There is no ReLU in front, because it would set an image's negative values to zero.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(x))) + self.shortcut(x)  # (B, out, H/2, W/2)


class ResidualHead(ResidualDownBlock):
    """The logit of a feature map: a residual block of the same size, ReLU, and the sum over positions in a
    :class:`torch_sagan.ProjectionHead`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_classes: int | None,
        spectral_norm: Normalizer,
        *,
        shortcut_after_relu: bool = False,
    ) -> None:
        super().__init__(
            in_channels, out_channels, spectral_norm, downsample=False, shortcut_after_relu=shortcut_after_relu
        )
        self.projection: ProjectionHead = ProjectionHead(out_channels, num_classes, spectral_norm=spectral_norm)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        x = super().forward(x)  # (B, out, H, W)
        return self.projection(F.relu(x).sum(dim=(2, 3)), labels)  # (B,)


def spectral_norm_attention(channels: int, spectral_norm: Normalizer) -> SelfAttention2d:
    """The layer of the paper's released code, its projections Xavier-uniform and normalized."""
    layer = SelfAttention2d.official(channels)
    for name in ("query", "key", "value", "out"):
        projection = getattr(layer, name)
        nn.init.xavier_uniform_(projection.weight)
        setattr(layer, name, spectral_norm(projection))
    return layer


def to_image(in_channels: int, image_channels: int, spectral_norm: Normalizer, *, norm_eps: float) -> nn.Sequential:
    """Batch norm, ReLU, 3×3 to the image."""
    norm = nn.BatchNorm2d(in_channels, eps=norm_eps)
    return nn.Sequential(norm, nn.ReLU(), spectral_norm(_conv3x3(in_channels, image_channels)))


def _apply_norm(norm: nn.Module, x: Tensor, labels: Tensor | None) -> Tensor:
    return norm(x) if labels is None else norm(x, labels)


def _conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return _xavier(nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1))


def _xavier(layer: Layer) -> Layer:
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
