"""Runs that would take days on a CPU say so, once and in time; no other run does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tiny_runs import train
from training.output import estimate
from training.output.estimate import LongRun


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: now[0])
    return now


def said(clock: list[float], capsys: pytest.CaptureFixture[str], device: str, seconds: float, steps: int) -> list[str]:
    """The lines of a run of 50 steps that goes on from step 1000; the first of them takes a minute."""
    run = LongRun(torch.device(device), 1000, steps, batch_size=64)
    for step in range(1001, 1051):
        clock[0] += 60 if step == 1001 else seconds
        run.advance(step)
    return capsys.readouterr().err.splitlines()


def test_days_on_a_cpu_are_announced_once(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    # 10 s after the first step it is at step 1005, so 98,995 steps of 2.5 s are left: 2.86 days.
    (line,) = said(clock, capsys, "cpu", 2.5, 100_000)
    assert line.startswith("at 25.6 images/s on this CPU step 100000 is 3 days away; @examples/recipes/images-cpu.txt")
    (path,) = re.findall(r"@(\S+\.txt)", line)
    assert (Path(estimate.__file__).parents[3] / path).exists()


@pytest.mark.parametrize(
    ("device", "seconds", "steps"), [("cuda", 2.5, 100_000), ("cpu", 2.5, 10_000), ("cpu", 0.1, 100_000)]
)
def test_nothing_else_is(
    device: str, seconds: float, steps: int, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(clock, capsys, device, seconds, steps) == []


@pytest.mark.usefixtures("small_figures")
def test_the_trainer_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(estimate, "SETTLE", 0)
    monkeypatch.setattr(estimate, "LONG", 1e-6)
    train(tmp_path, "--steps", "4")
    assert capsys.readouterr().err.count(" on this CPU step 4 is ") == 1
