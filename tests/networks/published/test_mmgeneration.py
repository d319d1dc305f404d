"""mmgeneration's SAGAN: with its weights the networks return its images and logits, and other networks an error."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from references import assert_all_close, filled_with_settled_vectors, rand
from torch_sagan import (
    SAGANDiscriminator,
    SAGANGenerator,
    SelfAttention2d,
    load_published,
    spectral_norm,
)

Weights = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

PAGE = Path(__file__).parents[3] / "docs" / "pretrained.md"
NARROW: dict[str, Any] = {"base_channels": 8, "num_classes": 7, "architecture": "resnet"}


def generator(**arguments: Any) -> SAGANGenerator:
    return SAGANGenerator(128, **(NARROW | {"attention_resolutions": (64,)} | arguments))


def discriminator(**arguments: Any) -> SAGANDiscriminator:
    return SAGANDiscriminator(128, **(NARROW | {"attention_resolutions": (64,)} | arguments))


@pytest.fixture(scope="module")
def stored() -> Mapping[str, Any]:
    with np.load(Path(__file__).parents[2] / "data" / "mmgeneration.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def stored_shapes(stored: Mapping[str, Any], network: str) -> Shapes:
    pairs = zip(stored[f"{network}/names"], stored[f"{network}/shapes"], strict=True)
    return {str(name): tuple(json.loads(str(shape))) for name, shape in pairs}


@pytest.fixture(scope="module")
def generator_weights(stored: Mapping[str, Any]) -> Weights:
    return filled_with_settled_vectors(stored_shapes(stored, "generator"), "generator.")


@pytest.fixture(scope="module")
def discriminator_weights(stored: Mapping[str, Any]) -> Weights:
    return filled_with_settled_vectors(stored_shapes(stored, "discriminator"), "discriminator.")


def with_prefix(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}{name}": value for name, value in weights.items()}


def zeros(weights: Weights) -> Weights:
    return {name: torch.zeros_like(value) for name, value in weights.items()}


def published(generator_weights: Weights, discriminator_weights: Weights) -> Weights:
    """What a published file's ``state_dict`` has, with nothing but zeros for the generator that is not the average."""
    return {
        **with_prefix("generator.", zeros(generator_weights)),
        **with_prefix("discriminator.", discriminator_weights),
        **with_prefix("generator_ema.", generator_weights),
    }


LABELS = torch.tensor([3, 6])
REVERSED = {None: True, "bgr": True, "rgb": False}


@torch.no_grad()
def check_generator(network: SAGANGenerator, stored: Mapping[str, Any], *, is_reversed: bool = True) -> None:
    expected = torch.from_numpy(stored["generator/images"])  # (2, 3, 32, 32) in blue, green, red
    images = network.eval()(rand(11, 2, 128), LABELS)[:, :, ::4, ::4]
    # The arrays are stored in float32, whose rounding of numbers below 1 is at most 2^-25.
    assert_all_close([("images", images, expected.flip(1) if is_reversed else expected)], atol=2**-24)


@torch.no_grad()
def check_discriminator(network: SAGANDiscriminator, stored: Mapping[str, Any], *, is_reversed: bool = True) -> None:
    x = rand(12, 2, 3, 128, 128).clamp(-1, 1)
    logits = network.eval()(x.flip(1) if is_reversed else x, LABELS)
    # Float64 throughout: what is left is the order of summation.
    assert_all_close([("logits", logits, torch.from_numpy(stored["discriminator/logits"])[:, 0])], atol=1e-10)


# --- same numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channel_order", [None, pytest.param("bgr", marks=pytest.mark.exhaustive), "rgb"])
def test_generator(stored: Mapping[str, Any], generator_weights: Weights, channel_order: Any) -> None:
    network = generator().double()
    load_published(generator_weights, network, channel_order=channel_order)
    check_generator(network, stored, is_reversed=REVERSED[channel_order])


@pytest.mark.parametrize("channel_order", [None, pytest.param("bgr", marks=pytest.mark.exhaustive), "rgb"])
def test_discriminator(stored: Mapping[str, Any], discriminator_weights: Weights, channel_order: Any) -> None:
    network = discriminator().double()
    load_published(discriminator_weights, network, channel_order=channel_order)
    check_discriminator(network, stored, is_reversed=REVERSED[channel_order])


def test_published_state_dict(
    stored: Mapping[str, Any], generator_weights: Weights, discriminator_weights: Weights
) -> None:
    """Of the three networks in it the averaged generator and the discriminator are taken."""
    state_dict = published(generator_weights, discriminator_weights)
    g, d = generator().double(), discriminator().double()
    load_published(state_dict, g)
    load_published(state_dict, d)
    check_generator(g, stored)
    check_discriminator(d, stored)


