"""Images of a folder or a zip archive, at any depth: found, decoded, cropped and resized.

A file that is not an image, or that cannot be read without guessing, is left out and reported with the reason.
"""

from __future__ import annotations

import heapq
import io
import mmap
import os
import stat
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple, cast

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from training.data.labels import UNLABELED, Labels
from training.runs.memory import readable

Indices = list[tuple[int, bool]]  # the images of a batch: each one's number, and whether it is mirrored
Found = tuple[str, str, str]  # a file's path, a text that changes when the file does, and why it is left out, or ""
Labeling = Callable[[list[str]], Labels]  # paths within a folder, with slashes -> their classes
CELEBA, CELEBA_CROP = (178, 218), 160  # the size of CelebA's aligned images, and what is usually cropped from them
LARGEST_FILE = 2**29  # bytes; a member of an archive is read into memory as a whole
NO_CLASS = "no class"  # the reason for leaving out an image without a class
SAMPLE = 64  # images whose sizes are looked at


class Batch(NamedTuple):
    """A batch of a data set that is indexed by a whole batch at once."""

    images: Tensor  # uint8 (B, C, size, size)
    labels: Tensor | None  # (B,), if the data set has classes
    unreadable: dict[str, str]  # files that could not be read, each with the reason

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, which a GPU reads while the program goes on."""
        labels = None if self.labels is None else self.labels.pin_memory()
        return self._replace(images=self.images.pin_memory(), labels=labels)


class ImageFolder(Dataset[Batch]):
    """The images below a folder, at any depth, cropped and resized. `others` are the files left out, each with the
    reason.

    An image that turns out to be unreadable is replaced by the next one that can be read, so that a batch always has
    its size. `crop` is the side of the centre square that is kept, in pixels, 0 for the largest; None takes 160 pixels
    of images of CelebA's size and the largest square of all others. With `labeling`, images without a class are left
    out, and an image that replaces an unreadable one has its own label.
    """

    flip = True  # a mirrored image could be in the data set

    def __init__(self, root: Path, size: int, crop: int | None = None, labeling: Labeling | None = None) -> None:
        self.labeling = labeling
        self.labels: Labels | None = None
        self.root, self.size, self.crop = root.resolve(), size, crop
        suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
        self.paths: list[str] = []
        self.stamps: list[str] = []  # for each image a text that changes when its file does, found without reading it
        self.others: dict[str, str] = {}
        for path, stamp, problem in sorted(self._find()):
            # Names that start with a dot belong to other programs, such as macOS's ._000001.jpg.
            image = os.path.splitext(path)[1].lower() in suffixes and not os.path.basename(path).startswith(".")
            if image and not problem:
                self.paths.append(path)
                self.stamps.append(stamp)
            else:
                self.others[path] = problem or "not an image"
        if labeling:
            self._label(labeling)
        self.unreadable: dict[str, str] = {}  # the images found unreadable so far in this process, each with the reason
        self._instead: dict[int, int] = {}  # from the index of each of them to that of the image that replaces it

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, indices: Indices) -> Batch:
        images, sources, unreadable = [], [], {}
        for index, flip in indices:
            image, source, problem = self.read(index)
            images.append(image.flip(-1) if flip else image)
            sources.append(source)
            unreadable.update(problem)
        labels = None if self.labels is None else torch.from_numpy(self.labels.numbers[sources])  # (B,)
        return Batch(torch.stack(images), labels, unreadable)

    def read(self, index: int) -> tuple[Tensor, int, dict[str, str]]:
        """Image `index`, uint8 (3, size, size), and its index, or those of the next image that can be read and the
        path of the unreadable one with the reason."""
        failed: list[int] = []
        at = index
        while len(failed) < len(self.paths):
            at = self._instead.get(at, at)
            try:
                image = self._decode(self.paths[at])
            except Exception as error:  # damaged files raise errors of many types
                self.unreadable[self.paths[at]] = _reason(error)
                failed.append(at)
                at = (at + 1) % len(self.paths)
            else:
                self._instead.update(dict.fromkeys(failed, at))
                path = self.paths[index]
                return image, at, {path: self.unreadable[path]} if path in self.unreadable else {}
        path, reason = next(iter(self.unreadable.items()))
        raise ValueError(f"none of the {len(failed)} images can be read, for example {path}: {reason}")

    def _label(self, labeling: Labeling) -> None:
        labels = labeling([self._name(path) for path in self.paths])
        kept = (labels.numbers != UNLABELED).nonzero()[0].tolist()
        self.others |= dict.fromkeys(set(self.paths) - {self.paths[i] for i in kept}, NO_CLASS)
        self.paths, self.stamps = [self.paths[i] for i in kept], [self.stamps[i] for i in kept]
        self.labels = labels.only(kept)

    def _name(self, path: str) -> str:
        """The path within the folder, with slashes."""
        return Path(path).relative_to(self.root).as_posix()

    def crops(self) -> str:
        """The crop and the sizes of the images, from the headers of all of them, or of a sample in a large folder."""
        sample = self.paths[:: -(-len(self.paths) // SAMPLE)]
        crops: Counter[str] = Counter()
        for path in sample:
            try:
                width, height = self._upright_size(path)
            except Exception:  # as in `read`, which reports it
                continue
            side = self._side(width, height)
            crops[f"{side}x{side} of {width}x{height}"] += 1
        if len(crops) == 1:
            (text,) = crops
        else:
            text = ", ".join(f"{what} ({count})" for what, count in crops.most_common(3))
            if others := crops.total() - sum(count for _, count in crops.most_common(3)):
                text += f", other sizes ({others})"
        return text if len(sample) == len(self.paths) else f"{text}, in a sample of {len(sample)}"

    def _find(self) -> Iterator[Found]:
        """All files. Each folder is read once, and links to folders last, so that links cannot form a cycle."""
        folders, links = [str(self.root)], list[str]()
        read = set()
        while folders or links:
            folder = folders.pop() if folders else heapq.heappop(links)
            try:
                status = os.stat(folder)
                entries = list(os.scandir(folder))
            except OSError as error:
                yield folder, "", _reason(error)
                continue
            if (status.st_dev, status.st_ino) in read:
                yield folder, "", "a link to a folder that is read already"
                continue
            read.add((status.st_dev, status.st_ino))
            for entry in entries:
                try:
                    status = entry.stat()
                except OSError as error:  # a broken link
                    yield entry.path, "", _reason(error)
                    continue
                if not stat.S_ISDIR(status.st_mode):
                    regular = stat.S_ISREG(status.st_mode)  # opening a pipe would wait for its writer
                    problem = _too_large(status.st_size) if regular else "not a regular file"
                    name = entry.path[len(str(self.root)) :]
                    yield entry.path, f"{name} {status.st_size} {status.st_mtime_ns}", problem
                elif entry.is_symlink():
                    heapq.heappush(links, entry.path)
                else:
                    folders.append(entry.path)

    def _open(self, path: str) -> ImageFile.ImageFile:
        return _open_image(path)

    def _decode(self, path: str) -> Tensor:
        with self._open(path) as file:
            image = upright_rgb(file)
        width, height = image.size
        side = self._side(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
        image = image.crop(box).resize((self.size, self.size), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # (3, size, size)

    def _side(self, width: int, height: int) -> int:
        """Width and height of the square that is cropped from an image."""
        crop = (CELEBA_CROP if (width, height) == CELEBA else 0) if self.crop is None else self.crop
        return min(width, height, crop or width)

    def _upright_size(self, path: str) -> tuple[int, int]:
        """Width and height that the decoded image will have, from its header."""
        with self._open(path) as file:
            width, height = file.size
            if isinstance(file, TiffImagePlugin.TiffImageFile):  # some versions of Pillow have swapped the size already
                width, height = (file.tag_v2[tag] for tag in (ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength))
            lies = file.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return (height, width) if lies else (width, height)


class _Mapped(mmap.mmap):
    """A file in memory. Each process has its own reading position, so that workers can share one open archive."""

    def seekable(self) -> bool:  # zipfile calls it, and mmap has it only from Python 3.13 on
        return True


class ZippedImageFolder(ImageFolder):
    """A folder in a zip archive, which is not unpacked. Paths are those in the archive."""

    def __init__(self, root: Path, size: int, crop: int | None = None, labeling: Labeling | None = None) -> None:
        with open(root, "rb") as file:
            mapped = _Mapped(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._archive = zipfile.ZipFile(cast("IO[bytes]", mapped))
        super().__init__(root, size, crop, labeling)

    def __reduce__(self) -> tuple[object, ...]:
        # For workers that do not share memory: they open the archive again.
        return type(self), (self.root, self.size, self.crop, self.labeling)

    def _find(self) -> Iterator[Found]:
        for member in self._archive.infolist():
            if not member.is_dir():
                problem = "encrypted" if member.flag_bits & 1 else _too_large(member.file_size)
                yield member.filename, f"{member.filename} {member.file_size} {member.CRC}", problem

    def _name(self, path: str) -> str:
        return path

    def _open(self, path: str) -> ImageFile.ImageFile:
        return _open_image(io.BytesIO(self._archive.read(path)))  # read as a whole, so that its checksum is verified


def _too_large(size: int) -> str:
    return f"{readable(size)}, at most {readable(LARGEST_FILE)} are read" if size > LARGEST_FILE else ""


def _reason(error: Exception) -> str:
    """Why a file cannot be read, without its path, which the messages already contain."""
    if isinstance(error, UnidentifiedImageError):
        return "not in a format that can be read"
    text = getattr(error, "strerror", None) or str(error)
    return (text.splitlines() or [type(error).__name__])[0]


def _open_image(source: str | io.BytesIO) -> ImageFile.ImageFile:
    with warnings.catch_warnings():
        # Pillow warns about images half as large as those that it refuses.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(source)


def upright_rgb(file: ImageFile.ImageFile) -> Image.Image:
    """The pixels of an open file as RGB, rotated as its EXIF data say, on white where they are transparent."""
    if file.mode == "F" or file.mode.startswith("I"):
        return _gray_bytes(file).convert("RGB")
    if file.format == "PNG" and "transparency" in file.info and file.tile[0][3] in ("L;2", "L;4", "RGB;16B"):
        # Pillow converts the pixels to bytes, but compares them with the unconverted colour of the file.
        raise ValueError("a transparent colour of 2, 4 or 16 bits, which Pillow does not find in the image")
    image = ImageOps.exif_transpose(file)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _gray_bytes(file: ImageFile.ImageFile) -> Image.Image:
    """Grey values of more than 8 bits, which Pillow's own conversion would cut off at 255."""
    tags = file.tag_v2 if isinstance(file, TiffImagePlugin.TiffImageFile) else {}
    if file.mode == "F":
        white = 1
    elif file.format in ("PNG", "PPM", "JPEG2000"):
        white = 65535
    elif file.format == "TIFF" and file.mode != "I":  # mode I: numbers with a sign, or of 32 bits
        white = 2 ** tags[ExifTags.Base.BitsPerSample][0] - 1
    else:
        raise ValueError(f"grey values of {file.format} mode {file.mode}, for which no value is known to be white")
    values = np.asarray(ImageOps.exif_transpose(file), np.float32)  # (H, W)
    if not (values.min() >= 0 and values.max() <= white):  # nor is nan
        raise ValueError(f"grey values from {values.min():g} to {values.max():g}, expected 0 to {white}")
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # 0 is white
        values = white - values
    if "transparency" in file.info:
        values = np.where(values == file.info["transparency"], white, values)
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
