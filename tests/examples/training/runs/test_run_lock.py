"""One run at a time in a folder: the second one names the first, on file systems with the kernel's lock and without."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from processes import started
from tiny_runs import checkpoint, lines, train
from training.runs import checkpointing, run_lock
from training.runs.run_lock import RunLock

pytestmark = pytest.mark.usefixtures("small_figures")

fcntl = pytest.importorskip("fcntl", reason="fakes the kernel's lock of POSIX")

# Holds a folder until its input ends, on a file system whose flock fails with a given error, if it is not 0. It imports
# no torch, so it is there at once.
HOLDER = """
import os, sys
sys.path.insert(0, {examples!r})
from pathlib import Path
from training.runs import kernel_lock, run_lock
run_lock.TIMEOUT, run_lock.BEAT, run_lock.SILENCE, run_lock.SETTLE = 0.5, 0.1, 1, 0.2
if code := int(sys.argv[2]):
    def flock(*_):
        raise OSError(code, os.strerror(code))
    kernel_lock.fcntl.flock = flock
lock = run_lock.RunLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def holder(out: Path, code: int = 0) -> AbstractContextManager[subprocess.Popen[str]]:
    examples = str(Path(run_lock.__file__).parents[2])
    return started([sys.executable, "-c", HOLDER.format(examples=examples), str(out), str(code)], stdin=-1)


@contextmanager
def another_process_in(out: Path, code: int = 0) -> Iterator[subprocess.Popen[str]]:
    with holder(out, code) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything ten to sixty times as fast."""
    for name, seconds in (("TIMEOUT", 0.5), ("BEAT", 0.1), ("SILENCE", 1), ("SETTLE", 0.2)):
        monkeypatch.setattr(run_lock, name, seconds)


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOSYS))


def failing(code: int) -> Callable[..., None]:
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return flock


@pytest.fixture(scope="module")
def run_of_two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    train(out, "--steps", "2")
    return out


def test_a_second_run_is_told_who_is_there_and_touches_nothing(
    run_of_two_steps: Path, tmp_path: Path, soon: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run_of_two_steps
    before = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != "run.lock"}
    with another_process_in(out) as process:
        for arguments in (["--steps", "3"], ["--resume", "auto", "--steps", "3"]):
            with pytest.raises(SystemExit, match=rf"--out .*: process {process.pid} on .*, since 20.* trains there$"):
                train(out, *arguments)
        assert f"waiting 0.5 s for process {process.pid} on " in capsys.readouterr().err
        assert {path: path.stat().st_mtime_ns for path in before} == before
        assert checkpointing.load(out)["step"] == 2  # reading needs no lock
        assert train(out, "--dry-run") == 0  # it has a folder of its own
    assert train(out, "--resume", "auto", "--steps", "3") == 0  # the kernel took the lock from the dead
    assert [line["step"] for line in lines(out)] == [2, 3]


def test_a_process_that_is_about_to_end_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with another_process_in(tmp_path) as process, closing(RunLock(tmp_path)) as lock:

        def say_and_end(*_: object, **__: object) -> None:
            process.kill()

        monkeypatch.setattr("builtins.print", say_and_end)
        lock.acquire()
        monkeypatch.undo()
        assert process.poll() is not None


def test_a_run_that_cannot_begin_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (["--image-size", "50"], ["--resume", "nowhere.pt"], ["--resume", str(tmp_path)]):
        with pytest.raises(SystemExit, match=r"image_size|no such file|no checkpoint"):
            train(tmp_path / "run", *arguments)
    assert not list(tmp_path.iterdir())


def test_a_lock_that_was_released_is_free_at_once(tmp_path: Path) -> None:
    for _ in range(2):
        with closing(RunLock(tmp_path)) as lock:
            lock.acquire()
            lock.acquire()  # it has it
            assert (tmp_path / "run.lock").read_text().startswith(f"process {os.getpid()} on ")
        assert (tmp_path / "run.lock").read_text() == ""


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused fsync is none, a full disk is."""
    for call, code in (("fsync", errno.EINVAL), ("write", errno.ENOSPC)):
        monkeypatch.setattr(os, call, failing(code))
        with closing(RunLock(tmp_path)) as lock:
            if call == "fsync":
                lock.acquire()
            else:
                with pytest.raises(SystemExit, match=rf"--out .*: cannot write .*run\.lock: {os.strerror(code)}$"):
                    lock.acquire()


