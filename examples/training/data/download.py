"""Download a file of known size and SHA-256: resumed where it was interrupted, verified before it gets its name.

What arrives is appended to a `.part` file, which stays after an interruption: the next attempt asks the server for the
rest alone (HTTP Range). A connection that breaks is taken up again as long as each one brings something. The
checksum is of the file as it is on the disk, so it does not matter how many servers, connections and runs it came from.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import sys
import time
from contextlib import suppress
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm import tqdm

from training.runs.atomic_files import force_to_disk
from training.runs.memory import readable

TIMEOUT = 30.0  # seconds without a byte, after which a server has stopped
PAUSE = 1.0  # seconds before a broken connection is taken up again
CHUNK = 2**18  # bytes that are read at a time
AGENT = "torch-sagan (+https://github.com/torch-sagan/torch-sagan)"  # some servers refuse Python's own


class RemoteFile(NamedTuple):
    """A file on a server, and how to know that it is the right one."""

    address: str
    size: int  # bytes
    sha256: str


class Unavailable(Exception):
    """A server does not give the file: none answers, or it refuses, or it has another one. The message is one line."""


class _Broken(Exception):
    """A connection ended before the file did."""


def download(file: RemoteFile, path: Path, part: Path) -> None:
    """Download a file to `path`, through the file `part` in the same folder, which may hold its beginning.

    Raises:
        Unavailable: if the server does not give this file. What arrived stays in `part`, unless it is wrong.
        OSError: if it cannot be written. Then `part` is removed.
    """
    try:
        at_once = _complete(file, part)
        if not at_once and sha256(part) != file.sha256:
            print(f"{part}: its pieces are of different files, downloaded anew", file=sys.stderr, flush=True)
            part.unlink()
            _complete(file, part)
        if (found := sha256(part)) != file.sha256:
            part.unlink()
            raise Unavailable(f"{file.address} is another file: its SHA-256 is {found}, expected {file.sha256}")
        with open(part, "rb") as whole:
            force_to_disk(whole.fileno(), part.parent)
        os.replace(part, path)
    except Unavailable:
        if not _size(part):
            part.unlink(missing_ok=True)
        raise
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({readable(file.size)}): {error.strerror or error}") from None


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _complete(file: RemoteFile, part: Path) -> bool:
    """Append to `part` what it lacks. Returns whether all of it came by one connection."""
    if _size(part) > file.size:  # it is of another file
        part.unlink()
    need, free = file.size - _size(part), shutil.disk_usage(part.parent).free
    if need > free:
        raise OSError(errno.ENOSPC, f"{readable(need - free)} more than are free")
    at_once = not _size(part)
    interval = 0.1 if sys.stderr.isatty() else 10
    with tqdm(
        total=file.size,
        initial=_size(part),
        desc=file.address.rsplit("/", 1)[-1],
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        dynamic_ncols=True,
        mininterval=interval,
        delay=1,  # none for what takes less, or never begins
    ) as bar:
        while (have := _size(part)) < file.size:
            try:
                _receive(file, part, have, bar)
                reason = "the server ended the connection"
            except _Broken as broken:
                reason = str(broken)
            if _size(part) <= have:
                raise Unavailable(f"{file.address}: {reason}")
            if _size(part) < file.size:
                at_once = False
                time.sleep(PAUSE)
    return at_once


def _receive(file: RemoteFile, part: Path, have: int, bar: tqdm) -> None:
    """Append what one connection brings to the first `have` bytes in `part`."""
    request = Request(file.address, headers={"User-Agent": AGENT} | ({"Range": f"bytes={have}-"} if have else {}))
    try:
        answer = urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        with error:  # it is an answer, too
            reason = " ".join(str(error.reason).split())  # of a circle of redirections in several lines
            raise Unavailable(f"{file.address}: HTTP {error.code} {reason}") from None
    except (OSError, HTTPException) as error:
        raise _Broken(_why(error)) from None
    with answer:
        have = bar.n = _offered(file, answer, have)
        with open(part, "ab") as target:
            target.truncate(have)  # to nothing if the server knows no Range
            while have < file.size:
                try:
                    chunk = answer.read1(min(CHUNK, file.size - have))
                except (OSError, HTTPException) as error:
                    raise _Broken(_why(error)) from None
                if not chunk:
                    return
                target.write(chunk)
                target.flush()  # after a kill, the next run goes on from here
                have += len(chunk)
                bar.update(len(chunk))


def _offered(file: RemoteFile, answer: HTTPResponse, have: int) -> int:
    """The byte at which an answer begins, if it is of a file of the right size or does not say of which."""
    start, total = 0, answer.headers.get("Content-Length", "")
    if answer.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        if not found or int(found[1]) > have:
            raise Unavailable(f"{file.address}: asked for bytes {have}-, got {answer.headers.get('Content-Range')}")
        start, total = int(found[1]), found[2]
    if total.isdecimal() and int(total) != file.size:
        kind = answer.headers.get_content_type()
        raise Unavailable(f"{file.address} is another file: {total} bytes of {kind}, expected {file.size}")
    return start


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _why(error: Exception) -> str:
    """What ended a connection, in a few words."""
    cause = getattr(error, "reason", error)  # urllib puts the cause into an error of its own
    if isinstance(cause, TimeoutError):
        return f"no answer for {TIMEOUT:g} s"
    return str(getattr(cause, "strerror", None) or cause or type(cause).__name__)
