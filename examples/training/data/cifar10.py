"""CIFAR-10's `cifar-10-binary.tar.gz`, as it is downloaded. (The other archive holds pickles, which can execute
anything.)

Each of the five files `data_batch_1.bin` … holds 10 000 records of 3073 bytes: the label, then the red, green and blue
pixels of 32×32, row by row. `test_batch.bin` holds the test images, and `batches.meta.txt` names the classes.
"""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SIZE = 32
RECORD = 1 + 3 * SIZE * SIZE
META, TEST = "batches.meta.txt", "test_batch.bin"
LARGEST = 64 * 2**20  # bytes of a file in the archive; the real ones have 29 MiB


def is_cifar10(path: Path) -> bool:
    """Whether a file is named like the archive."""
    return path.name.endswith((".tar.gz", ".tgz")) and path.is_file()


def read_cifar10(path: Path, *, held_out: bool = False) -> tuple[NDArray[np.uint8], NDArray[np.int64], tuple[str, ...]]:
    """The training images (N, 3, 32, 32), their labels (N,), and the names of the classes; the test images, of which an
    archive may have none, if `held_out`.

    Raises:
        ValueError: for an archive that is damaged or another one.
    """
    try:
        with tarfile.open(path, "r:gz") as archive:
            members = {Path(member.name).name: member for member in archive if member.isfile()}
            names = sorted(name for name in members if name.startswith("data_batch_") and name.endswith(".bin"))
            if not names or META not in members:
                held = ", ".join(sorted(members)[:3]) or "nothing"
                raise ValueError(f"{path}: expected CIFAR-10's data_batch_1.bin … and {META}, not {held}")
            wanted = [META, *(names if not held_out else [TEST] if TEST in members else [])]
            if any(members[name].size > LARGEST for name in wanted):
                raise ValueError(f"{path}: its files are too large to be CIFAR-10's")
            meta, *batches = (_content(archive, members[name]) for name in wanted)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    content = b"".join(batches)
    if (batches and not content) or any(len(batch) % RECORD for batch in batches):
        raise ValueError(f"{path}: expected records of {RECORD} bytes")
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, RECORD)  # (N, 3073)
    labels = records[:, 0].astype(np.int64)
    classes = tuple(meta.decode("ascii", "replace").split())
    if labels.size and labels.max() >= len(classes):
        raise ValueError(f"{path}: a label is {labels.max()}, and there are {len(classes)} classes")
    return records[:, 1:].reshape(-1, 3, SIZE, SIZE), labels, classes


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None  # a regular file has content
    return file.read()
