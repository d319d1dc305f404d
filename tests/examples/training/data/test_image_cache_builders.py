"""Several builders of one cache, with the kernel's lock and without; builders that are killed, stalled or told to stop;
files that the system cannot read."""

from __future__ import annotations

import builtins
import errno
import os
import signal
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from subprocess import Popen
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from processes import started
from training.data import image_cache
from training.data.dataset import Pixels, SourceLost
from training.data.image_cache import open_cache
from training.data.image_folder import ImageFolder
from training.data.prefetch import LIMIT
from training.runs import kernel_lock
from training.runs.kernel_lock import KernelLock

fcntl = pytest.importorskip("fcntl", reason="fakes the kernel's lock of POSIX")

EXAMPLES = Path(__file__).parents[4] / "examples"
PATIENCE = 120  # seconds for what takes some, and for ever when it is broken
NO_LOCKS = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]


def built(source: Path, cache: Path) -> Pixels:
    """All images of a folder or archive, by way of the cache."""
    images = open_cache(ImageFolder(source, 16), cache)
    return images.pixels(range(len(images)))[0]


def decoded(source: Path) -> Pixels:
    images = ImageFolder(source, 16)
    return images.pixels(range(len(images)))[0]


def suffixes(cache: Path) -> list[str]:
    return sorted(file.suffix for file in cache.iterdir())


def failing(code: int) -> Callable[..., None]:
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return flock


# -------------------------------------------------------------------------------------------- processes of their own

# Opens the cache once it is told to, and decodes an image in some seconds, on a file system whose flock fails with an
# error, if that is not 0.
BUILDER = """
import os, sys, time
sys.path.insert(0, {examples!r})
folder, cache, pause, code = *sys.argv[1:3], float(sys.argv[3]), int(sys.argv[4])
from pathlib import Path
from training.data import prefetch
from training.data.image_cache import open_cache
from training.data.image_folder import ImageFolder
from training.runs import kernel_lock
prefetch.NOTICE = 0.4
decode = ImageFolder._decode
def slow(self, target, path):
    time.sleep(pause)
    return decode(self, target, path)
ImageFolder._decode = slow
if code:
    def flock(*_):
        raise OSError(code, os.strerror(code))
    kernel_lock.fcntl.flock = flock
print("ready", flush=True)
sys.stdin.readline()
images = open_cache(ImageFolder(Path(folder), 16), Path(cache))
print(images.pixels(range(len(images)))[0].sum(dtype=int))
"""


@contextmanager
def builder(folder: Path, cache: Path, pause: float, code: int = 0) -> Iterator[Popen[str]]:
    command = [sys.executable, "-c", BUILDER.format(examples=str(EXAMPLES)), str(folder), str(cache)]
    with started([*command, str(pause), str(code)], stdin=-1) as process:
        yield process


def go(process: Popen[str]) -> None:
    assert process.stdout
    assert process.stdin
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("go\n")
    process.stdin.flush()


