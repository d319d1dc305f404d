"""The guide for a CycleGAN holds for the public networks, as their `define_G` and `define_D` return them."""

from __future__ import annotations

import copy
import functools
import re
import warnings

import pytest
import torch
from torch import nn

from pages import DOCS
from public_networks import NLayerDiscriminator, ResnetGenerator, define_D, define_G, init_func
from torch_sagan import (
    apply_spectral_norm,
    insert_self_attention,
    insertion_points,
    remove_self_attention,
    spectral_norms,
)

GPU_IDS = [0]
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


def generator() -> nn.Module:
    return define_G(3, 3, 4, "resnet_9blocks", "instance", gpu_ids=GPU_IDS).cpu()


def discriminator() -> nn.Module:
    return define_D(3, 4, "basic", norm="instance", gpu_ids=GPU_IDS).cpu()


@pytest.mark.parametrize(("make", "after"), [(generator, "model.9"), (discriminator, "model.7")])
def test_attention_goes_into_what_is_wrapped(make: functools.partial[nn.Module], after: str) -> None:
    wrapped = make()
    assert isinstance(wrapped, nn.DataParallel)
    images = IMAGES.repeat(1, 1, 2, 2)
    for refused in (insert_self_attention, insertion_points):
        arguments = (f"module.{after}",) if refused is insert_self_attention else (images,)
        with pytest.raises(ValueError, match=r"wrapped in DataParallel: insert into its \.module"):
            refused(wrapped, *arguments)  # type: ignore[operator]
    network = wrapped.module
    before, old = network(images), copy.deepcopy(network.state_dict())
    insert_self_attention(network, after=after, example_input=images)
    assert torch.equal(network(images), before)
    if not torch.cuda.is_available():  # else the wrapper would take the images to a GPU
        assert torch.equal(wrapped(images), before)

    nn.init.ones_(network.get_submodule(f"{after}.inserted_attention").gamma)
    assert not torch.equal(network(images), before)
    network.load_state_dict(old)  # a checkpoint from before
    assert torch.equal(network(images), before)
    for key in network.state_dict():  # which its loader looks up step by step
        functools.reduce(getattr, key.split("."), network)
    remove_self_attention(network)
    assert network.state_dict().keys() == old.keys()


def with_the_older_hook() -> nn.Module:
    return NLayerDiscriminator(4, old_hook=True).apply(init_func).eval()


def test_a_discriminator_with_the_older_norm_keeps_it() -> None:
    network = with_the_older_hook()
    images = IMAGES.repeat(1, 1, 2, 2)
    before = network(images)
    insert_self_attention(network, after="model.7", example_input=images)
    assert torch.equal(network(images), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_spectral_norm(network, include="model.7.inserted_attention")
    assert torch.equal(network(images), before)  # gamma is still zero
    convolutions = {f"model.{number}.weight" for number in (0, 2, 5, 8, 11)}
    attention = {f"model.7.inserted_attention.{name}.weight" for name in ("query", "key", "value")}
    assert spectral_norms(network).keys() == convolutions | attention

    nn.init.ones_(network.get_submodule("model.7.inserted_attention").gamma)
    network.train()
    for _ in range(2):
        network(images).sum().backward()
    again = with_the_older_hook()
    insert_self_attention(again, after="model.7", example_input=images)
    apply_spectral_norm(again, include="model.7.inserted_attention")
    again.load_state_dict(network.state_dict())
    assert torch.equal(again.eval()(images), network.eval()(images))


def test_without_a_choice_the_older_norm_is_named() -> None:
    network = with_the_older_hook()
    insert_self_attention(network, after="model.7", example_input=IMAGES.repeat(1, 1, 2, 2))
    with pytest.warns(UserWarning, match=r"model\.0.*model\.11"):
        apply_spectral_norm(network)
    assert len(spectral_norms(network)) == 8


def table() -> dict[str, tuple[str, str]]:
    """The rows of the guide: each path with its feature map and its share of operations."""
    rows = {}
    for line in (DOCS / "cyclegan.md").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\|.*?\| (`model\.\d+`.*?) \| (.+?) \| \+(\d+) % \|", line):
            for path in re.findall(r"`(model\.\d+)`", match[1]):
                rows[path + (" of D" if len(rows) >= 6 else "")] = (match[2], match[3])
    return rows


def test_the_table_has_the_sizes_and_operations_of_the_real_networks() -> None:
    """At 256 pixels and full width, on the meta device, which computes nothing."""
    rows = table()
    assert len(rows) == 9
    with torch.device("meta"):
        images = torch.empty(1, 3, 256, 256)
        for network, suffix in ((ResnetGenerator(64, 9), ""), (NLayerDiscriminator(64), " of D")):
            points = insertion_points(network, images)
            shares = {
                point.path + suffix: (
                    f"{point.channels} at {point.size[0]}×{point.size[1]}",
                    f"{100 * point.operations / points.operations:.0f}",
                )
                for point in points
            }
            for path in [path for path in rows if path.endswith(" of D") == bool(suffix)]:
                assert rows[path] == shares[path], path


def test_the_table_of_all_models_names_the_same_places() -> None:
    text = (DOCS / "existing-models.md").read_text(encoding="utf-8")
    assert "| CycleGAN, ResNet generator | `model.9` to `model.18`" in text
    points: dict[str, tuple[int, tuple[int, ...]]] = {}
    with torch.device("meta"):
        for point in insertion_points(ResnetGenerator(64, 9), torch.empty(1, 3, 256, 256)):
            points[point.path] = (point.channels, point.size)
    assert {points[f"model.{number}"] for number in range(9, 19)} == {(256, (64, 64))}
