"""Images that show where they were cropped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def framed(path: Path, width: int, height: int, side: int, **options: object) -> None:
    """A white image with a black center square of `side` pixels."""
    pixels = np.full((height, width, 3), 255, np.uint8)
    top, left = (height - side) // 2, (width - side) // 2
    pixels[top : top + side, left : left + side] = 0
    Image.fromarray(pixels).save(path, **options)
