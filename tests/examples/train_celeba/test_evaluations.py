"""Evaluations during a run: the best generator is kept, and they change nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import train_celeba
from evaluation import classifier
from tiny_runs import assert_same, checkpoint, leave_out_images, lines, train
from training.flags import Config


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a tiny run's time, and no test here looks at images."""
    leave_out_images(monkeypatch)


def test_the_best_generator_is_kept(tmp_path: Path) -> None:
    scores = iter([3.0, 2.0, 5.0, 1.0, 4.0])
    evaluated = []

    def open_evaluator(config: Config, data: object, device: torch.device, cache: Path | None) -> train_celeba.Evaluate:
        def evaluate(generator: torch.nn.Module, seed: int) -> dict[str, float]:
            torch.rand(3)  # the numbers that an evaluation draws are not the training's
            evaluated.append((generator.training, seed))
            return {"fid": next(scores), "other": 0.0}

        return evaluate

    settings = ["--eval-every", "2", "--save-every", "3", "--log-every", "100", "--seed", "5"]
    out = tmp_path / "evaluated"
    train(out, *settings, "--steps", "6", open_evaluator=open_evaluator)
    assert evaluated == [(False, 5)] * 3
    assert checkpoint(out, "best.pt")["step"] == 4
    assert [line["scores"]["fid"] for line in lines(out) if "scores" in line] == [3.0, 2.0, 5.0]
    train_celeba.main(["--resume", str(out), "--steps", "10"], open_evaluator=open_evaluator)
    assert checkpoint(out, "best.pt")["step"] == 8
    train(tmp_path / "plain", *settings, "--steps", "10", "--eval-every", "0")
    state, plain = checkpoint(out), checkpoint(tmp_path / "plain")
    assert (state.pop("best"), state.pop("scores")) == ({"fid": 1.0}, {"fid": 4.0, "other": 0.0})
    assert (plain.pop("best"), plain.pop("scores")) == ({}, {})
    assert_same(state, plain, apart_from=("/config/out", "/config/eval_every"))


def test_scores_of_another_kind_are_not_compared(tmp_path: Path) -> None:
    """A machine without Inception has another first score, on another scale."""
    settings = ["--eval-every", "1", "--save-every", "1"]
    train(tmp_path, *settings, "--steps", "1", open_evaluator=lambda *_: lambda *_: {"swd": 7.0})
    train_celeba.main(["--resume", str(tmp_path), "--steps", "2"], open_evaluator=lambda *_: lambda *_: {"fid": 50.0})
    assert checkpoint(tmp_path, "best.pt")["step"] == 2
    train_celeba.main(["--resume", str(tmp_path), "--steps", "3"], open_evaluator=lambda *_: lambda *_: {"swd": 8.0})
    assert checkpoint(tmp_path, "best.pt")["step"] == 2
    assert checkpoint(tmp_path)["best"] == {"swd": 7.0, "fid": 50.0}


def test_a_run_is_evaluated_without_a_download(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, "--steps", "2", "--eval-every", "1", "--eval-samples", "16")
    printed = capsys.readouterr().out
    assert "evaluate  16 images of each kind, every 1 steps, against training images" in printed
    scores = [line["scores"] for line in lines(tmp_path)]
    assert [list(each) for each in scores] == [["swd", "swd_real"]] * 2
    assert f"scores     swd {round(scores[-1]['swd'], 4)} (real {round(scores[-1]['swd_real'], 4)})" in printed
    assert "best" in checkpoint(tmp_path, "best.pt")


@pytest.mark.parametrize(("every", "evaluated"), [("5", [3]), ("3", [3]), ("2", [2]), ("0", [])])
def test_a_run_too_short_for_an_evaluation_is_evaluated_at_its_end(
    every: str, evaluated: list[int], tmp_path: Path
) -> None:
    train(tmp_path, "--steps", "3", "--eval-every", every, open_evaluator=lambda *_: lambda *_: {"swd": 7.0})
    assert [line["step"] for line in lines(tmp_path) if "scores" in line] == evaluated
    assert (tmp_path / "best.pt").exists() is bool(evaluated)


def test_images_with_classes_are_judged_by_their_classifier(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is in the folder for caches, where the next run finds it; a dry run trains the same one."""
    monkeypatch.setattr(classifier, "STEPS", 4)
    flags = ["--data", "faces:60", "--classes", "own", "--steps", "1", "--eval-samples", "30"]
    train(tmp_path / "a", *flags, "--eval-every", "9", "--dry-run")
    (kept,) = (tmp_path / "cache").iterdir()
    written = kept.stat().st_mtime_ns
    train(tmp_path / "a", *flags, "--eval-every", "9")
    assert [path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()] == [written]
    printed = capsys.readouterr().out
    assert "evaluate  30 images of each kind, at the end, against held-out images" in printed
    assert "% right on 4096 real images that it did not learn from" in printed
    assert list(checkpoint(tmp_path / "a", "best.pt")["best"]) == ["classifier_distance"]
    elsewhere = tmp_path / "elsewhere"
    train(tmp_path / "b", *flags, "--eval-every", "9", "--cache-dir", str(elsewhere))
    assert len(list(elsewhere.iterdir())) == 1
    train(tmp_path / "c" / "d", *flags, "--eval-every", "9", "--no-cache")
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["d"]


def test_what_cannot_be_evaluated_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "small", "--steps", "1", "--eval-every", "1", "--image-size", "8", "--data", "faces")
    assert "evaluate  no: it needs images of 16 pixels or more" in capsys.readouterr().out
    train(tmp_path / "few", "--steps", "1", "--eval-every", "1", "--data", "faces:3")
    assert "evaluate  no: it needs four images or more, there are 3" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"train_celeba\.py: .*(torch-fidelity|Inception)"):
        train(tmp_path, "--steps", "1", "--eval-every", "1", "--inception", "/nowhere")
