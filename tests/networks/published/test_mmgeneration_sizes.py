"""mmgeneration's other files: SAGAN and SNGAN at 32 and 128 pixels, with tables of classes that are normalized, without
spectral norm in G, and with a ReLU in D that works in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from references import assert_all_close, filled_with_settled_vectors, rand, stored_shapes
from torch_sagan import SAGANDiscriminator, SAGANGenerator, SelfAttention2d, load_published
from torch_sagan.networks.published.mmgeneration import MMGENERATION

Arrays = Mapping[str, Any]
Weights = dict[str, Tensor]

LABELS = torch.tensor([3, 6])
TAGS = ("sagan32", "sngan32", "sagan128", "sngan128")
# Names as the project's page lists them.
FILES = {
    "sagan_cifar10_32_lr2e-4_ndisc5_b64x1_woReUinplace_fid-iter480000_20210730_125449-d50568a4.pth": ("bgr", False),
    "sagan_cifar10_32_lr2e-4_ndisc5_b64x1_wReLUinplace_fid-iter460000_20210730_125155-cbefb354.pth": ("bgr", True),
    "sagan_32_cifar10_convert-studio-rgb_20210730_153321-080da7e2.pth": ("rgb", True),
}


@pytest.fixture(scope="module")
def stored() -> Arrays:
    with np.load(Path(__file__).parents[2] / "data" / "mmgeneration-more.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def weights_of(stored: Arrays, tag: str, network: str) -> Weights:
    return filled_with_settled_vectors(stored_shapes(stored, f"{tag}/{network}"), f"{tag}.{network}.")


@torch.no_grad()
def check_images(generator: SAGANGenerator, stored: Arrays, tag: str, order: str = "bgr") -> None:
    step = int(tag[5:]) // 32
    expected = torch.from_numpy(stored[f"{tag}/generator/images"])
    images = generator(rand(11, 2, 128), LABELS)[:, :, ::step, ::step]
    # Float64 throughout: what is left is the order of summation.
    assert_all_close([(tag, images, expected.flip(1) if order == "bgr" else expected)], atol=1e-10)


@torch.no_grad()
def check_logits(
    discriminator: SAGANDiscriminator, stored: Arrays, tag: str, *, in_place: bool, order: str = "bgr"
) -> None:
    size = int(tag[5:])
    x = rand(12, 2, 3, size, size).clamp(-1, 1)
    logits = discriminator(x.flip(1) if order == "bgr" else x, LABELS)
    expected = stored[f"{tag}/discriminator/logits{'_relu_in_place' if in_place else ''}"]
    # Float64 throughout: what is left is the order of summation.
    assert_all_close([(tag, logits, torch.from_numpy(expected))], atol=1e-10)


@pytest.mark.parametrize("tag", TAGS)
def test_generator(stored: Arrays, tag: str) -> None:
    generator = load_published(weights_of(stored, tag, "generator"))
    assert generator.arguments["norm_eps"] == 1e-4
    normalized = any("parametrizations" in name for name in generator.state_dict())
    assert normalized == generator.arguments["normalize_classes"] == tag.startswith("sagan")
    check_images(generator, stored, tag)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("tag", TAGS)
def test_discriminator(stored: Arrays, tag: str, in_place: bool) -> None:
    weights = weights_of(stored, tag, "discriminator")
    discriminator = load_published(weights, network="discriminator", shortcut_after_relu=in_place)
    check_logits(discriminator, stored, tag, in_place=in_place)


@pytest.mark.parametrize("name", FILES)
def test_what_the_name_of_a_file_tells(stored: Arrays, name: str, tmp_path: Path) -> None:
    order, in_place = FILES[name]
    state = {f"generator.{key}": value for key, value in weights_of(stored, "sagan32", "generator").items()}
    state |= {f"discriminator.{key}": value for key, value in weights_of(stored, "sagan32", "discriminator").items()}
    torch.save({"meta": {"iter": 480000}, "state_dict": state}, tmp_path / name)
    generator = load_published(tmp_path / name)
    assert generator.card == {
        "source": name, "framework": "mmgeneration", "num_classes": 7, "averaged": False, "channel_order": "rgb",
        "image_range": [-1, 1],
    }  # fmt: skip
    check_images(generator, stored, "sagan32", order)
    discriminator = load_published(tmp_path / name, network="discriminator")
    check_logits(discriminator, stored, "sagan32", in_place=in_place, order=order)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("widths", [(5, 6, 6, 7), (5, 7)])
def test_a_discriminator_that_is_there_has_to_be_what_the_name_tells(
    widths: tuple[int, ...], name: str, tmp_path: Path
) -> None:
    """Of four blocks, and of one and the block at the logit, which then is the only one with a ReLU in front."""
    _, in_place = FILES[name]
    arguments: dict[str, Any] = {"widths": widths, "downsampling_blocks": 1, "architecture": "resnet"}
    arguments |= {"attention_resolutions": ()}
    plain, quirky = (SAGANDiscriminator(32, **arguments, shortcut_after_relu=quirk) for quirk in (False, True))
    state = {MMGENERATION.names(plain)[ours]: value for ours, value in plain.state_dict().items()}
    torch.save({"state_dict": {f"discriminator.{key}": value for key, value in state.items()}}, tmp_path / name)
    assert load_published(tmp_path / name, quirky) is quirky
    if not in_place:
        load_published(tmp_path / name, plain)
        return
    with pytest.raises(ValueError, match="works in place: build this SAGANDiscriminator with shortcut_after_relu=True"):
        load_published(tmp_path / name, plain)


def test_arguments_say_what_the_name_does_not(stored: Arrays) -> None:
    generator = load_published(weights_of(stored, "sngan32", "generator"), channel_order="rgb")
    check_images(generator, stored, "sngan32", "rgb")
    other = load_published(weights_of(stored, "sngan32", "generator"), norm_eps=1e-5)
    assert {module.eps for module in other.modules() if isinstance(module, torch.nn.BatchNorm2d)} == {1e-5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": "discriminator", "norm_eps": 1e-4}, "norm_eps is for generators"),
        ({"shortcut_after_relu": True}, "shortcut_after_relu is for discriminators"),
        ({"averaged": False}, "averaged=False is for files that have two generators"),
        ({"network": "critic"}, "network must be one of 'generator', 'discriminator', got 'critic'"),
        (
            {"into": SAGANGenerator(8, base_channels=4, architecture="resnet"), "network": "generator"},
            "network are for",
        ),
    ],
)
def test_arguments_that_the_weights_have_no_use_for(stored: Arrays, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_published(weights_of(stored, "sagan32", "generator"), **arguments)


def test_its_attention_alone(stored: Arrays) -> None:
    weights, place = weights_of(stored, "sagan32", "generator"), "conv_blocks.2."
    alone = {key.removeprefix(place): value for key, value in weights.items() if key.startswith(place)}
    layer = load_published(alone, SelfAttention2d.official(32).double().eval())
    x = rand(1, 2, 32, 8, 8)
    expected = load_published(weights).attention["16"](x)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)  # float64, perhaps in another order
    assert (layer(x) - x).abs().max() > 0.01  # its gamma is 0.5
