"""A batch of images, and what every data set has: images by number, their labels, and what its files are known by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.data.labels import Labels

Indices = list[tuple[int, bool]]  # the images of a batch: each one's number, and whether it is mirrored
Pixels = NDArray[np.uint8]  # (B, C, S, S)
Problems = dict[str, str]  # files that could not be read, each with the reason


class Batch(NamedTuple):
    """Images with their classes, as they are read from the disk, taken to the device, and scored."""

    images: Tensor  # uint8 (B, C, S, S)
    labels: Tensor | None = None  # (B,), if the data set has classes

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, which a GPU reads while the program goes on."""
        return Batch(self.images.pin_memory(), None if self.labels is None else self.labels.pin_memory())


class SourceLost(OSError):
    """The data changed or vanished below a run that reads them, or memory for them ran out: no other image can take the
    place of one."""


class ImageSet:
    """Images of one size by their numbers. `data[[(3, False), (0, True)]]` is a batch of two, the second mirrored."""

    labels: Labels | None = None
    flip = True  # a mirrored image could be in the data set
    unreadable: Problems  # the files found unreadable so far, in this process or its workers

    def __len__(self) -> int:
        raise NotImplementedError

    def pixels(self, numbers: Sequence[int]) -> tuple[Pixels, Problems]:
        """These images, and the files that could not be read for them."""
        raise NotImplementedError

    def read(self, indices: Indices) -> tuple[Pixels, Problems]:
        """The same, mirrored where that is asked for."""
        numbers, mirrored = zip(*indices, strict=True)
        images, problems = self.pixels(numbers)
        flip = np.array(mirrored)
        # In numpy: torch takes ten times as long to index and select bytes.
        images[flip] = images[flip, :, :, ::-1]
        return images, problems

    def batch(self, indices: Indices, images: Pixels) -> Batch:
        """These images with their labels."""
        labels = None if self.labels is None else torch.from_numpy(self.labels.numbers[[i for i, _ in indices]])
        return Batch(torch.from_numpy(images), labels)

    def __getitem__(self, indices: Indices) -> Batch:
        images, problems = self.read(indices)
        self.unreadable |= problems
        return self.batch(indices, images)

    @property
    def missing(self) -> int:
        """How many images cannot be read, as far as that is known, and are replaced by others of their class."""
        return len(self.unreadable)

    def counts(self) -> dict[str, int]:
        """How many images of each class can be read, as far as that is known."""
        return self.labels.counts() if self.labels else {}

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data, to recognize them by."""
        labels = self.labels.numbers.astype("<i8").tobytes() if self.labels else b""
        return {"images": len(self), "classes": digest([labels])} | self.marks()

    def marks(self) -> dict[str, str]:
        """Digests of what the images are made of, by what each digest is of."""
        raise NotImplementedError


def digest(parts: Iterable[bytes]) -> str:
    """A short text that differs where the parts do."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "little") + part)
    return sha.hexdigest()[:16]


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two fingerprints, as the end of a sentence; empty if nothing does."""
    if before["images"] != now["images"]:
        return f"{now['images']} images instead of {before['images']}"
    return ", ".join(what for what, mark in now.items() if before.get(what) != mark)
