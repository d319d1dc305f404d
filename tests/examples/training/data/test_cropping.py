"""The square that an image becomes: which part is cropped, what CelebA's images are, and what padding repeats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from framed_images import framed
from training.data.cropping import PAD
from training.data.image_folder import ImageFolder


@pytest.mark.parametrize(
    ("crop", "width", "height", "side"),
    [
        (None, 178, 218, 160),
        (None, 218, 178, 178),
        (None, 256, 256, 256),
        (None, 300, 200, 200),
        (160, 300, 200, 160),
        (160, 90, 120, 90),
        (0, 178, 218, 178),
    ],
)
def test_the_square_that_is_cropped(crop: int | None, width: int, height: int, side: int, tmp_path: Path) -> None:
    framed(tmp_path / "exact.png", width, height, side)
    framed(tmp_path / "smaller.png", width, height, side - 2)
    folder = ImageFolder(tmp_path, 32, crop)
    assert not folder.pixels([0])[0].any()  # black to its edges
    assert folder.pixels([1])[0].any()  # one pixel more, and white would show
    assert folder.crops() == f"{side}x{side} of {width}x{height}"


def test_auto_decides_for_each_image(tmp_path: Path) -> None:
    for i, (width, height, side) in enumerate([(178, 218, 160), (178, 218, 160), (64, 48, 48), (20, 30, 20)]):
        framed(tmp_path / f"{i}.png", width, height, side)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    framed(tmp_path / "4.jpg", 218, 178, 160, exif=exif, quality=100, subsampling=0)  # upright 178×218, as CelebA's
    (tmp_path / "5.png").write_bytes(b"damaged")
    folder = ImageFolder(tmp_path, 16)
    images, unreadable = folder.pixels(range(5))
    assert not unreadable
    assert images.max() < 8  # black, but for the JPEG's losses beside white
    assert folder.crops() == "160x160 of 178x218 (3), 48x48 of 64x48 (1), 20x20 of 20x30 (1)"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("width", "height", "kept"),
    [(16, 16, (16, 16)), (32, 16, (8, 16)), (17, 34, (16, 8)), (48, 27, (9, 16)), (4, 3, (12, 16)), (3000, 1, (1, 16))],
)
def test_padding_keeps_the_whole_image_and_repeats_its_edges(
    width: int, height: int, kept: tuple[int, int], channels: int, tmp_path: Path
) -> None:
    """In the middle is what Pillow makes of the whole image; beyond it each row, or column, is that of its edge."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    folder = ImageFolder(tmp_path, 16, PAD, channels=channels)
    ((image,), problems) = folder.pixels([0])  # (channels, 16, 16)
    assert not problems
    with Image.open(tmp_path / "image.png") as file:
        whole = file.convert("L" if channels == 1 else "RGB").resize(kept[::-1], Image.Resampling.LANCZOS)
    expected = np.asarray(whole).reshape(*kept, channels).transpose(2, 0, 1)
    top, left = ((16 - length) // 2 for length in kept)
    np.testing.assert_array_equal(image[:, top : top + kept[0], left : left + kept[1]], expected)
    for y, x in np.ndindex(16, 16):
        inside = min(max(y - top, 0), kept[0] - 1), min(max(x - left, 0), kept[1] - 1)
        assert (image[:, y, x] == expected[(slice(None), *inside)]).all()
    assert folder.crops() == f"all of {width}x{height}"
