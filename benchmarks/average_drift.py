"""Measure how far an averaged generator is from its sigmas and batch statistics, before and after recalibration.

    python benchmarks/average_drift.py runs/faces   # a run's folder, or a checkpoint

Sigma is the exact largest singular value of the normalized weights, the smallest and the largest of all layers. The gap
is the mean absolute difference between images in evaluation mode and images with the statistics of their own batch, as
in training; pixels are in [-1, 1].
"""

from __future__ import annotations

import examples_path  # noqa: F401  # isort: skip
import training.threads  # noqa: F401  before torch  # isort: skip

import copy
from collections.abc import Sequence

import torch
from torch import nn

from torch_sagan import SAGANGenerator, spectral_norms
from training.average import recalibrated
from training.latents import draw_labels
from training.output.model_card import build, from_checkpoint
from training.script import Parser, given_path, script

IMAGES, SEED = 256, 5  # not the latent vectors that the statistics come from


@torch.no_grad()
def gap(generator: SAGANGenerator, images_per_class: Sequence[int]) -> float:
    random = torch.Generator().manual_seed(SEED)
    z = torch.randn(IMAGES, generator.z_dim, generator=random)  # (B, z_dim)
    labels = draw_labels(IMAGES, images_per_class, random) if images_per_class else None
    training = copy.deepcopy(generator)
    for part in training.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.train()
    return float((generator(z, labels) - training(z, labels)).abs().mean())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(description="Measure how far an averaged generator has drifted from its buffers.")
    parser.add_argument("run", type=given_path, help="a run's folder or a checkpoint of the trainer")
    try:
        weights, card = from_checkpoint(parser.parse_args(arguments).run)
        average, counts = build(weights, card), list(card["classes"].values())
    except ValueError as error:
        parser.error(str(error))
    for name, generator in (("before", average), ("after", recalibrated(average, counts))):
        sigmas = spectral_norms(generator).values()
        print(f"{name:8}sigma {min(sigmas):.4f} to {max(sigmas):.4f}, gap {gap(generator, counts):.4f}")


if __name__ == "__main__":
    script(main)
