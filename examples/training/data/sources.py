"""Training images: the data sets that `--data` and `--classes` name.

A data set is indexed by a whole batch at once, a list of (index, flip) pairs, and returns a `Batch`. All random numbers
are drawn in `InfiniteBatchSampler`, which makes these pairs, and none in the workers. So order and flips depend on the
seed alone, not on the number of decoding processes.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Sampler

from training.data import procedural_faces as faces
from training.data.cifar10 import is_cifar10, read_cifar10
from training.data.cropping import PAD
from training.data.dataset import ImageSet, Indices, Pixels, Problems
from training.data.image_cache import CachedFolder, open_cache
from training.data.image_folder import NO_CLASS, ImageFolder, Labeling
from training.data.labels import (
    ATTRIBUTE_FILES,
    Labels,
    check_classes,
    find_attributes,
    from_attributes,
    from_folders,
    parse_attributes,
    read_attributes,
)
from training.data.mnist import TEST, TRAINING, is_mnist, read_labels, read_mnist
from training.data.public_sets import NAMES, SETS, class_names, public_files
from training.data.textures import CLASSES as TEXTURES
from training.data.textures import read_textures

BUILT_IN = ("faces", "digits", "textures")
FACES = 4096
ATTRIBUTES = "attributes:"


class InfiniteBatchSampler(Sampler[Indices]):
    """Batches without end: every image once in each epoch, in an order that is a function of (seed, epoch).

    Starting at `position`, the number of images drawn so far, gives what an uninterrupted run would draw next. A batch
    may reach into the next epoch, so all have the same size and no image is left out.
    """

    def __init__(self, count: int, batch_size: int, *, seed: int, flip: bool, position: int = 0) -> None:
        self.count, self.batch_size, self.seed, self.flip, self.position = count, batch_size, seed, flip, position

    def __iter__(self) -> Iterator[Indices]:
        epoch, start = divmod(self.position, self.count)
        order = self._epoch(epoch)
        while True:
            batch = order[start : start + self.batch_size]
            start += len(batch)
            while len(batch) < self.batch_size:
                epoch += 1
                order = self._epoch(epoch)
                start = min(self.batch_size - len(batch), self.count)
                batch = batch + order[:start]
            yield batch

    def _epoch(self, epoch: int) -> Indices:
        # numpy hashes the two numbers, so that neighboring seeds and epochs have nothing in common.
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self.count).tolist()
        flips = rng.random(self.count) < 0.5 if self.flip else np.zeros(self.count, bool)
        return list(zip(order, flips.tolist(), strict=True))


class ArrayDataset(ImageSet):
    """Images in memory: uint8 (N, C, size, size). `flip` says whether a mirrored image could be in the data set."""

    def __init__(self, images: Pixels, labels: Labels | None = None, *, flip: bool = True) -> None:
        self.images, self.labels, self.flip, self.unreadable = images, labels, flip, {}

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, numbers: Sequence[int]) -> tuple[Pixels, Problems]:
        return self.images[list(numbers)], {}  # a copy

    def marks(self) -> dict[str, str]:
        return {"pixels": f"{zlib.crc32(np.ascontiguousarray(self.images).data):08x}"}


DataSource = ArrayDataset | ImageFolder | CachedFolder


def folder_of(data: DataSource) -> ImageFolder | None:
    """The folder or archive that images come from, decoded as they are needed or once."""
    return data.folder if isinstance(data, CachedFolder) else data if isinstance(data, ImageFolder) else None


def open_data(
    data: str,
    *,
    size: int,
    crop: int | None = None,
    cache: Path | None = None,
    verify: bool = True,
    classes: str = "none",
    attributes: str = "",
    channels: str = "auto",
    mirror: bool = True,
) -> DataSource:
    """The data set that `--data` names, with the classes that `--classes` names.

    A folder of images is decoded once, into the folder `cache`, or in every epoch without one; `verify` says whether a
    cache that is there has its checksum verified. All other data sets are read into memory within seconds.

    With `channels` "auto" a folder has three, and every other data set its own; "1" turns colors into gray values. With
    `mirror` false no image is mirrored, even if it could be in the data set.

    Every error is a ValueError or an OSError with one line.
    """
    if attributes and not classes.startswith(ATTRIBUTES):
        raise ValueError(f"--attributes {attributes}: only --classes {ATTRIBUTES}Smiling,Male has attributes")
    named = _named_attributes(classes)
    root = _locate(data)
    if (source := _in_memory(data, root, size)) is not None:
        _adapt(source, data, classes, channels, mirror)
        if source.labels:
            check_classes(source.labels, f"--classes {classes}")
        return source
    labeling = _attribute_labeling(root, named, attributes) if named else from_folders if classes == "own" else None
    colors = 1 if channels == "1" else 3
    named_and_found = f"{data}, {root}" if data in NAMES else data
    folder = _open_folder(named_and_found, root, size, crop, cache, verify, labeling, colors)
    folder.flip = mirror
    return folder


def open_held_out(
    data: str, *, size: int, classes: str = "none", channels: str = "auto", mirror: bool = True
) -> ArrayDataset | None:
    """Images of the same kind that `open_data` never returns, with the same classes in the same order; None if the data
    set keeps none, as digits, folders of images, and MNIST's files without `t10k-…`.

    Of CIFAR-10 and of MNIST's files it is the test part, of textures a band of each photograph. After `faces:200` come
    the faces from number 200 on.

    Every error is a ValueError or an OSError with one line.
    """
    _named_attributes(classes)
    if (held_out := _in_memory(data, _locate(data), size, held_out=True)) is not None:
        _adapt(held_out, data, classes, channels, mirror)
    return held_out


def _locate(data: str) -> Path:
    """Where the files are that `--data` names."""
    return public_files(data) if data in NAMES else Path(data)


def _in_memory(data: str, root: Path, size: int, *, held_out: bool = False) -> ArrayDataset | None:
    """The data set that is no folder of images, or its held-out part; None if there is none."""
    if numbers := face_numbers(data):
        if held_out:
            numbers = range(numbers.stop, numbers.stop + FACES)
        return procedural_faces(size, len(numbers), first=numbers.start)
    if data == "digits":
        return None if held_out else digits(size)
    if data == "textures":
        return textures(size, held_out=held_out)
    if is_cifar10(root):
        return cifar10(root, size, held_out=held_out)
    if root.is_dir() and is_mnist(root):
        names = SETS[data].classes if data in SETS else class_names(root)
        return mnist(root, size, names, held_out=held_out)
    return None


def _named_attributes(classes: str) -> list[str]:
    """The names after `attributes:` in `--classes`."""
    named = classes.removeprefix(ATTRIBUTES).split(",") if classes.startswith(ATTRIBUTES) else []
    if classes not in ("none", "own") and not (named and all(named)):
        raise ValueError(f"--classes {classes}: expected none, own, or {ATTRIBUTES} and names such as Smiling,Male")
    return named


def _adapt(source: ArrayDataset, data: str, classes: str, channels: str, mirror: bool) -> None:
    """Give images in memory the channels, the mirroring and the classes that are asked for."""
    if _named_attributes(classes):
        raise ValueError(f"--classes {classes}: {data} has no attributes, give own or none")
    source.images = with_channels(source.images, channels)
    source.flip = source.flip and mirror
    if classes == "none":
        source.labels = None


def face_numbers(data: str) -> range | None:
    """The numbers of the procedural faces that `--data` names: faces, faces:200 (the first 200), faces:5000-7000."""
    name, colon, numbers = data.partition(":")
    if name != "faces" or not colon:
        return range(FACES) if data == "faces" else None
    parts = re.fullmatch(r"(?:(\d{1,9})-)?(\d{1,9})", numbers)
    chosen = range(int(parts[1] or 0), int(parts[2])) if parts else range(0)
    if not chosen:
        raise ValueError(f"--data {data}: expected faces, faces:200 (the first 200) or faces:5000-7000")
    return chosen


def procedural_faces(size: int, count: int = FACES, *, first: int = 0) -> ArrayDataset:
    """Procedural faces, from number `first` on; their classes are the colors of the hair."""
    traits = faces.traits(count, first=first)
    return ArrayDataset(faces.render(traits, size), Labels(faces.HAIR_COLORS, faces.hair_colors(traits)))


def digits(size: int) -> ArrayDataset:
    """The 1797 handwritten digits that scikit-learn ships, 8×8 pixels in 17 grays: enlarged, with more contrast."""
    from sklearn.datasets import load_digits  # imported here, because only this data set needs it

    margin = 3 * size // 28  # the strokes reach the edge of the 8×8 pixels, and are easier to read with a margin
    content = load_digits()
    images = torch.from_numpy(content.images).float()[:, None] / 8 - 1  # (1797, 1, 8, 8) in [-1, 1]
    images = F.interpolate(images, size=size - 2 * margin, mode="bicubic", align_corners=False)
    images = F.pad(images, (margin,) * 4, value=-1.0)  # (1797, 1, size, size)
    pixels = (127.5 * (1 + 1.6 * images)).round().clamp(0, 255).byte().numpy()
    return ArrayDataset(pixels, Labels(tuple(map(str, range(10))), content.target.astype(np.int64)), flip=False)


def textures(size: int, *, held_out: bool = False) -> ArrayDataset:
    """Patches of two photographs, or those held out; their classes are the photographs."""
    images, labels = read_textures(held_out=held_out)
    return ArrayDataset(_resized(images, size), Labels(TEXTURES, labels))


def mnist(folder: Path, size: int, names: tuple[str, ...], *, held_out: bool = False) -> ArrayDataset | None:
    """MNIST's training or test images, or those of a data set in the same files; None without test images. Their
    classes have these names, or those of digits if there are none."""
    if held_out and not is_mnist(folder, TEST):
        return None
    images, labels = read_mnist(folder, TEST if held_out else TRAINING)
    count = int(read_labels(folder, TRAINING).max()) + 1
    if labels.max() >= count:
        raise ValueError(f"{folder}: a label of the test images is {labels.max()}, above all of the training images")
    if names and count > len(names):
        raise ValueError(f"{folder}: expected {len(names)} classes ({', '.join(names)}), the labels have {count}")
    classes = names or tuple(map(str, range(count)))
    return ArrayDataset(_resized(images, size), Labels(classes, labels), flip=False)


def cifar10(archive: Path, size: int, *, held_out: bool = False) -> ArrayDataset | None:
    """CIFAR-10's training or test images; None if the archive is without test images."""
    images, labels, classes = read_cifar10(archive, held_out=held_out)
    return ArrayDataset(_resized(images, size), Labels(classes, labels)) if len(images) else None


