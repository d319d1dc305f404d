"""The procedural faces: paired parts have one color, and face number i is always the same image."""

from __future__ import annotations

import numpy as np
import pytest

from training.data import procedural_faces as faces
from training.data.sources import open_data

PALETTES = [faces.EYES, faces.EARRINGS, faces.BANDS]


def color_in(images: np.ndarray, palette: tuple, center: tuple[float, float], reach: float) -> np.ndarray:
    """Which of the palette's colors fills most of the window around (x, y), for each image; -1 for none."""
    size = images.shape[-1]
    (left, right), (top, bottom) = [(int((c - reach + 1) / 2 * size), int((c + reach + 1) / 2 * size)) for c in center]
    window = images[:, :, top:bottom, left:right].astype(float)  # (n, 3, h, w)
    distance = np.linalg.norm(window[:, None] - np.array(palette)[None, :, :, None, None], axis=2)  # (n, p, h, w)
    votes = (distance < 30).sum((2, 3))  # (n, p)
    return np.where(votes.max(1) > 0, votes.argmax(1), -1)


@pytest.mark.parametrize(
    ("palette", "one", "other", "reach"),
    [
        pytest.param(faces.EYES, (-0.255, 0.04), (0.255, 0.04), 0.1, id="eyes"),
        pytest.param(faces.EARRINGS, (-0.58, 0.35), (0.58, 0.35), 0.15, id="earrings"),
        pytest.param(faces.BANDS, (0.0, -0.6), (0.0, 0.93), 0.05, id="headband and shirt"),
    ],
)
def test_distant_parts_share_a_color(palette, one, other, reach):
    images = faces.render(faces.traits(300), 128)
    here, there = color_in(images, palette, one, reach), color_in(images, palette, other, reach)
    assert (here >= 0).mean() > 0.95  # the part is visible in every pose
    assert (here == there).mean() > 0.95
    assert set(here) >= set(range(len(palette)))  # and every color occurs


@pytest.mark.parametrize("palette", PALETTES)
def test_colors_that_must_agree_are_easy_to_tell_apart(palette):
    colors = np.array(palette, float)
    distances = np.linalg.norm(colors[:, None] - colors[None], axis=2)
    assert distances[~np.eye(len(colors), dtype=bool)].min() > 70


def test_a_face_depends_on_its_seed_and_index_alone():
    all_at_once, some = faces.traits(12, seed=3), faces.traits(4, seed=3, first=8)
    for whole, part in zip(all_at_once, some, strict=True):
        np.testing.assert_array_equal(whole[8:], part)
    np.testing.assert_array_equal(faces.render(all_at_once, 32)[8:], faces.render(some, 32))
    assert (faces.traits(12, seed=4).eyes != all_at_once.eyes).any()


@pytest.mark.parametrize("size", [16, 28, 33, 64])
def test_shape_and_type(size):
    images = faces.render(faces.traits(5), size)
    assert images.shape == (5, 3, size, size)
    assert images.dtype == np.uint8
    assert images.std() > 30


def test_small_faces_are_large_faces_seen_from_afar():
    people = faces.traits(20)
    small, large = (faces.render(people, size).astype(float) for size in (32, 128))
    averaged = large.reshape(20, 3, 32, 4, 32, 4).mean((3, 5))
    assert np.abs(small - averaged).mean() < 3


def test_a_range_of_faces_is_data():
    every, few, later = (open_data(data, size=16, classes="own") for data in ("faces", "faces:200", "faces:100-300"))
    assert (few.images == every.images[:200]).all()
    assert (later.images == every.images[100:300]).all()
    assert (later.labels.numbers == every.labels.numbers[100:300]).all()


@pytest.mark.parametrize("data", ["faces:", "faces:0", "faces:5-5", "faces:-5", "faces:many", "faces:1-2-3"])
def test_a_range_without_faces_is_one_line(data):
    with pytest.raises(ValueError, match=f"--data {data}: expected faces, faces:200"):
        open_data(data, size=16)
