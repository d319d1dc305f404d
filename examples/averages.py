"""The averaged generator as it is used: with sigmas and batch statistics that belong to its own weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from torch_sagan import SAGANGenerator, recalibrate

SAMPLES, BATCH, SEED = 1024, 64, 4


def recalibrated(average: SAGANGenerator) -> SAGANGenerator:
    """A copy of the averaged generator, recalibrated, in evaluation mode.

    It is a function of the averaged weights alone: training, its random state and its checkpoints know nothing of it,
    and whoever reads a checkpoint makes the same one again.
    """
    return recalibrate(copy.deepcopy(average).eval(), latents(average))


def latents(generator: SAGANGenerator) -> Iterator[tuple[Tensor, ...]]:
    """Batches of a generator's arguments, always the same: z (B, z_dim), and all classes in turn where it has some."""
    random = torch.Generator().manual_seed(SEED)
    device = next(generator.parameters()).device
    for start in range(0, SAMPLES, BATCH):
        z = torch.randn(BATCH, generator.z_dim, generator=random).to(device)  # (B, z_dim)
        if generator.num_classes is None:
            yield (z,)
        else:
            yield z, torch.arange(start, start + BATCH, device=device) % generator.num_classes
