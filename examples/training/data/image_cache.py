"""Decode the images of a folder once, into an array on the disk, so that later epochs need no decoding.

A cache is one `.npy` file, uint8 (N, 3, size, size), with all images of the folder, those without a class too. Training
from it and training without it are bitwise the same. After the array come N numbers (i where image i could be read) and
a checksum. Runs read the rows that they need; they do not map the file, because access to a mapping kills the process
where the file was cut off or the disk cannot read it.

The name contains crop, size and a fingerprint of the files. A cache is written under another name, and renamed when it
is complete and on the disk. So a file with the name that a run expects is up to date. If its checksum is wrong, it is
built again. The lock only spares work: without it each process writes a file of its own, and the last one stays.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import secrets
import shutil
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from numpy.typing import NDArray
from tqdm import tqdm

from training.data.cropping import PAD
from training.data.dataset import ImageSet, Pixels, Problems, SourceLost
from training.data.files import SharedFile
from training.data.image_folder import ImageFolder, Replacements, left_out
from training.data.prefetch import LIMIT, made_ahead
from training.data.workers import Workers, usable_cores
from training.runs.atomic_files import force_to_disk
from training.runs.kernel_lock import KernelLock, machine
from training.runs.memory import readable
from training.runs.signals import StopRequested, deferred_signals, stop_requested

DECODER = f"3, Pillow {PIL.__version__}"  # increase the number when `ImageFolder` returns other pixels for a file
CHECKSUM = 4  # bytes at the end of a cache: the CRC-32 of all before them
CHUNK = 2**20  # bytes that are read at a time


class Rows:
    """The images in the file of a cache, uint8 (N, C, size, size), read when they are indexed."""

    def __init__(self, path: Path, start: int, shape: tuple[int, ...]) -> None:
        self.path, self.start, self.shape = path, start, shape
        self._file = SharedFile(path)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: NDArray[np.int64]) -> Pixels:
        """The images of these numbers, a copy."""
        images = np.empty((len(index), *self.shape[1:]), np.uint8)
        size, whole = math.prod(self.shape[1:]), images.reshape(-1).data
        for i, row in enumerate(index.tolist()):
            # At its own position: several threads read.
            target = whole[i * size : (i + 1) * size]
            if os.preadv(self._file.descriptor, [target], self.start + size * row) != size:
                raise SourceLost(f"{self.path} was cut off while it was read; the next start decodes the images again")
        return images


class CachedFolder(ImageSet):
    """The images of a folder, from its cache.

    Raises:
        ValueError: if no image of a class could be read.
    """

    def __init__(self, folder: ImageFolder, decoded: Decoded) -> None:
        self.folder, self.labels, self.unreadable = folder, folder.labels, {}
        self.images, self.readable = decoded.images, decoded.readable[folder.kept]
        self.rows = folder.kept.copy()  # for each image the row of its pixels
        replacements = Replacements(self.labels, ~self.readable)
        for number in (~self.readable).nonzero()[0].tolist():
            other = next(replacements(number), None)
            if other is None:
                raise ValueError(folder.nothing_readable(number))
            self.rows[number] = folder.kept[other]

    def __len__(self) -> int:
        return len(self.rows)

    def pixels(self, numbers: Sequence[int]) -> tuple[Pixels, Problems]:
        return self.images[self.rows[list(numbers)]], {}

    @property
    def missing(self) -> int:
        return int((~self.readable).sum())

    def counts(self) -> dict[str, int]:
        return self.labels._replace(numbers=self.labels.numbers[self.readable]).counts() if self.labels else {}

    def marks(self) -> dict[str, str]:
        return self.folder.marks()


class Decoded(NamedTuple):
    """All images of a folder, those without a class too."""

    images: Rows  # (N, C, size, size), zeros where a file could not be read
    readable: NDArray[np.bool_]  # (N,)


def open_cache(folder: ImageFolder, directory: Path, *, verify: bool = True) -> CachedFolder:
    """The images of a folder from its cache in `directory`, which is built if necessary.

    Without `verify` only the length of a cache that is there is checked, in no time: for a process beside another one
    that has just verified it.
    """
    shape = (len(folder.all_paths), folder.channels, folder.size, folder.size)
    stem = _stem(folder)
    path = directory / f"{stem}-{_fingerprint(folder)}.npy"
    images = _open(path, shape, verify=verify)
    if images is not None:
        return CachedFolder(folder, images)
    directory.mkdir(parents=True, exist_ok=True)
    with closing(KernelLock(directory / f"{stem}.lock")) as lock:
        locked = bool(lock.wait(f"decodes {folder.root}"))
        if not locked:
            print(
                f"{lock.path}: this file system has no locks ({lock.missing}); runs that start together all decode "
                f"{folder.root}",
                file=sys.stderr,
                flush=True,
            )
        images = _open(path, shape)  # by now, another process may have built it
        if images is None:
            if path.exists():
                print(f"damaged, decoded again: {path}", file=sys.stderr, flush=True)
            _tidy(stem, path, locked=locked)
            with deferred_signals(second_stops=False):
                with suppress(StopRequested):
                    _build(folder, path, shape)
                if number := stop_requested():
                    raise SystemExit(128 + number)
            images = _open(path, shape)
            if images is None:
                raise OSError(f"{path} differs from what was just written: choose another folder with --cache-dir")
        if locked:
            lock.clear()
    return CachedFolder(folder, images)


def _tidy(stem: str, path: Path, *, locked: bool) -> None:
    """Delete caches that are damaged or out of date, and what processes left that were killed.

    The lock may be this machine's alone, or none. What another process may be writing or may have just written is only
    deleted after a time in which a builder would have given up.
    """
    for file in path.parent.iterdir():
        if not file.name.startswith(f"{stem}-") or file.suffix not in (".npy", ".part"):
            continue
        with suppress(FileNotFoundError):
            mine = locked and (file.suffix == ".npy" or _mark() in file.name)
            if mine or (file != path and time.time() - file.stat().st_mtime > LIMIT):
                file.unlink()


def _mark() -> str:
    """A part of the names of files that this machine is writing."""
    return hashlib.sha256(machine().encode()).hexdigest()[:8]


def _stem(folder: ImageFolder) -> str:
    """The part of the name that all caches of this folder, crop and size share, whatever the folder contained."""
    where = hashlib.sha256(os.fsencode(folder.root)).hexdigest()[:8]
    crop = {None: "auto", PAD: "pad"}.get(folder.crop, folder.crop)
    gray = "-gray" if folder.channels == 1 else ""
    return f"{folder.root.stem[:64]}-{folder.size}px-crop{crop}{gray}-{where}"


def _fingerprint(folder: ImageFolder) -> str:
    digest = hashlib.sha256(DECODER.encode())
    for stamp in folder.all_stamps:
        digest.update(os.fsencode(stamp) + b"\0")
    return digest.hexdigest()[:16]


def _header(shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _open(path: Path, shape: tuple[int, ...], *, verify: bool = True) -> Decoded | None:
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
            return Decoded(Rows(path, len(header), shape), np.frombuffer(sources, "<i8") == np.arange(shape[0]))
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
    for line in left_out(folder.others):
        print(line, file=sys.stderr)
    part = path.with_name(f"{path.stem}-{_mark()}-{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as file:
            # Written, not mapped: on a full disk a write raises an error, while storing to a mapping kills the process.
            file.write(header)
            checksum = zlib.crc32(header)
            sources = bytearray()
            for images, numbers in _decoded(folder):
                file.write(images.data)
                checksum = zlib.crc32(images.data, checksum)
                sources += numbers.astype("<i8").tobytes()
            file.write(sources)
            checksum = zlib.crc32(sources, checksum)
            file.write(checksum.to_bytes(CHECKSUM, "little"))
            file.flush()
            force_to_disk(file.fileno(), part.parent)
        os.replace(part, path)
    except SourceLost:
        raise
    except OSError as error:
        raise OSError(f"cannot write {path} ({readable(need)}): {error}") from None
    finally:
        part.unlink(missing_ok=True)


def _decoded(folder: ImageFolder) -> Iterator[tuple[Pixels, NDArray[np.int64]]]:
    """All images in their order, uint8 (n, C, size, size) at a time, with their numbers (n,) or -1, decoded on all
    cores."""
    count = len(folder.all_paths)
    step = min(64, max(1, 2**20 // (folder.channels * folder.size**2)))  # at most a MiB, so that all cores get some
    parts = [range(start, min(start + step, count)) for start in range(0, count, step)]
    workers = min(usable_cores(), len(parts))
    pool = Workers(folder.rows, workers)
    interval = 0.1 if sys.stderr.isatty() else 10
    unreadable: Problems = {}
    bar = tqdm(total=count, desc=f"decoding {folder.root.name}", unit="img", dynamic_ncols=True, mininterval=interval)
    decoding = made_ahead(pool, parts, threads=workers, ahead=2 * workers, why_late=pool.state, abandon=pool.kill)
    with bar, closing(decoding):
        try:
            for part, (images, problems) in zip(parts, decoding, strict=True):
                if stop_requested():  # seen by what waits for images, but they may come fast
                    raise StopRequested
                unreadable |= problems
                bar.update(len(part))
                yield images, np.array([-1 if folder.all_paths[i] in problems else i for i in part])
        except OSError as error:
            raise SourceLost(f"{folder.root} cannot be decoded: {error}") from None
    for line in left_out(unreadable):
        print(line, file=sys.stderr)
