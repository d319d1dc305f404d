"""The blocks of the two networks, and functions for the number, width and size of a network's blocks.

Up blocks and heads are called as ``block(x, labels)``, with labels None in a network without classes, and down blocks
as ``block(x)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from torch_sagan.attention.layer import SelfAttention2d
from torch_sagan.networks.conditional import ConditionalBatchNorm2d, ProjectionHead

__all__ = [
    "UPSAMPLING",
    "DCGANHead",
    "DCGANProjectionHead",
    "DownBlock",
    "FirstResidualDownBlock",
    "LatentBlock",
    "PooledConv2d",
    "ResidualDownBlock",
    "ResidualHead",
    "ResidualUpBlock",
    "Stages",
    "UpBlock",
    "UpsampledConv2d",
    "feature_map_sizes",
    "residual_resolutions",
    "spectral_norm_attention",
    "stage_widths",
    "to_image",
]

Normalizer = Callable[[nn.Module], nn.Module]
AttentionFactory = Callable[[int], nn.Module]
Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)

# The widest stage has 16 times the base width, as in the paper's network; only images above 128 pixels reach it.
WIDEST = 16


# The DCGAN blocks of the PyTorch reference.


class UpBlock(nn.Module):
    """A convolution that makes the map larger, batch norm, ReLU."""

    def __init__(
        self, conv: nn.Conv2d | nn.ConvTranspose2d, num_classes: int | None, spectral_norm: Normalizer
    ) -> None:
        super().__init__()
        channels = conv.out_channels
        self.conv: nn.Module = spectral_norm(conv)
        self.norm: nn.Module = _batch_norm(channels, num_classes)
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

    def __init__(self, in_channels: int, out_channels: int, num_classes: int | None, spectral_norm: Normalizer) -> None:
        super().__init__()
        self.norm1: nn.Module = _batch_norm(in_channels, num_classes)
        self.conv1: nn.Module = spectral_norm(_xavier(UpsampledConv2d(in_channels, out_channels, 3, padding=1)))
        self.norm2: nn.Module = _batch_norm(out_channels, num_classes)
        self.conv2: nn.Module = spectral_norm(_conv3x3(out_channels, out_channels))
        self.shortcut: nn.Module = spectral_norm(_xavier(UpsampledConv2d(in_channels, out_channels, 1)))

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        y = self.conv1(F.relu(_apply_norm(self.norm1, x, labels)))  # (B, out, 2H, 2W)
        y = self.conv2(F.relu(_apply_norm(self.norm2, y, labels)))  # (B, out, 2H, 2W)
        return y + self.shortcut(x)  # (B, out, 2H, 2W)


class ResidualDownBlock(nn.Module):
    """Half the size: ReLU, 3×3, ReLU, 3×3, mean of 2×2. The shortcut is 1×1, mean of 2×2."""

    def __init__(self, in_channels: int, out_channels: int, spectral_norm: Normalizer) -> None:
        super().__init__()
        self.conv1: nn.Module = spectral_norm(_conv3x3(in_channels, out_channels))
        self.conv2: nn.Module = spectral_norm(_xavier(PooledConv2d(out_channels, out_channels, 3, padding=1)))
        self.shortcut: nn.Module = spectral_norm(_xavier(PooledConv2d(in_channels, out_channels, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(F.relu(x)))) + self.shortcut(x)  # (B, out, H/2, W/2)


class FirstResidualDownBlock(ResidualDownBlock):
    """Half the size of an image: 3×3, ReLU, 3×3, mean of 2×2. The shortcut is 1×1, mean of 2×2.

    There is no ReLU in front, because it would set an image's negative values to zero.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(x))) + self.shortcut(x)  # (B, out, H/2, W/2)


class ResidualHead(nn.Module):
    """The logit of a feature map: a residual block of the same size and width, ReLU, and the sum over positions in a
    :class:`torch_sagan.ProjectionHead`."""

    def __init__(self, channels: int, num_classes: int | None, spectral_norm: Normalizer) -> None:
        super().__init__()
        self.conv1: nn.Module = spectral_norm(_conv3x3(channels, channels))
        self.conv2: nn.Module = spectral_norm(_conv3x3(channels, channels))
        self.projection: ProjectionHead = ProjectionHead(channels, num_classes, spectral_norm=spectral_norm)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        x = x + self.conv2(F.relu(self.conv1(F.relu(x))))  # (B, C, H, W)
        return self.projection(F.relu(x).sum(dim=(2, 3)), labels)  # (B,)


