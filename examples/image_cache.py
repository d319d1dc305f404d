"""Images decoded once, into an array on the disk: from then on, an epoch costs no decoding.

A cache is one `.npy` file, uint8 (N, 3, size, size), that runs map into memory, with a checksum after the array. Row i
is what the folder itself would give for image i, so training from the cache and training without it are bitwise the
same. The name holds crop, size and a fingerprint of the files. A cache is written under another name, by one process at
a time, and takes its own only when it is whole and on the disk: whichever file has the name that a run looks for is
up to date. The checksum shows whether it is still as it was written; if not, it is built again.
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
from typing import TYPE_CHECKING

import numpy as np
import PIL
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from workers import decoded

if TYPE_CHECKING:
    from sources import Folder

DECODER = f"2, Pillow {PIL.__version__}"  # raise the number when `Folder` makes other pixels of the same file
CHECKSUM = 4  # bytes at the end of a cache: the CRC-32 of all before them
CHUNK = 2**20  # bytes that are read at a time


def usable_cores() -> int:
    """The cores that this process may use, and so the processes that can decode at a time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def readable(size: int) -> str:
    """A number of bytes in the largest unit of which there is at least one: 1536 is 1.5 KiB."""
    power = max(0, size.bit_length() - 1) // 10
    return f"{size / 1024**power:.4g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB', 'EiB')[power]}"


def open_cache(folder: Folder, directory: Path) -> NDArray[np.uint8]:
    """All images of a folder, uint8 (N, 3, size, size), from its cache in `directory`, which is built if need be."""
    shape = (len(folder), 3, folder.size, folder.size)
    stem = _stem(folder)
    path = directory / f"{stem}-{_fingerprint(folder)}.npy"
    images = _map(path, shape)
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
            for file in directory.iterdir():  # out of date, or what a builder left that was killed
                if file.name.startswith(f"{stem}-") and file.suffix in (".npy", ".part"):
                    if file == path:
                        print(f"damaged, decoded again: {path}", file=sys.stderr, flush=True)
                    file.unlink()
            _build(folder, path, shape)
            images = _map(path, shape)
            if images is None:
                raise OSError(f"{path} is not what has just been written: --cache-dir names another folder")
    finally:
        lock.release()
    return images


def _stem(folder: Folder) -> str:
    """What the caches of the same folder, crop and size have in common, whatever the folder held at the time."""
    where = hashlib.sha256(os.fsencode(folder.root)).hexdigest()[:8]
    crop = "auto" if folder.crop is None else folder.crop
    return f"{folder.root.stem[:64]}-{folder.size}px-crop{crop}-{where}"


def _fingerprint(folder: Folder) -> str:
    digest = hashlib.sha256(DECODER.encode())
    for stamp in folder.stamps:
        digest.update(os.fsencode(stamp) + b"\0")
    return digest.hexdigest()[:16]


def _header(shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _map(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8] | None:
    """The cache, or None where there is none, or where it is no longer as it was written."""
    header = _header(shape)
    end = len(header) + math.prod(shape)
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size != end + CHECKSUM:
                return None
            # Read, not mapped: at a bad sector, a read raises an error, where looking into a mapping ends the process.
            checksum = 0
            for start in range(0, end, CHUNK):
                checksum = zlib.crc32(file.read(min(CHUNK, end - start)), checksum)
            if file.read() != checksum.to_bytes(CHECKSUM, "little"):
                return None
            return np.memmap(file, np.uint8, "r", offset=len(header), shape=shape)
    except OSError:
        return None


def _build(folder: Folder, path: Path, shape: tuple[int, ...]) -> None:
    header = _header(shape)
    need, free = len(header) + math.prod(shape) + CHECKSUM, shutil.disk_usage(path.parent).free
    if need > free:
        raise OSError(
            f"the decoded images need {readable(need)} in {path.parent}, {readable(need - free)} more than are "
            "free: --cache-dir names another folder, --no-cache does without"
        )
    for other, reason in folder.others.items():
        print(f"{reason}, left out: {other}", file=sys.stderr)
    part = path.with_name(f"{path.stem}-{uuid.uuid4().hex[:8]}.part")
    try:
        with open(part, "xb") as file:
            # Written, not mapped: on a full disk a write raises an error, where storing to a mapping ends the process.
            file.write(header)
            checksum = zlib.crc32(header)
            for images in _decoded(folder):
                file.write(images.numpy().data)
                checksum = zlib.crc32(images.numpy().data, checksum)
            file.write(checksum.to_bytes(CHECKSUM, "little"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"cannot write {path} ({readable(need)}): {error}") from None
    finally:
        part.unlink(missing_ok=True)


def _decoded(folder: Folder) -> Iterator[Tensor]:
    """The images in their order, uint8 (n, 3, size, size) at a time, decoded on all cores."""
    step = min(64, max(1, 2**20 // (3 * folder.size**2)))  # a MiB at most, so that little shared memory is enough
    starts = range(0, len(folder), step)
    batches = [[(index, False) for index in range(len(folder))[start : start + step]] for start in starts]
    decoding = decoded(folder, batches, workers=min(usable_cores(), len(batches)))
    named: dict[str, str] = {}
    interval = 0.1 if sys.stderr.isatty() else 10
    with tqdm(
        total=len(folder), desc=f"decoding {folder.root.name}", unit="img", dynamic_ncols=True, mininterval=interval
    ) as bar:
        for images, unreadable in decoding:
            for path in sorted(unreadable.keys() - named):
                tqdm.write(f"{unreadable[path]}, left out: {path}", file=sys.stderr)
            named.update(unreadable)
            bar.update(len(images))
            yield images
