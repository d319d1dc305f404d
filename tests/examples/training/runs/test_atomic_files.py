"""A file is written completely or not at all, also by file systems that refuse what POSIX promises."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
import torch

from refused_calls import refuse_fsync, refusing
from training.runs import atomic_files
from training.runs.atomic_files import write, write_json, write_text

resource = pytest.importorskip("resource", reason="limits the size of files, which only POSIX can")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As good as a full disk: the kernel refuses what is larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def is_folder(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


def test_the_file_is_on_the_disk_before_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append("folder" if is_folder(descriptor) else "file"))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    write(tmp_path / "a", lambda file: file.write(b"1"))
    assert calls == ["file", "replace", "folder"]  # the contents, the name, the folder that holds the name


def test_text_json_and_tensors(tmp_path: Path) -> None:
    write_text(tmp_path / "text", "é \udcff\n")  # the second from the name of a file that is not UTF-8
    assert (tmp_path / "text").read_bytes() == "é \\udcff\n".encode()
    content = {"name": "é\udcff", "steps": [1, 2]}
    write_json(tmp_path / "json", content)
    assert json.loads((tmp_path / "json").read_bytes()) == content
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "json", {"loss": float("inf")})
    assert json.loads((tmp_path / "json").read_bytes()) == content
    write(tmp_path / "tensors", lambda file: torch.save({"a": torch.ones(3)}, file))
    assert torch.equal(torch.load(tmp_path / "tensors", weights_only=True)["a"], torch.ones(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["json", "tensors", "text"]


def test_a_link_stays_one_and_its_file_is_replaced(tmp_path: Path) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    (tmp_path / "there" / "old").write_text("old")
    for name in ("old", "missing"):
        link = tmp_path / "here" / name
        link.symlink_to(f"../there/{name}")
        write_text(link, "new")
        assert link.is_symlink()
        assert (tmp_path / "there" / name).read_text() == "new"
    assert len(list((tmp_path / "here").iterdir())) == len(list((tmp_path / "there").iterdir())) == 2


def test_a_link_in_the_way_of_the_new_file_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "a.new").symlink_to("mine")
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "a").is_symlink()


def test_what_is_no_file_is_refused_by_its_kind(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
    found = {
        tmp_path / "folder": "a folder",
        tmp_path / "fifo": r"a FIFO \(named pipe\)",
        tmp_path / "link": r"a FIFO \(named pipe\)",
        tmp_path / "socket": "a socket",
        Path("/dev/null"): "a character device",
    }
    before = sorted(tmp_path.iterdir())
    for path, kind in found.items():
        with pytest.raises(SystemExit, match=rf"^cannot save {path}: expected a file or nothing there, found {kind}$"):
            write(path, lambda file: pytest.fail("asked for its contents"))
    assert sorted(tmp_path.iterdir()) == before
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_full_disk_leaves_the_old_file_and_one_line(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    for fill in (
        lambda file: file.write(bytes(10**6)),
        lambda file: torch.save({"weights": torch.zeros(10**6)}, file),  # a RuntimeError of PyTorch's writer
    ):
        with files_of_at_most(10_000), pytest.raises(SystemExit, match=r"^cannot save .*a: .*File too large") as error:
            write(tmp_path / "a", fill)
        assert "\n" not in str(error.value)
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        assert (tmp_path / "a").read_text() == "old"


def test_other_errors_of_what_fills_it_pass(tmp_path: Path) -> None:
    def fill(file: IO[bytes]) -> None:
        file.write(b"half")
        raise KeyError("a fault of the script")

    with pytest.raises(KeyError):
        write(tmp_path / "a", fill)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF], ids=errno.errorcode.get)
@pytest.mark.parametrize("what", ["folders", "files"])
def test_where_fsync_is_refused_one_line_says_so(
    what: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    atomic_files._say_once.cache_clear()
    when = is_folder if what == "folders" else lambda descriptor: not is_folder(descriptor)
    monkeypatch.setattr(os, "fsync", refusing(os.fsync, code, when))
    for text in ("one", "two"):
        write_text(tmp_path / "a", text)
        assert (tmp_path / "a").read_text() == text
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"the file system of {tmp_path} cannot force {what} onto the disk ({os.strerror(code)})")


def test_a_folder_that_cannot_be_opened_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One with the permissions -wx; root, who may run this test, may do everything."""
    monkeypatch.setattr(os, "open", refusing(os.open, errno.EACCES, lambda path, *_: path == tmp_path))
    write_text(tmp_path / "a", "text")
    assert (tmp_path / "a").read_text() == "text"


@pytest.mark.parametrize("when", [is_folder, lambda descriptor: not is_folder(descriptor)], ids=["folder", "file"])
def test_an_error_of_the_disk_is_none_of_the_file_system(
    when: Callable[[int], bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", refusing(os.fsync, errno.EIO, when))
    with pytest.raises(SystemExit, match=r"cannot save .*a: .*Input/output error"):
        write_text(tmp_path / "a", "text")
    assert not (tmp_path / "a.new").exists()


def test_no_descriptor_is_left_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_fsync(monkeypatch, errno.EINVAL)
    before = os.dup(0)
    os.close(before)
    write_text(tmp_path / "a", "text")
    after = os.dup(0)
    os.close(after)
    assert after == before  # the lowest that is free


def test_a_file_that_another_program_has_open_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On shares of Windows a file cannot be replaced while a viewer shows it."""
    attempts = []
    busy = refusing(os.replace, errno.EACCES, lambda *_: len(attempts) < 3 and not attempts.append(1))
    monkeypatch.setattr(os, "replace", busy)
    write_text(tmp_path / "a", "text")
    assert len(attempts) == 3
    assert (tmp_path / "a").read_text() == "text"
    monkeypatch.setattr(atomic_files, "PATIENCE", 0.2)
    monkeypatch.setattr(os, "replace", refusing(os.replace, errno.EBUSY, lambda *_: True))
    with pytest.raises(SystemExit, match=r"cannot save .*a: .*a program that has it open may have to close it first$"):
        write_text(tmp_path / "a", "other")
    assert (tmp_path / "a").read_text() == "text"
