"""The kernel's lock keeps others out, ends with its process and no worker's, and says why where there is none."""

from __future__ import annotations

import errno
import os
import signal
import sys
from contextlib import closing
from pathlib import Path

import pytest

from processes import started
from training.runs import kernel_lock
from training.runs.kernel_lock import KernelLock, holder, machine, this_process

fcntl = pytest.importorskip("fcntl", reason="fakes the kernel's lock of POSIX")

# Takes the lock and says so; it imports no torch, so it is there at once.
HOLDER = """
import sys
sys.path.insert(0, {examples!r})
from pathlib import Path
from training.runs.kernel_lock import KernelLock
lock = KernelLock(Path(sys.argv[1]))
print(lock.attempt(), flush=True)
sys.stdin.read()
"""


def test_one_at_a_time_has_it(tmp_path: Path) -> None:
    with closing(KernelLock(tmp_path / "a")) as one, closing(KernelLock(tmp_path / "a")) as other:
        assert one.attempt() is True
        assert other.attempt() is False
        one.write("process 7 on node\nand more")
        assert holder(other.read()) == "process 7 on node"
        one.clear()
        assert holder(other.read()) == "another process"
    with closing(KernelLock(tmp_path / "a")) as lock:
        assert lock.attempt() is True


def test_it_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    examples = str(Path(kernel_lock.__file__).parents[2])
    command = [sys.executable, "-c", HOLDER.format(examples=examples), str(tmp_path / "a")]
    with closing(KernelLock(tmp_path / "a")) as lock, started(command, stdin=-1) as process:
        assert process.stdout
        assert process.stdout.readline() == "True\n"
        assert lock.attempt() is False
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert lock.attempt() is True


def test_a_forked_process_has_no_part_in_it(tmp_path: Path) -> None:
    here, there = os.pipe()
    with closing(KernelLock(tmp_path / "a")) as lock:
        assert lock.attempt()
        if not (child := os.fork()):
            os.write(there, b".")
            signal.pause()
    try:
        os.read(here, 1)  # it has begun
        with closing(KernelLock(tmp_path / "a")) as lock:
            assert lock.attempt() is True
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(here)
        os.close(there)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, None])
def test_where_there_is_none_it_says_why(code: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        assert code
        raise OSError(code, os.strerror(code))

    if code is None:
        monkeypatch.setattr(kernel_lock, "fcntl", None)
    else:
        monkeypatch.setattr(fcntl, "flock", flock)
    with closing(KernelLock(tmp_path / "a")) as lock:
        assert lock.attempt() is None
        assert lock.missing == (os.strerror(code) if code else "Windows has no flock")


def test_names_of_process_and_machine_are_words(monkeypatch: pytest.MonkeyPatch) -> None:
    assert this_process().startswith(f"process {os.getpid()} on ")
    monkeypatch.setattr(Path, "read_text", lambda self: (_ for _ in ()).throw(OSError()))
    monkeypatch.setattr(kernel_lock.platform, "node", lambda: "a  strange name")
    assert machine() == "a-strange-name"