def with_channels(images: Pixels, channels: str) -> Pixels:
    """Images (N, 1 or 3, H, W) with so many channels, or their own if that is "auto"."""
    if channels == "auto" or images.shape[1] == int(channels):
        return images
    if channels == "3":
        return np.repeat(images, 3, axis=1)
    red, green, blue = np.moveaxis(images.astype(np.uint32), 1, 0)  # (N, H, W) each
    # The luma of ITU-R 601, in integers as Pillow computes it for files.
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).astype(np.uint8)[:, None]


def crop_setting(text: str) -> int | None:
    """The value of `--crop`: a number of pixels, None for auto, PAD for pad."""
    named = {"auto": None, "pad": PAD}
    if text not in named and not text.isdecimal():
        raise ValueError(f"--crop {text}: expected auto, pad, or a number of pixels, 0 for the largest center square")
    return named[text] if text in named else int(text)


def _attribute_labeling(root: Path, names: list[str], attributes: str) -> Labeling:
    return partial(from_attributes, table=_attribute_table(root, names, attributes), attributes=names)


def _attribute_table(root: Path, names: list[str], attributes: str) -> dict[str, tuple[bool, ...]]:
    if not attributes and root.is_file() and zipfile.is_zipfile(root):
        with suppress(zipfile.BadZipFile), zipfile.ZipFile(root) as archive:  # Kaggle's has images and table in it
            for member in archive.namelist():
                if re.split(r"[/\\]", member)[-1] in ATTRIBUTE_FILES:
                    return parse_attributes(archive.read(member), f"{root}, {member}", names)
    return read_attributes(Path(attributes) if attributes else find_attributes(root), names)