def test_without_an_average_the_generator_is_taken(stored: Mapping[str, Any], generator_weights: Weights) -> None:
    network = generator().double()
    load_published(with_prefix("generator.", generator_weights), network)
    check_generator(network, stored)


def test_the_state_dict_is_left_alone(generator_weights: Weights, discriminator_weights: Weights) -> None:
    for network, weights in ((generator(), generator_weights), (discriminator(), discriminator_weights)):
        before = {name: value.clone() for name, value in weights.items()}
        load_published(weights, network)
        assert list(weights) == list(before)
        assert all(torch.equal(value, before[name]) for name, value in weights.items())


def full_size(shapes: Shapes) -> Shapes:
    """The shapes for 1000 classes at base width 64, from those for 7 classes at base width 8."""
    full: Shapes = {}
    for name, shape in shapes.items():
        sizes = [8 * size for size in shape[:2]] + list(shape[2:])  # rows, columns, kernel
        if re.match(r"to_rgb\.conv|decision", name):
            sizes[:1] = shape[:1]  # the image's channels, the logit
        if re.search(r"embedding|proj_y", name):
            sizes[:1] = [1000]
        if re.match(r"noise2feat|from_rgb\.(conv_1|shortcut)", name):
            sizes[1:2] = shape[1:2]  # the latent, the image's channels
        full[name] = tuple(sizes)
    for name in full:
        if name.endswith("weight_u"):
            rows, *columns = full[name.replace("weight_u", "weight_orig")]
            full[name], full[name.replace("weight_u", "weight_v")] = (rows,), (int(np.prod(columns)),)
    return full


@pytest.mark.parametrize(
    ("network", "build", "parameters"),
    # As docs/variants.md counts them, with attention at 64 pixels instead of 32. Its projections have 1.25 C² weights
    # (query and key C·C/8, value and output C·C/2); C is 128 there instead of 256 in G, and 64 instead of 128 in D.
    [
        ("generator", SAGANGenerator, 42_078_852 - 1.25 * (256**2 - 128**2)),
        ("discriminator", SAGANDiscriminator, 39_463_618 - 1.25 * (128**2 - 64**2)),
    ],
)
def test_full_size(stored: Mapping[str, Any], network: str, build: Any, parameters: float) -> None:
    """Names and shapes for 1000 classes at full width fit; on the meta device, where nothing is allocated."""
    shapes = full_size(stored_shapes(stored, network))
    state_dict = {
        name: torch.empty(shape, device="meta", dtype=torch.long if name.endswith("tracked") else None)
        for name, shape in shapes.items()
    }
    with torch.device("meta"):
        model = build(128, num_classes=1000, architecture="resnet", attention_resolutions=(64,))
    load_published(with_prefix(f"{network}.", state_dict), model)
    buffers = r"weight_[uv]$|running_|num_batches_tracked$"
    assert sum(t.numel() for name, t in state_dict.items() if not re.search(buffers, name)) == parameters
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


# --- files ---------------------------------------------------------------------------------------------------------


def checkpoint(meta: dict[str, Any], state_dict: Weights) -> dict[str, Any]:
    """A file as mmcv saves it."""
    return {"meta": {"mmgen_version": "0.2.0", "iter": 826000, "config": "model = dict(...)", **meta}} | {
        "state_dict": state_dict,
        "optimizer": {"generator": {"state": {}, "param_groups": [{"lr": 1e-4, "betas": (0.0, 0.999)}]}},
    }


def test_a_file_with_plain_entries_loads_with_weights_only(
    stored: Mapping[str, Any], generator_weights: Weights, tmp_path: Path
) -> None:
    state_dict = with_prefix("generator_ema.", generator_weights)
    torch.save(checkpoint({"hook_msgs": {"best_score": 12.83}}, state_dict), tmp_path / "sagan.pth")
    network = generator().double()
    load_published(torch.load(tmp_path / "sagan.pth", weights_only=True)["state_dict"], network)
    check_generator(network, stored)


def test_a_file_with_objects_of_other_libraries_is_saved_again(
    stored: Mapping[str, Any], generator_weights: Weights, tmp_path: Path
) -> None:
    """A NumPy number among the notes is enough for ``weights_only`` to refuse; the weights alone are not refused."""
    state_dict = with_prefix("generator_ema.", generator_weights)
    torch.save(checkpoint({"hook_msgs": {"best_score": np.float64(12.83)}}, state_dict), tmp_path / "sagan.pth")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(tmp_path / "sagan.pth", weights_only=True)
    trusted = torch.load(tmp_path / "sagan.pth", weights_only=False)
    torch.save({"state_dict": trusted["state_dict"]}, tmp_path / "weights.pth")
    network = generator().double()
    load_published(torch.load(tmp_path / "weights.pth", weights_only=True)["state_dict"], network)
    check_generator(network, stored)


