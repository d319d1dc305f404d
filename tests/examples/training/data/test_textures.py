"""Textures: patches of two photographs, whose held-out part shares no pixel with the rest."""

from __future__ import annotations

import numpy as np
import pytest

from training.data import textures
from training.data.sources import open_data, open_held_out
from training.data.textures import BANDS, CONTRAST, SIDE, STRIDE, read_textures


def test_patches_have_contrast() -> None:
    images, labels = read_textures(held_out=True)
    assert images.shape == (2508, 3, SIDE, SIDE)
    assert np.bincount(labels).tolist() == [1262, 1246]
    assert (images[::20].mean(1).std((1, 2)) >= CONTRAST).all()


def test_patches_are_squares_and_no_pixel_is_in_both_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In photographs whose pixels are all different."""
    height, width = 100, 10 * SIDE
    number = np.arange(height * width, dtype=np.uint32).reshape(height, width)
    pixels = np.stack([number % 256, number // 256 % 256, number // 65536], axis=2).astype(np.uint8)  # (H, W, 3)
    monkeypatch.setattr("sklearn.datasets.load_sample_image", lambda name: pixels)
    monkeypatch.setattr(textures, "CONTRAST", 0)

    for held_out in (False, True):
        images, labels = read_textures(held_out=held_out)
        red, green, blue = np.moveaxis(images.astype(np.uint32), 1, 0)
        shown = red + 256 * green + 65536 * blue  # (N, 64, 64)
        for patch in shown[::37]:
            top, left = divmod(int(patch[0, 0]), width)
            assert top % STRIDE == left % STRIDE == 0
            np.testing.assert_array_equal(patch, number[top : top + SIDE, left : left + SIDE])
        for label, (start, end) in enumerate(BANDS.values()):
            band = (number[:, start:end]).ravel()
            expected = band if held_out else np.setdiff1d(number, band)
            np.testing.assert_array_equal(np.unique(shown[labels == label]), np.sort(expected))


def test_textures_are_data() -> None:
    data, held_out = open_data("textures", size=64, classes="own"), open_held_out("textures", size=32, classes="own")
    assert held_out is not None
    assert data.counts() == {"china": 5959, "flower": 2348}
    assert held_out.counts() == {"china": 1262, "flower": 1246}
    assert data.images.shape == (8307, 3, 64, 64)
    assert data.flip
    patches, _ = read_textures(held_out=True)
    smaller = patches[:50].reshape(50, 3, 32, 2, 32, 2).mean((3, 5))  # averages of 2×2; Lanczos is a little sharper
    assert np.abs(held_out.images[:50] - smaller).mean() < 3
