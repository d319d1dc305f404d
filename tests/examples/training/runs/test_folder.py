"""The folder of a run is recognized by the names in it, so that its images are not taken for data."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import minimal
from tiny_runs import resume, train
from training.runs.folder import holds_a_run

pytestmark = pytest.mark.usefixtures("small_figures")


def test_a_run_is_recognized_and_so_is_what_was_set_aside(tmp_path: Path) -> None:
    assert not holds_a_run([])
    train(tmp_path, "--steps", "2", "--save-every", "1")
    assert holds_a_run(os.listdir(tmp_path))
    resume(tmp_path / "checkpoint-000001.pt", "--steps", "2")
    train(tmp_path, "--steps", "1")
    for earlier in ("earlier-1", "earlier-2"):  # later steps alone, and a whole run
        assert holds_a_run(os.listdir(tmp_path / earlier))


def test_a_run_of_the_minimal_trainer_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "images" / "a.png")
    flags = ["--image-size", "16", "--base-channels", "2", "--batch-size", "4", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", ["minimal.py", str(tmp_path / "images"), "--out", str(tmp_path / "out"), *flags])
    minimal.main()
    assert holds_a_run(os.listdir(tmp_path / "out"))


@pytest.mark.parametrize(
    ("names", "is_one"),
    [
        (["config.json", "run.lock"], True),  # that has just begun
        (["config.json", "log.jsonl", "run.lock"], True),  # that was killed before its first checkpoint
        (["config.json", "a.png"], False),  # of a data set that somebody downloaded
        (["run.lock", "samples-000001.png"], False),
        (["checkpoint.pt", "a.png"], False),
        (["checkpoint-1.pt", "samples-1.png", "log.jsonl"], False),
    ],
    ids=str,
)
def test_names_that_others_use_too_are_not_enough(names: list[str], is_one: bool) -> None:
    assert holds_a_run(names) is is_one
