"""Where training images come from: a folder of pictures, the embedded faces, scikit-learn's digits.

A source is a map-style data set that is indexed by a whole batch at once, a list of (index, flip) pairs, and returns
the images as uint8 (B, C, size, size) with the paths that could not be read. All chance lies in `Shuffle`, which draws
those pairs: workers draw nothing, so order and flips depend on the seed alone, not on how many processes decode.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler

import faces

Batch = list[tuple[int, bool]]
EMBEDDED_FACES = 4096


class Shuffle(Sampler[Batch]):
    """Batches without end: every image once in each epoch, in an order that is a function of (seed, epoch).

    Starting at `position`, the number of images drawn so far, gives what an uninterrupted run would draw next. A batch
    may reach into the next epoch, so all have the same size and no image is left out.
    """

    def __init__(self, count: int, batch_size: int, *, seed: int, flip: bool, position: int = 0) -> None:
        self.count, self.batch_size, self.seed, self.flip, self.position = count, batch_size, seed, flip, position

    def __iter__(self) -> Iterator[Batch]:
        epoch, place = divmod(self.position, self.count)
        order = self._epoch(epoch)
        while True:
            batch = order[place : place + self.batch_size]
            place += len(batch)
            while len(batch) < self.batch_size:
                epoch += 1
                order = self._epoch(epoch)
                place = min(self.batch_size - len(batch), self.count)
                batch = batch + order[:place]
            yield batch

    def _epoch(self, epoch: int) -> Batch:
        # The two numbers seed a hash, so that neighbouring seeds and epochs have nothing in common.
        generator = np.random.default_rng((self.seed, epoch))
        order = generator.permutation(self.count).tolist()
        flips = generator.random(self.count) < 0.5 if self.flip else np.zeros(self.count, bool)
        return list(zip(order, flips.tolist(), strict=True))


class Images(Dataset[tuple[Tensor, list[str]]]):
    """Images that are in memory: uint8 (N, C, size, size)."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, batch: Batch) -> tuple[Tensor, list[str]]:
        index, flip = (torch.tensor(column) for column in zip(*batch, strict=True))
        images = self.images[index]  # (B, C, size, size)
        return torch.where(flip[:, None, None, None], images.flip(-1), images), []


class Folder(Dataset[tuple[Tensor, list[str]]]):
    """The images below a folder, at any depth, cropped and resized. `others` are the files not named like an image.

    A file that turns out unreadable is replaced by the next one that can be read, so that a batch always has its size.
    """

    def __init__(self, root: Path, size: int, crop: int) -> None:
        suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
        found = sorted(str(Path(at, name)) for at, _, names in os.walk(root) for name in names)
        self.paths = [path for path in found if Path(path).suffix.lower() in suffixes]
        self.others = [path for path in found if Path(path).suffix.lower() not in suffixes]
        self.size, self.crop = size, crop

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, batch: Batch) -> tuple[Tensor, list[str]]:
        images, unreadable = [], []
        for index, flip in batch:
            image, broken = self.read(index)
            images.append(image.flip(-1) if flip else image)
            unreadable += broken
        return torch.stack(images), unreadable  # (B, 3, size, size)

    def read(self, index: int) -> tuple[Tensor, list[str]]:
        """The first readable image from `index` on, uint8 (3, size, size), and the paths that were not."""
        unreadable: list[str] = []
        for offset in range(len(self.paths)):
            path = self.paths[(index + offset) % len(self.paths)]
            try:
                return self._decode(path), unreadable
            except Exception:  # a damaged file can raise anything, each format has its own way
                unreadable.append(path)
        raise ValueError(f"none of the {len(unreadable)} images can be read")

    def _decode(self, path: str) -> Tensor:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")
        width, height = picture.size
        side = min(width, height, self.crop or width)
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
        picture = picture.crop(box).resize((self.size, self.size), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()  # (3, size, size)


def embedded_faces(size: int) -> Images:
    """The first 4096 procedural faces."""
    return Images(torch.from_numpy(faces.render(faces.traits(EMBEDDED_FACES), size)))


def digits(size: int) -> Images:
    """The 1797 handwritten digits that scikit-learn ships, 8×8 pixels in 17 greys: enlarged, with more contrast."""
    from sklearn.datasets import load_digits  # here, because only this source needs it

    margin = 3 * size // 28  # the strokes reach the edge of the 8×8 pixels, and are easier to read with some air
    images = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1  # (1797, 1, 8, 8) in [-1, 1]
    images = F.interpolate(images, size=size - 2 * margin, mode="bicubic", align_corners=False)
    images = F.pad(images, (margin,) * 4, value=-1.0)  # (1797, 1, size, size)
    return Images((127.5 * (1 + 1.6 * images)).round().clamp(0, 255).byte())


def open_source(data: str, *, size: int, crop: int) -> Images | Folder:
    """What `--data` names. Errors are ValueError or OSError with one line that says what is wrong."""
    if data == "faces":
        return embedded_faces(size)
    if data == "digits":
        return digits(size)
    root = Path(data)
    if not root.exists():
        raise ValueError(f"--data {data}: no such folder (and neither 'faces' nor 'digits')")
    if not root.is_dir():
        raise ValueError(f"--data {data}: a folder of images is needed, this is a file")
    folder = Folder(root, size, crop)
    if not folder.paths:
        raise ValueError(f"--data {data}: no images in this folder or below it")
    folder.read(0)  # at least one can be decoded; otherwise this says so before the training starts
    return folder
