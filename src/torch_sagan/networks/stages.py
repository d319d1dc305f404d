"""The stages of both networks: blocks in a row with attention between them, and how many, how wide and how large."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn

from torch_sagan._checks import at_least_one

__all__ = [
    "AttentionFactory",
    "Stages",
    "block_widths",
    "feature_map_sizes",
    "residual_resolutions",
    "stage_widths",
]

AttentionFactory = Callable[[int], nn.Module]  # of a number of channels

# The widest stage has 16 times the base width, as in the paper's network; only images above 128 pixels reach it.
WIDEST = 16
BASE_CHANNELS = 64


class Stages(nn.Module):
    """What both networks are: blocks in a row, and attention behind those whose feature map has one of the named sizes.

    Args:
        blocks: called as ``block(x, *labels)``.
        sizes: S of each block's feature map (B, width, S, S). It is given because that of a traced tensor is no number.
        widths: its channels.
        resolutions: which sizes get attention, behind the first block of that size.
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
        self.attention: nn.ModuleDict = nn.ModuleDict()
        for size, width in zip(sizes, widths, strict=True):
            if size in resolutions and str(size) not in self.attention:
                self.attention[str(size)] = attention(width)

    def run_stages(self, x: Tensor, maps: list[Tensor] | None, *labels: Tensor | None) -> Tensor:
        """The last feature map. Attention maps (B, N, M) are appended to ``maps``, or not computed when it is None."""
        previous = 0
        for size, block in zip(self.sizes, self.blocks, strict=True):
            x = block(x, *labels)  # (B, width, size, size)
            if size == previous or str(size) not in self.attention:
                continue
            previous = size
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


def block_widths(
    widths: Sequence[int] | None, base_channels: int | None, sizes: Sequence[int], default: Callable[[int], list[int]]
) -> list[int]:
    """The channels of the feature maps of these sizes: those that are given, or the default for a base width.

    Raises:
        ValueError: for widths together with a base width, too few or too many of them, or one below 1.
    """
    if widths is None:
        at_least_one(base_channels=base_channels)
        return default(base_channels or BASE_CHANNELS)
    if base_channels is not None:
        raise ValueError(f"expected either base_channels or widths, got both: {base_channels} and {tuple(widths)}")
    if len(widths) != len(sizes) or min(widths) < 1:
        raise ValueError(
            f"widths: expected {len(sizes)} numbers of channels, of feature maps of the sizes "
            f"{', '.join(map(str, sizes))}, got {tuple(widths)}"
        )
    return list(widths)
