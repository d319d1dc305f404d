"""Two runs in one folder: the second one names the first, and waits if that is about to end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tiny_runs import checkpoint, lines, train
from training.runs import checkpointing, run_lock

# Holds a folder until its input ends. It imports no torch, so it is there at once.
HOLDER = """
import sys
sys.path.insert(0, {examples!r})
from pathlib import Path
from training.runs.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def another_process_in(out: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER.format(examples=str(Path(run_lock.__file__).parents[2])), str(out)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_told_who_is_there_and_touches_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_lock, "TIMEOUT", 0.1)
    train(tmp_path, "--steps", "2")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != "run.lock"}
    with another_process_in(tmp_path) as process:
        for arguments in (["--steps", "3"], ["--resume", "auto", "--steps", "3"]):
            with pytest.raises(SystemExit, match=rf"--out .*: process {process.pid} on .*, since 20.* trains there$"):
                train(tmp_path, *arguments)
        assert f"waiting 0.1 s for process {process.pid} on " in capsys.readouterr().err
        assert {path: path.stat().st_mtime_ns for path in before} == before
        assert checkpointing.load(tmp_path)["step"] == 2  # reading needs no lock
        assert train(tmp_path / "other", "--steps", "1") == 0
        assert train(tmp_path, "--dry-run") == 0  # it has a folder of its own
    assert train(tmp_path, "--resume", "auto", "--steps", "3") == 0  # the kernel took the lock from the dead
    assert [line["step"] for line in lines(tmp_path)] == [2, 3]


def test_a_process_that_is_about_to_end_is_waited_for(tmp_path, monkeypatch):
    train(tmp_path, "--steps", "1")
    with another_process_in(tmp_path) as process:

        def say_and_end(*_: object, **__: object) -> None:
            process.kill()

        monkeypatch.setattr("builtins.print", say_and_end)
        assert train(tmp_path, "--resume", "auto", "--steps", "2") == 0
    monkeypatch.undo()
    assert checkpoint(tmp_path)["step"] == 2


def test_a_run_that_cannot_begin_leaves_no_lock(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (["--image-size", "50"], ["--resume", "nowhere.pt"], ["--resume", str(tmp_path)]):
        with pytest.raises(SystemExit, match=r"image_size|no such file|no checkpoint"):
            train(tmp_path / "run", *arguments)
    assert not list(tmp_path.iterdir())
