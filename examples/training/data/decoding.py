"""The pixels of an image file, in whatever form they are stored, as 8-bit RGB.

A file that cannot be read without guessing raises a ValueError with the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, TiffImagePlugin

SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Pillow warns of images half as large as those that it refuses, and of damaged EXIF data beside good pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def upright_size(file: ImageFile.ImageFile) -> tuple[int, int]:
    """Width and height that `upright_rgb` will have, from the header."""
    width, height = file.size
    if isinstance(file, TiffImagePlugin.TiffImageFile):  # some versions of Pillow have swapped the size already
        width, height = (file.tag_v2[tag] for tag in (ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength))
    lies = file.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return (height, width) if lies else (width, height)


def is_gray(file: ImageFile.ImageFile) -> bool:
    """Whether the file stores gray values, and no colors."""
    return file.mode in ("1", "L", "LA", "F") or file.mode.startswith("I")


def upright_rgb(file: ImageFile.ImageFile) -> Image.Image:
    """The pixels of an open file as RGB, rotated as its EXIF data say, on white where they are transparent."""
    if file.mode == "F" or file.mode.startswith("I"):
        return _gray_bytes(file).convert("RGB")
    if file.format == "PNG" and "transparency" in file.info and file.tile[0][3] in ("L;2", "L;4", "RGB;16B"):
        # Pillow converts the pixels to bytes, but compares them with the unconverted color of the file.
        raise ValueError("a transparent color of 2, 4 or 16 bits, which Pillow does not find in the image")
    image = ImageOps.exif_transpose(file)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _gray_bytes(file: ImageFile.ImageFile) -> Image.Image:
    """Gray values of more than 8 bits, which Pillow's own conversion would cut off at 255."""
    tags = file.tag_v2 if isinstance(file, TiffImagePlugin.TiffImageFile) else {}
    if file.mode == "F":
        white = 1
    elif file.format in ("PNG", "PPM", "JPEG2000"):
        white = 65535
    elif file.format == "TIFF" and file.mode != "I":  # mode I: numbers with a sign, or of 32 bits
        white = 2 ** tags[ExifTags.Base.BitsPerSample][0] - 1
    else:
        raise ValueError(f"gray values of {file.format} mode {file.mode}, for which no value is known to be white")
    values = np.asarray(ImageOps.exif_transpose(file), np.float32)  # (H, W)
    if not (values.min() >= 0 and values.max() <= white):  # nor is nan
        raise ValueError(f"gray values from {values.min():g} to {values.max():g}, expected 0 to {white}")
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # 0 is white
        values = white - values
    if "transparency" in file.info:
        values = np.where(values == file.info["transparency"], white, values)
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
