"""Files that are written completely or not at all: text, JSON, and whatever else fills an open file.

    write_text(Path("report.md"), text)
    write_json(Path("config.json"), {"steps": 10})
    write(Path("weights.pt"), lambda file: torch.save(weights, file))

A new file beside the old one is filled, forced onto the disk, renamed to the old one's name, and the folder is forced
onto the disk too, since it holds the name. A symbolic link stays one: the file that it points to is replaced. Whatever
goes wrong ends the script with one line, and the old file is as it was.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

PATIENCE = 2.0  # seconds for another program to close a file that it keeps from being replaced

# What is no file and no link to one, by the first thing that is true of it.
OTHERS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO (named pipe)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


def write(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Write the file that `fill` makes."""
    new: Path | None = None
    try:
        target = _file_to_replace(path)
        new = target.with_name(target.name + ".new")
        if not new.is_dir():
            new.unlink(missing_ok=True)  # of a run that was killed; or a link, which would lead elsewhere
        with open(new, "xb") as file:
            fill(file)
            file.flush()
            force_to_disk(file.fileno(), target.parent)
        _replace(new, target)
        if os.name == "posix":  # on other systems folders cannot be opened
            _sync_folder(target.parent)
    except BaseException as error:
        if new:
            with suppress(OSError):
                new.unlink(missing_ok=True)
        cause = error
        if isinstance(error, RuntimeError):  # in which torch wraps what the disk said
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
        elif not isinstance(error, OSError):
            raise
        raise SystemExit(f"cannot save {path}: {str(cause).splitlines()[0]}") from None


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8. What cannot be encoded, as in the name of a file, is escaped."""
    write(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def write_json(path: Path, content: Any) -> None:
    """Write plain values as JSON, which has no infinite numbers."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def force_to_disk(descriptor: int, folder: Path, what: str = "files") -> None:
    """Force what is open onto the disk. Where the file system of `folder` cannot, as older CIFS and FUSE, a line says
    so once.

    Raises:
        OSError: if the disk refuses, so that something is lost.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
        _say_once(f"the file system of {folder} cannot force {what} onto the disk ({error.strerror}): after a power "
                  "failure the newest may be missing")  # fmt: skip


def _file_to_replace(path: Path) -> Path:
    """The file that the path or link names, which may not be there yet."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return Path(os.path.realpath(path))
    for is_kind, kind in OTHERS:
        if is_kind(mode):
            raise OSError(f"expected a file or nothing there, found {kind}")
    return Path(os.path.realpath(path))


def _replace(new: Path, target: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return os.replace(new, target)
        except OSError as error:
            # On network shares and on Windows, a file that another program has open.
            if error.errno not in (errno.EACCES, errno.EBUSY, errno.EPERM):
                raise
            if time.monotonic() > deadline:
                raise OSError(f"{error}; a program that has it open may have to close it first") from None
        time.sleep(0.1)


def _sync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # it may be written but not listed
        return
    try:
        force_to_disk(descriptor, folder, "folders")
    finally:
        os.close(descriptor)


@cache
def _say_once(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