def wait_for_a_part(cache: Path, process: Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not list(cache.glob("*.part")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def build_at_once(folder: Path, cache: Path, code: int = 0) -> list[str]:
    """What two processes wrote to stderr that began to build together; both have the right images."""
    with builder(folder, cache, 0.1, code) as one, builder(folder, cache, 0.1, code) as other:
        go(one)
        go(other)
        (said, errors) = zip(*(process.communicate(timeout=PATIENCE) for process in (one, other)), strict=True)
    assert one.returncode == other.returncode == 0, errors
    assert said[0] == said[1] == f"{decoded(folder).sum(dtype=int)}\n"
    return list(errors)


@pytest.mark.exhaustive  # starts two processes, which import torch; the next tests have two as well
def test_two_processes_that_start_together_build_it_once(folder: Path, tmp_path: Path) -> None:
    errors = build_at_once(folder, tmp_path / "cache")
    assert sorted("waiting for process" in text for text in errors) == [False, True]
    assert sorted("notes.txt" in text for text in errors) == [False, True]
    assert suffixes(tmp_path / "cache") == [".lock", ".npy"]


@pytest.mark.exhaustive
def test_without_locks_two_processes_that_start_together_both_have_it(folder: Path, tmp_path: Path) -> None:
    for text in build_at_once(folder, tmp_path / "cache", errno.ENOLCK):
        assert text.count("no locks (No locks available); runs that start together all decode") == 1
        assert "notes.txt" in text
        assert "waiting for process" not in text
    assert suffixes(tmp_path / "cache") == [".lock", ".npy"]


@pytest.mark.exhaustive
def test_a_damaged_header_is_replaced_once_while_another_process_waits(folder: Path, tmp_path: Path) -> None:
    built(folder, tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("*.npy")
    with open(path, "r+b") as file:
        file.write(b"\x93NUMPY\1\0\xff\xff")  # a header that claims to be 64 KiB long
    errors = build_at_once(folder, tmp_path / "cache")
    assert sorted("damaged, decoded again" in text for text in errors) == [False, True]
    assert sorted("waiting for process" in text for text in errors) == [False, True]


@pytest.mark.slow  # starts two processes, which import torch
@pytest.mark.parametrize(
    "code",
    [0, *(pytest.param(code, marks=pytest.mark.exhaustive) for code in NO_LOCKS)],
    ids=lambda code: errno.errorcode.get(code, "flock"),
)
def test_a_builder_that_is_killed_holds_up_nobody(code: int, folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with builder(folder, cache, 2.0, code) as killed, builder(folder, cache, 0.0, code) as next_one:
        go(killed)
        wait_for_a_part(cache, killed)
        if code:
            os.killpg(killed.pid, signal.SIGKILL)
            killed.wait()
        go(next_one)
        if not code:  # then it waits until the other is killed, and says for whom
            assert next_one.stderr
            assert next_one.stderr.readline().startswith(f"waiting for process {killed.pid} on ")
            assert not list(cache.glob("*.npy"))
            killed.kill()  # it alone: its worker ends by itself, and has no part in the lock
        (said, errors) = next_one.communicate(timeout=PATIENCE)
    assert killed.returncode == -signal.SIGKILL
    assert next_one.returncode == 0, errors
    assert said == f"{decoded(folder).sum(dtype=int)}\n"
    # Without locks nothing tells that nobody writes that file any more: later it is deleted, as below.
    assert suffixes(cache) == [".lock", ".npy", *([".part"] if code else [])]
    np.testing.assert_array_equal(built(folder, cache), decoded(folder))


@pytest.mark.slow  # starts a process, which imports torch
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux' /proc")
def test_a_worker_that_is_suspended_is_named_and_sigterm_ends_the_build(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with builder(folder, cache, 0.5) as process:
        go(process)
        wait_for_a_part(cache, process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + PATIENCE
        while not (workers := children.read_text().split()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (worker,) = workers
        os.kill(int(worker), signal.SIGSTOP)
        assert process.stderr
        late = (line for line in process.stderr if "waiting for images" in line)
        assert f"waiting for images since 0 s; worker {worker} is stopped" in next(late)
        process.terminate()
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM
    assert not Path(f"/proc/{worker}").exists()
    assert suffixes(cache) == [".lock"]


# ------------------------------------------------------------------------------------------------------ in this one


def without_locks(monkeypatch: pytest.MonkeyPatch, code: int | None) -> None:
    """A file system whose flock fails with this error; Windows, which has no flock, if it is None."""
    if code is None:
        monkeypatch.setattr(kernel_lock, "fcntl", None)
    else:
        monkeypatch.setattr(fcntl, "flock", failing(code))


@pytest.mark.parametrize("code", [*NO_LOCKS, None], ids=lambda code: errno.errorcode.get(code, "Windows"))
def test_without_locks_it_is_built_and_one_line_says_so(
    code: int | None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, why = tmp_path / "cache", "Windows has no flock" if code is None else os.strerror(code)
    without_locks(monkeypatch, code)
    np.testing.assert_array_equal(built(folder, cache), decoded(folder))
    (path,) = cache.glob("*.lock")
    line = f"{path}: this file system has no locks ({why}); runs that start together all decode {folder}\n"
    assert capsys.readouterr().err.count(line) == 1
    assert suffixes(cache) == [".lock", ".npy"]
    built(folder, cache)
    assert capsys.readouterr().err == ""  # it is there, and needs no lock


def test_without_locks_what_another_may_be_writing_stays(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    built(folder, cache)
    without_locks(monkeypatch, errno.ENOSYS)
    (before,) = cache.glob("*.npy")
    part = before.with_suffix(".part")
    part.touch()
    (folder / "05.jpg").unlink()
    built(folder, cache)
    assert part.exists()
    assert before.exists()
    for file in (part, before):
        os.utime(file, (time.time() - LIMIT - 60,) * 2)
    (folder / "04.jpg").unlink()
    built(folder, cache)
    assert not part.exists()
    assert not before.exists()


def test_where_locks_hold_on_one_machine_alone_the_others_files_stay(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with localflock: the kernel gives the lock to this process while another machine builds."""
    cache, parts = tmp_path / "cache", set[Path]()

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    for machine in ("another", "this"):
        with monkeypatch.context() as patch:
            patch.setattr(image_cache, "machine", lambda machine=machine: machine)
            patch.setattr(os, "fsync", interrupted)
            patch.setattr(Path, "unlink", lambda *_, **__: None)  # as if it was killed
            with pytest.raises(KeyboardInterrupt):
                built(folder, cache)
        (of_this,) = set(cache.glob("*.part")) - parts
        parts.add(of_this)
    monkeypatch.setattr(image_cache, "machine", lambda: "this")
    built(folder, cache)
    assert set(cache.glob("*.part")) == parts - {of_this}


def test_who_is_waited_for_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built(folder, tmp_path / "cache")
    for path in (tmp_path / "cache").glob("*.npy"):
        path.unlink()
    (path,) = (tmp_path / "cache").glob("*.lock")
    assert path.read_text() == ""  # whoever built it has signed off
    with closing(KernelLock(path)) as lock:
        assert lock.attempt()
        lock.write("process 7 on node")
        monkeypatch.setattr(kernel_lock, "time", SimpleNamespace(sleep=lambda _: lock.clear() or unlock(lock)))
        built(folder, tmp_path / "cache")
    assert f"waiting for process 7 on node, which decodes {folder}\n" in capsys.readouterr().err


def unlock(lock: KernelLock) -> None:
    fcntl.flock(lock.descriptor, fcntl.LOCK_UN)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("late", [False, True])
def test_a_signal_is_answered_though_images_come_fast(
    late: bool, number: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first images are written, and after the last: then the cache is complete, but the run ends."""
    fsync = os.fsync

    def crc32(data: bytes, value: int = 0) -> int:
        if not value:  # of the header
            signal.raise_signal(number)
        return zlib.crc32(data, value)

    def late_signal(descriptor: int) -> None:
        fsync(descriptor)
        signal.raise_signal(number)

    if late:
        monkeypatch.setattr(os, "fsync", late_signal)
    else:
        monkeypatch.setattr(image_cache, "zlib", SimpleNamespace(crc32=crc32))
    with pytest.raises(SystemExit) as stop:
        built(folder, tmp_path / "cache")
    assert stop.value.code == 128 + number
    assert suffixes(tmp_path / "cache") == [".lock", *([".npy"] if late else [])]


# -------------------------------------------------------------------------------- files that the system cannot read


def no_reads_of(name: str, error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk or server that cannot read one file, in this process and those that it forks."""
    opened = builtins.open

    class Unreadable:
        def __init__(self, file: Any) -> None:
            self.file = file

        def read(self, *_: object) -> bytes:
            self.file.close()
            raise error

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    def open_unless(path: Any, *arguments: Any, **more: Any) -> Any:
        file = opened(path, *arguments, **more)
        return Unreadable(file) if str(path).endswith(name) else file

    monkeypatch.setattr(builtins, "open", open_unless)


@pytest.mark.parametrize(
    "code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOENT, errno.EACCES], ids=errno.errorcode.get
)
def test_what_the_system_cannot_read_today_is_not_left_out_of_a_cache_for_ever(
    code: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = decoded(folder)
    with monkeypatch.context() as patch:
        no_reads_of("05.jpg", OSError(code, os.strerror(code)), patch)
        said = rf"photographs cannot be decoded: {folder}/05\.jpg: {os.strerror(code)} \(--no-cache goes on without"
        with pytest.raises(OSError, match=said):
            built(folder, tmp_path / "cache")
    assert suffixes(tmp_path / "cache") == [".lock"]
    np.testing.assert_array_equal(built(folder, tmp_path / "cache"), expected)


def test_the_same_in_an_archive(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "photographs.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.glob("*.jpg")):
            file.write(path, path.name)
        start = file.getinfo("05.jpg").header_offset
    pread = os.pread

    def bad_sector(descriptor: int, count: int, position: int) -> bytes:
        if position <= start < position + count:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(descriptor, count, position)

    images = ImageFolder(archive, 16)
    monkeypatch.setattr(os, "pread", bad_sector)
    with pytest.raises(OSError, match=r"photographs\.zip cannot be decoded: 05\.jpg: Input/output error"):
        open_cache(images, tmp_path / "cache")
    assert suffixes(tmp_path / "cache") == [".lock"]


def test_an_invalid_argument_is_damage(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pillow seeks to a position that a damaged file names, before its beginning."""
    no_reads_of("05.jpg", OSError(errno.EINVAL, os.strerror(errno.EINVAL)), monkeypatch)
    images = open_cache(ImageFolder(folder, 16), tmp_path / "cache")
    assert images.missing == 4  # with the damaged ones
    assert f"{os.strerror(errno.EINVAL)}, left out: {folder}/05.jpg\n" in capsys.readouterr().err


def test_without_a_cache_such_an_image_is_replaced_and_the_line_says_what_the_system_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ImageFolder(folder, 16)
    no_reads_of("05.jpg", OSError(errno.EIO, os.strerror(errno.EIO)), monkeypatch)
    pixels, problems = images.pixels([5])
    assert problems[f"{folder}/05.jpg"] == "Input/output error"
    assert any((pixels[0] == other).all() for other in images.pixels([0, 1, 2, 3, 4, 6, 9, 10])[0])


@contextmanager
def little_memory() -> Iterator[None]:
    """128 MiB more than this process has; those that it forks inherit the limit."""
    resource = pytest.importorskip("resource")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + 2**27, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the size of the process from /proc")
def test_lack_of_memory_is_no_damage(folder: Path, tmp_path: Path) -> None:
    """The large image is a good one, of 77 MiB as it is stored and four times as much in color."""
    Image.new("1", (9000, 9000)).save(folder / "05.png")
    images = ImageFolder(folder, 16)
    said = rf"{folder}/05\.png: no memory to decode it"
    with little_memory():
        with pytest.raises(SourceLost, match=rf"^{folder} cannot be decoded: {said}"):
            open_cache(images, tmp_path / "cache")
        with pytest.raises(SourceLost, match=f"^{said}"):
            images.pixels([images.paths.index(f"{folder}/05.png")])
    assert suffixes(tmp_path / "cache") == [".lock"]
    assert not images.unreadable
    (folder / "05.png").unlink()
    np.testing.assert_array_equal(built(folder, tmp_path / "cache"), decoded(folder))
