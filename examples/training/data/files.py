"""The files of a folder or a zip archive, and those that are nobody's data.

Nothing is read below hidden folders, folders of operating systems and storage devices, and folders of the trainer's own
runs, wherever they are: they hold thumbnails, copies, what was deleted, and generated images.
"""

from __future__ import annotations

import errno
import heapq
import io
import os
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, cast

from training.data.dataset import SourceLost
from training.runs.folder import FILES, holds_a_run
from training.runs.memory import readable

LARGEST_FILE = 2**29  # bytes; a member of an archive is read into memory as a whole

SYSTEM = frozenset(
    name.casefold()
    for name in (
        "__MACOSX", "@eaDir", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", "lost+found", "$RECYCLE.BIN",
        "RECYCLER", "System Volume Information",
    )
)  # fmt: skip

# What a run and generate.py write besides `FILES`, where the run's folder is that of the data itself.
FOLDERS = re.compile(r"generated|dry-run|tensorboard|earlier-\d+")

# What the system says of a disk, a server, a permission or itself, not of a damaged file: another day it may read it.
PASSING = frozenset({
    errno.EIO, errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.ESTALE, errno.ENOTCONN, errno.ECONNRESET,
    errno.ECONNABORTED, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
    errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.EAGAIN, errno.EBUSY,
})  # fmt: skip

HIDDEN, HIDDEN_FILE, OF_A_RUN = "hidden or system folder", "hidden file", "folder or file of a run"


class File(NamedTuple):
    """A file that may be an image."""

    path: str  # by which it is opened, and named in messages
    stamp: str  # a text that changes when the file does, found without reading it
    problem: str = ""  # why it is left out, or ""


class Skipped:
    """What was not looked at: how many of each kind, and the first names."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.names: dict[str, list[str]] = {}

    def add(self, kind: str, name: str) -> None:
        self.counts[kind] += 1
        names = self.names.setdefault(kind, [])
        if name not in names and len(names) < 4:
            names.append(name)

    def __str__(self) -> str:
        """One line; empty if nothing was skipped."""
        parts = []
        for kind, count in sorted(self.counts.items()):
            first, more = ", ".join(self.names[kind][:3]), ", …" if len(self.names[kind]) > 3 else ""
            several = kind.replace("folder", "folders").replace("file", "files") if count > 1 else kind
            parts.append(f"{count} {several} ({first}{more})")
        return ", ".join(parts)


def kind_of(name: str, *, folder: bool, within: Collection[str], below: bool) -> str:
    """Why a file or folder of this name is nobody's data, or "". `within` are the names in the folder that it is in.

    `below` says whether that folder is below that of the data, where the whole of a run's folder is skipped.
    """
    if folder and (name.startswith(".") or name.casefold() in SYSTEM):
        return HIDDEN
    if not folder and name.startswith("."):  # such as macOS's ._000001.jpg
        return HIDDEN_FILE
    if not below and (FOLDERS if folder else FILES).fullmatch(name) and holds_a_run(within):
        return OF_A_RUN
    return ""


class Folder:
    """The files below a folder, at any depth."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.skipped = Skipped()

    def files(self) -> Iterator[File]:
        """All files. Each folder is read once, and links to folders last, so that links cannot form a cycle."""
        folders, links = [str(self.root)], list[str]()
        read = set()
        while folders or links:
            folder = folders.pop() if folders else heapq.heappop(links)
            try:
                status = os.stat(folder)
                entries = list(os.scandir(folder))
            except OSError as error:
                yield File(folder, "", reason(error))
                continue
            if (status.st_dev, status.st_ino) in read:
                yield File(folder, "", "a link to a folder that is read already")
                continue
            read.add((status.st_dev, status.st_ino))
            names, below = {entry.name for entry in entries}, folder != str(self.root)
            if below and holds_a_run(names):
                self.skipped.add(OF_A_RUN, self.name(folder))
                continue
            for entry in entries:
                # Known before its status is asked for: some hidden folders cannot be read.
                try:
                    directory = entry.is_dir()
                except OSError:
                    directory = False
                if kind := kind_of(entry.name, folder=directory, within=names, below=below):
                    self.skipped.add(kind, entry.name)
                    continue
                try:
                    status = entry.stat()
                except OSError as error:  # a broken link
                    yield File(entry.path, "", reason(error))
                    continue
                if not stat.S_ISDIR(status.st_mode):
                    regular = stat.S_ISREG(status.st_mode)  # opening a pipe would wait for its writer
                    problem = too_large(status.st_size) if regular else "not a regular file"
                    name = entry.path[len(str(self.root)) :]
                    yield File(entry.path, f"{name} {status.st_size} {status.st_mtime_ns}", problem)
                elif entry.is_symlink():
                    heapq.heappush(links, entry.path)
                else:
                    folders.append(entry.path)

    def name(self, path: str) -> str:
        """The path within the folder, with slashes."""
        return Path(path).relative_to(self.root).as_posix()

    def open(self, path: str) -> str | IO[bytes]:
        """What Pillow opens."""
        return path

    def check(self) -> None:
        """Raise an error if the source is no longer what it was when it was opened."""


