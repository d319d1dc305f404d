"""MNIST's own files: `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, compressed by gzip or not; the test part
has `t10k` in place of `train`.

The IDX format: two zeros, 8 for unsigned bytes, the number of dimensions; each dimension as four bytes, the highest
first; then the values, row by row. Fashion-MNIST and KMNIST come in files of the same names.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

TRAINING, TEST = "train", "t10k"  # how the names of the files of each part begin


def is_mnist(folder: Path, part: str = TRAINING) -> bool:
    """Whether a folder holds the images of a part."""
    return _find(folder, f"{part}-images-idx3-ubyte") is not None


def read_mnist(folder: Path, part: str = TRAINING) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The images (N, 1, H, W) of a part and their labels (N,).

    Raises:
        ValueError: for files that are missing, damaged, or do not belong together.
    """
    images, labels = read_idx(folder, f"{part}-images-idx3-ubyte", dimensions=3), read_labels(folder, part)
    if len(images) != len(labels):
        raise ValueError(f"{folder}: {len(images)} images, but {len(labels)} labels")
    if not len(images):
        raise ValueError(f"{folder}: no images")
    return images[:, None], labels


def read_labels(folder: Path, part: str) -> NDArray[np.int64]:
    """The labels (N,) of a part."""
    return read_idx(folder, f"{part}-labels-idx1-ubyte", dimensions=1).astype(np.int64)


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_idx(folder: Path, name: str, *, dimensions: int) -> NDArray[np.uint8]:
    """The bytes of an IDX file in the shape that it states; of `name.gz` if there is no `name`."""
    path = _find(folder, name)
    if path is None:
        raise ValueError(f"{folder}: expected {name} or {name}.gz in it")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    magic, start = bytes((0, 0, 8, dimensions)), 4 + 4 * dimensions
    if content[:4] != magic:
        raise ValueError(f"{path} starts with {content[:4].hex(' ') or 'nothing'}, not {magic.hex(' ')}")
    if len(content) < start:
        raise ValueError(f"{path} ends within its header")
    shape = np.frombuffer(content[4:start], dtype=">u4").tolist()
    if len(content) - start != math.prod(shape):
        raise ValueError(f"{path} states {math.prod(shape)} values {tuple(shape)} and has {len(content) - start}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)
