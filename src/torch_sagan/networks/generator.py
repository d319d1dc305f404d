"""The generator: a latent vector in, an image out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from torch_sagan._checks import at_least_one, one_of
from torch_sagan._torch import on_device
from torch_sagan.attention.layer import SelfAttention2d
from torch_sagan.networks.blocks import (
    UPSAMPLING,
    LatentBlock,
    Normalizer,
    ResidualUpBlock,
    UpBlock,
    spectral_norm_attention,
    to_image,
)
from torch_sagan.networks.conditional import ConditionalBatchNorm2d
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

__all__ = ["SAGANGenerator"]


class SAGANGenerator(Stages):
    r"""A generator with self-attention and spectral normalization: z (B, z_dim) -> images (B, image_channels, S, S).

    ``architecture="dcgan"`` at 64 pixels has the layers of the PyTorch implementation that most tutorials copy
    (``512@4`` means 512 channels of 4×4)::

        z 128 -> 512@4 -> 256@8 -> 128@16, attention -> 64@32, attention -> 3@64, tanh

    Each stage is a transposed 4×4 convolution with spectral norm, batch norm and ReLU; the last convolution and the
    projections of the attention are not normalized.

    ``architecture="resnet"`` is the paper's released code, at 128 pixels::

        z 128 -> 1024@4 -> 1024@8 -> 512@16 -> 256@32, attention
              -> 128@64 -> 64@128 -> 3@128, tanh

    Each stage is a residual block (nearest ×2, two 3×3 convolutions, a 1×1 shortcut), the attention is
    :meth:`SelfAttention2d.official`, and every weight is normalized. Weights start Xavier-uniform and biases zero,
    before they are normalized.

    Other sizes have as many stages as they need. The first map is 4, 5, 6 or 7 pixels wide. The map next to the image
    has ``base_channels`` channels, and each map before it twice as many, up to 16 times ``base_channels``. With
    ``widths`` the channels are given one by one. The usual residual network for CIFAR-10 is 256 channels wide
    throughout: ``SAGANGenerator(32, widths=(256,) * 4, num_classes=10, architecture="resnet")``.

    Args:
        image_size: S, the width and height of the images: 4, 5, 6 or 7 doubled at least once.
        z_dim: length of the latent vector.
        base_channels: channels of the largest feature map. Default: 64.
        widths: channels of each feature map, smallest map first, instead of ``base_channels``. In ``"resnet"`` the last
            map is as large as the image.
        image_channels: channels of the images.
        num_classes: classes of a conditional network; None for an unconditional one.
        conditioning: where the class enters. ``"batch_norm"``, as in the paper: each batch norm has a scale and shift
            for each class (:class:`ConditionalBatchNorm2d`). ``"latent"``: the class, as a one-hot vector, is joined to
            the latent vector, z_dim + num_classes numbers long, and batch norms have no classes. It learns the classes
            in far fewer steps, since a scale moves by about a learning rate in a step.
        architecture: ``"dcgan"`` or ``"resnet"``.
        upsampling: how a stage of ``"dcgan"`` doubles its map. ``"transposed"``: a transposed 4×4 convolution.
            ``"nearest"``: nearest ×2 and a 3×3 convolution, which costs the same and leaves no checkerboard (Odena et
            al., *Deconvolution and checkerboard artifacts*, Distill 2016). Default: ``"transposed"``, and of
            ``"resnet"`` ``"nearest"``, which has no other.
        attention_resolutions: sizes of the feature maps that get attention, () for none. Default of ``"dcgan"``: those
            of 16 to 32 pixels, or the largest map where there are none; of ``"resnet"``: 32, or the largest below.
        attention: ``attention(channels) -> Module``. Default: the architecture's own.
        spectral_norm: ``spectral_norm(module) -> module``, applied to each layer that the architecture normalizes, or
            None to disable. An ``attention`` of your own is not changed.
        normalize_classes: apply ``spectral_norm`` to the scales and shifts of the classes, too, as mmgeneration and
            PyTorch-StudioGAN do (see :class:`ConditionalBatchNorm2d`). They are embeddings then.
        norm_eps: added to the variance in every batch norm. Those two frameworks have 1e-4.
        output_activation: makes the last activation. The default, tanh, gives images in [-1, 1].
        device: where the parameters are made; default: PyTorch's default device.
        dtype: of the parameters; default: PyTorch's default dtype.

    Attributes:
        card: what is known of its weights: a dictionary that :func:`load_generator` and :func:`load_published` fill,
            and that :func:`save_generator` writes. Empty in a new network.

    Raises:
        ValueError: for a size that cannot be built, an unknown architecture, widths that do not fit, arguments that
            exclude each other, and attention resolutions that do not occur (the message lists those that do); in
            ``forward`` for a z of another shape.
        ValueError, TypeError: in ``forward``, for labels that are missing or given when not wanted, or of another
            shape, type, device or range.

    Source: Zhang et al., arXiv:1805.08318; layers as in heykeetae/Self-Attention-GAN (``"dcgan"``) and
    brain-research/self-attention-gan (``"resnet"``).

    >>> import torch
    >>> from torch_sagan import SAGANGenerator
    >>> generator = SAGANGenerator(64)
    >>> images, maps = generator(torch.randn(2, 128), return_attention=True)
    >>> images.shape, [attention.shape[1:] for attention in maps]
    (torch.Size([2, 3, 64, 64]), [torch.Size([256, 256]), torch.Size([1024, 1024])])
    >>> digits = SAGANGenerator(
    ...     28, image_channels=1, num_classes=10, attention_resolutions=(7,)
    ... )
    >>> digits(torch.randn(2, 128), torch.tensor([3, 8])).shape
    torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self,
        image_size: int = 64,
        *,
        z_dim: int = 128,
        base_channels: int | None = None,
        widths: Sequence[int] | None = None,
        image_channels: int = 3,
        num_classes: int | None = None,
        conditioning: Literal["batch_norm", "latent"] = "batch_norm",
        architecture: Literal["dcgan", "resnet"] = "dcgan",
        upsampling: Literal["transposed", "nearest"] | None = None,
        attention_resolutions: Iterable[int] | None = None,
        attention: AttentionFactory | None = None,
        spectral_norm: Normalizer | None = spectral_norm,
        normalize_classes: bool = False,
        norm_eps: float = 1e-5,
        output_activation: Callable[[], nn.Module] = nn.Tanh,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        at_least_one(z_dim=z_dim, image_channels=image_channels, num_classes=num_classes)
        one_of(("dcgan", "resnet"), architecture=architecture)
        one_of(("batch_norm", "latent"), conditioning=conditioning)
        if upsampling is not None:
            one_of(("transposed", "nearest"), upsampling=upsampling)
        if architecture == "resnet" and upsampling == "transposed":
            raise ValueError("upsampling 'transposed': architecture 'resnet' has 'nearest' alone")
        if num_classes is None and conditioning == "latent":
            raise ValueError("conditioning 'latent': expected num_classes, the length of the one-hot vector")
        if normalize_classes and (num_classes is None or conditioning == "latent"):
            raise ValueError("normalize_classes: expected num_classes and conditioning 'batch_norm'")
        sizes = feature_map_sizes(image_size)
        residual = architecture == "resnet"
        maps = [*sizes, image_size] if residual else sizes
        channels = block_widths(widths, base_channels, maps, partial(_default_widths, len(sizes), residual))
        normalize = spectral_norm or _unchanged
        joined = num_classes if conditioning == "latent" and num_classes is not None else 0
        batch_norm: Callable[[int], nn.Module] = partial(nn.BatchNorm2d, eps=norm_eps)
        if num_classes is not None and not joined:
            batch_norm = partial(
                ConditionalBatchNorm2d,
                num_classes=num_classes,
                eps=norm_eps,
                spectral_norm=normalize if normalize_classes else None,
            )

        with on_device(device):
            if not residual:
                doubled = UPSAMPLING[upsampling or "transposed"]
                first = nn.ConvTranspose2d(z_dim + joined, channels[0], kernel_size=sizes[0])  # of a 1×1 map
                blocks: list[nn.Module] = [UpBlock(first, batch_norm, normalize)]
                blocks += [UpBlock(doubled(*pair), batch_norm, normalize) for pair in pairwise(channels)]
                last: nn.Module = doubled(channels[-1], image_channels)
                default_resolutions = [size for size in sizes if 16 <= size <= 32] or sizes[-1:]
                default_attention: AttentionFactory = SelfAttention2d
            else:
                blocks = [LatentBlock(z_dim + joined, channels[0], sizes[0], normalize)]
                blocks += [ResidualUpBlock(*pair, batch_norm, normalize) for pair in pairwise(channels)]
                last = to_image(channels[-1], image_channels, normalize, norm_eps=norm_eps)
                default_resolutions = residual_resolutions(maps)
                default_attention = partial(spectral_norm_attention, spectral_norm=normalize)

            resolutions = default_resolutions if attention_resolutions is None else list(attention_resolutions)
            super().__init__(blocks, maps, channels, resolutions, attention or default_attention, num_classes)
            self.z_dim = z_dim
            self.conditioning: str = conditioning
            self.to_image: nn.Module = last
            self.output_activation: nn.Module = output_activation()
        # The arguments that are not functions: with them save_generator describes the network.
        self.arguments: dict[str, Any] = {
            "image_size": image_size,
            "z_dim": z_dim,
            "widths": channels,
            "image_channels": image_channels,
            "num_classes": num_classes,
            "conditioning": conditioning,
            "architecture": architecture,
            "upsampling": upsampling,
            "attention_resolutions": resolutions,
            "normalize_classes": normalize_classes,
            "norm_eps": norm_eps,
        }
        self.card: dict[str, Any] = {}
        if dtype is not None:
            self.to(dtype)

    @overload
    def forward(
        self, z: Tensor, labels: Tensor | None = None, *, return_attention: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def forward(
        self, z: Tensor, labels: Tensor | None = None, *, return_attention: Literal[True]
    ) -> tuple[Tensor, list[Tensor]]: ...

    # Not keyword-only: PyTorch's older ONNX exporter passes every argument by position.
    def forward(
        self, z: Tensor, labels: Tensor | None = None, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Generate images from latent vectors.

        Args:
            z: (B, z_dim) or (B, z_dim, 1, 1), usually standard normal.
            labels: (B,) classes from 0 to num_classes - 1, only for a conditional network.
            return_attention: also return the attention maps.

        Returns:
            images (B, image_channels, S, S); with ``return_attention`` the pair of images and a list of maps
            (B, N, M), input side first.
        """
        if z.shape[1:] not in ((self.z_dim,), (self.z_dim, 1, 1)):
            raise ValueError(f"expected z (B, {self.z_dim}) or (B, {self.z_dim}, 1, 1), got {tuple(z.shape)}")
        check_labels(labels, self.num_classes, z, once=True)
        iterate_together(self)
        maps: list[Tensor] | None = [] if return_attention else None
        x = z.reshape(z.shape[0], self.z_dim, 1, 1)
        if labels is not None and self.conditioning == "latent":
            # Not one_hot, which on a GPU waits for the largest label. The look-up fails for one that is out of range.
            classes = torch.arange(self.num_classes or 0, device=labels.device)
            one_hot = (classes.index_select(0, labels)[:, None] == classes).to(x)  # (B, num_classes)
            one_hot = one_hot[:, :, None, None]  # (B, num_classes, 1, 1)
            x, labels = torch.cat([x, one_hot], dim=1), None  # (B, z_dim + num_classes, 1, 1)
        x = self.run_stages(x, maps, labels)  # (B, base_channels, ·, ·)
        images = self.output_activation(self.to_image(x))  # (B, image_channels, S, S)
        return images if maps is None else (images, maps)


def _default_widths(n_stages: int, residual: bool, base_channels: int) -> list[int]:
    """Those of :func:`stage_widths`; the first two maps of a residual network are equally wide."""
    widths = stage_widths(base_channels, n_stages)
    return [widths[0], *widths] if residual else widths


def _unchanged(module: nn.Module) -> nn.Module:
    return module
