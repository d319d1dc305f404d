"""What a run writes and prints: its folder, a dry run, settings, the log, and the commands that go on from there."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

import train_celeba
from tiny_runs import checkpoint, lines, resume, train
from training.flags import default_out
from training.script import interpreter

pytestmark = pytest.mark.usefixtures("small_figures")


def test_dry_run_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path, "--dry-run", "--eval-every", "2") == 0
    *printed, scores = capsys.readouterr().out.splitlines()[-8:]
    assert scores.startswith("scores ")
    out, *made = [Path(line.split()[-1]) for line in printed]
    assert out == tmp_path / "dry-run"
    names = ["samples-000003.png", "attention-000003.png", "attention-000003.html", "checkpoint-000003.pt"]
    assert made == [out / name for name in [*names, "log.jsonl", "best.pt"]]
    assert all(path.exists() for path in made)
    assert checkpoint(tmp_path / "dry-run")["step"] == 3


def test_a_dry_run_leaves_nothing_that_a_run_picks_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--resume", "auto", "--save-every", "2"]
    train(tmp_path, *settings, "--dry-run")
    train(tmp_path, *settings, "--steps", "4")
    assert [line["step"] for line in lines(tmp_path)] == [2, 4]
    before = {path: path.read_bytes() for path in tmp_path.glob("*.*")}
    capsys.readouterr()
    train(tmp_path, *settings, "--dry-run")
    assert "training  steps 4 to 7" in capsys.readouterr().out  # from the run's own checkpoint
    assert {path: path.read_bytes() for path in tmp_path.glob("*.*")} == before
    assert checkpoint(tmp_path / "dry-run")["step"] == 7
    train(tmp_path, *settings, "--steps", "6")
    state = checkpoint(tmp_path)
    assert (state["step"], state["config"]["log_every"], state["config"]["eval_samples"]) == (6, 50, 2000)
    assert state["config"]["out"] == str(tmp_path)


@pytest.mark.parametrize(
    ("data", "out"),
    [
        ("faces", "faces"),
        ("faces:200", "faces-200"),
        ("~/celeba.zip", "celeba"),
        (".", "here"),
        ("..", "above"),
        ("/", "images"),
        ("a/..", "here"),
    ],
)
def test_the_folder_is_named_after_the_data(
    data: str, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "above" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above" / "here")
    assert default_out(data) == f"runs/{out}"


def test_without_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, "--g-attention", "none", "--d-attention", "4", "--steps", "1")
    assert "attention-" not in capsys.readouterr().out
    assert set(lines(tmp_path)[0]["gamma"]) == {"D.attention.4"}


def test_the_settings_lie_beside_the_log(tmp_path: Path) -> None:
    train(tmp_path, "--steps", "1", "--lr-g", "0.003")
    assert json.loads((tmp_path / "config.json").read_text()) == checkpoint(tmp_path)["config"]
    resume(tmp_path, "--steps", "2")
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["steps"], config["lr_g"]) == (2, 0.003)
    assert config == checkpoint(tmp_path)["config"]


def test_the_last_lines_name_the_best_checkpoint_and_the_next_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--steps", "1", "--eval-every", "1"]
    train(tmp_path, *settings, open_evaluator=lambda *_: lambda *_: {"swd": 7.0})
    *_, best, scores, generate, show, report = capsys.readouterr().out.splitlines()
    assert scores.split() == ["scores", "swd", "7.0"]
    assert best.split() == ["best", str(tmp_path / "best.pt")]
    for line, name in ((generate, "generate"), (show, "show_attention"), (report, "report")):
        script = re.search(rf"python examples/({name}\.py) {re.escape(str(tmp_path))}", line)
        assert script
        assert (Path(train_celeba.__file__).parent / script[1]).exists()


def test_the_next_commands_run_without_activating_an_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    assert interpreter() == str(Path(".venv", "bin", "python"))
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3.12")
    assert interpreter() == "python"


def test_the_progress_bar_shows_the_losses_of_the_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, "--steps", "2")
    (line,) = lines(tmp_path)
    assert f"D {line['loss_d']:.3f} G {line['loss_g']:.3f}" in capsys.readouterr().err.splitlines()[-1]
