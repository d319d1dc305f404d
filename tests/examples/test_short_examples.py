"""The short examples, with tiny settings: they run, the insertion changes nothing, and they write their figures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import attention_in_cyclegan
import attention_in_dcgan
import show_attention
import train_celeba
from torch_sagan import AttentionRecord, SAGANGenerator, explore_attention, record_attention
from training.average import recalibrated
from training.configuration import Config
from training.output import image_io, model_card
from training.output.image_io import GAP, TILE, save_attention


def sheet(columns: int, rows: int, tile: int = 128) -> tuple[int, int]:
    """The size of a PNG with so many tiles: a gap on both sides of each."""
    return columns * (tile + GAP) + GAP, rows * (tile + GAP) + GAP


def opened(path: Path) -> np.ndarray:
    with Image.open(path) as file:
        assert file.format == "PNG"
        return np.asarray(file.convert("RGB"))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """An example sets them for its process, here that of all tests."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# --- show_attention ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generators() -> dict[str, SAGANGenerator]:
    torch.manual_seed(0)
    small = {"z_dim": 8, "base_channels": 4}
    made = {
        "plain": SAGANGenerator(16, **small, attention_resolutions=(4, 8)),
        "grey": SAGANGenerator(16, **small, image_channels=1),
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


@pytest.mark.parametrize("kind", ["plain", "grey", "classes", "resnet"])
def test_attention_of_a_checkpoint(kind, generators, tmp_path, capsys):
    path = checkpoint(tmp_path, generators[kind])
    out = tmp_path / "a" / "where.png"
    arguments = ["--samples", "3", "--query", "2,3", "--query", "0.5,0.9"]
    show_attention.main([str(path), *arguments])
    beside = tmp_path / "generated" / "attention.png"  # where generate.py writes too
    assert capsys.readouterr().out.startswith(f"figure    {beside}: ")
    arguments += ["--out", str(out)]
    show_attention.main([str(path), *arguments])
    assert out.read_bytes() == beside.read_bytes()
    assert str(out) in capsys.readouterr().out
    figure = opened(out)
    assert (figure.shape[1], figure.shape[0]) == sheet(3, 3, TILE)
    assert figure.std() > 5
    page = out.with_suffix(".html").read_bytes()
    show_attention.main([str(tmp_path), *arguments])  # the run's folder is as good, and nothing is left to chance
    assert np.array_equal(opened(out), figure)
    assert out.with_suffix(".html").read_bytes() == page
    show_attention.main([str(path), *arguments, "--seed", "1"])
    assert not np.array_equal(opened(out), figure)
    assert out.with_suffix(".html").read_bytes() != page


@pytest.mark.parametrize("source", ["checkpoint", "folder", "export"])
def test_the_explorer_holds_the_maps_of_the_model(source, generators, tmp_path):
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


def test_a_page_holds_as_many_images_as_fit(generators, tmp_path, capsys, monkeypatch):
    """Two layers of 16² and 64² weights: 8704 bytes an image, by the estimate of two bytes a weight."""
    path = str(checkpoint(tmp_path, generators["plain"]))
    out = tmp_path / "figure.png"
    for limit, count in ((10**6, 4), (3 * 8704, 3), (3 * 8704 - 1, 2), (1, 1)):
        monkeypatch.setattr(image_io, "PAGE_BYTES", limit)
        show_attention.main([path, "--out", str(out)])
        assert opened(out).shape == (*sheet(5, 4, TILE)[::-1], 3)  # the figure has all four
        assert capsys.readouterr().out.splitlines() == [
            f"figure    {out}: attention.8 of 4 samples",
            f"explorer  {out.with_suffix('.html')}: attention.4, attention.8 of {count} samples",
        ]
        (data,) = re.findall(r'id="data">(.*?)</script>', out.with_suffix(".html").read_text(encoding="utf-8"))
        assert len(json.loads(data)["images"]) == count


def test_attention_of_the_trainers_own_checkpoint(tmp_path, capsys):
    tiny = ["--image-size", "16", "--base-channels", "4", "--batch-size", "4", "--z-dim", "8", "--device", "cpu"]
    train_celeba.main([*tiny, "--data", "digits", "--steps", "1", "--out", str(tmp_path)])
    capsys.readouterr()
    show_attention.main([str(tmp_path), "--query", "8,8", "--out", str(tmp_path / "where.png")])
    figure, _ = capsys.readouterr().out.splitlines()
    assert figure == f"figure    {tmp_path / 'where.png'}: attention.8 of 4 samples"
    assert opened(tmp_path / "where.png").shape == (*sheet(2, 4, TILE)[::-1], 3)


def test_layers_labels_and_points_matter(generators, tmp_path):
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
        ("without", [], "no SelfAttention2d"),
    ],
)
def test_mistakes_are_one_line(kind, arguments, message, generators, tmp_path):
    path = checkpoint(tmp_path, generators[kind])
    with pytest.raises(SystemExit, match=r"^show_attention\.py: .*" + re.escape(message)) as stopped:
        show_attention.main([str(path), "--out", str(tmp_path / "x.png"), *arguments])
    assert "\n" not in str(stopped.value)
    assert not list(tmp_path.glob("x.*"))


