"""No run is lost: not by a full disk, a damaged file, a signal, or a power failure."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import train_celeba
from tiny_runs import checkpoint, lines, resume, train
from training.runs import checkpointing

pytestmark = pytest.mark.usefixtures("small_figures")


@pytest.fixture(scope="module")
def run_of_four_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    train(out, "--steps", "4", "--save-every", "1", "--log-every", "1", "--keep-last", "4")
    return out


@pytest.fixture
def run(run_of_four_steps: Path, tmp_path: Path) -> Path:
    """A copy of a run of four steps, all of whose checkpoints and log lines are there."""
    return Path(shutil.copytree(run_of_four_steps, tmp_path / "run", symlinks=True))


KINDS = (("checkpoint", "pt"), ("samples", "png"), ("attention", "png"))


def images(out: Path) -> dict[str, bytes]:
    """The images of a run, and its attention explorer."""
    return {path.name: path.read_bytes() for path in out.glob("*.*") if path.suffix in (".png", ".html")}


def names(out: Path, pattern: str = "checkpoint-*.pt") -> list[str]:
    return sorted(path.name for path in out.glob(pattern))


# -------------------------------------------------------------------------------------------------------- saving


def test_the_last_few_and_every_so_often_one_are_kept(tmp_path: Path) -> None:
    train(tmp_path, "--steps", "9", "--save-every", "1", "--keep-last", "2", "--keep-every", "4")
    assert names(tmp_path) == [f"checkpoint-00000{step}.pt" for step in (4, 8, 9)]
    assert [checkpoint(tmp_path, name)["step"] for name in names(tmp_path)] == [4, 8, 9]
    assert checkpoint(tmp_path)["step"] == 9
    assert not list(tmp_path.glob("*.new"))


def test_where_a_disk_has_no_links_the_folder_names_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError("Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", no_links)
    train(tmp_path, "--steps", "2", "--save-every", "1")
    assert not (tmp_path / "checkpoint.pt").exists()
    assert checkpointing.load(tmp_path)["step"] == 2


def test_an_old_checkpoint_that_cannot_be_deleted_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On shares of Windows no file can be deleted while a script reads it."""
    unlink, busy = Path.unlink, [tmp_path / "checkpoint-000001.pt"]

    def refusing(path: Path, missing_ok: bool = False) -> None:
        if path in busy:
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refusing)
    train(tmp_path, "--steps", "2", "--save-every", "1", "--keep-last", "1")
    assert names(tmp_path) == ["checkpoint-000001.pt", "checkpoint-000002.pt"]
    busy.clear()
    resume(tmp_path, "--steps", "3")
    assert names(tmp_path) == ["checkpoint-000003.pt"]


