"""Downloads from servers that break, stall, redirect, refuse, or have another file: the right file is there at the end,
or one line says why not, and nothing else has its name."""

from __future__ import annotations

import errno
import hashlib
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import file_server
from file_server import Answer, FileServer, broken, redirected, refused, slow
from refused_calls import refuse_fsync
from training.data import download as module
from training.data.download import RemoteFile, Unavailable, download

CONTENT, OTHER = (np.random.default_rng(seed).bytes(300_000) for seed in (0, 1))
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little, so that the tests are fast; and no proxy between this machine and itself."""
    monkeypatch.setattr(module, "TIMEOUT", 1.5)
    monkeypatch.setattr(module, "PAUSE", 0.01)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server() -> Iterator[FileServer]:
    started = FileServer({"file.gz": CONTENT})
    yield started
    started.close()


def fetch(server: FileServer, folder: Path, name: str = "file.gz") -> None:
    remote = RemoteFile(server.address + name, len(CONTENT), DIGEST)
    download(remote, folder / "file.gz", folder / "file.gz.part")


def left(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def ranges(server: FileServer) -> list[str | None]:
    return [asked for _, asked in server.requests]


# ------------------------------------------------------------------------------------------------------ it arrives


@pytest.mark.parametrize(
    ("answers", "asked"),
    [
        ([], [None]),
        ([file_server.without_length], [None]),
        ([slow(8, 0.3)], [None]),  # longer in all than the longest silence
        ([broken(100_000)], [None, "bytes=100000-"]),
        ([broken(100_000), broken(1)], [None, "bytes=100000-", "bytes=100001-"]),
        ([file_server.broken_chunks(100_000)], [None, "bytes=100000-"]),
        ([broken(100_000), file_server.ignoring_range], [None, "bytes=100000-"]),
        ([broken(100_000), file_server.without_length], [None, "bytes=100000-"]),
        ([broken(100_000), redirected("/file.gz")], [None, "bytes=100000-", "bytes=100000-"]),
    ],
)
def test_the_file_arrives(answers: list[Answer], asked: list[str | None], server: FileServer, tmp_path: Path) -> None:
    server.answers = answers
    fetch(server, tmp_path)
    assert left(tmp_path) == {"file.gz": CONTENT}
    assert ranges(server) == asked


def test_a_server_that_stops_is_asked_for_the_rest(server: FileServer, tmp_path: Path) -> None:
    server.answers = [server.stalled(100_000)]
    fetch(server, tmp_path)
    assert left(tmp_path) == {"file.gz": CONTENT}
    assert ranges(server) == [None, "bytes=100000-"]


def test_what_a_server_sends_beyond_the_file_is_left_out(server: FileServer, tmp_path: Path) -> None:
    """Where it states no length, the end of the file is known by its size alone."""
    server.files["file.gz"], server.answers = CONTENT + b"more", [file_server.without_length]
    fetch(server, tmp_path)
    assert left(tmp_path) == {"file.gz": CONTENT}
    assert ranges(server) == [None]


def test_a_server_that_breaks_is_left_alone_for_a_moment(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=slept.append))
    server.answers = [broken(100_000), broken(1)]
    fetch(server, tmp_path)
    assert slept == [module.PAUSE] * 2


def test_progress_is_of_what_lies_on_the_disk(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From what is there already; from the beginning where the server knows no Range."""
    shown: list[tuple[float, float]] = []

    class Bar(module.tqdm):  # type: ignore[type-arg]
        def close(self) -> None:
            shown.append((self.initial, self.n))
            super().close()

    monkeypatch.setattr(module, "tqdm", Bar)
    (tmp_path / "file.gz.part").write_bytes(CONTENT[:1000])
    server.answers = [broken(100_000), file_server.ignoring_range]
    fetch(server, tmp_path)
    assert shown[0] == (1000, len(CONTENT))


@pytest.mark.parametrize(
    ("part", "asked"),
    [
        (CONTENT[:100_000], ["bytes=100000-"]),
        (CONTENT, []),  # only the name is missing
        (CONTENT + b"more", [None]),
        (OTHER[:100_000], ["bytes=100000-", None]),  # of a file that was there before
        (OTHER, [None]),
    ],
)
def test_what_an_interrupted_run_left_is_used_if_it_fits(
    part: bytes, asked: list[str | None], server: FileServer, tmp_path: Path
) -> None:
    (tmp_path / "file.gz.part").write_bytes(part)
    fetch(server, tmp_path)
    assert left(tmp_path) == {"file.gz": CONTENT}
    assert ranges(server) == asked


# -------------------------------------------------------------------------------------------------- it does not arrive