def test_the_sign_of_life_goes_nowhere_after_the_end(tmp_path: Path, soon: None) -> None:
    """The number of a closed lock is that of the next file: nothing may be written into it."""
    for i in range(20):
        with closing(RunLock(tmp_path)) as lock:
            lock.acquire()
            time.sleep(0.1 * i / 20)
        with open(tmp_path / "next", "w+") as file:
            time.sleep(0.01)
            assert file.read() == ""


def test_a_worker_that_outlives_its_run_holds_nothing(tmp_path: Path) -> None:
    with closing(RunLock(tmp_path)) as lock:
        lock.acquire()
        here, there = os.pipe()
        if not (child := os.fork()):
            os.read(here, 1)
            os._exit(0)
    try:
        with closing(RunLock(tmp_path)) as lock:
            lock.acquire()
    finally:
        os.write(there, b".")
        os.waitpid(child, 0)
        for end in (here, there):
            os.close(end)


# ---------------------------------------------------------------------------------------- without the kernel's lock


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_without_the_kernels_lock_a_second_run_is_refused_too(
    code: int, run_of_two_steps: Path, soon: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run_of_two_steps
    monkeypatch.setattr(fcntl, "flock", failing(code))
    before = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != "run.lock"}
    with another_process_in(out, code) as process:
        with pytest.raises(SystemExit, match=rf"--out .*: process {process.pid} on .*, since 20.* trains there$"):
            train(out, "--steps", "3")
        assert f"waiting 1 s for a sign of life of process {process.pid} on " in capsys.readouterr().err
        assert {path: path.stat().st_mtime_ns for path in before} == before
        assert process.poll() is None
    begun = time.monotonic()
    with closing(RunLock(out)) as lock:  # the dead is silent
        lock.acquire()
    assert time.monotonic() - begun > 1
    assert f"{out / 'run.lock'}: this file system has no locks ({os.strerror(code)})" in capsys.readouterr().err


def test_without_the_kernels_lock_one_that_ended_in_order_is_not_waited_for(
    tmp_path: Path, soon: None, without_flock: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert train(tmp_path, "--resume", "auto", "--steps", "1") == 0
    assert "waiting" not in capsys.readouterr().err
    assert checkpoint(tmp_path)["step"] == 1


@pytest.mark.parametrize("here", [True, False])
def test_a_lock_that_holds_on_one_machine_alone_is_noticed(
    here: bool, tmp_path: Path, soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with Lustre's localflock: the kernel gives the lock to this process, but another machine's is in the file."""
    with another_process_in(tmp_path, errno.ENOSYS if here else 0) as process, closing(RunLock(tmp_path)) as lock:
        if not here:
            monkeypatch.setattr(fcntl, "flock", lambda *_: None)
            monkeypatch.setattr(run_lock, "machine", lambda: "another")
        with pytest.raises(SystemExit, match=rf"process {process.pid} on .* trains there$"):
            lock.acquire()


def test_of_two_that_begin_at_once_one_goes_on(tmp_path: Path) -> None:
    with ExitStack() as stack:
        several = [stack.enter_context(holder(tmp_path, errno.ENOSYS)) for _ in range(4)]
        deadline = time.monotonic() + 60
        while sum(process.poll() is None for process in several) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        ended = [process for process in several if process.poll() is not None]
        assert [process.returncode for process in ended] == [1] * 3
        for process in ended:
            _, err = process.communicate()
            assert "trains there" in err or "has taken the folder over" in err
        (left,) = (process for process in several if process not in ended)
        out, _ = left.communicate("")
        assert out == "held\n"


def test_a_run_that_was_taken_for_dead_ends(tmp_path: Path, soon: None) -> None:
    """One that was stopped for longer than the time of silence, on a machine that sees no lock of the kernel."""
    with another_process_in(tmp_path) as process:
        (tmp_path / "run.lock").write_text("process 7 on another machine, since now\nalone other 0\n00000001\n")
        assert process.wait(timeout=30) == 1
        assert process.stderr is not None
        err = process.stderr.read()
        assert err.endswith("process 7 on another machine, since now has taken the folder over; this process ends\n")
    assert (tmp_path / "run.lock").read_text().startswith("process 7")


def test_the_lock_of_an_older_version_is_the_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.lock").write_text("process 7 on node, since 2026-01-01 00:00:00+00:00\n")
    with closing(RunLock(tmp_path)) as lock:
        lock.acquire()
    assert "waiting" not in capsys.readouterr().err
