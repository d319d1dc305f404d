"""The networks of `--architecture`, each with its source.

`dcgan` and `resnet` are the library's own (see `SAGANGenerator`). `mnist` is the TensorFlow tutorial's system for
28-pixel digits: `dcgan` with an attention layer whose projections are 4×4 convolutions, followed by batch norm and ReLU
in G. In D they are followed by ReLU alone, with spectral norm instead of the batch norm: with batch norm, D wins before
G has learned anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from torch_sagan import SAGANDiscriminator, SAGANGenerator, SelfAttention2d, apply_spectral_norm, spectral_norm

ARCHITECTURES = ("dcgan", "resnet", "mnist")


def build_generator(
    architecture: str,
    image_size: int,
    *,
    attention_resolutions: Sequence[int] | None,
    eps: float = 1e-12,
    **arguments: Any,
) -> SAGANGenerator:
    """The generator, spectrally normalized with `eps`; further arguments are those of `SAGANGenerator`."""
    if architecture != "mnist":
        arguments["architecture"] = architecture
    else:
        arguments["attention"] = partial(SelfAttention2d, projection=_generator_projection)
        attention_resolutions = _mnist_resolutions(image_size, attention_resolutions)
    norm = partial(spectral_norm, eps=eps)
    return SAGANGenerator(image_size, attention_resolutions=attention_resolutions, spectral_norm=norm, **arguments)


def build_discriminator(
    architecture: str,
    image_size: int,
    *,
    attention_resolutions: Sequence[int] | None,
    norm_of: str | None = "matrix",
    eps: float = 1e-12,
    **arguments: Any,
) -> SAGANDiscriminator:
    """The discriminator, its weights divided by the norm (with `eps`) of what `norm_of` says, if anything; further
    arguments are `SAGANDiscriminator`'s."""
    chosen: list[nn.Module] = []

    def collect(layer: nn.Module) -> nn.Module:
        chosen.append(layer)
        return layer

    # A convolution's norm needs the size of its feature maps, which is known when the network is there.
    norm = {"matrix": partial(spectral_norm, eps=eps), "convolution": collect, None: None}[norm_of]
    if architecture != "mnist":
        arguments["architecture"] = architecture
    else:
        arguments["attention"] = partial(
            SelfAttention2d, projection=partial(_discriminator_projection, normalize=norm or _unchanged)
        )
        attention_resolutions = _mnist_resolutions(image_size, attention_resolutions)
    discriminator = SAGANDiscriminator(
        image_size, attention_resolutions=attention_resolutions, spectral_norm=norm, **arguments
    )
    if norm_of == "convolution":
        labels = [torch.zeros(1, dtype=torch.int64)] if discriminator.num_classes else []
        example = torch.zeros(1, *discriminator.image_shape), *labels
        apply_spectral_norm(
            discriminator, include=lambda name, layer: layer in chosen, eps=eps, of="convolution", example_input=example
        )
    return discriminator


def _mnist_resolutions(image_size: int, resolutions: Sequence[int] | None) -> Sequence[int]:
    return [image_size // 4] if resolutions is None else resolutions


def _convolution(in_channels: int, out_channels: int) -> tuple[nn.Module, nn.Conv2d]:
    """The tutorial's 4×4 convolution. The even kernel needs one more row and column of padding at the end."""
    # TensorFlow's "same" padding. torch has it too, but warns about even kernels.
    return nn.ZeroPad2d((1, 2, 1, 2)), nn.Conv2d(in_channels, out_channels, kernel_size=4, bias=False)


def _generator_projection(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Sequential(*_convolution(in_channels, out_channels), nn.BatchNorm2d(out_channels), nn.ReLU())


def _discriminator_projection(in_channels: int, out_channels: int, normalize: Any) -> nn.Module:
    pad, convolution = _convolution(in_channels, out_channels)
    return nn.Sequential(pad, normalize(convolution), nn.ReLU())


def _unchanged(module: nn.Module) -> nn.Module:
    return module
