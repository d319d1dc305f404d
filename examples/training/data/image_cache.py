"""Decode the images of a folder once, into an array on the disk, so that later epochs need no decoding.

A cache is one `.npy` file, uint8 (N, 3, size, size), that runs map into memory. Row i is what the folder itself would
return for image i, so that training from the cache and training without it are bitwise the same. After the array come
the numbers of the decoded images (where image i cannot be read, row i is another image) and a checksum.

The name contains crop, size and a fingerprint of the files. A cache is written under another name, by one process at a
time, and renamed when it is complete and on the disk. So a file with the name that a run expects is up to date. If its
checksum is wrong, it is built again.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import shutil
import sys
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from training.data.image_folder import ImageFolder
from training.data.workers import decoded, usable_cores
from training.runs.memory import readable

DECODER = f"3, Pillow {PIL.__version__}"  # increase the number when `ImageFolder` returns other pixels for a file
CHECKSUM = 4  # bytes at the end of a cache: the CRC-32 of all before them
CHUNK = 2**20  # bytes that are read at a time


class Decoded(NamedTuple):
    """All images of a folder."""

    images: NDArray[np.uint8]  # (N, 3, size, size)
    sources: NDArray[np.int64]  # (N,) the number of the image in each row: its own, or of the one that replaces it


def open_cache(folder: ImageFolder, directory: Path, *, verify: bool = True) -> Decoded:
    """All images of a folder from its cache in `directory`, which is built if necessary.

    Without `verify` only the length of a cache that is there is checked, in no time: for a process beside another one
    that has just verified it.
    """
    shape = (len(folder), 3, folder.size, folder.size)
    stem = _stem(folder)
    path = directory / f"{stem}-{_fingerprint(folder)}.npy"
    images = _map(path, shape, verify=verify)
    if images is not None:
        return images
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / f"{stem}.lock")  # the kernel's: it ends with the process, however that ends
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process, which decodes {folder.root}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        images = _map(path, shape)  # by now, another process may have built it
        if images is None:
            for file in directory.iterdir():  # out of date, or left by a process that was killed
                if file.name.startswith(f"{stem}-") and file.suffix in (".npy", ".part"):
                    if file == path:
                        print(f"damaged, decoded again: {path}", file=sys.stderr, flush=True)
                    file.unlink()
            _build(folder, path, shape)
            images = _map(path, shape)
            if images is None:
                raise OSError(f"{path} differs from what was just written: choose another folder with --cache-dir")
    finally:
        lock.release()
    return images


def _stem(folder: ImageFolder) -> str:
    """The part of the name that all caches of this folder, crop and size share, whatever the folder contained."""
    where = hashlib.sha256(os.fsencode(folder.root)).hexdigest()[:8]
    crop = "auto" if folder.crop is None else folder.crop
    return f"{folder.root.stem[:64]}-{folder.size}px-crop{crop}-{where}"


def _fingerprint(folder: ImageFolder) -> str:
    digest = hashlib.sha256(DECODER.encode())
    for stamp in folder.stamps:
        digest.update(os.fsencode(stamp) + b"\0")
    return digest.hexdigest()[:16]


def _header(shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _map(path: Path, shape: tuple[int, ...], *, verify: bool = True) -> Decoded | None:
    """The cache, or None if there is none, it has another length, or its checksum is wrong."""
    header = _header(shape)
    pixels = len(header) + math.prod(shape)
    end = pixels + 8 * shape[0]
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size != end + CHECKSUM:
                return None
            # Read, not mapped: at a bad sector a read raises an error, while access to a mapping kills the process.
            checksum = 0
            for start in range(0, pixels, CHUNK) if verify else ():
                checksum = zlib.crc32(file.read(min(CHUNK, pixels - start)), checksum)
            file.seek(pixels)
            sources = file.read(end - pixels)
            if verify and file.read() != zlib.crc32(sources, checksum).to_bytes(CHECKSUM, "little"):
                return None
            images = np.memmap(file, np.uint8, "r", offset=len(header), shape=shape)
            return Decoded(images, np.frombuffer(sources, np.dtype("<i8")).astype(np.int64))
    except OSError:
        return None


def _build(folder: ImageFolder, path: Path, shape: tuple[int, ...]) -> None:
    header = _header(shape)
    need, free = len(header) + math.prod(shape) + 8 * shape[0] + CHECKSUM, shutil.disk_usage(path.parent).free
    if need > free:
        raise OSError(
            f"the decoded images need {readable(need)} in {path.parent}, {readable(need - free)} more than are "
            "free: choose another folder with --cache-dir, or give --no-cache"
        )
    for other, reason in folder.others.items():
        print(f"{reason}, left out: {other}", file=sys.stderr)
    part = path.with_name(f"{path.stem}-{uuid.uuid4().hex[:8]}.part")
    try:
        with open(part, "xb") as file:
            # Written, not mapped: on a full disk a write raises an error, while storing to a mapping kills the process.
            file.write(header)
            checksum = zlib.crc32(header)
            sources = bytearray()
            for images, numbers in _decoded(folder):
                file.write(images.numpy().data)
                checksum = zlib.crc32(images.numpy().data, checksum)
                sources += numbers.numpy().astype("<i8").tobytes()
            file.write(sources)
            checksum = zlib.crc32(sources, checksum)
            file.write(checksum.to_bytes(CHECKSUM, "little"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"cannot write {path} ({readable(need)}): {error}") from None
    finally:
        part.unlink(missing_ok=True)


class _Sources(Dataset[tuple[Tensor, Tensor, dict[str, str]]]):
    """A folder that also returns the numbers of the images that it has read, and no classes."""

    def __init__(self, folder: ImageFolder) -> None:
        self.folder = folder

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor, dict[str, str]]:
        images, sources, problems = zip(*map(self.folder.read, indices), strict=True)
        unreadable = {path: reason for problem in problems for path, reason in problem.items()}
        return torch.stack(images), torch.tensor(sources), unreadable


def _decoded(folder: ImageFolder) -> Iterator[tuple[Tensor, Tensor]]:
    """The images in their order, uint8 (n, 3, size, size) at a time, and their numbers (n,), decoded on all cores."""
    step = min(64, max(1, 2**20 // (3 * folder.size**2)))  # at most a MiB, so that little shared memory is enough
    starts = range(0, len(folder), step)
    batches = [list(range(len(folder))[start : start + step]) for start in starts]
    decoding = decoded(_Sources(folder), batches, workers=min(usable_cores(), len(batches)))
    named: dict[str, str] = {}
    interval = 0.1 if sys.stderr.isatty() else 10
    with tqdm(
        total=len(folder), desc=f"decoding {folder.root.name}", unit="img", dynamic_ncols=True, mininterval=interval
    ) as bar:
        for images, numbers, unreadable in decoding:
            for path in sorted(unreadable.keys() - named):
                tqdm.write(f"{unreadable[path]}, left out: {path}", file=sys.stderr)
            named.update(unreadable)
            bar.update(len(images))
            yield images, numbers