def test_infinite_moments_are_neither_saved_nor_resumed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every weight and loss is finite, but Adam would never move that weight again."""
    state = checkpoint(run)
    state["discriminator_optimizer"]["state"][0]["exp_avg_sq"].view(-1)[-1] = float("inf")
    where = r"infinities or NaN in discriminator_optimizer\.state\.0\.exp_avg_sq"
    with pytest.raises(SystemExit, match=rf"cannot save .*7\.pt: the training is no longer finite: {where}\. The last"):
        checkpointing.save_and_rotate(state | {"step": 7}, run, keep_last=1, keep_every=0)
    assert names(run)[-1] == "checkpoint-000004.pt"
    torch.save(state, run / "checkpoint-000004.pt")  # as an older version did
    with pytest.raises(SystemExit, match=rf"cannot resume from .*4\.pt: {where}$"):
        resume(run / "checkpoint-000004.pt", "--steps", "5")
    assert resume(run, "--steps", "5") == 0
    assert re.search(rf"{where}; trying the one before\n", capsys.readouterr().err)


@pytest.mark.parametrize("failing", ["torch.save", "os.replace"])
def test_a_save_that_fails_ends_the_run_and_leaves_the_old_checkpoint(
    failing: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **more: object) -> None:
        if failing == "os.replace" and not str(args[1]).endswith(".pt"):
            return os.rename(*args)
        if failing == "torch.save":
            args[1].write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(SystemExit, match=r"cannot save .*checkpoint-000005\.pt: .*No space left on device"):
        resume(run, "--steps", "5")
    assert checkpoint(run)["step"] == 4
    assert not list(run.glob("*.new"))


@pytest.mark.parametrize("failing", ["open", "draw"])
def test_a_disk_that_fills_elsewhere_is_one_line_too(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "log.jsonl"))

    if failing == "open":
        monkeypatch.setattr(train_celeba.RunLog, "write", fail)
    else:
        monkeypatch.setattr(train_celeba, "draw", fail)
    with pytest.raises(SystemExit, match=r"^train_celeba\.py: \[Errno 28\] No space left on device: .*log\.jsonl"):
        train(tmp_path, "--steps", "2", "--log-every", "1")


# ------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("damage", "how"),
    [
        ("bit", "folder"),
        ("cut", "auto"),
        pytest.param("empty", "folder", marks=pytest.mark.exhaustive),
        pytest.param("bit", "auto", marks=pytest.mark.exhaustive),
    ],
)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    damage: str, how: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = run / "checkpoint-000004.pt"
    content = bytearray(newest.read_bytes())
    if damage == "bit":
        content[content.index(b"data/0") + 200] ^= 1  # in the first tensor, which has other weights then
    newest.write_bytes(content[: {"cut": len(content) // 2, "bit": None, "empty": 0}[damage]])
    capsys.readouterr()
    if how == "folder":
        resume(run, "--steps", "5")
    else:
        train(run, "--resume", "auto", "--steps", "5")
    out, err = capsys.readouterr()
    assert "checkpoint-000004.pt: it cannot be read as a checkpoint; trying the one before" in err
    assert "training  steps 3 to 5" in out
    drawn = ["attention-000004.html", "attention-000004.png", "samples-000004.png"]
    assert names(run, "earlier-1/*") == sorted([*drawn, "checkpoint-000004.pt"])
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4, 5]
    with pytest.raises(SystemExit, match=r"cannot be read as a checkpoint"):
        resume(run / "earlier-1" / "checkpoint-000004.pt")


def test_lack_of_memory_does_not_go_back_to_the_one_before(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the file holds may be good; going on from an older one would set it aside."""
    before = names(run)
    monkeypatch.setattr(torch, "load", lambda *_, **__: torch.empty(10**15))
    with pytest.raises(SystemExit, match=r"^train_celeba\.py: can't allocate memory: you tried to allocate"):
        resume(run, "--steps", "5")
    assert names(run) == before
    assert "trying the one before" not in capsys.readouterr().err


def test_where_none_can_be_read_nothing_is_begun(run: Path) -> None:
    for name in names(run):
        (run / name).write_bytes(b"PK")
    with pytest.raises(SystemExit, match=r"none of its 4 checkpoints can be read"):
        train(run, "--resume", "auto")
    assert len(names(run)) == 4


def test_a_new_run_keeps_what_an_earlier_one_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, "--steps", "2", "--tensorboard")
    for steps in ("1", "3"):
        train(tmp_path, "--steps", steps)
    assert f"moved     the files of an earlier run to {tmp_path / 'earlier-2'}" in capsys.readouterr().out
    assert checkpoint(tmp_path)["step"] == 3
    assert [checkpoint(tmp_path / f"earlier-{i}", f"checkpoint-00000{3 - i}.pt")["step"] for i in (1, 2)] == [2, 1]
    assert names(tmp_path, "earlier-1/*") == [
        "attention-000002.html", "attention-000002.png", "checkpoint-000002.pt", "checkpoint.pt", "config.json",
        "log.jsonl", "reals.png", "samples-000002.png", "tensorboard",
    ]  # fmt: skip
    assert [line["step"] for line in lines(tmp_path)] == [3]


