"""BigGAN-PyTorch's ``launch_SAGAN`` networks: with their weights ours return their images and logits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from references import assert_all_close, fill, rand, stored_shapes
from torch_sagan import load_published, spectral_norms

Arrays = Mapping[str, Any]
LABELS = torch.tensor([3, 6])
# Attention, widths of G from the latent on, and of D with the block at the logit.
NETWORKS: dict[str, tuple[list[int], tuple[int, ...], tuple[int, ...]]] = {
    "sagan32": ([], (32, 32, 32, 32), (32, 32, 32, 32)),
    "sagan64": ([32], (128, 128, 64, 32, 16), (8, 16, 32, 64, 128)),
    "sagan128": ([64], (128, 128, 64, 32, 16, 8), (8, 16, 32, 64, 128, 128)),
}


@pytest.fixture(scope="module")
def stored() -> Arrays:
    with np.load(Path(__file__).parents[2] / "data" / "biggan.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def weights_of(stored: Arrays, tag: str, network: str) -> dict[str, Tensor]:
    """Its u0 is as far from the singular vector as any other number: an evaluation iterates once."""
    shapes = stored_shapes(stored, f"{tag}/{network}")
    return {name: fill(f"{tag}.{network}.{name}", shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("tag", NETWORKS)
@torch.no_grad()
def test_generator(stored: Arrays, tag: str) -> None:
    generator = load_published(weights_of(stored, tag, "generator"))
    attention, widths, _ = NETWORKS[tag]
    assert (generator.arguments["attention_resolutions"], tuple(generator.arguments["widths"])) == (attention, widths)
    step = generator.arguments["image_size"] // 32
    images = generator(rand(11, 2, 128), LABELS)[:, :, ::step, ::step]
    # Float64 throughout: what is left is the order of summation.
    assert_all_close([(tag, images, torch.from_numpy(stored[f"{tag}/generator/images"]))], atol=1e-10)


@pytest.mark.parametrize("tag", NETWORKS)
@torch.no_grad()
def test_discriminator(stored: Arrays, tag: str) -> None:
    discriminator = load_published(weights_of(stored, tag, "discriminator"), network="discriminator")
    size = int(tag.removeprefix("sagan"))
    logits = discriminator(rand(12, 2, 3, size, size).clamp(-1, 1), LABELS)
    # Float64 throughout: what is left is the order of summation.
    assert_all_close([(tag, logits, torch.from_numpy(stored[f"{tag}/discriminator/logits"]))], atol=1e-10)


def test_training_brings_the_vectors_to_the_weights(stored: Arrays) -> None:
    generator = load_published(weights_of(stored, "sagan32", "generator")).train()
    far = max(abs(norm - 1) for norm in spectral_norms(generator).values())
    with torch.no_grad():
        for _ in range(30):
            generator(torch.randn(4, 128, dtype=torch.float64), torch.tensor([0, 1, 2, 6]))
    assert max(abs(norm - 1) for norm in spectral_norms(generator).values()) < far / 10


def test_biggan_itself_is_named(stored: Arrays) -> None:
    weights = weights_of(stored, "sagan64", "generator") | {"shared.weight": torch.zeros(7, 128)}
    with pytest.raises(ValueError, match="BigGAN-PyTorch's BigGAN, whose blocks share an embedding of classes"):
        load_published(weights)
