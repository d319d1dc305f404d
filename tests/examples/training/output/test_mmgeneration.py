"""A file as mmgeneration publishes it, read by the scripts: the averaged generator, its classes, errors of one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import generate
from references import filled_with_settled_vectors
from torch_sagan import SAGANGenerator, load_published
from training.latents import draw_latents
from training.output.image_io import row_names
from training.output.model_card import open_generator

ENTRIES = {"meta": {"mmgen_version": "0.2.0", "iter": 826000, "config": "model = dict(...)"}, "optimizer": {}}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Those of a generator with an eighth of the width, for seven classes."""
    with np.load(Path(__file__).parents[3] / "data" / "mmgeneration.npz") as stored:
        shapes = zip(stored["generator/names"], stored["generator/shapes"], strict=True)
        state = filled_with_settled_vectors({str(n): tuple(json.loads(str(s))) for n, s in shapes}, "generator.")
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


@pytest.fixture
def file(weights: dict[str, Tensor], tmp_path: Path) -> Path:
    """With nothing but zeros for the generator that is not the average, and with a discriminator."""
    state = {f"generator.{name}": torch.zeros_like(value) for name, value in weights.items()}
    state |= {f"generator_ema.{name}": value for name, value in weights.items()}
    torch.save(
        ENTRIES | {"state_dict": state | {"discriminator.decision.bias": torch.zeros(1)}}, tmp_path / "sagan.pth"
    )
    return tmp_path / "sagan.pth"


def test_a_grid_of_a_class(file: Path, weights: dict[str, Tensor], tmp_path: Path) -> None:
    """Red, green, blue, with the class and the latent vectors that are asked for, and nothing computed anew."""
    out = tmp_path / "out"
    assert generate.main([str(file), "--labels", "3,6", "--columns", "2", "--out", str(out)]) == 0
    network = SAGANGenerator(128, base_channels=8, num_classes=7, architecture="resnet", attention_resolutions=(64,))
    load_published(weights, network)
    z = draw_latents(2, 128, torch.Generator().manual_seed(0), None).repeat(2, 1)
    with torch.no_grad():
        images = network.eval()(z, torch.tensor([3, 3, 6, 6]))
    assert row_names(out / "grid.png") == ["3", "6"]
    grid = torch.from_numpy(np.array(Image.open(out / "grid.png"))).permute(2, 0, 1)
    assert grid.shape[0] == 3
    grid = grid[:, :, grid.shape[2] - grid.shape[1] :]  # without the names of the rows
    for number, image in enumerate(images):  # tiles have borders of their own, so each is looked for in its quarter
        top, left = (side // 2 * part for side, part in zip(grid.shape[1:], divmod(number, 2), strict=True))
        expected = ((image + 1) * 127.5).round().to(torch.uint8)
        tiles = (grid[:, top + i : top + i + 128, left + j : left + j + 128] for i in range(9) for j in range(9))
        assert any(torch.equal(tile, expected) for tile in tiles)


def test_the_generator_that_is_not_the_average(file: Path) -> None:
    generator, card = open_generator(file, average=False)
    assert card["averaged"] is False
    assert not any(value.any() for value in generator.parameters() if value.ndim > 1 and len(value) != 7)


def test_card(file: Path) -> None:
    _, card = open_generator(file)
    assert card == {
        "generator": {
            "architecture": "resnet", "image_size": 128, "z_dim": 128, "widths": [128, 128, 64, 32, 16, 8],
            "image_channels": 3, "num_classes": 7, "attention_resolutions": [64], "conditioning": "batch_norm",
            "upsampling": None, "normalize_classes": False, "norm_eps": 1e-5,
        },
        "averaged": True,
        "classes": {},
        "source": "sagan.pth",
        "framework": "mmgeneration",
        "num_classes": 7,
        "channel_order": "rgb",
        "image_range": [-1, 1],
    }  # fmt: skip


def test_it_can_be_exported(file: Path, tmp_path: Path) -> None:
    exported = tmp_path / "sagan.safetensors"
    assert generate.main([str(file), "--export", str(exported)]) == 0
    first, second = open_generator(file)[0], open_generator(exported)[0]
    z, labels = torch.randn(1, 128), torch.tensor([3])
    with torch.no_grad():
        assert torch.equal(first(z, labels), second(z, labels))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"meta": {"best_score": np.float64(12.83)}, "state_dict": {}},
            r"cannot be read as a checkpoint, because it holds a numpy\.\S+ \(see docs/pretrained\.md\)$",
        ),
        (
            {"state_dict": {"discriminator.decision.bias": torch.zeros(1)}},
            "as a published file: expected a published generator; this resembles",
        ),
        ({"state_dict": None}, "as a published file: expected a state dict of names and tensors"),
    ],
    ids=["a NumPy number", "no generator", "no weights"],
)
def test_what_prevents_it_is_said_in_one_line(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "sagan.pth")
    with pytest.raises(SystemExit, match=message) as raised:
        generate.main([str(tmp_path / "sagan.pth"), "--out", str(tmp_path / "out")])
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_weights_of_another_size_do_not_fit(file: Path, weights: dict[str, Tensor]) -> None:
    state = {f"generator_ema.{name}": value for name, value in weights.items() if "conv_blocks.4" not in name}
    torch.save({"state_dict": state}, file)
    with pytest.raises(SystemExit, match="as a published file: the state dict does not fit SAGANGenerator"):
        generate.main([str(file)])