class SharedFile(io.RawIOBase):
    """An open file of which each process has its own reading position, so that workers can share it.

    It is read, not mapped: where a file was truncated, access to a mapping kills the process.
    """

    def __init__(self, path: Path) -> None:
        self.descriptor, self.position = os.open(path, os.O_RDONLY), 0

    def close(self) -> None:
        if not self.closed:
            os.close(self.descriptor)
        super().close()

    def size(self) -> int:
        """Bytes in the file, as it is now."""
        return os.fstat(self.descriptor).st_size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = (0, self.position, self.size())[whence]
        if start + offset < 0:
            raise OSError(f"a position before the beginning of the file: {start + offset}")
        self.position = start + offset
        return self.position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        read = os.pread(self.descriptor, len(buffer), self.position)
        buffer[: len(read)] = read
        self.position += len(read)
        return len(read)


class Archive:
    """The members of a zip archive, which is not unpacked. Paths are those in the archive, with slashes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.skipped = Skipped()
        self._file = SharedFile(root)
        self._size = self._file.size()
        self._archive = zipfile.ZipFile(cast("IO[bytes]", self._file))
        self._members: dict[str, zipfile.ZipInfo] = {}
        self._earlier = []
        for member in self._archive.infolist():
            # Archives of old Windows programs have backslashes, which the format does not allow as separators.
            path = member.filename.replace("\\", "/")
            if not path.endswith("/"):
                if path in self._members:  # a program that unpacks the archive would overwrite the earlier one
                    self._earlier.append(path)
                self._members[path] = member

    def files(self) -> Iterator[File]:
        """All members that are files."""
        inside: dict[str, set[str]] = {"": set()}
        for path in self._members:
            parts = PurePosixPath(path).parts
            for depth, name in enumerate(parts):
                inside.setdefault("/".join(parts[:depth]), set()).add(name)
        skipped: set[str] = set()
        for path, member in self._members.items():
            parts = PurePosixPath(path).parts
            for depth, name in enumerate(parts):
                here, folder = "/".join(parts[: depth + 1]), depth < len(parts) - 1
                kind = kind_of(name, folder=folder, within=inside["/".join(parts[:depth])], below=depth > 0)
                if not kind and folder and holds_a_run(inside[here]):
                    kind = OF_A_RUN
                if kind:
                    if here not in skipped:
                        self.skipped.add(kind, here if kind == OF_A_RUN else name)
                    skipped.add(here)
                    break
            else:
                problem = "encrypted" if member.flag_bits & 1 else too_large(member.file_size)
                yield File(path, f"{member.filename} {member.file_size} {member.CRC}", problem)
        for path in self._earlier:
            yield File(f"{path} (an earlier member)", "", "the archive has a later member of this name")

    def name(self, path: str) -> str:
        """The path within the archive, with slashes."""
        return path

    def open(self, path: str) -> IO[bytes]:
        """What Pillow opens: the member, read as a whole, so that its checksum is verified."""
        return io.BytesIO(self._archive.read(self._members[path]))

    def check(self) -> None:
        """Raise an error if the source is no longer what it was when it was opened."""
        if self._file.size() != self._size:
            raise SourceLost(f"{self.root} was {self._size} bytes long when it was opened, and was changed since")

    def __reduce__(self) -> tuple[object, ...]:
        # For workers that do not share memory: they open the archive again.
        return Archive, (self.root,)


def too_large(size: int) -> str:
    return f"{readable(size)}, at most {readable(LARGEST_FILE)} are read" if size > LARGEST_FILE else ""


def reason(error: Exception) -> str:
    """Why a file cannot be read, without its path, which the messages already contain."""
    text = getattr(error, "strerror", None) or str(error)
    return (text.splitlines() or [type(error).__name__])[0]
