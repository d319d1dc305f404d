"""MNIST's files, written here from their format."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from mnist_files import idx, write
from training.data.mnist import is_mnist, read_mnist
from training.data.sources import open_data, open_held_out

PIXELS = np.arange(3 * 28 * 28).reshape(3, 28, 28).astype(np.uint8)


@pytest.mark.parametrize("pack", [False, True])
def test_images_and_labels(tmp_path: Path, pack: bool) -> None:
    assert not is_mnist(tmp_path)
    folder = write(tmp_path, idx(PIXELS), idx(np.array([7, 0, 9], np.uint8)), pack)
    assert is_mnist(folder)
    images, labels = read_mnist(folder)
    assert np.array_equal(images, PIXELS[:, None])
    assert labels.tolist() == [7, 0, 9]
    assert labels.dtype == np.int64


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (idx(PIXELS), idx(np.zeros(2, np.uint8)), "3 images, but 2 labels"),
        (idx(PIXELS)[:-1], idx(np.zeros(3, np.uint8)), "states 2352 values .* and has 2351"),
        (b"", idx(np.zeros(3, np.uint8)), "starts with nothing, not 00 00 08 03"),
        (b"GIF89a", idx(np.zeros(3, np.uint8)), "starts with 47 49 46 38"),
        (idx(PIXELS)[:10], idx(np.zeros(3, np.uint8)), "ends within its header"),
        (idx(PIXELS[:0]), idx(np.zeros(0, np.uint8)), "no images"),
    ],
)
def test_damaged_files(tmp_path: Path, images: bytes, labels: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_mnist(write(tmp_path, images, labels))


@pytest.mark.parametrize("pack", [False, True])
def test_the_test_part_is_held_out(tmp_path: Path, pack: bool) -> None:
    folder = write(tmp_path, idx(PIXELS), idx(np.array([2, 0, 1], np.uint8)), pack)
    assert open_held_out(str(folder), size=28) is None
    write(folder, idx(255 - PIXELS[:2]), idx(np.array([1, 1], np.uint8)), pack, part="t10k")
    held_out = open_held_out(str(folder), size=28, classes="own")
    assert held_out is not None
    assert np.array_equal(held_out.images, 255 - PIXELS[:2, None])
    assert held_out.counts() == {"0": 0, "1": 2, "2": 0}  # the classes of the training images, also without an image
    assert not held_out.flip
    assert np.array_equal(open_data(str(folder), size=28).images, PIXELS[:, None])


def test_a_test_part_that_does_not_belong_to_the_training_images(tmp_path: Path) -> None:
    folder = write(tmp_path, idx(PIXELS), idx(np.array([2, 0, 1], np.uint8)))
    write(folder, idx(PIXELS), idx(np.array([2, 0, 3], np.uint8)), part="t10k")
    with pytest.raises(ValueError, match="a label of the test images is 3, above all of the training images"):
        open_held_out(str(folder), size=28)
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match=r"expected t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte\.gz"):
        open_held_out(str(folder), size=28)


def test_a_cut_off_archive(tmp_path: Path) -> None:
    folder = write(tmp_path, idx(PIXELS), idx(np.zeros(3, np.uint8)), pack=True)
    packed = folder / "train-images-idx3-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(ValueError, match="cannot be read"):
        read_mnist(folder)
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    write_images = gzip.compress(idx(PIXELS))
    packed.write_bytes(write_images)
    with pytest.raises(ValueError, match=r"expected train-labels-idx1-ubyte or train-labels-idx1-ubyte\.gz"):
        read_mnist(folder)
