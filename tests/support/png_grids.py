"""The PNGs that the examples write: their sizes and their pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.output.image_io import GAP


def sheet(columns: int, rows: int, tile: int = 128) -> tuple[int, int]:
    """The size of a PNG with so many tiles: a gap on both sides of each."""
    return columns * (tile + GAP) + GAP, rows * (tile + GAP) + GAP


def opened(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as file:
        assert file.format == "PNG"
        return np.asarray(file.convert("RGB"))
