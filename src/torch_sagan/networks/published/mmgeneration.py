"""open-mmlab/mmgeneration: SAGAN, and SNGAN with the projection, which is the same network without attention.

A file has three networks, ``generator.``, its moving average ``generator_ema.`` and ``discriminator.``. Their images
are in the order blue, green, red, but for those that were converted from PyTorch-StudioGAN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torch_sagan.networks.generator import SAGANGenerator
from torch_sagan.networks.published.dialect import HOOK, Dialect, Network

__all__ = ["MMGENERATION", "reverse_channels"]


@dataclass(frozen=True)
class _MMGeneration(Dialect):
    def eps(self, arguments: Mapping[str, Any]) -> float:
        # Its default, but for BigGAN's schedule, which alone normalizes convolutions and not the classes.
        biggan_schedule = "spectral_norm" not in arguments and not arguments["normalize_classes"]
        return 1e-5 if biggan_schedule else self.norm_eps


MMGENERATION = _MMGeneration(
    framework="mmgeneration",
    marks={"generator": r"noise2feat\..*", "discriminator": r"from_rgb\.(conv_[12]|shortcut)\..*"},
    outside={
        "generator": {
            "blocks.0.linear.": "noise2feat.",
            "to_image.0.": "to_rgb.bn.",
            "to_image.2.": "to_rgb.conv.",
        },
        "discriminator": {
            "blocks.0.": "from_rgb.",
            "to_logit.projection.linear.": "decision.",
            "to_logit.projection.embedding.": "proj_y.",
        },
    },
    place="conv_blocks.{}.",
    attention="gamma",
    parts={
        "norm1.gamma": "norm_1.weight_embedding.weight",
        "norm1.beta": "norm_1.bias_embedding.weight",
        "norm2.gamma": "norm_2.weight_embedding.weight",
        "norm2.beta": "norm_2.bias_embedding.weight",
        "norm1.scale.": "norm_1.weight_embedding.",
        "norm1.shift.": "norm_1.bias_embedding.",
        "norm2.scale.": "norm_2.weight_embedding.",
        "norm2.shift.": "norm_2.bias_embedding.",
        "norm1.": "norm_1.",
        "norm2.": "norm_2.",
        "conv1.": "conv_1.conv.",
        "conv2.": "conv_2.conv.",
        "shortcut.": "shortcut.conv.",
        "query.": "theta.conv.",
        "key.": "phi.conv.",
        "value.": "g.conv.",
        "out.": "o.conv.",
        **HOOK,
    },
)


def reverse_channels(network: Network, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Blue, green, red into red, green, blue, where images leave the generator and enter the discriminator."""
    reversed_values = dict(values)
    if isinstance(network, SAGANGenerator):
        for key in ("bias", "weight", "parametrizations.weight.original", "parametrizations.weight.0._u"):
            if (name := f"to_image.2.{key}") in values:
                reversed_values[name] = values[name].flip(0)
        return reversed_values
    for layer in ("blocks.0.conv1", "blocks.0.shortcut"):
        for key in ("weight", "parametrizations.weight.original"):
            if (name := f"{layer}.{key}") in values:
                weight = values[name]  # (out, channels, k, k)
                reversed_values[name] = weight.flip(1)
                channels = weight.shape[1]
        if (name := f"{layer}.parametrizations.weight.0._v") in values:
            reversed_values[name] = values[name].unflatten(0, (channels, -1)).flip(0).flatten()  # (channels · k · k,)
    return reversed_values
