"""CIFAR-10's archive: images, labels and names of both parts, and one line for another or a damaged file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cifar10_files import CLASSES, META, archive, records
from training.data.cifar10 import is_cifar10, read_cifar10
from training.data.sources import open_data, open_held_out


def test_images_labels_and_names(tmp_path: Path) -> None:
    (first, one), (second, other) = records([2, 0], 0), records([1], 1)
    path = archive(
        tmp_path / "cifar-10-binary.tar.gz",
        {"data_batch_2.bin": second, "batches.meta.txt": META, "data_batch_1.bin": first, "test_batch.bin": first},
    )
    assert is_cifar10(path)
    images, labels, classes = read_cifar10(path)
    assert np.array_equal(images, np.concatenate([one, other]))  # without the test images
    assert labels.tolist() == [2, 0, 1]
    assert classes == tuple(CLASSES)


def test_the_test_part_is_held_out(tmp_path: Path) -> None:
    (learned, one), (tested, other) = records([2, 0, 1], 0), records([1, 2], 1)
    files = {"data_batch_1.bin": learned, "batches.meta.txt": META}
    whole = str(archive(tmp_path / "whole.tar.gz", {"test_batch.bin": tested} | files))
    assert np.array_equal(open_data(whole, size=32).images, one)
    held_out = open_held_out(whole, size=32, classes="own")
    assert held_out is not None
    assert np.array_equal(held_out.images, other)
    assert held_out.counts() == {"airplane": 0, "cat": 1, "truck": 1}
    assert open_held_out(str(archive(tmp_path / "training.tar.gz", files)), size=32) is None


def test_other_archives(tmp_path: Path) -> None:
    good, _ = records([0], 0)
    for files, message in (
        ({"notes.txt": b""}, r"expected CIFAR-10's data_batch_1\.bin .* not notes\.txt"),
        ({"data_batch_1": b"pickled", "batches.meta": b""}, "not batches.meta, data_batch_1"),
        ({"data_batch_1.bin": good[:-1], "batches.meta.txt": META}, "records of 3073 bytes"),
        ({"data_batch_1.bin": bytes([9]) + good[1:], "batches.meta.txt": META}, "a label is 9, and there are 3"),
    ):
        with pytest.raises(ValueError, match=message):
            read_cifar10(archive(tmp_path / "a.tar.gz", files))


def test_a_damaged_archive(tmp_path: Path) -> None:
    good, _ = records([0] * 4, 0)
    path = archive(tmp_path / "cifar.tar.gz", {"data_batch_1.bin": good, "batches.meta.txt": META})
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot be read"):
        read_cifar10(path)
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="cannot be read"):
        read_cifar10(path)