@pytest.mark.parametrize(
    ("answers", "message", "kept"),
    [
        ([refused(404)], "HTTP 404 Not Found", 0),
        ([refused(403)], "HTTP 403 Forbidden", 0),
        ([broken(100_000), refused(503)], "HTTP 503 Service Unavailable", 100_000),
        ([broken(0)], "the server ended the connection", 0),
        ([broken(100_000), broken(0)], "the server ended the connection", 100_000),
        (
            [broken(100_000), file_server.from_elsewhere],
            "asked for bytes 100000-, got bytes 299999-299999/300000",
            100_000,
        ),
        ([redirected("/file.gz")] * 20, "HTTP 302 The HTTP server returned a redirect error", 0),
        (
            [redirected("file:///etc/passwd")],
            "HTTP 302 Found - Redirection to url 'file:///etc/passwd' is not allowed",
            0,
        ),
    ],
)
def test_the_reason_is_one_line(
    answers: list[Answer], message: str, kept: int, server: FileServer, tmp_path: Path
) -> None:
    server.answers = answers
    with pytest.raises(Unavailable) as error:
        fetch(server, tmp_path)
    assert str(error.value).startswith(f"{server.address}file.gz: {message}")
    assert "\n" not in str(error.value)
    assert left(tmp_path) == ({"file.gz.part": CONTENT[:kept]} if kept else {})


def test_a_server_that_never_answers(server: FileServer, tmp_path: Path) -> None:
    server.answers = [server.stalled(0)]
    with pytest.raises(Unavailable, match=r"file\.gz: no answer for 1\.5 s$"):
        fetch(server, tmp_path)
    assert left(tmp_path) == {}


def test_nobody_listens(server: FileServer, tmp_path: Path) -> None:
    server.close()
    (tmp_path / "file.gz.part").write_bytes(CONTENT[:9])
    with pytest.raises(Unavailable, match=r"file\.gz: Connection refused$"):
        fetch(server, tmp_path)
    assert left(tmp_path) == {"file.gz.part": CONTENT[:9]}


def test_a_name_that_nobody_knows(tmp_path: Path) -> None:
    remote = RemoteFile("http://nowhere.invalid/file.gz", len(CONTENT), DIGEST)  # RFC 2606: no such name exists
    with pytest.raises(Unavailable, match=r"^http://nowhere\.invalid/file\.gz: .*[Nn]ame"):
        download(remote, tmp_path / "file.gz", tmp_path / "file.gz.part")


@pytest.mark.parametrize("answer", [file_server.whole, file_server.without_length])
def test_another_file_of_the_same_size(answer: Answer, server: FileServer, tmp_path: Path) -> None:
    server.files["file.gz"], server.answers = OTHER, [answer]
    found = hashlib.sha256(OTHER).hexdigest()
    with pytest.raises(Unavailable, match=f"is another file: its SHA-256 is {found}, expected {DIGEST}"):
        fetch(server, tmp_path)
    assert left(tmp_path) == {}
    assert ranges(server) == [None]


def test_the_server_changes_the_file_in_the_middle(server: FileServer, tmp_path: Path) -> None:
    def other(handler: object, content: bytes) -> None:
        file_server.whole(handler, OTHER)

    server.answers = [broken(100_000), other]
    fetch(server, tmp_path)
    assert left(tmp_path) == {"file.gz": CONTENT}
    assert ranges(server) == [None, "bytes=100000-", None]


@pytest.mark.parametrize("begun", [0, 5])
def test_a_page_in_place_of_the_file(begun: int, server: FileServer, tmp_path: Path) -> None:
    """As where a network wants a login first."""
    server.files["file.gz"] = b"<html>Welcome to the Grand Hotel</html>"
    (tmp_path / "file.gz.part").write_bytes(CONTENT[:begun])
    with pytest.raises(Unavailable, match=f"is another file: {39} bytes of text/plain, expected 300000"):
        fetch(server, tmp_path)
    assert left(tmp_path) == ({"file.gz.part": CONTENT[:begun]} if begun else {})


def test_a_shorter_file_than_what_is_there(server: FileServer, tmp_path: Path) -> None:
    server.files["file.gz"] = CONTENT[:1000]
    (tmp_path / "file.gz.part").write_bytes(CONTENT[:2000])
    with pytest.raises(Unavailable, match="HTTP 416"):
        fetch(server, tmp_path)


# ------------------------------------------------------------------------------------------------ it cannot be written


@pytest.fixture
def small_files() -> Iterator[None]:
    """The kernel refuses files of more than 200 kB, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
def test_a_disk_that_is_full_in_the_middle(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"^cannot write .*file\.gz \(293 KiB\): File too large$"):
        fetch(server, tmp_path)
    assert left(tmp_path) == {}


def test_a_disk_that_is_full_before(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    (tmp_path / "file.gz.part").write_bytes(CONTENT[:150_000])
    with pytest.raises(OSError, match=r"cannot write .*: 48\.83 KiB more than are free$"):
        fetch(server, tmp_path)
    assert server.requests == []


def test_a_folder_in_place_of_the_file(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "file.gz" / "in-it").mkdir(parents=True)
    with pytest.raises(OSError, match=r"^cannot write .*file\.gz \(293 KiB\): Is a directory$"):
        fetch(server, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file.gz"]


def test_a_file_system_without_fsync(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse_fsync(monkeypatch, errno.EINVAL)
    fetch(server, tmp_path)
    assert left(tmp_path) == {"file.gz": CONTENT}
    assert f"the file system of {tmp_path} cannot force files onto the disk" in capsys.readouterr().err


def test_a_disk_that_loses_what_was_written(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_fsync(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match=r"^cannot write .*file\.gz \(293 KiB\): Input/output error$"):
        fetch(server, tmp_path)
    assert left(tmp_path) == {}
