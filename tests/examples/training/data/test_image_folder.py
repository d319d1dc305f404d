"""The data set of a folder: what is cropped, what is shown, and what takes the place of an unreadable image."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_celeba
from framed_images import framed
from tiny_runs import checkpoint, train
from training.data import image_folder
from training.data.cropping import PAD
from training.data.dataset import Batch
from training.data.files import Folder
from training.data.image_folder import ImageFolder, left_out
from training.data.labels import from_folders
from training.data.sources import crop_setting, open_data

SIZE = 8


def test_sizes_are_those_of_a_sample_where_there_are_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_folder, "SAMPLE", 4)
    for i in range(10):
        Image.new("L", (20 + i // 2, 30)).save(tmp_path / f"{i}.png")
    looked_at: list[str] = []
    whole = Folder.open
    monkeypatch.setattr(Folder, "open", lambda self, path: looked_at.append(path) or whole(self, path))
    text = ImageFolder(tmp_path, 16).crops()
    assert [Path(path).name for path in looked_at] == ["0.png", "3.png", "6.png", "9.png"]
    expected = "20x20 of 20x30 (1), 21x21 of 21x30 (1), 23x23 of 23x30 (1), other sizes (1), in a sample of 4"
    assert text == expected


def test_the_crop_setting() -> None:
    assert [crop_setting(text) for text in ("auto", "0", "160", "pad")] == [None, 0, 160, PAD]
    for text in ("-1", "all", "1.5", ""):
        with pytest.raises(ValueError, match=rf"--crop {re.escape(text)}: expected auto, pad, or a number of pixels"):
            crop_setting(text)


@pytest.mark.parametrize("quick", [["--no-cache", "--num-workers", "0"], []], ids=["no cache", "cache"])
def test_a_run_says_what_it_crops_and_shows_what_the_discriminator_is_shown(
    quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    for i in range(9):
        framed(data / f"{i}.png", 64, 40, 4 * i)
    shown: list[torch.Tensor] = []
    read_images = train_celeba.read_images

    def watched(*arguments: object) -> Iterator[Batch]:
        for batch in read_images(*arguments):
            shown.append(batch.images)
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_celeba, "read_images", watched)
        train(out, "--data", str(data), "--steps", "2", "--seed", "3", *quick)
    assert "crop      40x40 of 64x40\n" in capsys.readouterr().out
    with Image.open(out / "reals.png") as file:
        grid = np.asarray(file)  # 8 columns and 2 rows of 9 images, each 8 times as large, 2 pixels apart
    tiles = [grid[2 + row * 130 :, 2 + column * 130 :][:128:8, :128:8] for row in range(2) for column in range(8)]
    first = torch.cat(shown)[:8].permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(np.stack(tiles[:8]), first)


# ------------------------------------------------------------------------------------------ unreadable images


COLORS = {"box": (255, 0, 0), "disc": (0, 255, 0), "wedge": (0, 0, 255)}


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """Twelve images of each of three classes, in their colors; three of the last are damaged, neighbors."""
    root = tmp_path / "shapes"
    for name, color in COLORS.items():
        (root / name).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (SIZE, SIZE), color).save(root / name / f"{i:02d}.png")
    for i in (9, 10, 11):
        (root / "wedge" / f"{i:02d}.png").write_bytes((root / "wedge" / f"{i:02d}.png").read_bytes()[:-30])
    return root


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize("cache", [["--no-cache", "--num-workers", "0"], []], ids=["no cache", "cache"])
def test_a_run_counts_what_it_trains_on(
    cache: list[str], shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "run", "--data", str(shapes), "--classes", "own", "--steps", "9", *cache)
    said, complaints = capsys.readouterr()
    assert checkpoint(tmp_path / "run")["classes"] == {"box": 12, "disc": 12, "wedge": 9}
    for i in (9, 10, 11):
        assert complaints.count(f"wedge/{i:02d}.png") == 1
    if not cache:
        assert re.search(r"^data .*: 33 images at 16 px", said, re.MULTILINE)
        assert "3 more cannot be read; another image of the same class takes the place of each\n" in said
        assert "classes   3: box 12, disc 12, wedge 9\n" in said


@pytest.mark.parametrize("cached", [False, True])
def test_another_image_of_the_class_takes_the_place_of_an_unreadable_one(
    cached: bool, shapes: Path, tmp_path: Path
) -> None:
    data = open_data(str(shapes), size=SIZE, cache=tmp_path / "cache" if cached else None, classes="own")
    batch = data[[(i, False) for i in range(36)]]
    assert batch.labels is not None
    colors = torch.tensor(list(COLORS.values()), dtype=torch.uint8)
    assert torch.equal(batch.images[:, :, 0, 0], colors[batch.labels])
    assert batch.labels.bincount().tolist() == [12, 12, 12]
    assert data.missing == 3


def test_replacements_are_spread(tmp_path: Path) -> None:
    """As a full disk leaves them: half of the files are empty, one after another."""
    for i in range(200):
        if i < 100:
            (tmp_path / f"{i:03d}.png").touch()
        else:
            Image.new("RGB", (SIZE, SIZE), (i, i, i)).save(tmp_path / f"{i:03d}.png")
    images, unreadable = ImageFolder(tmp_path, SIZE).pixels(range(100))
    assert len(unreadable) == 100
    taken = Counter(images[:, 0, 0, 0].tolist())
    assert set(taken) <= set(range(100, 200))
    assert max(taken.values()) <= 6  # of 100 drawn from 100, one in 1700 tries has seven of a kind
    again, _ = ImageFolder(tmp_path, SIZE).pixels(range(99, -1, -1))  # whatever was read before
    np.testing.assert_array_equal(again[::-1], images)


def test_hundreds_of_unreadable_neighbors_are_tried_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0300.png")
    for i in range(300):  # as a full disk leaves them when an archive is unpacked
        (tmp_path / f"{i:04d}.png").touch()
    tried: list[str] = []
    decode = ImageFolder._decode
    monkeypatch.setattr(
        ImageFolder, "_decode", lambda self, target, path: tried.append(path) or decode(self, target, path)
    )
    images, unreadable = ImageFolder(tmp_path, size=4, crop=0).pixels(range(301))
    assert images.shape == (301, 3, 4, 4)
    assert len(unreadable) == 300
    assert len(tried) <= 2 * 301


def test_a_class_without_a_readable_image_is_an_error_with_its_name(shapes: Path, tmp_path: Path) -> None:
    for path in (shapes / "disc").iterdir():
        path.write_text("damaged")
    folder = ImageFolder(shapes, SIZE, labeling=from_folders)
    message = r"none of the 12 images of the class disc can be read, for example .*disc/\d\d\.png: not in a format"
    with pytest.raises(ValueError, match=message):
        folder.pixels(range(36))
    with pytest.raises(ValueError, match=message):
        open_data(str(shapes), size=SIZE, cache=tmp_path / "cache", classes="own")


def test_a_folder_without_one_readable_image_says_why(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text("not an image")
    with pytest.raises(ValueError, match=r"none of the 2 images can be read, .*a\.png: not in a format"):
        open_data(str(tmp_path), size=SIZE)


@pytest.mark.usefixtures("no_drawing")
def test_the_first_image_is_named_when_it_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "images"
    data.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (SIZE, SIZE)).save(data / name)
    (data / "0.png").write_text("not an image")
    for arguments in ([], ["--no-cache", "--num-workers", "1"]):
        train(tmp_path / "run", "--data", str(data), "--steps", "3", *arguments)
        assert capsys.readouterr().err.count("not in a format that can be read, ") == 1


def test_of_many_files_with_one_reason_the_first_are_named() -> None:
    others = {f"{i:03d}.txt": "not an image" for i in range(200)} | {"a.jpg": "encrypted"}
    lines = list(left_out(others))
    assert lines[0] == "not an image, left out: 000.txt"
    assert len(lines) == image_folder.NAMED + 2
    assert lines[-2:] == [f"not an image, left out: {200 - image_folder.NAMED} more", "encrypted, left out: a.jpg"]
