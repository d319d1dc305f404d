"""Every signal that asks a run to stop is answered with a checkpoint of the last step."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import torch

import train_celeba
from processes import started
from tiny_runs import SCRIPT, assert_same, checkpoint, lines, resume, train
from training import step
from training.runs.signals import ASKING, StopRequested, deferred_signals, stop_requested

LATER = [number for number in ASKING if number not in (signal.SIGINT, signal.SIGTERM)]

pytestmark = pytest.mark.usefixtures("small_figures")


def test_one_after_the_other_is_noted_and_the_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in ASKING]
    for number in ASKING:
        with deferred_signals():
            assert stop_requested() == 0
            signal.raise_signal(number)
            assert stop_requested() == number
            signal.raise_signal(signal.SIGTERM)
            assert stop_requested() == number  # the first one counts
        assert stop_requested() == 0
    assert [signal.getsignal(number) for number in ASKING] == before
    assert {"SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"} <= {number.name for number in ASKING}


def test_a_second_ctrl_c_stops_at_once_and_sigterm_never_does() -> None:
    with deferred_signals():
        for number in (signal.SIGTERM, signal.SIGTERM):
            signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with deferred_signals(second_stops=False):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        assert stop_requested() == signal.SIGINT


@pytest.mark.parametrize("number", LATER)
def test_what_nohup_and_the_like_ignore_stays_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with deferred_signals():
            signal.raise_signal(number)
            assert stop_requested() == 0
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive),
        signal.SIGTERM,
        pytest.param(signal.SIGHUP, marks=pytest.mark.exhaustive),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.exhaustive),
    ],
)
def test_interrupted_between_two_halves_of_a_step(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator_step, steps = step.generator_step, count()

    def interrupted(*arguments: object) -> torch.Tensor:
        if next(steps) == 2:
            signal.raise_signal(number)
        return generator_step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(step, "generator_step", interrupted)
    handler = signal.getsignal(number)
    assert train(tmp_path / "a run", "--steps", "5") == 128 + number
    printed = capsys.readouterr().out.splitlines()
    assert "stopped at step 3" in printed
    assert printed[-1] == f"next       the same command with --resume '{tmp_path / 'a run'}'"
    assert signal.getsignal(number) is handler
    monkeypatch.undo()
    assert checkpoint(tmp_path / "a run")["step"] == 3
    drawn = sorted(path.name for path in (tmp_path / "a run").glob("attention*"))
    assert drawn == ["attention-000003.png"]  # the page is drawn at the end of the run
    assert lines(tmp_path / "a run") == []  # the mean of fewer steps than those of a line is not logged
    resume(tmp_path / "a run", "--steps", "5")
    train(tmp_path / "b", "--steps", "5")
    logs = [[{**line, "images_per_second": 0} for line in lines(tmp_path / out)] for out in ("a run", "b")]
    assert len(logs[0]) == 1
    assert logs[0] == logs[1]
    assert_same(checkpoint(tmp_path / "a run"), checkpoint(tmp_path / "b"), apart_from=("/config/out",))


@pytest.mark.parametrize("at", [0, 3])
def test_a_run_that_waits_for_images_is_saved_at_its_last_step(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the two batches of a step one has come already, and none has been learned from; at step 0 there is none."""
    settings = ["--steps", "5", "--d-steps", "2", "--lr-g", "0.01"]
    read_images = train_celeba.read_images

    def waiting(*arguments: object) -> Iterator[object]:
        images = read_images(*arguments)  # type: ignore[arg-type]
        for _ in range(2 * at + 1):
            yield next(images)
        while not stop_requested():
            signal.raise_signal(signal.SIGTERM)
        raise StopRequested

    with monkeypatch.context() as patch:
        patch.setattr(train_celeba, "read_images", waiting)
        assert train(tmp_path / "a", *settings) == 128 + signal.SIGTERM
    assert f"stopped at step {at}" in capsys.readouterr().out.splitlines()
    state = checkpoint(tmp_path / "a")
    assert (state["step"], state["images"]) == (at, at * 2 * 4)
    resume(tmp_path / "a")
    train(tmp_path / "b", *settings)
    assert_same(checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b"), apart_from=("/config/out",))
    assert not list((tmp_path / "a").glob("earlier-*"))


def test_a_signal_after_a_save_saves_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, save_and_rotate = [], train_celeba.save_and_rotate

    def watched(state: dict[str, object], *arguments: object, **more: object) -> Path:
        saved.append(state["step"])
        if state["step"] == 2:
            signal.raise_signal(signal.SIGTERM)
        return save_and_rotate(state, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(train_celeba, "save_and_rotate", watched)
    assert train(tmp_path, "--steps", "9", "--save-every", "1") == 128 + signal.SIGTERM
    assert saved == [1, 2]
    assert checkpoint(tmp_path)["step"] == 2


def test_signals_of_the_last_step_and_after_it_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Schedulers send one signal after another."""
    original: Callable[..., object]
    for name in ("save_and_rotate", "draw"):
        original = getattr(train_celeba, name)

        def signaled(*arguments: object, original: Callable[..., object] = original, **more: object) -> object:
            signal.raise_signal(signal.SIGTERM)
            return original(*arguments, **more)

        monkeypatch.setattr(train_celeba, name, signaled)
    assert train(tmp_path, "--steps", "2") == 0
    assert "next " in capsys.readouterr().out.splitlines()[-3]


@pytest.mark.exhaustive  # a terminal and a process of its own
@pytest.mark.slow  # starts a process
@pytest.mark.parametrize("nohup", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_a_closed_terminal_ends_a_run_in_order_unless_it_runs_under_nohup(nohup: bool, tmp_path: Path) -> None:
    """The kernel signals all processes of the session and refuses every write to the terminal."""
    pty = pytest.importorskip("pty", reason="needs a terminal")
    controller, terminal = pty.openpty()
    command = [sys.executable, *SCRIPT, "--data", "digits", "--out", str(tmp_path), "--log-every", "1"]
    wanted = ["--steps", "60"] if nohup else ["--steps", "100000"]
    become = (
        "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        f"signal.signal(signal.SIGHUP, signal.{'SIG_IGN' if nohup else 'SIG_DFL'}); os.execv(sys.argv[1], sys.argv[1:])"
    )
    streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    with started([sys.executable, "-c", become, *command, *wanted], **streams) as process:
        os.close(terminal)
        deadline = time.monotonic() + 120
        while not (tmp_path / "log.jsonl").exists() or len(lines(tmp_path)) < 3:
            assert process.poll() is None, os.read(controller, 10**5)
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.close(controller)
        assert process.wait(timeout=120) == (0 if nohup else 128 + signal.SIGHUP)
    state = checkpoint(tmp_path)
    assert state["step"] == 60 if nohup else state["step"] >= 3
    assert len(lines(tmp_path)) == state["step"]


@pytest.mark.exhaustive
@pytest.mark.slow  # starts a process
@pytest.mark.skipif(not shutil.which("bash"), reason="runs a job script")
def test_the_job_script_of_the_docs_saves_before_the_end_and_requeues(tmp_path: Path) -> None:
    """With Slurm's two commands replaced: one that runs a command, and one that is only noted."""
    page = (Path(__file__).parents[4] / "docs" / "cluster.md").read_text()
    (script,) = re.findall(r"```bash\n(#!/bin/bash.*?)```", page, re.DOTALL)
    flags = "examples/train_celeba.py \\\n    --data ~/img_align_celeba.zip --out runs/celeba"
    assert flags in script
    tiny = " ".join([*SCRIPT, "--data", "digits", "--log-every", "1", "--out", str(tmp_path / "run")])
    commands = {"srun": 'exec "$@"', "scontrol": 'echo "$@"', "python": f'exec {sys.executable} "$@"'}
    for name, does in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    with started(["bash", "-c", script.replace(flags, tiny)], env=environment) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "log.jsonl").exists() or len(lines(tmp_path / "run")) < 3:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        out, err = process.communicate(timeout=60)
    assert out.splitlines()[-1] == "requeue 7", err
    (stopped,) = re.findall(r"stopped at step (\d+)", out)
    assert checkpoint(tmp_path / "run")["step"] == int(stopped) == len(lines(tmp_path / "run"))
