"""What an image of any size becomes before training: a square, cropped from its center or padded.

`crop` is the side of the center square that is kept, in pixels, 0 for the largest; None takes 160 pixels of images of
CelebA's size and the largest square of all others. PAD crops nothing: it repeats the edges of an image.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from training.data.dataset import Pixels

CELEBA, CELEBA_CROP = (178, 218), 160  # the size of CelebA's aligned images, and what is usually cropped from them
PAD = -1


def squared(image: Image.Image, size: int, crop: int | None) -> Pixels:
    """The image as (size, size, C), resized with Lanczos."""
    pixels = _padded(image, size) if crop == PAD else np.asarray(_center(image, size, _side(*image.size, crop)))
    return pixels.reshape(size, size, -1)


def kept(width: int, height: int, crop: int | None) -> str:
    """What is kept of an image of this size, for people."""
    return "all" if crop == PAD else "{0}x{0}".format(_side(width, height, crop))


def _side(width: int, height: int, crop: int | None) -> int:
    crop = (CELEBA_CROP if (width, height) == CELEBA else 0) if crop is None else crop
    return min(width, height, crop or width)


def _center(image: Image.Image, size: int, side: int) -> Image.Image:
    left, top = ((length - side) // 2 for length in image.size)
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)


def _padded(image: Image.Image, size: int) -> Pixels:
    """Resized first: an image of 1×50,000 pixels would be enormous as a square."""
    width, height = (max(1, round(side * size / max(image.size))) for side in image.size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))  # (height, width) or with colors
    gaps = [(gap // 2, gap - gap // 2) for gap in (size - height, size - width)]
    return np.pad(pixels, [*gaps, (0, 0)][: pixels.ndim], mode="edge")
