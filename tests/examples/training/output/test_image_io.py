"""Tensors as files: grids and overlays with the names of their rows, completely or not at all."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from png_grids import opened, sheet
from torch_sagan import AttentionRecord
from training.output.image_io import GAP, TILE, row_names, save_attention, save_grid, save_images


def test_the_figure_shows_the_map_of_each_point(tmp_path: Path) -> None:
    """Two positions of a gray image, upper right and lower left, each of which attends to the other's quarter."""
    attention = torch.zeros(1, 4, 4)
    attention[0, 1, 2] = attention[0, 2, 1] = 1
    record = AttentionRecord(attention, (2, 2), (2, 2))
    save_attention(tmp_path / "x.png", torch.zeros(1, 1, 32, 32), record, [(0.1, 0.9), (0.9, 0.1)])
    figure = opened(tmp_path / "x.png").astype(float)
    image, first, second = (figure[GAP:-GAP, at : at + TILE] for at in range(GAP, 3 * (GAP + TILE), GAP + TILE))
    assert figure.shape[:2] == sheet(3, 1, TILE)[::-1]
    assert first[135:147, 45:57].mean() > first[45:57, 135:147].mean() + 50
    assert second[45:57, 135:147].mean() > second[135:147, 45:57].mean() + 50
    # On two rings of radius 8 (2.6 · 192 / 64) in two colors, which come back around their maps.
    mine, other = image[19, 172 - 8], image[172, 19 - 8]
    assert np.abs(mine - other).max() > 100
    assert np.array_equal(first[19, 172 - 8], mine)
    assert np.array_equal(second[172, 19 - 8], other)


@pytest.mark.parametrize("size", [16, 50, 64, 191, 192, 200])
def test_tiles_of_overlays_are_large_enough_to_be_seen(size: int, tmp_path: Path) -> None:
    save_attention(tmp_path / "x.png", torch.zeros(1, 3, size, size), torch.ones(1, 4, 1), [(0.5, 0.5)])
    height, width, _ = opened(tmp_path / "x.png").shape
    tile = height - 2 * GAP
    assert (width, height) == sheet(2, 1, tile)
    assert tile % size == 0
    assert 192 <= tile < 192 + size


# --- names of rows -------------------------------------------------------------------------------------------------

NAMES = ["cat", "Größe", "猫", "a name that is far too long to leave the images any space at all", "\x1b[31m"]


def test_a_grid_names_its_rows_at_the_left_and_in_the_file(tmp_path: Path) -> None:
    images = torch.rand(10, 3, 16, 16) * 2 - 1
    save_grid(tmp_path / "plain.png", images, columns=2)
    save_grid(tmp_path / "named.png", images, columns=2, rows=NAMES)
    assert row_names(tmp_path / "named.png") == NAMES
    assert row_names(tmp_path / "plain.png") == []
    plain, named = opened(tmp_path / "plain.png"), opened(tmp_path / "named.png")
    margin = named.shape[1] - plain.shape[1]
    assert 0 < margin < 2.2 * (128 + GAP)
    assert np.array_equal(named[:, margin:], plain)
    rows = [named[i * (128 + GAP) + GAP : (i + 1) * (128 + GAP), :margin] for i in range(5)]
    ink = [np.argwhere(row.min(axis=2) < 128) for row in rows]
    for letters in ink:  # in the middle of their row, and up to its images
        assert 40 < letters[:, 0].min() < letters[:, 0].max() < 90
        assert margin - 12 < letters[:, 1].max() < margin
    width = [int(np.ptp(letters[:, 1])) for letters in ink]
    assert width[0] < width[1] < width[3]
    assert len({row.tobytes() for row in rows}) == 5  # a name in another script is not nothing, nor a box


def test_a_figure_names_its_rows(tmp_path: Path) -> None:
    save_attention(tmp_path / "x.png", torch.zeros(2, 3, 16, 16), torch.ones(2, 4, 1), [(0.5, 0.5)], ["cat", "dog"])
    assert row_names(tmp_path / "x.png") == ["cat", "dog"]
    assert opened(tmp_path / "x.png").shape[0] == sheet(2, 2, TILE)[1]


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n\x00\x00"])
def test_what_is_no_image_has_no_names(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(content)
    assert row_names(tmp_path / "x.png") == []
    assert row_names(tmp_path / "missing.png") == []


def test_names_of_another_form_are_none(tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    for text in ('{"cat": 1}', "[" * 100_000, "cat"):
        info = PngInfo()
        info.add_itxt("rows", text)
        Image.new("RGB", (4, 4)).save(tmp_path / "x.png", pnginfo=info)
        assert row_names(tmp_path / "x.png") == []


# --- where they are written ----------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="has no devices or links of this kind")
def test_links_are_written_through_and_devices_refused(tmp_path: Path) -> None:
    real, link, device = tmp_path / "real.png", tmp_path / "link.png", tmp_path / "device.png"
    real.write_bytes(b"old")
    link.symlink_to(real)
    device.symlink_to("/dev/full")
    images = torch.zeros(1, 3, 8, 8)
    save_images([link], images)
    assert link.is_symlink()
    assert opened(real).shape == (8, 8, 3)
    with pytest.raises(SystemExit, match=r"cannot save .*device\.png: expected a file or nothing there, found a char"):
        save_images([device], images)
    assert device.is_symlink()
