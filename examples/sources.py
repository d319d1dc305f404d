"""Where training images come from: a folder or zip of pictures, the embedded faces, scikit-learn's digits.

A source is a map-style data set that is indexed by a whole batch at once, a list of (index, flip) pairs, and returns
the images as uint8 (B, C, size, size) with the paths that could not be read. All chance lies in `Shuffle`, which draws
those pairs: workers draw nothing, so order and flips depend on the seed alone, not on how many processes decode.
"""

from __future__ import annotations

import io
import mmap
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler

import faces
from image_cache import open_cache

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
    """Images that are in memory, or mapped into it: uint8 (N, C, size, size)."""

    def __init__(self, images: NDArray[np.uint8]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, batch: Batch) -> tuple[Tensor, list[str]]:
        # In numpy, which takes a tenth of the time that torch's indexing and selection take for bytes.
        index, flip = (np.array(column) for column in zip(*batch, strict=True))
        images = np.asarray(self.images)[index]  # (B, C, size, size), a copy
        images[flip] = images[flip, :, :, ::-1]
        return torch.from_numpy(images), []


class Folder(Dataset[tuple[Tensor, list[str]]]):
    """The images below a folder, at any depth, cropped and resized. `others` are the files not named like an image.

    A file that turns out unreadable is replaced by the next one that can be read, so that a batch always has its size.
    """

    def __init__(self, root: Path, size: int, crop: int) -> None:
        self.root, self.size, self.crop = root.resolve(), size, crop
        suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
        self.paths: list[str] = []
        self.others: list[str] = []
        for path in sorted(self._find()):
            # A name that starts with a dot is some program's own, such as macOS's ._000001.jpg.
            image = os.path.splitext(path)[1].lower() in suffixes and not os.path.basename(path).startswith(".")
            (self.paths if image else self.others).append(path)
        self._instead: dict[int, int] = {}  # for each index found unreadable, that of the image in its place

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
        """The first readable image from `index` on, uint8 (3, size, size), and the paths newly found not to be."""
        unreadable: list[int] = []
        while len(unreadable) < len(self.paths):
            index = self._instead.get(index, index)
            try:
                image = self._decode(self.paths[index])
            except Exception:  # a damaged file can raise anything, each format has its own way
                unreadable.append(index)
                index = (index + 1) % len(self.paths)
            else:
                self._instead.update(dict.fromkeys(unreadable, index))
                return image, [self.paths[broken] for broken in unreadable]
        raise ValueError(f"none of the {len(unreadable)} images can be read")

    def stamps(self) -> Iterator[str]:
        """For each image, what changes when its file does, found without reading it."""
        for path in self.paths:
            name = path[len(str(self.root)) :]
            try:
                status = os.stat(path)
                yield f"{name} {status.st_size} {status.st_mtime_ns}"
            except OSError:  # a link that leads nowhere
                yield name

    def _find(self) -> Iterable[str]:
        return (os.path.join(at, name) for at, _, names in os.walk(self.root) for name in names)

    def _open(self, path: str) -> str | io.BytesIO:
        return path

    def _decode(self, path: str) -> Tensor:
        with Image.open(self._open(path)) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")
        width, height = picture.size
        side = min(width, height, self.crop or width)
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
        picture = picture.crop(box).resize((self.size, self.size), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()  # (3, size, size)


class _Mapped(mmap.mmap):
    """A file in memory. Each process has its own reading position, so that workers can share one open archive."""

    def seekable(self) -> bool:  # which zipfile asks for, and mmap has from Python 3.13 on
        return True


class ZippedFolder(Folder):
    """A folder in a zip archive, read where it is. Paths are those in the archive."""

    def __init__(self, root: Path, size: int, crop: int) -> None:
        with open(root, "rb") as file:
            mapped = _Mapped(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._archive = zipfile.ZipFile(cast("IO[bytes]", mapped))
        super().__init__(root, size, crop)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.root, self.size, self.crop)  # for workers that do not share memory: open it again

    def stamps(self) -> Iterator[str]:
        for path in self.paths:
            member = self._archive.getinfo(path)
            yield f"{path} {member.file_size} {member.CRC}"

    def _find(self) -> Iterable[str]:
        return (member.filename for member in self._archive.infolist() if not member.is_dir())

    def _open(self, path: str) -> io.BytesIO:
        return io.BytesIO(self._archive.read(path))  # read whole, so that its checksum is looked at


def embedded_faces(size: int) -> Images:
    """The first 4096 procedural faces."""
    return Images(faces.render(faces.traits(EMBEDDED_FACES), size))


def digits(size: int) -> Images:
    """The 1797 handwritten digits that scikit-learn ships, 8×8 pixels in 17 greys: enlarged, with more contrast."""
    from sklearn.datasets import load_digits  # here, because only this source needs it

    margin = 3 * size // 28  # the strokes reach the edge of the 8×8 pixels, and are easier to read with some air
    images = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1  # (1797, 1, 8, 8) in [-1, 1]
    images = F.interpolate(images, size=size - 2 * margin, mode="bicubic", align_corners=False)
    images = F.pad(images, (margin,) * 4, value=-1.0)  # (1797, 1, size, size)
    return Images((127.5 * (1 + 1.6 * images)).round().clamp(0, 255).byte().numpy())


def open_source(data: str, *, size: int, crop: int, cache: Path | None = None) -> Images | Folder:
    """What `--data` names. A folder of images is decoded into the folder `cache`, or without one, again and again.

    Errors are ValueError or OSError with one line that says what is wrong.
    """
    if data == "faces":
        return embedded_faces(size)
    if data == "digits":
        return digits(size)
    root = Path(data)
    if not root.exists():
        raise ValueError(f"--data {data}: no such folder or zip archive (and neither 'faces' nor 'digits')")
    if not root.is_dir() and not zipfile.is_zipfile(root):
        raise ValueError(
            f"--data {data}: a folder of images is needed, or a zip archive; this is neither, or its end is missing"
        )
    try:
        folder = Folder(root, size, crop) if root.is_dir() else ZippedFolder(root, size, crop)
    except (zipfile.BadZipFile, ValueError) as error:  # the second where an offset points out of the file
        raise ValueError(f"--data {data}: a damaged zip archive: {error}") from None
    if not folder.paths:
        raise ValueError(f"--data {data}: no images in this {'folder or below it' if root.is_dir() else 'archive'}")
    folder.read(0)  # at least one can be decoded; otherwise this says so before the training starts
    return folder if cache is None else Images(open_cache(folder, cache))
