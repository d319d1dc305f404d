"""What a checkpoint recognizes its data by, and what a resumed run says of changes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tiny_runs import checkpoint, resume, train
from training.data.dataset import changes
from training.data.sources import digits, open_data

SIZE = 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for name in ("cat/0.png", "cat/1.png", "dog/0.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (SIZE, SIZE)).save(root / name)
        os.utime(root / name, ns=(10**18, 10**18))
    return root


def add(folder: Path) -> None:
    shutil.copy(folder / "cat" / "0.png", folder / "cat" / "2.png")


def rename(folder: Path) -> None:
    (folder / "cat" / "0.png").rename(folder / "cat" / "00.png")


def touch(folder: Path) -> None:
    os.utime(folder / "dog" / "0.png", ns=(1, 1))


def rewrite(folder: Path) -> None:
    Image.effect_noise((SIZE, SIZE), 50).save(folder / "dog" / "0.png")


def move_to_another_class(folder: Path) -> None:
    (folder / "cat" / "1.png").rename(folder / "dog" / "1.png")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (add, "4 images instead of 3"),
        (rename, "names of files"),
        (touch, "times of files"),
        (rewrite, "sizes of files, times of files"),
        (move_to_another_class, "classes, names of files"),
        (lambda folder: None, ""),
    ],
)
def test_what_has_changed_is_told_apart(change: Callable[[Path], None], told: str, folder: Path) -> None:
    before = open_data(str(folder), size=SIZE, classes="own").fingerprint()
    change(folder)
    assert changes(before, open_data(str(folder), size=SIZE, classes="own").fingerprint()) == told


def test_a_folder_elsewhere_and_its_cache_are_the_same_data(folder: Path, tmp_path: Path) -> None:
    before = open_data(str(folder), size=SIZE).fingerprint()
    folder = folder.rename(tmp_path / "elsewhere")
    assert open_data(str(folder), size=SIZE, cache=tmp_path / "cache").fingerprint() == before


def test_pixels_of_other_data_are_recognized() -> None:
    data, other = digits(SIZE), digits(SIZE)
    assert changes(data.fingerprint(), other.fingerprint()) == ""
    other.images[7, 0, 3, 3] ^= 1
    assert changes(data.fingerprint(), other.fingerprint()) == "pixels"


@pytest.mark.usefixtures("no_drawing")
def test_a_resumed_run_says_what_has_changed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    train(out, "--data", str(folder), "--steps", "1")
    before = checkpoint(out)["data"]
    assert "have changed" not in capsys.readouterr().out
    add(folder)
    resume(out, "--steps", "2")
    assert "since the checkpoint the data have changed: 4 images instead of 3\n" in capsys.readouterr().out
    assert checkpoint(out)["data"] == open_data(str(folder), size=16).fingerprint() != before
