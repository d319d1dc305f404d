"""The data sets that `--data` names: channels, mirroring, what is held out, and CelebA's table beside the images or in
them."""

from __future__ import annotations

import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import generate
from tiny_runs import checkpoint, train
from training.data import sources
from training.data.image_folder import ImageFolder
from training.data.sources import open_data, open_held_out, procedural_faces, with_channels

SIZE = 16


@pytest.fixture
def gray(tmp_path: Path) -> Path:
    root = tmp_path / "gray"
    root.mkdir()
    for i in range(3):
        Image.new("L", (20, 20), 40 * i).save(root / f"{i}.png")
    return root


# ------------------------------------------------------------------------------------------- channels and mirroring


@pytest.mark.parametrize("cached", [False, True])
def test_channels_of_a_folder(cached: bool, gray: Path, tmp_path: Path) -> None:
    pixels = {}
    for channels in ("auto", "3", "1"):
        cache = tmp_path / "cache" if cached else None
        data = open_data(str(gray), size=SIZE, cache=cache, channels=channels)
        pixels[channels], _ = data.pixels(range(3))
    assert pixels["auto"].shape == pixels["3"].shape == (3, 3, SIZE, SIZE)
    assert pixels["1"].shape == (3, 1, SIZE, SIZE)
    np.testing.assert_array_equal(pixels["auto"], np.repeat(pixels["1"], 3, axis=1))
    assert pixels["1"][:, 0, 0, 0].tolist() == [0, 40, 80]
    assert len(list(tmp_path.glob("cache/*.npy"))) == (2 if cached else 0)  # neither replaces the other


def test_a_folder_that_is_gray_is_recognized(gray: Path) -> None:
    folder = open_data(str(gray), size=SIZE)
    assert folder.gray()
    Image.new("RGB", (20, 20), (9, 9, 9)).save(gray / "3.png")
    assert not open_data(str(gray), size=SIZE).gray()


def test_channels_of_data_in_memory() -> None:
    faces = procedural_faces(SIZE, 20).images
    assert open_data("faces:20", size=SIZE).images.shape[1] == open_data("digits", size=8, channels="3").images.shape[1]
    gray = with_channels(faces, "1")
    for face, expected in zip(faces, gray, strict=True):
        luma = Image.fromarray(face.transpose(1, 2, 0)).convert("L")
        np.testing.assert_array_equal(expected[0], np.asarray(luma))
    np.testing.assert_array_equal(with_channels(gray, "3"), np.repeat(gray, 3, axis=1))
    assert with_channels(faces, "auto") is faces


@pytest.mark.parametrize("mirror", [False, True])
def test_mirroring_can_be_disabled(mirror: bool, gray: Path, tmp_path: Path) -> None:
    for cache in (None, tmp_path / "cache"):
        assert open_data(str(gray), size=SIZE, cache=cache, mirror=mirror).flip is mirror
    assert open_data("faces:4", size=SIZE, mirror=mirror).flip is mirror
    assert open_data("digits", size=SIZE, mirror=mirror).flip is False


def test_a_run_on_gray_unmirrored_images_is_scored_against_such(
    gray: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (20, 20), 120).save(gray / "3.png")  # four images have two halves to compare
    train(tmp_path / "run", "--data", str(gray), "--steps", "1", "--channels", "1", "--no-mirror")
    assert "--channels 1" not in capsys.readouterr().out  # advice for those that have not given it
    assert checkpoint(tmp_path / "run")["generator"]["to_image.weight"].shape[1] == 1
    read: list[ImageFolder] = []
    monkeypatch.setattr(generate, "open_data", lambda *data, **more: read.append(open_data(*data, **more)) or read[-1])
    generate.main([str(tmp_path / "run"), "--out", str(tmp_path / "made"), "--score", str(gray), "--samples", "2"])
    assert [(data.channels, data.flip) for data in read] == [(1, False)]


