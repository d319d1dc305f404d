"""PyTorch-StudioGAN: with its weights, networks that are built for them return its images and logits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from references import assert_all_close, filled_with_settled_vectors, rand, stored_shapes
from torch_sagan import SAGANDiscriminator, SAGANGenerator, SelfAttention2d, apply_spectral_norm, load_published

Arrays = Mapping[str, Any]
Weights = dict[str, Tensor]

LABELS = torch.tensor([3, 6])
ATTENTION = {"sagan32": ([16], [16]), "sngan32": ([], []), "sagan64": ([32], [32]), "sngan64": ([], [])}
ATTENTION |= {"sagan128": ([64], [64]), "sngan32-plain": ([], []), "sngan128-plain": ([], [])}
# Widths at its base width of 8: G from the latent on, D with the block at the logit.
WIDTHS = {
    32: ((32, 32, 32, 32), (16, 16, 16, 16)),
    64: ((128, 64, 32, 16, 8), (8, 16, 32, 64, 128)),
    128: ((128, 128, 64, 32, 16, 8), (8, 16, 32, 64, 128, 128)),
}


@pytest.fixture(scope="module")
def stored() -> Arrays:
    found: dict[str, Any] = {}
    for file in ("studiogan.npz", "studiogan-plain.npz"):
        with np.load(Path(__file__).parents[2] / "data" / file) as arrays:
            found |= {name: arrays[name] for name in arrays.files}
    return found


def weights_of(stored: Arrays, tag: str, network: str) -> Weights:
    return filled_with_settled_vectors(stored_shapes(stored, f"{tag}/{network}"), f"{tag}.{network}.")


def size_of(tag: str) -> int:
    return int(tag.removesuffix("-plain")[5:])


@torch.no_grad()
def check_images(generator: SAGANGenerator, stored: Arrays, tag: str) -> None:
    step = size_of(tag) // 32
    images = generator(rand(11, 2, 128), LABELS)[:, :, ::step, ::step]
    expected = torch.from_numpy(stored[f"{tag}/generator/images"])
    # Some are stored in float32, which rounds numbers below 1 by at most 2^-25; else the order of summation is left.
    assert_all_close([(tag, images, expected)], atol=2**-24 if expected.dtype == torch.float32 else 1e-10)


@torch.no_grad()
def check_logits(discriminator: SAGANDiscriminator, stored: Arrays, tag: str, entry: str = "logits") -> None:
    logits = discriminator(rand(12, 2, 3, size_of(tag), size_of(tag)).clamp(-1, 1), LABELS)
    # Float64 throughout: what is left is the order of summation.
    assert_all_close([(tag, logits, torch.from_numpy(stored[f"{tag}/discriminator/{entry}"]))], atol=1e-10)


@pytest.mark.parametrize("tag", ATTENTION)
def test_generator(stored: Arrays, tag: str) -> None:
    generator = load_published(weights_of(stored, tag, "generator"))
    assert not generator.training
    assert generator.arguments["image_size"] == size_of(tag)
    assert tuple(generator.arguments["widths"]) == WIDTHS[size_of(tag)][0]
    assert generator.arguments["attention_resolutions"] == ATTENTION[tag][0]
    assert (generator.num_classes, generator.z_dim) == (7, 128)
    assert generator.card["channel_order"] == "rgb"
    check_images(generator, stored, tag)


@pytest.mark.parametrize("tag", ATTENTION)
def test_discriminator(stored: Arrays, tag: str) -> None:
    discriminator = load_published(weights_of(stored, tag, "discriminator"), network="discriminator")
    assert not discriminator.training
    assert [int(size) for size in discriminator.attention] == ATTENTION[tag][1]
    check_logits(discriminator, stored, tag)


@pytest.mark.parametrize("tag", ["sagan32", "sngan64"])
def test_discriminator_with_a_relu_that_is_not_in_place(stored: Arrays, tag: str) -> None:
    """The two differ by far more than rounding, so that none stands for the other."""
    weights = weights_of(stored, tag, "discriminator")
    discriminator = load_published(weights, network="discriminator", shortcut_after_relu=False)
    check_logits(discriminator, stored, tag, "logits_relu_not_in_place")


def test_a_whole_checkpoint(stored: Arrays, tmp_path: Path) -> None:
    """As the framework saves it, read from a file."""
    state = {f"module.{name}": value for name, value in weights_of(stored, "sagan32", "generator").items()}
    notes = {"seed": 0, "run_name": "CIFAR10-SAGAN-train", "step": 98000, "best_fid": 14.0, "optimizer": {"state": {}}}
    torch.save(notes | {"state_dict": state}, tmp_path / "model=G-best-weights-step=98000.pth")
    generator = load_published(tmp_path / "model=G-best-weights-step=98000.pth")
    assert generator.card["source"] == "model=G-best-weights-step=98000.pth"
    check_images(generator, stored, "sagan32")


def test_files_of_2021(stored: Arrays) -> None:
    """Embeddings of classes, (num_classes, C), where newer files have linear layers, (C, num_classes)."""
    older: Weights = {}
    for name, value in weights_of(stored, "sagan32", "generator").items():
        table = re.fullmatch(r"(.*\.bn[12])\.(gain|bias)\.weight_(orig|u|v)", name)
        if table:
            entry = {"orig": "orig", "u": "v", "v": "u"}[table[3]]
            older[f"{table[1]}.embed{int(table[2] == 'bias')}.weight_{entry}"] = value.mT if value.ndim == 2 else value
        else:
            older[name] = value
    check_images(load_published(older), stored, "sagan32")


def test_without_spectral_norm_in_the_generator(stored: Arrays) -> None:
    """As the configurations of its SNGAN are."""
    generator = load_published(weights_of(stored, "sngan32-plain", "generator"))
    assert not any("parametrizations" in name for name in generator.state_dict())
    assert any(
        "parametrizations" in name for name in load_published(weights_of(stored, "sngan32", "generator")).state_dict()
    )


def test_into_a_network_that_is_there(stored: Arrays) -> None:
    weights = weights_of(stored, "sagan32", "generator")
    arguments: dict[str, Any] = {
        "widths": (32,) * 4, "num_classes": 7, "architecture": "resnet", "attention_resolutions": (16,),
        "normalize_classes": True,
    }  # fmt: skip
    generator = SAGANGenerator(32, **arguments, norm_eps=1e-4).double()
    assert load_published(weights, generator) is generator
    assert generator.training
    check_images(generator.eval(), stored, "sagan32")
    with pytest.raises(ValueError, match=r"PyTorch-StudioGAN add 0\.0001 to the variance.*build it with norm_eps=0\."):
        load_published(weights, SAGANGenerator(32, **arguments).double())


def test_a_discriminator_that_is_there_needs_the_relu(stored: Arrays) -> None:
    weights = weights_of(stored, "sagan32", "discriminator")
    arguments: dict[str, Any] = {
        "widths": (16,) * 4, "downsampling_blocks": 2, "num_classes": 7, "architecture": "resnet",
        "attention_resolutions": (16,),
    }  # fmt: skip
    check_logits(
        load_published(weights, SAGANDiscriminator(32, **arguments, shortcut_after_relu=True).double()).eval(),
        stored,
        "sagan32",
    )
    with pytest.raises(ValueError, match="build this SAGANDiscriminator with shortcut_after_relu=True"):
        load_published(weights, SAGANDiscriminator(32, **arguments).double())


def test_training_goes_on_from_there(stored: Arrays) -> None:
    """Tables of classes are normalized in training, too: every weight has a gradient and every u moves."""
    generator = load_published(weights_of(stored, "sagan32", "generator")).train()
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    generator(torch.randn(4, 128, dtype=torch.float64), torch.tensor([0, 1, 2, 6])).square().mean().backward()
    without = [name for name, parameter in generator.named_parameters() if parameter.grad is None]
    assert without == []
    moved = [name for name, value in generator.state_dict().items() if not torch.equal(value, before[name])]
    assert {name for name in before if name.endswith("num_batches_tracked")} <= set(moved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linear0.weight_orig": None}, r"PyTorch-StudioGAN's generator, but linear0\.weight is missing"),
        ({"bn4.bias": None}, r"1 key differs, missing: bn4\.bias"),
        ({"extra.weight": torch.zeros(1)}, r"1 key differs, unexpected: extra\.weight"),
        ({"conv2d5.bias": torch.zeros(4)}, r"1 key differs, of another shape: conv2d5\.bias \(4,\) instead of \(3,\)"),
    ],
)
def test_what_does_not_fit_is_named(stored: Arrays, change: dict[str, Tensor | None], message: str) -> None:
    weights: dict[str, Tensor | None] = dict(weights_of(stored, "sagan32", "generator"))
    changed = {name: value for name, value in (weights | change).items() if value is not None}
    if "linear0.weight_orig" in change:
        changed["linear0.bias"] = changed["linear0.bias"]
    with pytest.raises(ValueError, match=message):
        load_published(changed)


@pytest.mark.parametrize("normalized", [False, True])
def test_its_attention_alone(stored: Arrays, normalized: bool) -> None:
    """Into a layer with plain projections, whose weights are divided by sigma, or normalized ones."""
    weights, place = weights_of(stored, "sagan32", "generator"), "blocks.2.0."
    alone = {key.removeprefix(place): value for key, value in weights.items() if key.startswith(place)}
    layer = SelfAttention2d.official(32).double().eval()
    if normalized:
        apply_spectral_norm(layer)
    assert load_published(alone, layer) is layer
    x = rand(1, 2, 32, 8, 8)
    expected = load_published(weights).attention["16"](x)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)  # float64, perhaps in another order
    assert (layer(x) - x).abs().max() > 0.01  # its gamma is 0.5
