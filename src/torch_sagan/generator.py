"""The generator: a latent vector in, an image out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Literal, overload

from torch import Tensor, nn

from torch_sagan.arguments import at_least_one
from torch_sagan.attention import SelfAttention2d
from torch_sagan.blocks import (
    AttentionFactory,
    Normalizer,
    UpBlock,
    attention_layers,
    feature_map_sizes,
    stage_widths,
)
from torch_sagan.spectral import spectral_norm

__all__ = ["SAGANGenerator"]


class SAGANGenerator(nn.Module):
    r"""A generator with self-attention and spectral normalisation: z (B, z_dim) -> images (B, image_channels, S, S).

    At 64 pixels these are the layers of the PyTorch implementation that most tutorials copy::

        z 128 -> 512@4 -> 256@8 -> 128@16, attention -> 64@32, attention -> 3@64, tanh

    Each stage is a transposed 4×4 convolution with spectral norm, batch norm and ReLU; the last convolution and the
    projections of the attention are not normalised. Other sizes have as many stages as they need; the first map is
    4, 5, 6 or 7 pixels wide, and widths double from ``base_channels`` beside the image up to 16 times that.

    Args:
        image_size: S, the width and height of the images: 4, 5, 6 or 7 doubled at least once.
        z_dim: length of the latent vector.
        base_channels: channels of the largest feature map.
        image_channels: channels of the images.
        architecture: ``"dcgan"``, the layers above.
        attention_resolutions: sizes of the feature maps that get attention, () for none. Default: those of 16 to 32
            pixels, or the largest map where there are none.
        attention: ``attention(channels) -> Module``. Default: :class:`SelfAttention2d`.
        spectral_norm: ``spectral_norm(module) -> module`` applied to each stage's convolution, or None for none.
        output_activation: makes the last activation. The default, tanh, gives images in [-1, 1].

    Raises:
        ValueError: for a size that cannot be built, and for attention resolutions that do not occur (the message
            lists those that do); in ``forward`` for a z of another shape.

    Source: Zhang et al., arXiv:1805.08318; layers as in heykeetae/Self-Attention-GAN.

    >>> import torch
    >>> generator = SAGANGenerator(64)
    >>> images, maps = generator(torch.randn(2, 128), return_attention=True)
    >>> images.shape, [attention.shape[1:] for attention in maps]
    (torch.Size([2, 3, 64, 64]), [torch.Size([256, 256]), torch.Size([1024, 1024])])
    """

    def __init__(
        self,
        image_size: int = 64,
        *,
        z_dim: int = 128,
        base_channels: int = 64,
        image_channels: int = 3,
        architecture: Literal["dcgan"] = "dcgan",
        attention_resolutions: Iterable[int] | None = None,
        attention: AttentionFactory | None = None,
        spectral_norm: Normalizer | None = spectral_norm,
        output_activation: Callable[[], nn.Module] = nn.Tanh,
    ) -> None:
        super().__init__()
        if architecture != "dcgan":
            raise ValueError(f"architecture must be 'dcgan', got {architecture!r}")
        at_least_one(z_dim=z_dim, base_channels=base_channels, image_channels=image_channels)
        normalize = spectral_norm or (lambda module: module)
        sizes = feature_map_sizes(image_size)
        widths = stage_widths(base_channels, len(sizes))
        if attention_resolutions is None:
            attention_resolutions = [size for size in sizes if 16 <= size <= 32] or sizes[-1:]

        self.z_dim = z_dim
        self.sizes = sizes
        self.blocks = nn.ModuleList(
            [UpBlock(z_dim, widths[0], normalize, kernel_size=sizes[0], stride=1, padding=0)]
            + [UpBlock(wide, narrow, normalize) for wide, narrow in pairwise(widths)]
        )
        self.attention = attention_layers(attention_resolutions, sizes, widths, attention or SelfAttention2d)
        self.to_image = nn.ConvTranspose2d(widths[-1], image_channels, kernel_size=4, stride=2, padding=1)
        self.output_activation = output_activation()

    @overload
    def forward(self, z: Tensor, *, return_attention: Literal[False] = False) -> Tensor: ...

    @overload
    def forward(self, z: Tensor, *, return_attention: Literal[True]) -> tuple[Tensor, list[Tensor]]: ...

    def forward(self, z: Tensor, *, return_attention: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Draw images.

        Args:
            z: (B, z_dim) or (B, z_dim, 1, 1), usually standard normal.
            return_attention: also return the attention maps.

        Returns:
            images (B, image_channels, S, S); with ``return_attention`` the pair of images and a list of maps
            (B, N, M), input side first.
        """
        if z.shape[1:] not in ((self.z_dim,), (self.z_dim, 1, 1)):
            raise ValueError(f"expected z (B, {self.z_dim}) or (B, {self.z_dim}, 1, 1), got {tuple(z.shape)}")
        maps = []
        x = z.reshape(len(z), self.z_dim, 1, 1)  # (B, z_dim, 1, 1)
        for size, block in zip(self.sizes, self.blocks, strict=True):
            x = block(x)  # (B, width, size, size)
            if str(size) in self.attention:
                layer = self.attention[str(size)]
                if return_attention:
                    x, attention = layer(x, return_attention=True)
                    maps.append(attention)  # (B, N, M)
                else:
                    x = layer(x)  # (B, width, size, size)
        images: Tensor = self.output_activation(self.to_image(x))  # (B, image_channels, S, S)
        return (images, maps) if return_attention else images