def _open_folder(
    data: str,
    root: Path,
    size: int,
    crop: int | None,
    cache: Path | None,
    verify: bool,
    labeling: Labeling | None,
    channels: int,
) -> ImageFolder | CachedFolder:
    if not root.exists():
        names = ", ".join((*BUILT_IN, *NAMES))
        raise ValueError(f"--data {data}: no such folder or zip archive (and none of {names})")
    if not root.is_dir() and not (root.is_file() and zipfile.is_zipfile(root)):
        raise ValueError(
            f"--data {data}: expected a folder of images or a zip archive; this is neither, or it is incomplete"
        )
    try:
        folder = ImageFolder(root, size, crop, labeling, channels=channels)
    except (zipfile.BadZipFile, ValueError) as error:  # a ValueError if an offset points outside the file
        raise ValueError(f"--data {data}: a damaged zip archive: {error}") from None
    if folder.labels and (folder.paths or NO_CLASS in folder.others.values()):
        check_classes(folder.labels, f"--data {data}")
    if not folder.paths:
        message = f"--data {data}: no images in this {'folder or below it' if root.is_dir() else 'archive'}"
        if folder.others:
            path, reason = next(iter(folder.others.items()))
            message += f"; {len(folder.others)} files are left out, for example {path}: {reason}"
        if folder.skipped:
            message += f"; not read: {folder.skipped}"
        raise ValueError(message)
    folder.pixels([0])  # raises an error before the training starts if no image can be decoded
    return folder if cache is None else open_cache(folder, cache, verify=verify)


def _resized(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Images (N, C, H, W) as (N, C, size, size), the largest center square of each channel resized as `ImageFolder`
    does."""
    count, channels, height, width = images.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    images = images[:, :, top : top + side, left : left + side]
    if side == size:
        return np.ascontiguousarray(images)
    resized = np.empty((count * channels, size, size), np.uint8)
    for channel, target in zip(images.reshape(-1, side, side), resized, strict=True):
        target[:] = Image.fromarray(channel).resize((size, size), Image.Resampling.LANCZOS)
    return resized.reshape(count, channels, size, size)