def spectral_norm_attention(channels: int, spectral_norm: Normalizer) -> SelfAttention2d:
    """The layer of the paper's released code, its projections Xavier-uniform and normalized."""
    layer = SelfAttention2d.official(channels)
    for name in ("query", "key", "value", "out"):
        projection = getattr(layer, name)
        nn.init.xavier_uniform_(projection.weight)
        setattr(layer, name, spectral_norm(projection))
    return layer


def to_image(in_channels: int, image_channels: int, spectral_norm: Normalizer) -> nn.Sequential:
    """Batch norm, ReLU, 3×3 to the image."""
    return nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU(), spectral_norm(_conv3x3(in_channels, image_channels)))


# Sizes, widths and attention of the stages.


class Stages(nn.Module):
    """What both networks are: blocks in a row, and attention behind those whose feature map has one of the named sizes.

    Args:
        blocks: called as ``block(x, *labels)``.
        sizes: S of each block's feature map (B, width, S, S). It is given because that of a traced tensor is no number.
        widths: its channels.
        resolutions: which sizes get attention.
        attention: ``attention(channels) -> Module``.
        num_classes: classes of a conditional network, or None.

    Raises:
        ValueError: for a resolution that does not occur; the message lists those that do.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        sizes: Sequence[int],
        widths: Sequence[int],
        resolutions: Iterable[int],
        attention: AttentionFactory,
        num_classes: int | None,
    ) -> None:
        super().__init__()
        resolutions = tuple(resolutions)
        unknown = [resolution for resolution in resolutions if resolution not in sizes]
        if unknown:
            raise ValueError(
                f"attention_resolutions {unknown} do not occur: its feature maps have the sizes {list(sizes)}"
            )
        self.num_classes = num_classes
        self.sizes: list[int] = list(sizes)
        self.blocks: nn.ModuleList = nn.ModuleList(blocks)
        self.attention: nn.ModuleDict = nn.ModuleDict(
            {str(size): attention(width) for size, width in zip(sizes, widths, strict=True) if size in resolutions}
        )

    def run_stages(self, x: Tensor, maps: list[Tensor] | None, *labels: Tensor | None) -> Tensor:
        """The last feature map. Attention maps (B, N, M) are appended to ``maps``, or not computed when it is None."""
        for size, block in zip(self.sizes, self.blocks, strict=True):
            x = block(x, *labels)  # (B, width, size, size)
            if str(size) not in self.attention:
                continue
            if maps is None:
                x = self.attention[str(size)](x)  # (B, width, size, size)
            else:
                x, attention_map = self.attention[str(size)](x, return_attention=True)  # and (B, N, M)
                maps.append(attention_map)
        return x


def feature_map_sizes(image_size: int) -> list[int]:
    """The sizes of the feature maps between the latent and the image, smallest first.

    >>> feature_map_sizes(64)
    [4, 8, 16, 32]
    >>> feature_map_sizes(28)
    [7, 14]

    Raises:
        ValueError: when the image size is not 4, 5, 6 or 7 times a power of two (2 at least).
    """
    sizes: list[int] = []
    size = image_size
    while size > 7 and size % 2 == 0:
        size //= 2
        sizes.insert(0, size)
    if not sizes or size not in (4, 5, 6, 7):
        raise ValueError(
            "image_size must be 4, 5, 6 or 7 doubled at least once (8, 10, 12, 14, 16, ... 28, 32, 48, 64, 96, 128, "
            f"256, ...), got {image_size}"
        )
    return sizes


def stage_widths(base_channels: int, n_stages: int) -> list[int]:
    """The channels of each feature map, smallest map first: the base width next to the image, twice as many in each
    smaller map, at most 16 times the base width.

    >>> stage_widths(64, 4)
    [512, 256, 128, 64]
    """
    return [base_channels * min(2**i, WIDEST) for i in reversed(range(n_stages))]


def residual_resolutions(sizes: Iterable[int]) -> list[int]:
    """Where the residual networks have attention: at 32 pixels, or at the largest feature map below."""
    return [max(size for size in sizes if size <= 32)]


def _batch_norm(channels: int, num_classes: int | None) -> nn.Module:
    return nn.BatchNorm2d(channels) if num_classes is None else ConditionalBatchNorm2d(channels, num_classes)


def _apply_norm(norm: nn.Module, x: Tensor, labels: Tensor | None) -> Tensor:
    return norm(x) if labels is None else norm(x, labels)


def _conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return _xavier(nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1))


def _xavier(layer: Layer) -> Layer:
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
