"""Small generators that are unlike new ones, and as much of a checkpoint as has to do with them."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch

from torch_sagan import SAGANGenerator

ANIMALS = {"cat": 20, "dog": 30, "3": 50}  # the last class has a number for a name
TINY = {"image_size": 16, "z_dim": 8, "base_channels": 4}


def shaken(**more: Any) -> SAGANGenerator:
    """A generator with gammas, statistics and norms that differ from the initial ones."""
    return copy.deepcopy(_shaken(**{name: tuple(v) if isinstance(v, list) else v for name, v in more.items()}))


@cache
def _shaken(**more: Any) -> SAGANGenerator:
    torch.manual_seed(1)
    generator = SAGANGenerator(**(TINY | {"attention_resolutions": [4, 8]} | more))
    for _ in range(3):
        labels = None if generator.num_classes is None else torch.arange(8) % generator.num_classes
        generator(torch.randn(8, 8), labels)
    with torch.no_grad():
        for layer in generator.attention.values():
            layer.gamma.fill_(0.7)
        for name, table in generator.named_parameters():
            if name.startswith("blocks.") and name.endswith((".gamma", ".beta")):
                table.normal_(0.5)  # new classes are all alike
        for weight in generator.to_image.parameters():
            weight.mul_(5)  # untrained images are nearly gray
    return generator


def checkpoint(
    path: Path,
    generator: SAGANGenerator,
    average: SAGANGenerator | None = None,
    *,
    architecture: str = "dcgan",
    crop: str = "auto",
    classes: dict[str, int] = ANIMALS,
) -> Path:
    """A checkpoint as far as the trainer's has to do with its generator."""
    config = TINY | {"data": "/home/somebody/faces", "g_attention": "auto", "architecture": architecture, "crop": crop}
    state = {
        "config": config,
        "classes": {} if generator.num_classes is None else classes,
        "scores": {"swd": 12.34567},
        "generator": generator.state_dict(),
        "average": (average or generator).state_dict(),
        "step": 12,
        "images": 48,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path
