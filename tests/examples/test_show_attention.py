"""What a trained generator attends to: the figure and the page that are drawn of it, and errors of one line."""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import show_attention
import train_celeba
from png_grids import opened, sheet
from torch_sagan import SAGANGenerator, explore_attention, record_attention
from training.average import recalibrated
from training.flags import Config
from training.output import image_io, model_card
from training.output.image_io import TILE, row_names


@pytest.fixture(scope="module")
def generators() -> dict[str, SAGANGenerator]:
    torch.manual_seed(0)
    small = {"z_dim": 8, "base_channels": 4}
    made = {
        "plain": SAGANGenerator(16, **small, attention_resolutions=(4, 8)),
        "gray": SAGANGenerator(16, **small, image_channels=1),
        "classes": SAGANGenerator(16, **small, num_classes=3),
        "resnet": SAGANGenerator(16, **small, num_classes=3, architecture="resnet"),
        "without": SAGANGenerator(16, **small, attention_resolutions=()),
    }
    for generator in made.values():
        for name, weight in generator.named_parameters():
            if name.endswith(("gamma", "beta")):  # new classes do not differ, and new attention does nothing
                torch.nn.init.normal_(weight)
    return made


def checkpoint(folder: Path, generator: SAGANGenerator) -> Path:
    architecture = "resnet" if hasattr(generator.blocks[0], "linear") else "dcgan"
    config = Config(image_size=16, z_dim=8, base_channels=4, architecture=architecture)
    classes = dict.fromkeys(("dark", "fair", "red")[: generator.num_classes or 0], 1)
    state = {"config": asdict(config), "classes": classes, "average": generator.state_dict()}
    state |= {"step": 1, "images": 4, "scores": {}}
    torch.save(state, folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


@pytest.mark.parametrize(
    "kind", ["plain", "classes", *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ("gray", "resnet"))]
)
def test_attention_of_a_checkpoint(
    kind: str, generators: dict[str, SAGANGenerator], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint(tmp_path, generators[kind])
    out = tmp_path / "a" / "where.png"
    arguments = ["--samples", "3", "--query", "2,3", "--query", "0.5,0.9"]
    show_attention.main([str(path), *arguments])
    beside = tmp_path / "generated" / "attention.png"  # where generate.py writes too
    assert capsys.readouterr().out.startswith(f"figure    {beside}: ")
    arguments += ["--out", str(out)]
    show_attention.main([str(tmp_path), *arguments])  # the run's folder is as good, and nothing is left to chance
    assert out.read_bytes() == beside.read_bytes()
    page = out.with_suffix(".html").read_bytes()
    assert page == beside.with_suffix(".html").read_bytes()
    assert str(out) in capsys.readouterr().out
    figure, names = opened(out), row_names(out)
    assert names == ([] if generators[kind].num_classes is None else ["dark", "fair", "red"])
    margin = figure.shape[1] - sheet(3, 3, TILE)[0]
    assert figure.shape[0] == sheet(3, 3, TILE)[1]
    assert margin > 0 if names else margin == 0
    assert figure[:, margin:].std() > 5
    show_attention.main([str(path), *arguments, "--seed", "1"])
    assert not np.array_equal(opened(out), figure)
    assert out.with_suffix(".html").read_bytes() != page


@pytest.mark.parametrize("source", ["checkpoint", "folder", "export"])
def test_the_explorer_holds_the_maps_of_the_model(
    source: str, generators: dict[str, SAGANGenerator], tmp_path: Path
) -> None:
    generator = generators["plain"]
    path = checkpoint(tmp_path, generator)
    if source == "export":
        exported, card = model_card.open_generator(path)
        path = tmp_path / "faces.safetensors"
        model_card.save(exported.state_dict(), card, path)
    elif source == "folder":
        path = tmp_path
    out = tmp_path / "figure.png"
    show_attention.main([str(path), "--samples", "2", "--seed", "4", "--out", str(out)])
    z = torch.randn(2, 8, generator=torch.Generator().manual_seed(4))
    generator = recalibrated(generator).eval()
    with record_attention(generator) as records, torch.no_grad():
        images = generator(z)
    assert out.with_suffix(".html").read_text(encoding="utf-8") == explore_attention(images, records).page


def test_a_page_holds_as_many_images_as_fit(
    generators: dict[str, SAGANGenerator],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two layers of 16² and 64² weights: 8704 bytes an image, by the estimate of two bytes a weight."""
    path = str(checkpoint(tmp_path, generators["plain"]))
    out = tmp_path / "figure.png"
    for limit, count in ((10**6, 4), (3 * 8704 - 1, 2), (1, 1)):
        monkeypatch.setattr(image_io, "PAGE_BYTES", limit)
        show_attention.main([path, "--out", str(out)])
        assert opened(out).shape == (*sheet(5, 4, TILE)[::-1], 3)  # the figure has all four
        assert capsys.readouterr().out.splitlines() == [
            f"figure    {out}: attention.8 of 4 samples",
            f"explorer  {out.with_suffix('.html')}: attention.4, attention.8 of {count} samples",
        ]
        (data,) = re.findall(r'id="data">(.*?)</script>', out.with_suffix(".html").read_text(encoding="utf-8"))
        assert len(json.loads(data)["images"]) == count


def test_attention_of_the_trainers_own_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--image-size", "16", "--base-channels", "4", "--batch-size", "4", "--z-dim", "8", "--device", "cpu"]
    tiny += ["--eval-every", "0", "--no-tensorboard"]
    train_celeba.main([*tiny, "--data", "digits", "--steps", "1", "--out", str(tmp_path)])
    capsys.readouterr()
    show_attention.main([str(tmp_path), "--query", "8,8", "--out", str(tmp_path / "where.png")])
    figure, _ = capsys.readouterr().out.splitlines()
    assert figure == f"figure    {tmp_path / 'where.png'}: attention.8 of 4 samples"
    assert opened(tmp_path / "where.png").shape == (*sheet(2, 4, TILE)[::-1], 3)


def test_layers_labels_and_points_matter(generators: dict[str, SAGANGenerator], tmp_path: Path) -> None:
    out, seen = tmp_path / "where.png", set()
    for kind, arguments in [
        ("plain", []),
        ("plain", ["--layer", "attention.4"]),
        ("plain", ["--query", "15,15"]),
        ("plain", ["--query", "14,15"]),
        ("classes", ["--labels", "0"]),
        ("classes", ["--labels", "1,red"]),
    ]:
        show_attention.main([str(checkpoint(tmp_path, generators[kind])), *arguments, "--out", str(out)])
        seen.add(out.read_bytes())
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("plain", ["--layer", "attention.5"], "--layer attention.5: this generator has attention.4, attention.8"),
        ("plain", ["--query", "16,0"], "--query 16,0: expected pixels from 0,0 to 15,15"),
        ("plain", ["--query", "1.5,0.5"], "--query 1.5,0.5: expected"),
        ("plain", ["--query", "3"], "--query 3: expected"),
        ("plain", ["--query", "a,b"], "--query a,b: expected"),
        ("plain", ["--labels", "1"], "--labels: this generator has no classes"),
        ("classes", ["--labels", "3"], "numbers from 0 to 2), got '3'"),
        ("classes", ["--labels", "blue"], "expected classes (dark, fair, red; or"),
        ("plain", ["--samples", "0"], "--samples must be at least 1, got 0"),
        ("without", [], "no self-attention layer"),
    ],
)
def test_mistakes_are_one_line(
    kind: str, arguments: list[str], message: str, generators: dict[str, SAGANGenerator], tmp_path: Path
) -> None:
    path = checkpoint(tmp_path, generators[kind])
    with pytest.raises(SystemExit, match=r"^show_attention\.py: .*" + re.escape(message)) as stopped:
        show_attention.main([str(path), "--out", str(tmp_path / "x.png"), *arguments])
    assert "\n" not in str(stopped.value)
    assert not list(tmp_path.glob("x.*"))


def test_a_folder_gets_the_figure_and_the_page(
    generators: dict[str, SAGANGenerator], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show_attention.main([str(checkpoint(tmp_path, generators["plain"])), "--samples", "1", "--out", str(tmp_path)])
    assert opened(tmp_path / "attention.png").shape == (*sheet(5, 1, TILE)[::-1], 3)
    assert (tmp_path / "attention.html").exists()
    assert str(tmp_path / "attention.png") in capsys.readouterr().out


@pytest.mark.parametrize("name", ["x", "x.figure", "file/x.png"])
def test_an_image_that_cannot_be_written_is_one_line(
    name: str, generators: dict[str, SAGANGenerator], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / name
    with pytest.raises(SystemExit, match=rf"^show_attention\.py: --out {re.escape(str(out))}: ") as stopped:
        show_attention.main([str(checkpoint(tmp_path, generators["plain"])), "--out", str(out)])
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("attention.8.query.bias", "has diverged|must be finite|NaN"),  # its maps
        ("to_image.bias", "hold infinities or NaN: the training has diverged"),  # its images alone
    ],
)
def test_a_generator_that_has_diverged(
    where: str, message: str, generators: dict[str, SAGANGenerator], tmp_path: Path
) -> None:
    broken = copy.deepcopy(generators["plain"])
    torch.nn.init.constant_(broken.get_parameter(where), math.nan)
    with pytest.raises(SystemExit, match=message) as error:
        show_attention.main([str(checkpoint(tmp_path, broken)), "--out", str(tmp_path / "x.png")])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("x.*"))


def test_foreign_files_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"model": torch.zeros(1)}, tmp_path / "other.pt")
    for name, message in (
        ("text.pt", "cannot be read as a checkpoint"),
        ("other.pt", "not a checkpoint of this trainer"),
        ("none.pt", "no such file"),
        (".", "no checkpoint in this folder"),
    ):
        with pytest.raises(SystemExit, match=message):
            show_attention.main([str(tmp_path / name)])
