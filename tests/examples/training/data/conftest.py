"""A folder of photographs; runs without the images that they draw, for tests of what they read."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from tiny_runs import leave_out_images


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_images(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve JPEGs of CelebA's size, three of them damaged, in two folders, beside what is not an image."""
    root = tmp_path / "photographs"
    (root / "more").mkdir(parents=True)
    photographs = load_sample_images().images
    for i in range(12):
        crop = Image.fromarray(photographs[i % 2][15 * i : 15 * i + 218, 30 * i : 30 * i + 178])
        crop.save(root / ("more" if i >= 9 else ".") / f"{i:02d}.jpg", quality=90)
    for path in root.rglob("*.jpg"):
        if path.name in ("07.jpg", "08.jpg", "11.jpg"):  # two neighbors, and the last, whose next one is the first
            path.write_bytes(path.read_bytes()[:3000])
    (root / "notes.txt").write_text("not an image")
    (root / "._00.jpg").write_text("what macOS leaves")
    return root
