"""Files that do not fit get a short error that says what they are, and no name that is not theirs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils import spectral_norm as legacy_spectral_norm

from torch_sagan import (
    SAGANDiscriminator,
    SAGANGenerator,
    SelfAttention2d,
    apply_spectral_norm,
    load_published,
)

UNKNOWN = "no weights that this function knows"
OWN = "an attention layer of torch-sagan itself, for load_state_dict, or of another implementation with the same names"


def state_of(*keys: str) -> dict[str, Tensor]:
    return {key: torch.zeros(1) for key in keys}


def projections(kind: type[nn.Conv1d | nn.Conv2d], names: tuple[str, ...], *, normalized: bool) -> dict[str, Tensor]:
    """Layers of those names, under PyTorch's older norm or without, and a gamma."""
    norm = legacy_spectral_norm if normalized else nn.Identity()
    layers = nn.ModuleDict({name: norm(kind(16, 4, 1)) for name in names})
    return layers.state_dict() | {"gamma": torch.zeros(1)}


def pruned() -> Mapping[str, Tensor]:
    return prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=0.5).state_dict()


OUR_GENERATOR = SAGANGenerator(8, base_channels=2, architecture="resnet")
OUR_DISCRIMINATOR = SAGANDiscriminator(8, base_channels=2)
STUDIOGAN = ("conv1x1_theta.weight_orig", "conv1x1_phi.weight_orig", "conv1x1_g.weight_orig", "sigma")

FILES: dict[str, tuple[Mapping[str, Tensor], str]] = {
    "mmgeneration's G": (state_of("noise2feat.bias"), "mmgeneration's generator"),
    "mmgeneration's G of three": (state_of("generator_ema.noise2feat.bias"), "mmgeneration's generator"),
    "mmgeneration's D": (state_of("module.discriminator.from_rgb.conv_1.conv.bias"), "mmgeneration's discriminator"),
    "our G": (OUR_GENERATOR.state_dict(), "a network of torch-sagan itself, for load_state_dict"),
    "our D": (OUR_DISCRIMINATOR.state_dict(), "a network of torch-sagan itself, for load_state_dict"),
    "our layer": (SelfAttention2d(8).state_dict(), OWN),
    "our layer, normalized": (apply_spectral_norm(SelfAttention2d(8)).state_dict(), OWN),
    "torchgan": (projections(nn.Conv2d, ("query", "key", "value"), normalized=False), OWN),
    "rosinality": (projections(nn.Conv1d, ("query", "key", "value"), normalized=True), "one-dimensional convolutions"),
    "fastai": (projections(nn.Conv1d, ("query", "key", "value"), normalized=False), "as fastai's: docs/migrating.md"),
    "fastai in a network": ({"layers.3.query.weight_orig": torch.zeros(4, 8, 1)}, "one-dimensional convolutions"),
    "StudioGAN": (state_of(*STUDIOGAN), "PyTorch-StudioGAN's attention, for SelfAttention2d.official(C)"),
    "StudioGAN's G": (
        state_of(*(f"blocks.4.0.{key}" for key in STUDIOGAN), "linear0.weight_orig", "linear0.weight_u"),
        "PyTorch-StudioGAN's attention",
    ),
    "reference's D": (state_of("l1.0.module.bias"), "the PyTorch reference's discriminator"),
    "reference's G": (state_of("l1.0.module.bias", "l1.1.bias"), "the PyTorch reference's generator"),
    "reference's layer": (state_of("query_conv.bias", "gamma"), "the PyTorch reference's attention"),
    "BigGAN's layer": (
        state_of("theta.weight", "o.weight", "gamma"),
        "an attention layer as BigGAN-PyTorch's, for SelfAttention2d.official(C)",
    ),
    "BigGAN's G": (state_of("blocks.0.0.conv1.u0", "blocks.0.0.conv1.sv0"), "a network of BigGAN-PyTorch"),
    "older norm": (legacy_spectral_norm(nn.Linear(2, 2)).state_dict(), "PyTorch's older spectral norm"),
    "pruned, not normalized": (pruned(), UNKNOWN),
    "a non-local block": (state_of("theta.weight", "phi.weight", "g.weight", "W.weight"), UNKNOWN),
    "a language model's": (state_of("query.weight", "key.weight", "value.weight"), UNKNOWN),
    "an EfficientNet": (state_of("blocks.0.conv_pw.weight", "classifier.weight"), UNKNOWN),
    "a StyleGAN's D": (state_of("from_rgb.weight", "blocks.0.conv0.weight"), UNKNOWN),
    "a ResNet": (state_of("l1.0.conv1.weight", "l1.1.conv1.weight"), UNKNOWN),
    "a layer": (nn.Linear(2, 2).state_dict(), UNKNOWN),
    "empty": ({}, UNKNOWN),
}


@pytest.mark.parametrize("file", FILES)
def test_other_files_get_a_short_error(file: str) -> None:
    state_dict, resembles = FILES[file]
    for model in (SAGANGenerator(8, base_channels=8), SelfAttention2d.official(16)):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=rf"resembles .*{re.escape(resembles)}.*; \d+ keys? differs?") as error:
            load_published(state_dict, model)
        assert len(str(error.value)) < 800  # five keys with their shapes, not hundreds
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("given", "resembles"),
    [
        ({"generator": {}, "discriminator": {}, "step": 3}, "a checkpoint of torch-sagan's trainer"),
        ({"generator": {}}, UNKNOWN),
        ({"noise2feat.bias": 3}, "mmgeneration's generator"),
    ],
)
def test_a_checkpoint_is_not_a_state_dict(given: dict[str, object], resembles: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"a state dict of names and tensors; this resembles {resembles}")):
        load_published(given, SelfAttention2d(8))  # type: ignore[arg-type]


@pytest.mark.parametrize("source", [3, None, torch.zeros(1)])
def test_what_is_neither_a_file_nor_a_state_dict(source: Any) -> None:
    with pytest.raises(TypeError, match=f"expected a path or a state dict, got {type(source).__name__}"):
        load_published(source, SelfAttention2d(8))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"sagan\.pth"):
        load_published(tmp_path / "sagan.pth")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth", b"", r"a\.pth: it cannot be read as a file of PyTorch"),
        ("a.pth", b"not a file of PyTorch", r"a\.pth: it cannot be read with weights_only=True, because it is damaged"),
        ("a.safetensors", b"\x08", r"a\.safetensors: it cannot be read as safetensors"),
    ],
)
def test_damaged_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_published(tmp_path / name)


def test_a_file_that_holds_other_objects(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "best": np.float64(3)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"because it holds a numpy\.\S+; the guide 'Published weights' says how"):
        load_published(tmp_path / "a.pth")
    torch.save([torch.zeros(1)], tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"b\.pth: expected a state dict or a checkpoint, got list"):
        load_published(tmp_path / "b.pth")


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith(("mm", "ref"))])
def test_without_a_network_the_same_is_said(file: str) -> None:
    state_dict, resembles = FILES[file]
    with pytest.raises(ValueError, match=rf"resembles .*{re.escape(resembles)}"):
        load_published(state_dict)