@pytest.mark.parametrize("best", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_going_on_from_an_older_checkpoint_sets_what_came_later_aside(best: int, tmp_path: Path) -> None:
    settings = [
        "--save-every",
        "1",
        "--log-every",
        "1",
        "--sample-every",
        "1",
        "--keep-last",
        "4",
        "--eval-every",
        "2",
    ]
    scores = iter([1.0, 2.0] if best == 2 else [2.0, 1.0])
    train(tmp_path, "--steps", "4", *settings, open_evaluator=lambda *_: lambda *_: {"fid": next(scores)})
    resume(tmp_path / "checkpoint-000002.pt", "--steps", "3", "--eval-every", "0")
    assert names(tmp_path) == [f"checkpoint-00000{step}.pt" for step in (1, 2, 3)]
    assert names(tmp_path, "samples-*") == [f"samples-00000{step}.png" for step in (1, 2, 3)]
    later = [f"{name}-00000{step}.{kind}" for name, kind in KINDS for step in (3, 4)]
    assert names(tmp_path, "earlier-1/*") == sorted([*later, "attention-000004.html"] + ["best.pt"] * (best == 4))
    assert (tmp_path / "best.pt").exists() is (best == 2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_images_that_no_checkpoint_knows_are_drawn_again(tmp_path: Path) -> None:
    train(tmp_path, "--steps", "2", "--sample-every", "1")
    for name in ("samples-000003.png", "attention-000003.html"):
        (tmp_path / name).write_bytes(b"of a run that was killed")
    resume(tmp_path, "--steps", "4", "--sample-every", "2")
    assert names(tmp_path, "samples-*") == [f"samples-00000{step}.png" for step in (1, 2, 4)]
    assert names(tmp_path, "*.html") == [f"attention-00000{step}.html" for step in (2, 4)]  # a page for each end
    assert not list(tmp_path.glob("earlier-*"))


def test_what_a_run_left_before_its_first_checkpoint_is_kept_apart(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir(parents=True)
    for name in ("log.jsonl", "reals.png", "samples-000002.png", "best.pt"):
        (tmp_path / name).write_text('{"step": 2}\n')
    train(tmp_path, "--resume", "auto", "--steps", "1")
    assert names(tmp_path, "earlier-1/*") == ["best.pt", "log.jsonl", "reals.png", "samples-000002.png", "tensorboard"]
    assert [line["step"] for line in lines(tmp_path)] == [1]
    assert names(tmp_path, "samples-*") == ["samples-000001.png"]


def test_kills_before_the_first_checkpoint_leave_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with the same settings makes the same files again; with others, they are kept apart."""
    settings = ["--steps", "3", "--sample-every", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(train_celeba, "save_and_rotate", lambda *_, **__: sys.exit("killed"))
        for how in ([], ["--resume", "auto"], []):
            with pytest.raises(SystemExit, match="killed"):
                train(tmp_path, *settings, *how)
            assert names(tmp_path, "samples-*") == [f"samples-00000{step}.png" for step in (1, 2)]
    assert not list(tmp_path.glob("earlier-*"))
    train(tmp_path, *settings, "--seed", "1")
    assert names(tmp_path, "earlier-1/samples-*") == [f"samples-00000{step}.png" for step in (1, 2)]
    train(tmp_path, *settings, "--seed", "1")  # this one had checkpoints
    assert names(tmp_path, "earlier-2/checkpoint-*") == ["checkpoint-000003.pt"]


def test_files_of_others_are_not_touched(tmp_path: Path) -> None:
    others = [
        "mine.new",
        "weights.pt.new",
        "samples-of-mine.png",
        "samples-000001.html",
        "samples-1.png.new",
        "best.pt.bak",
        "checkpoint-9.pt",
    ]
    for name in others:
        (tmp_path / name).write_text("mine")
    for name in ("folder.new", "checkpoint-000009.pt.new"):
        (tmp_path / name).mkdir()
    for name in ("samples-000003.png.new", "attention-000003.html.new", "log.jsonl.new"):
        (tmp_path / name).write_text("of a run that was killed")
    for arguments in ([], [], ["--resume", "auto"]):
        train(tmp_path, "--steps", "2", *arguments)
    assert all((tmp_path / name).read_text() == "mine" for name in others)
    assert names(tmp_path, "*.new") == [
        "checkpoint-000009.pt.new", "folder.new", "mine.new", "samples-1.png.new", "weights.pt.new",
    ]  # fmt: skip


# -------------------------------------------------------------------------------------------------------- images


EVERY_TWO = ["--steps", "4", "--sample-every", "2", "--save-every", "2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The images of a run that nothing interrupts."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(out, *EVERY_TWO)
    return images(out)


@pytest.mark.parametrize("name", ["samples", "attention"])
def test_an_image_is_never_half_written(
    name: str, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Image.Image.save

    def killed(image: Image.Image, file: object, **options: object) -> None:
        save(image, file, **options)
        if f"{name}-000002" in file.name:  # type: ignore[attr-defined]
            file.truncate(100)  # type: ignore[attr-defined]
            sys.exit("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", killed)
        with pytest.raises(SystemExit, match=r"^killed$"):
            train(tmp_path / "killed", *EVERY_TWO)
    assert not (tmp_path / "killed" / f"{name}-000002.png").exists()
    assert names(tmp_path / "killed") == ["checkpoint-000002.pt"]
    train(tmp_path / "killed", "--resume", "auto")  # with the settings of the checkpoint
    assert images(tmp_path / "killed") == whole


def test_a_complete_run_draws_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, "--steps", "2")
    before = images(tmp_path)
    drawn = ["samples-000002.png", "attention-000002.png", "attention-000002.html"]
    assert sorted(before) == sorted([*drawn, "reals.png"])
    for missing in (*([name] for name in drawn), drawn):
        for name in missing:
            (tmp_path / name).unlink()
        train(tmp_path, "--resume", "auto", "--steps", "2")
        assert "complete" in capsys.readouterr().out
        assert images(tmp_path) == before
