"""The discriminator: an image in, a logit out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Literal, overload

import torch
from torch import Tensor, nn

from torch_sagan._checks import at_least_one, one_of
from torch_sagan._torch import on_device
from torch_sagan.attention.layer import SelfAttention2d
from torch_sagan.networks.blocks import (
    DCGANHead,
    DCGANProjectionHead,
    DownBlock,
    FirstResidualDownBlock,
    Normalizer,
    ResidualDownBlock,
    ResidualHead,
    spectral_norm_attention,
)
from torch_sagan.networks.labels import check_labels
from torch_sagan.networks.stages import (
    AttentionFactory,
    Stages,
    block_widths,
    feature_map_sizes,
    residual_resolutions,
    stage_widths,
)
from torch_sagan.spectral.grouped import iterate_together
from torch_sagan.spectral.registration import spectral_norm

__all__ = ["SAGANDiscriminator"]


class SAGANDiscriminator(Stages):
    r"""A discriminator with self-attention and spectral normalization: images (B, image_channels, S, S) -> logits (B,).

    ``architecture="dcgan"`` at 64 pixels has the layers of the PyTorch implementation that most tutorials copy
    (``64@32`` means 64 channels of 32×32)::

        3@64 -> 64@32 -> 128@16 -> 256@8, attention -> 512@4, attention -> 1

    Each stage is a 4×4 convolution of stride 2 with spectral norm and a leaky ReLU of slope 0.1; the last convolution,
    which spans the whole last map, and the projections of the attention are not normalized.

    ``architecture="resnet"`` is the paper's released code, at 128 pixels::

        3@128 -> 64@64 -> 128@32, attention -> 256@16 -> 512@8 -> 1024@4
              -> 1024@4 -> ReLU, sum over positions -> 1

    Each stage is a residual block (two 3×3 convolutions, mean of 2×2, a 1×1 shortcut), the attention is
    :meth:`SelfAttention2d.official`, and every weight is normalized. Weights start Xavier-uniform and biases zero,
    before they are normalized.

    Other sizes as in :class:`SAGANGenerator`. With classes, the logit also has the projection of the class on the
    features (:class:`ProjectionHead`, normalized). The features are the last map, flattened, in ``"dcgan"``, whose last
    convolution covers it whole, and its sum over positions in ``"resnet"``.

    The usual residual network for CIFAR-10 has four blocks of 128 channels, of which two halve the map:
    ``SAGANDiscriminator(32, widths=(128,) * 4, downsampling_blocks=2, num_classes=10, architecture="resnet")``.

    Args:
        image_size, base_channels, image_channels, num_classes, architecture, attention, device, dtype: as those of
            :class:`SAGANGenerator`.
        widths: channels of each block, instead of ``base_channels``, from the image on. In ``"resnet"`` the last one is
            the block at the logit, which keeps the size.
        downsampling_blocks: how many blocks of ``"resnet"`` halve the size; those that follow keep it. Default: as many
            as it takes to reach 4 to 7 pixels.
        attention_resolutions: sizes of the feature maps that get attention, () for none. Default of ``"dcgan"``: the
            last two; of ``"resnet"``: 32, or the largest below.
        spectral_norm: ``spectral_norm(module) -> module``, applied to each layer that the architecture normalizes, or
            None for no normalization, as :func:`gradient_penalty` needs it. An ``attention`` of your own is not
            changed.
        shortcut_after_relu: give the shortcuts of ``"resnet"`` their input after the ReLU, from the second block on.
            That is what a ReLU that works in place does to them in PyTorch-StudioGAN and in some of mmgeneration's
            files (``wReLUinplace``); without it such weights give other logits.

    Raises:
        ValueError, TypeError: as :class:`SAGANGenerator` does; in ``forward`` also for images of another shape.

    Source: Zhang et al., arXiv:1805.08318; layers as in heykeetae/Self-Attention-GAN (``"dcgan"``) and
    brain-research/self-attention-gan (``"resnet"``).

    >>> import torch
    >>> from torch_sagan import SAGANDiscriminator
    >>> discriminator = SAGANDiscriminator(64)
    >>> logits, maps = discriminator(torch.randn(2, 3, 64, 64), return_attention=True)
    >>> logits.shape, [attention.shape[1:] for attention in maps]
    (torch.Size([2]), [torch.Size([64, 64]), torch.Size([16, 16])])
    """

    def __init__(
        self,
        image_size: int = 64,
        *,
        base_channels: int | None = None,
        widths: Sequence[int] | None = None,
        downsampling_blocks: int | None = None,
        image_channels: int = 3,
        num_classes: int | None = None,
        architecture: Literal["dcgan", "resnet"] = "dcgan",
        attention_resolutions: Iterable[int] | None = None,
        attention: AttentionFactory | None = None,
        spectral_norm: Normalizer | None = spectral_norm,
        shortcut_after_relu: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        at_least_one(image_channels=image_channels, num_classes=num_classes, downsampling_blocks=downsampling_blocks)
        one_of(("dcgan", "resnet"), architecture=architecture)
        residual = architecture == "resnet"
        if not residual and (downsampling_blocks is not None or shortcut_after_relu):
            raise ValueError("downsampling_blocks and shortcut_after_relu are for architecture 'resnet'")
        normalize = spectral_norm or (lambda module: module)
        sizes = feature_map_sizes(image_size)[::-1]
        if residual:
            sizes = _residual_sizes(sizes, widths, downsampling_blocks)
        channels = block_widths(widths, base_channels, sizes, partial(_default_widths, len(sizes), residual))

        with on_device(device):
            if not residual:
                blocks: list[nn.Module] = [
                    DownBlock(narrow, wide, normalize) for narrow, wide in pairwise([image_channels, *channels])
                ]
                # Without the norm, the convolution would outgrow the class's part of the logit, which is normalized.
                head: nn.Module = (
                    DCGANHead(channels[-1], sizes[-1])
                    if num_classes is None
                    else DCGANProjectionHead(channels[-1], sizes[-1], num_classes, normalize)
                )
                default_resolutions = sizes[-2:]
                default_attention: AttentionFactory = SelfAttention2d
            else:
                *pairs, last = pairwise(channels)
                sizes, channels = sizes[:-1], channels[:-1]  # of the blocks that attention can follow
                blocks = [FirstResidualDownBlock(image_channels, channels[0], normalize)]
                for pair, (before, after) in zip(pairs, pairwise(sizes), strict=True):
                    down, quirk = after < before, shortcut_after_relu
                    blocks.append(ResidualDownBlock(*pair, normalize, downsample=down, shortcut_after_relu=quirk))
                head = ResidualHead(*last, num_classes, normalize, shortcut_after_relu=shortcut_after_relu)
                default_resolutions = residual_resolutions(sizes)
                default_attention = partial(spectral_norm_attention, spectral_norm=normalize)

            if attention_resolutions is None:
                attention_resolutions = default_resolutions
            super().__init__(
                blocks, sizes, channels, attention_resolutions, attention or default_attention, num_classes
            )
            self.image_shape: tuple[int, int, int] = (image_channels, image_size, image_size)
            self.to_logit: nn.Module = head
        if dtype is not None:
            self.to(dtype)

    @overload
    def forward(
        self, images: Tensor, labels: Tensor | None = None, *, return_attention: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def forward(
        self, images: Tensor, labels: Tensor | None = None, *, return_attention: Literal[True]
    ) -> tuple[Tensor, list[Tensor]]: ...

    # Not keyword-only: PyTorch's older ONNX exporter passes every argument by position.
    def forward(
        self, images: Tensor, labels: Tensor | None = None, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Compute the logits of images.

        Args:
            images: (B, image_channels, S, S), in the range of the generator's images, [-1, 1] by default.
            labels: (B,) classes from 0 to num_classes - 1, only for a conditional network.
            return_attention: also return the attention maps.

        Returns:
            logits (B,), for a batch of one too; with ``return_attention`` the pair of logits and a list of maps
            (B, N, M), input side first.
        """
        if images.shape[1:] != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(f"expected images (B, {expected}), got {tuple(images.shape)}")
        check_labels(labels, self.num_classes, images, once=True)
        iterate_together(self)
        maps: list[Tensor] | None = [] if return_attention else None
        x = self.run_stages(images, maps)  # the last feature map
        logits = self.to_logit(x, labels)  # (B,)
        return logits if maps is None else (logits, maps)


def _residual_sizes(halved: list[int], widths: Sequence[int] | None, downsampling_blocks: int | None) -> list[int]:
    """The size of each block's feature map, that of the block at the logit included, from the sizes of all halvings."""
    n_blocks = len(widths) if widths is not None else len(halved) + 1
    if downsampling_blocks is None:
        return [*halved, halved[-1]]
    if downsampling_blocks > len(halved) or downsampling_blocks >= n_blocks:
        raise ValueError(
            f"downsampling_blocks: expected at most {min(len(halved), n_blocks - 1)}, by image size and number "
            f"of blocks, of which the last keeps the size, got {downsampling_blocks}"
        )
    halved = halved[:downsampling_blocks]
    return halved + halved[-1:] * (n_blocks - downsampling_blocks)


def _default_widths(n_blocks: int, residual: bool, base_channels: int) -> list[int]:
    """Those of :func:`stage_widths`, reversed; the block at the logit is as wide as the one before."""
    widths = stage_widths(base_channels, n_blocks - residual)[::-1]
    return [*widths, widths[-1]] if residual else widths
