"""A folder of images as people have them."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_sample_images


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real JPEGs of CelebA's size at several depths, two smaller images, a cut-off JPEG and a text file."""
    root = tmp_path_factory.mktemp("images")
    (root / "a" / "b").mkdir(parents=True)
    photographs = load_sample_images().images
    for i in range(8):
        x, y = 50 * i, 20 * i
        crop = Image.fromarray(photographs[i % 2][y : y + 218, x : x + 178])
        crop.save(root / ("a/b" if i % 3 else "a" if i % 2 else ".") / f"{i:03d}.jpg", quality=90)
    Image.fromarray(photographs[0][:90, :120]).convert("L").save(root / "gray.png")
    Image.fromarray(photographs[1][:200, :100]).save(root / "a" / "narrow.JPEG")
    whole = (root / "000.jpg").read_bytes()
    (root / "a" / "cut-off.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "notes.txt").write_text("not an image")
    return root
