"""The discriminator: an image in, a logit out."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Literal, overload

from torch import Tensor, nn

from torch_sagan.arguments import at_least_one
from torch_sagan.attention import SelfAttention2d
from torch_sagan.blocks import (
    AttentionFactory,
    DownBlock,
    Normalizer,
    attention_layers,
    feature_map_sizes,
    stage_widths,
)
from torch_sagan.spectral import spectral_norm

__all__ = ["SAGANDiscriminator"]


class SAGANDiscriminator(nn.Module):
    r"""A discriminator with self-attention and spectral normalisation: images (B, image_channels, S, S) -> logits (B,).

    At 64 pixels these are the layers of the PyTorch implementation that most tutorials copy::

        3@64 -> 64@32 -> 128@16 -> 256@8, attention -> 512@4, attention -> 1

    Each stage is a 4×4 convolution of stride 2 with spectral norm and a leaky ReLU of slope 0.1; the last convolution,
    which spans the whole last map, and the projections of the attention are not normalised. Other sizes as in
    :class:`SAGANGenerator`.

    Args:
        image_size: S, the width and height of the images: 4, 5, 6 or 7 doubled at least once.
        base_channels: channels of the largest feature map.
        image_channels: channels of the images.
        architecture: ``"dcgan"``, the layers above.
        attention_resolutions: sizes of the feature maps that get attention, () for none. Default: the last two.
        attention: ``attention(channels) -> Module``. Default: :class:`SelfAttention2d`.
        spectral_norm: ``spectral_norm(module) -> module`` applied to each stage's convolution, or None for none
            (as a gradient penalty wants it).

    Raises:
        ValueError: for a size that cannot be built, and for attention resolutions that do not occur (the message
            lists those that do); in ``forward`` for images of another shape.

    Source: Zhang et al., arXiv:1805.08318; layers as in heykeetae/Self-Attention-GAN.

    >>> import torch
    >>> discriminator = SAGANDiscriminator(64)
    >>> logits, maps = discriminator(torch.randn(2, 3, 64, 64), return_attention=True)
    >>> logits.shape, [attention.shape[1:] for attention in maps]
    (torch.Size([2]), [torch.Size([64, 64]), torch.Size([16, 16])])
    """

    def __init__(
        self,
        image_size: int = 64,
        *,
        base_channels: int = 64,
        image_channels: int = 3,
        architecture: Literal["dcgan"] = "dcgan",
        attention_resolutions: Iterable[int] | None = None,
        attention: AttentionFactory | None = None,
        spectral_norm: Normalizer | None = spectral_norm,
    ) -> None:
        super().__init__()
        if architecture != "dcgan":
            raise ValueError(f"architecture must be 'dcgan', got {architecture!r}")
        at_least_one(base_channels=base_channels, image_channels=image_channels)
        normalize = spectral_norm or (lambda module: module)
        sizes = feature_map_sizes(image_size)[::-1]
        widths = stage_widths(base_channels, len(sizes))[::-1]
        if attention_resolutions is None:
            attention_resolutions = sizes[-2:]

        self.image_shape = (image_channels, image_size, image_size)
        self.sizes = sizes
        self.blocks = nn.ModuleList(
            DownBlock(narrow, wide, normalize) for narrow, wide in pairwise([image_channels, *widths])
        )
        self.attention = attention_layers(attention_resolutions, sizes, widths, attention or SelfAttention2d)
        self.to_logit = nn.Conv2d(widths[-1], 1, kernel_size=sizes[-1])

    @overload
    def forward(self, images: Tensor, *, return_attention: Literal[False] = False) -> Tensor: ...

    @overload
    def forward(self, images: Tensor, *, return_attention: Literal[True]) -> tuple[Tensor, list[Tensor]]: ...

    def forward(self, images: Tensor, *, return_attention: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Judge images.

        Args:
            images: (B, image_channels, S, S), in the range of the generator's.
            return_attention: also return the attention maps.

        Returns:
            logits (B,), for a batch of one too; with ``return_attention`` the pair of logits and a list of maps
            (B, N, M), input side first.
        """
        if images.shape[1:] != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(f"expected images (B, {expected}), got {tuple(images.shape)}")
        maps = []
        x = images
        for size, block in zip(self.sizes, self.blocks, strict=True):
            x = block(x)  # (B, width, size, size)
            if str(size) in self.attention:
                layer = self.attention[str(size)]
                if return_attention:
                    x, attention = layer(x, return_attention=True)
                    maps.append(attention)  # (B, N, M)
                else:
                    x = layer(x)  # (B, width, size, size)
        logits: Tensor = self.to_logit(x).flatten()  # (B,)
        return (logits, maps) if return_attention else logits
