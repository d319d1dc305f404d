"""MNIST's files, written from their format."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np


def idx(values: np.ndarray) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write(folder: Path, images: bytes, labels: bytes, pack: bool = False, part: str = "train") -> Path:
    for name, content in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
        (folder / f"{name}.gz" if pack else folder / name).write_bytes(gzip.compress(content) if pack else content)
    return folder