@pytest.mark.usefixtures("no_drawing")
def test_gray_images_are_pointed_out(gray: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", "--data", str(gray), "--dry-run")
    assert "these images are gray; a new run with --channels 1 would train on one" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- the held-out part


@pytest.mark.parametrize(("data", "first"), [("faces", 50), ("faces:10", 10), ("faces:5-12", 12)])
def test_faces_after_those_of_the_training_are_held_out(data: str, first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "FACES", 50)  # 4096 take seconds
    held_out, faces = open_held_out(data, size=SIZE, classes="own"), open_data(f"faces:{first}-{first + 50}", size=SIZE)
    assert held_out is not None
    np.testing.assert_array_equal(held_out.images, faces.images)
    assert held_out.labels is not None
    assert held_out.labels.classes == open_data("faces:99", size=SIZE, classes="own").labels.classes
    learned = {face.tobytes() for face in open_data(data, size=SIZE).images}
    assert not learned & {face.tobytes() for face in held_out.images}


def test_a_held_out_part_is_read_like_the_training_images() -> None:
    held_out = open_held_out("faces:1", size=SIZE, channels="1", mirror=False)
    assert held_out is not None
    assert held_out.images.shape == (4096, 1, SIZE, SIZE)
    assert held_out.flip is False
    assert held_out.labels is None
    for classes, message in (("hair", "expected none, own"), ("attributes:Male", "faces:1 has no attributes")):
        with pytest.raises(ValueError, match=message):
            open_held_out("faces:1", size=SIZE, classes=classes)


def test_data_that_keep_no_image_apart(gray: Path) -> None:
    assert open_held_out("digits", size=SIZE, classes="own") is None
    assert open_held_out(str(gray), size=SIZE, classes="own") is None
    assert open_held_out(str(gray), size=SIZE, classes="attributes:Male") is None


# --------------------------------------------------------------------------------------------------------- CelebA


ROWS = [("000001", 1, -1), ("000002", -1, 1), ("000003", 1, 1), ("000004", -1, -1)]
TXT = "4\nMale Smiling \n" + "".join(f"{name}.jpg {a:2d} {b:2d}\n" for name, a, b in ROWS)
CSV = "image_id,Male,Smiling\n" + "".join(f"{name}.jpg,{a},{b}\n" for name, a, b in ROWS)
COUNTS = {"not-Smiling+not-Male": 1, "not-Smiling+Male": 1, "Smiling+not-Male": 1, "Smiling+Male": 1}


def write_images(folder: Path, suffix: str) -> None:
    folder.mkdir(parents=True)
    for i, (name, *_) in enumerate(ROWS):
        Image.new("RGB", (178, 218), (60 * i, 0, 0)).save(folder / f"{name}.{suffix}")


def beside(root: Path) -> Path:
    write_images(root / "img_align_celeba", "jpg")
    (root / "list_attr_celeba.txt").write_text(TXT)
    return root / "img_align_celeba"


def official_folders(root: Path) -> Path:
    write_images(root / "Img" / "img_align_celeba", "jpg")
    (root / "Anno").mkdir()
    (root / "Anno" / "list_attr_celeba.txt").write_text(TXT)
    return root / "Img" / "img_align_celeba"


def official_pngs(root: Path) -> Path:
    write_images(root / "Img" / "img_align_celeba_png", "png")
    (root / "Anno").mkdir()
    (root / "Anno" / "list_attr_celeba.txt").write_text(TXT)
    return root / "Img" / "img_align_celeba_png"


def kaggle_unpacked(root: Path) -> Path:
    write_images(root / "img_align_celeba" / "img_align_celeba", "jpg")
    (root / "list_attr_celeba.csv").write_text(CSV)
    return root / "img_align_celeba" / "img_align_celeba"


def kaggle_zip(root: Path) -> Path:
    write_images(root / "images", "jpg")
    with zipfile.ZipFile(root / "archive.zip", "w") as file:
        file.writestr("list_attr_celeba.csv", CSV)
        for path in (root / "images").iterdir():
            file.write(path, f"img_align_celeba/img_align_celeba/{path.name}")
    return root / "archive.zip"


@pytest.mark.parametrize("layout", [beside, official_folders, official_pngs, kaggle_unpacked, kaggle_zip])
def test_celeba_as_people_have_it(layout: Callable[[Path], Path], tmp_path: Path) -> None:
    data = open_data(str(layout(tmp_path / "celeba")), size=SIZE, classes="attributes:Smiling,Male")
    assert data.counts() == COUNTS
    assert data.labels is not None
    assert data.labels.numbers.tolist() == [1, 2, 3, 0]


def test_names_with_accents_are_one_name_however_they_are_composed(tmp_path: Path) -> None:
    """macOS decomposes them in file names; tables and folders from elsewhere have them composed."""
    decomposed, composed = (unicodedata.normalize(form, "é") for form in ("NFD", "NFC"))
    assert decomposed != composed
    for name in (f"{decomposed}/1.png", "b/2.png"):
        (tmp_path / "classes" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "classes" / name)
    data = open_data(str(tmp_path / "classes"), size=SIZE, classes="own")
    assert data.labels is not None
    assert data.labels.classes == ("b", composed)
    table = tmp_path / "table.txt"
    for row, file in ((decomposed, composed), (composed, decomposed)):
        root = tmp_path / f"faces-{len(row)}"
        root.mkdir()
        for name in (file, "b"):
            Image.new("RGB", (SIZE, SIZE)).save(root / f"{name}.png")
        table.write_text(f"2\nMale\n{row}.png 1\nb.png -1\n", encoding="utf-8")
        data = open_data(str(root), size=SIZE, classes="attributes:Male", attributes=str(table))
        assert data.counts() == {"not-Male": 1, "Male": 1}
