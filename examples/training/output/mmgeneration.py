"""The generator in a file that mmgeneration has published, its SAGAN for ImageNet's classes at 128 pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch_sagan import SAGANGenerator, load_reference_state_dict
from training.architectures import build_generator

# load_reference_state_dict takes the average where a file has one, for a network that is there already. Here the caller
# chooses, and the network is built after the weights.
AVERAGE, LAST = "generator_ema.", "generator."


def published_generator(state_dict: Any, *, average: bool = True) -> tuple[SAGANGenerator, dict[str, Any]]:
    """The averaged or the last generator in a file's `state_dict`, in evaluation mode, and its arguments.

    Widths and the number of classes are those of the weights.

    Raises:
        ValueError: where there is no such generator, or the weights do not fit it.
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError("it has no state dict of mmgeneration's SAGAN")
    prefix = AVERAGE if average else LAST
    weights = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    try:
        latent, classes = weights["noise2feat.weight_orig"], weights["conv_blocks.0.norm_1.weight_embedding.weight"]
        arguments = {
            "architecture": "resnet",
            "image_size": 128,
            "z_dim": latent.shape[1],
            "base_channels": latent.shape[0] // 256,  # 4×4 positions of 16 times as many channels
            "num_classes": classes.shape[0],
            "attention_resolutions": [64],
        }
    except KeyError as error:
        raise ValueError(f"it has no {prefix}{error.args[0]}, which mmgeneration's SAGAN has") from None
    generator = build_generator(**arguments)
    load_reference_state_dict(generator, weights)
    return generator.eval(), arguments