def test_the_guide_makes_a_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: Mapping[str, Any]) -> None:
    """The lines of the guide run, on weights of an eighth of the width, for 1000 classes."""
    code = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[2]
    shapes = stored_shapes(stored, "generator")
    for name in shapes:
        if "embedding" in name:
            shapes[name] = (1000, shapes[name][1])
    filled = filled_with_settled_vectors(shapes, "generator.")
    weights = {name: value.float() if value.is_floating_point() else value for name, value in filled.items()}
    monkeypatch.chdir(tmp_path)
    torch.save(checkpoint({}, with_prefix("generator_ema.", weights)), "sagan.pth")
    namespace: dict[str, Any] = {}
    exec(code, namespace)

    images, grid = namespace["images"], namespace["grid"]
    assert images.shape == (16, 3, 128, 128)
    assert grid.shape == (512, 512, 3)
    for index in (0, 1, 4, 15):  # row by row
        top, left = 128 * (index // 4), 128 * (index % 4)
        tile = grid[top : top + 128, left : left + 128].permute(2, 0, 1)
        torch.testing.assert_close(tile, images[index] / 2 + 0.5)
    network = generator(num_classes=1000)
    load_published(weights, network)
    labels = torch.full((16,), 207)
    with torch.no_grad():
        # The same latents and labels, drawn anew: the whole of the guide's state is its seed.
        expected = network.eval()(torch.randn(16, 128, generator=torch.Generator().manual_seed(0)), labels)
    torch.testing.assert_close(images, expected)


# --- errors: short, and nothing is loaded --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "built"),
    [((32, 64), r"\[32, 64\]"), ((), r"\[\]"), pytest.param((32,), r"\[32\]", marks=pytest.mark.exhaustive)],
)
def test_attention_elsewhere(
    generator_weights: Weights, discriminator_weights: Weights, given: tuple[int, ...], built: str
) -> None:
    for build, weights in ((generator, generator_weights), (discriminator, discriminator_weights)):
        network = build(attention_resolutions=given)
        order = built if build is generator else built.replace("32, 64", "64, 32")
        message = rf"attention at \[64\] pixels, this \w+ at {order}: build it with attention_resolutions=\(64,\)$"
        with pytest.raises(ValueError, match=message):
            load_published(weights, network)


def test_attention_at_two_sizes_is_recognized(generator_weights: Weights, discriminator_weights: Weights) -> None:
    """Each attention layer shifts the numbers of the blocks behind it."""

    def with_second(weights: Weights, position: int) -> Weights:
        """Another attention layer before ``conv_blocks.position``; its shapes do not matter."""
        moved = {}
        for name, value in weights.items():
            match = re.match(r"conv_blocks\.(\d+)\.(.*)", name)
            number = int(match[1]) + (int(match[1]) >= position) if match else 0
            moved[f"conv_blocks.{number}.{match[2]}" if match else name] = value
        return moved | {f"conv_blocks.{position}.gamma": torch.zeros(())}

    with pytest.raises(ValueError, match=r"attention at \[32, 64\] pixels, this SAGANGenerator at \[64\]"):
        load_published(with_second(generator_weights, 3), generator())
    with pytest.raises(ValueError, match=r"attention at \[64, 32\] pixels, this SAGANDiscriminator at \[64\]"):
        load_published(with_second(discriminator_weights, 2), discriminator())


def test_the_first_five_of_all_differences(generator_weights: Weights) -> None:
    """All tables of 7 classes in a network for 9, and no other key: 5 blocks, 2 norms in each, scale and shift."""
    with pytest.raises(ValueError, match="does not fit SAGANGenerator") as error:
        load_published(generator_weights, generator(num_classes=9))
    message = str(error.value)
    assert (
        "; 20 keys differ, of another shape: conv_blocks.0.norm_1.weight_embedding.weight (7, 128) instead" in message
    )
    assert message.count("_embedding.weight") == 5
    assert message.endswith(" and 15 more")


def test_channel_order_is_checked(generator_weights: Weights) -> None:
    with pytest.raises(ValueError, match="channel_order must be one of 'bgr', 'rgb', got 'gbr'"):
        load_published(generator_weights, generator(), channel_order="gbr")  # type: ignore[arg-type]
    for model in (SelfAttention2d(8), SAGANDiscriminator(64, base_channels=8)):
        with pytest.raises(ValueError, match="channel_order is for mmgeneration's networks"):
            load_published({}, model, channel_order="bgr")


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"num_classes": None}, "conv_blocks.0.norm_1.weight"),
        ({"spectral_norm": None}, "noise2feat.weight"),
        ({"attention": lambda channels: spectral_norm(nn.Conv2d(channels, channels, 1))}, "conv_blocks.4.bias"),
    ],
)
def test_networks_that_it_does_not_have(generator_weights: Weights, arguments: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=rf"missing: .*\b{re.escape(key)}\b"):
        load_published(generator_weights, generator(**arguments))