def test_a_folder_gets_the_figure_and_the_page(generators, tmp_path, capsys):
    show_attention.main([str(checkpoint(tmp_path, generators["plain"])), "--samples", "1", "--out", str(tmp_path)])
    assert opened(tmp_path / "attention.png").shape == (*sheet(5, 1, TILE)[::-1], 3)
    assert (tmp_path / "attention.html").exists()
    assert str(tmp_path / "attention.png") in capsys.readouterr().out


@pytest.mark.parametrize("name", ["x", "x.figure", "file/x.png"])
def test_an_image_that_cannot_be_written_is_one_line(name, generators, tmp_path):
    (tmp_path / "file").touch()
    out = tmp_path / name
    with pytest.raises(SystemExit, match=rf"^show_attention\.py: --out {re.escape(str(out))}: ") as stopped:
        show_attention.main([str(checkpoint(tmp_path, generators["plain"])), "--out", str(out)])
    assert "\n" not in str(stopped.value)


def test_foreign_files_are_no_checkpoints(tmp_path):
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


def test_the_figure_shows_the_map_of_each_point(tmp_path):
    """Two positions of a grey image, upper right and lower left, each of which attends to the other's quarter."""
    attention = torch.zeros(1, 4, 4)
    attention[0, 1, 2] = attention[0, 2, 1] = 1
    record = AttentionRecord(attention, (2, 2), (2, 2))
    save_attention(tmp_path / "x.png", torch.zeros(1, 1, 32, 32), record, [(0.1, 0.9), (0.9, 0.1)])
    figure = opened(tmp_path / "x.png").astype(float)
    image, first, second = (figure[GAP:-GAP, at : at + TILE] for at in range(GAP, 3 * (GAP + TILE), GAP + TILE))
    assert figure.shape[:2] == sheet(3, 1, TILE)[::-1]
    assert first[135:147, 45:57].mean() > first[45:57, 135:147].mean() + 50
    assert second[45:57, 135:147].mean() > second[135:147, 45:57].mean() + 50
    # On two rings of radius 8 (2.6 · 192 / 64) in two colours, which come back around their maps.
    mine, other = image[19, 172 - 8], image[172, 19 - 8]
    assert np.abs(mine - other).max() > 100
    assert np.array_equal(first[19, 172 - 8], mine)
    assert np.array_equal(second[172, 19 - 8], other)


@pytest.mark.parametrize("size", [16, 50, 64, 191, 192, 200])
def test_tiles_of_overlays_are_large_enough_to_be_seen(size, tmp_path):
    save_attention(tmp_path / "x.png", torch.zeros(1, 3, size, size), torch.ones(1, 4, 1), [(0.5, 0.5)])
    height, width, _ = opened(tmp_path / "x.png").shape
    tile = height - 2 * GAP
    assert (width, height) == sheet(2, 1, tile)
    assert tile % size == 0
    assert 192 <= tile < 192 + size


# --- attention in existing models -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("example", "layers", "figures"),
    [
        (attention_in_dcgan, 2, {"samples.png": sheet(8, 4), "attention.png": sheet(5, 4, TILE)}),
        (attention_in_cyclegan, 6, {"samples.png": sheet(8, 3), "attention.png": sheet(4, 4, TILE)}),
    ],
)
def test_attention_in_an_existing_model(example, layers, figures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(example, "PEOPLE", 64)
    printed = []
    for threads in (1, 2):
        out = tmp_path / str(threads)
        torch.set_num_threads(threads)
        example.main(["--steps", "20", "--out", str(out), "--seed", "5"])
        said = capsys.readouterr()
        printed.append(said.out.replace(str(out), "OUT"))
        assert "before: 100%" in said.err
        assert "after: 100%" in said.err
        assert {path.name for path in out.iterdir()} == set(figures)
        for name, size in figures.items():
            assert opened(out / name).shape == (*size[::-1], 3)
    assert printed[0] == printed[1]
    for name in figures:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert "unchanged by the insertion: True" in printed[0]
    gammas = re.findall(r"[+-]0\.\d{4}", printed[0])
    assert len(gammas) == layers
    assert all(float(gamma) != 0 for gamma in gammas)


def test_attention_in_some_networks_of_a_cyclegan(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(attention_in_cyclegan, "PEOPLE", 64)
    random_states = []
    for choice, layers in (("both", 6), ("generators", 4), ("discriminators", 2), ("none", 0)):
        out = tmp_path / choice
        attention_in_cyclegan.main(["--steps", "2", "--out", str(out), "--attention", choice])
        random_states.append(torch.get_rng_state())
        assert len(re.findall(r"[+-]0\.\d{4}", capsys.readouterr().out)) == layers
        assert (out / "attention.png").exists() == (choice in ("both", "generators"))
    assert all(torch.equal(state, random_states[0]) for state in random_states)  # the same batches


@pytest.mark.parametrize("example", [attention_in_dcgan, attention_in_cyclegan])
def test_no_steps_are_refused(example, tmp_path):
    with pytest.raises(SystemExit, match=rf"^{example.__name__}\.py: argument --steps: must be at least 1, got 0"):
        example.main(["--steps", "0", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
