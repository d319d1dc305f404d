"""The up and down blocks that the networks are stacked from, and the plan of the stack."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn

__all__ = ["DownBlock", "UpBlock", "attention_layers", "feature_map_sizes", "stage_widths"]

Normalizer = Callable[[nn.Module], nn.Module]
AttentionFactory = Callable[[int], nn.Module]

# The widest stage has 16 times the base width, as in the paper's network; only images above 128 pixels reach it.
WIDEST = 16


class UpBlock(nn.Module):
    """Transposed 4×4 convolution, batch norm, ReLU: twice the size. With ``kernel_size=k, stride=1, padding=0`` the
    1×1 latent becomes a k×k map."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        normalize: Normalizer,
        *,
        kernel_size: int = 4,
        stride: int = 2,
        padding: int = 1,
    ) -> None:
        super().__init__()
        self.conv = normalize(nn.ConvTranspose2d(in_channels, out_channels, kernel_size, stride, padding))
        self.norm = nn.BatchNorm2d(out_channels)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.norm(self.conv(x)))  # (B, out, 2H, 2W)
        return y


class DownBlock(nn.Module):
    """4×4 convolution of stride 2, leaky ReLU of slope 0.1: half the size."""

    def __init__(self, in_channels: int, out_channels: int, normalize: Normalizer) -> None:
        super().__init__()
        self.conv = normalize(nn.Conv2d(in_channels, out_channels, kernel_size=4, stride=2, padding=1))
        self.activation = nn.LeakyReLU(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.conv(x))  # (B, out, H/2, W/2)
        return y


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
    """The channels of each feature map, smallest map first: the base width next to the image, doubled at each stage.

    >>> stage_widths(64, 4)
    [512, 256, 128, 64]
    """
    return [base_channels * min(2**i, WIDEST) for i in reversed(range(n_stages))]


def attention_layers(
    resolutions: Iterable[int], sizes: Sequence[int], widths: Sequence[int], make: AttentionFactory
) -> nn.ModuleDict:
    """One attention layer for each of the named resolutions, under the resolution's name.

    Raises:
        ValueError: for a resolution that does not occur; the message lists those that do.
    """
    resolutions = tuple(resolutions)
    unknown = [resolution for resolution in resolutions if resolution not in sizes]
    if unknown:
        raise ValueError(f"attention_resolutions {unknown} do not occur: its feature maps have the sizes {list(sizes)}")
    return nn.ModuleDict(
        {str(size): make(width) for size, width in zip(sizes, widths, strict=True) if size in resolutions}
    )
