"""Nothing is lost: not to a full disk, a damaged file, a signal, or the power."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from tiny_runs import SCRIPT, assert_same, checkpoint, lines, resume, train
from torch.utils.data import get_worker_info

import safekeeping
import train_celeba
from distributed import ALONE
from sources import Folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    photograph = load_sample_images().images[0]
    for i in range(10):
        Image.fromarray(photograph[20 * i : 20 * i + 180, 40 * i : 40 * i + 180]).save(root / f"{i}.png")
    return root


def names(out: Path, pattern: str = "checkpoint-*.pt") -> list[str]:
    return sorted(path.name for path in out.glob(pattern))


# -------------------------------------------------------------------------------------------------------- saving


def test_the_file_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append("fsync"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    safekeeping.save({"step": 1}, tmp_path / "checkpoint.pt")
    assert calls == ["fsync", "replace", "fsync"]  # the contents, the name, the folder that holds the name


def test_the_last_few_and_every_so_often_one_are_kept(tmp_path):
    train(tmp_path, "--steps", "9", "--save-every", "1", "--keep-last", "2", "--keep-every", "4")
    assert names(tmp_path) == [f"checkpoint-00000{step}.pt" for step in (4, 8, 9)]
    assert [checkpoint(tmp_path, name)["step"] for name in names(tmp_path)] == [4, 8, 9]
    assert checkpoint(tmp_path)["step"] == 9
    assert not list(tmp_path.glob("*.new"))


def test_where_a_disk_has_no_links_the_folder_names_the_newest(tmp_path, monkeypatch):
    def no_links(*_: object) -> None:
        raise OSError("Operation not permitted")

    monkeypatch.setattr(os, "symlink", no_links)
    train(tmp_path, "--steps", "2", "--save-every", "1")
    assert not (tmp_path / "checkpoint.pt").exists()
    assert safekeeping.load(tmp_path)["step"] == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_leaves_the_old_checkpoint_and_one_line(tmp_path):
    train(tmp_path, "--steps", "1")
    (tmp_path / "checkpoint.pt.new").unlink(missing_ok=True)
    full = tmp_path / "full.pt.new"
    full.symlink_to("/dev/full")
    with pytest.raises(SystemExit, match=r"cannot save .*full\.pt: .*No space left on device") as error:
        safekeeping.save({"weights": torch.zeros(10**6)}, tmp_path / "full.pt")
    assert "\n" not in str(error.value)
    assert not full.is_symlink()
    assert names(tmp_path) == ["checkpoint-000001.pt"]


@pytest.mark.parametrize("failing", ["torch.save", "os.replace"])
def test_a_save_that_fails_ends_the_run_and_leaves_the_old_checkpoint(failing, tmp_path, monkeypatch):
    train(tmp_path, "--steps", "1")

    def fail(*args: object, **more: object) -> None:
        if failing == "os.replace" and not str(args[1]).endswith(".pt"):
            return os.rename(*args)
        if failing == "torch.save":
            args[1].write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(SystemExit, match=r"cannot save .*checkpoint-000002\.pt: .*No space left on device"):
        resume(tmp_path, "--steps", "2")
    assert checkpoint(tmp_path)["step"] == 1
    assert not list(tmp_path.glob("*.new"))


@pytest.mark.parametrize("failing", ["open", "draw"])
def test_a_disk_that_fills_elsewhere_is_one_line_too(failing, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "log.jsonl"))

    if failing == "open":
        monkeypatch.setattr(train_celeba.RunLog, "write", fail)
    else:
        monkeypatch.setattr(train_celeba, "draw", fail)
    with pytest.raises(SystemExit, match=r"^train_celeba\.py: \[Errno 28\] No space left on device: .*log\.jsonl"):
        train(tmp_path, "--steps", "2", "--log-every", "1")


# ------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("damage", ["cut", "bit", "empty"])
@pytest.mark.parametrize("how", ["folder", "auto"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(damage, how, tmp_path, capsys):
    train(tmp_path, "--steps", "4", "--save-every", "1", "--log-every", "1")
    newest = tmp_path / "checkpoint-000004.pt"
    content = bytearray(newest.read_bytes())
    if damage == "bit":
        content[content.index(b"data/0") + 200] ^= 1  # in the first tensor, which has other weights then
    newest.write_bytes(content[: {"cut": len(content) // 2, "bit": None, "empty": 0}[damage]])
    capsys.readouterr()
    if how == "folder":
        resume(tmp_path, "--steps", "5")
    else:
        train(tmp_path, "--resume", "auto", "--steps", "5")
    out, err = capsys.readouterr()
    assert "checkpoint-000004.pt: it cannot be read as a checkpoint; trying the one before" in err
    assert "training  steps 3 to 5" in out
    assert names(tmp_path, "earlier-1/*") == ["checkpoint-000004.pt"]
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    with pytest.raises(SystemExit, match=r"cannot be read as a checkpoint"):
        resume(tmp_path / "earlier-1" / "checkpoint-000004.pt")


def test_where_none_can_be_read_nothing_is_begun(tmp_path):
    train(tmp_path, "--steps", "2", "--save-every", "1")
    for name in names(tmp_path):
        (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(SystemExit, match=r"none of its 2 checkpoints can be read"):
        train(tmp_path, "--resume", "auto")
    assert len(names(tmp_path)) == 2


def test_a_new_run_keeps_what_an_earlier_one_left(tmp_path, capsys):
    train(tmp_path, "--steps", "2", "--tensorboard")
    for steps in ("1", "3"):
        train(tmp_path, "--steps", steps)
    assert f"kept      other checkpoints in {tmp_path / 'earlier-2'}" in capsys.readouterr().out
    assert checkpoint(tmp_path)["step"] == 3
    assert [checkpoint(tmp_path / f"earlier-{i}", f"checkpoint-00000{3 - i}.pt")["step"] for i in (1, 2)] == [2, 1]
    assert names(tmp_path, "earlier-1/*") == [
        "attention-000002.png", "checkpoint-000002.pt", "checkpoint.pt", "log.jsonl", "samples-000002.png",
        "tensorboard",
    ]  # fmt: skip
    assert [line["step"] for line in lines(tmp_path)] == [3]


def test_going_on_from_an_older_checkpoint_sets_the_newer_ones_aside(tmp_path):
    train(tmp_path, "--steps", "4", "--save-every", "1", "--log-every", "1", "--keep-last", "4")
    resume(tmp_path / "checkpoint-000002.pt", "--steps", "3")
    assert names(tmp_path) == [f"checkpoint-00000{step}.pt" for step in (1, 2, 3)]
    assert names(tmp_path, "earlier-1/*") == ["checkpoint-000003.pt", "checkpoint-000004.pt"]
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


# ------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_between_two_halves_of_a_step(number, tmp_path, monkeypatch, capsys):
    generator_step = train_celeba.generator_step

    def interrupted(run: train_celeba.Run, fakes: object) -> torch.Tensor:
        if run.step == 2:
            signal.raise_signal(number)
        return generator_step(run, fakes)

    monkeypatch.setattr(train_celeba, "generator_step", interrupted)
    handler = signal.getsignal(number)
    assert train(tmp_path / "a", "--steps", "5") == 128 + number
    assert f"stopped at step 3; go on with --resume {tmp_path / 'a'}" in capsys.readouterr().out
    assert signal.getsignal(number) is handler
    monkeypatch.undo()
    assert checkpoint(tmp_path / "a")["step"] == 3
    resume(tmp_path / "a", "--steps", "5")
    train(tmp_path / "b", "--steps", "5")
    assert_same(checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b"), apart_from=("/config/out",))


def test_a_second_ctrl_c_stops_at_once_and_sigterm_never_does():
    with safekeeping.postponed_signals() as received:
        for number in (signal.SIGTERM, signal.SIGTERM):
            signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert received == [signal.SIGTERM, signal.SIGTERM]
    with safekeeping.postponed_signals(second_stops=False) as received:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
    assert received == [signal.SIGINT, signal.SIGINT]


class SignalledFolder(Folder):
    """A signal to the whole group of processes as a worker sees it, while it decodes."""

    number = signal.SIGINT

    def __getitem__(self, batch: list[tuple[int, bool]]) -> tuple[torch.Tensor, list[str]]:
        assert get_worker_info() is not None
        if self.number:
            os.kill(os.getpid(), self.number)
            self.number = 0
        return super().__getitem__(batch)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_go_on_after_a_signal(number, pictures):
    config = train_celeba.Config(data=str(pictures), batch_size=4, workers=1)
    source = SignalledFolder(pictures, size=16, crop=160)
    source.number = number
    batches = iter(train_celeba.open_loader(source, config, 0, torch.device("cpu"), ALONE))
    assert [len(next(batches)[0]) for _ in range(3)] == [4, 4, 4]


# A run in a process of its own imports torch, which takes seconds.


def start(out: Path, pictures: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, *SCRIPT, "--data", str(pictures), "--out", str(out), "--workers", "1", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_a_line(out: Path, process: subprocess.Popen[str], more_than: int = 0) -> None:
    deadline = time.monotonic() + 120
    log = out / "log.jsonl"
    while not (log.exists() and log.stat().st_size > more_than):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow  # starts a process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_leaves_a_checkpoint(number, pictures, tmp_path):
    with start(tmp_path, pictures, "--no-cache", "--log-every", "1") as process:
        wait_for_a_line(tmp_path, process)
        os.killpg(process.pid, number)  # as a terminal, torchrun and schedulers do it: to the workers too
        out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    assert "stopped at step" in out
    assert checkpoint(tmp_path)["step"] >= 1


@pytest.mark.slow  # starts a process for each kill; SAGAN_KILLS=30 for a long try
def test_killed_at_random_moments_a_run_ends_as_if_it_never_was(pictures, tmp_path):
    kills = int(os.environ.get("SAGAN_KILLS", "2"))
    chance = random.Random(int(os.environ.get("SAGAN_KILLS_SEED", "0")))
    steps = 30 * (kills + 1)
    settings = ["--resume", "auto", "--steps", str(steps), "--save-every", "2", "--log-every", "1"]
    settings += ["--sample-every", "20", "--keep-last", "2"]
    resumed = 0
    for _ in range(kills):
        with start(tmp_path / "killed", pictures, *settings) as process:
            log = tmp_path / "killed" / "log.jsonl"
            size = log.stat().st_size if log.exists() else 0
            if chance.random() < 0.8:  # while it trains; else while it starts
                for _ in range(3):  # the third comes after a checkpoint, however slow the machine is
                    wait_for_a_line(tmp_path / "killed", process, more_than=size)
                    size = log.stat().st_size
                time.sleep(chance.uniform(0, 0.5))
            else:
                end = time.monotonic() + chance.uniform(0, 8)
                while time.monotonic() < end and not (log.exists() and log.stat().st_size > size):
                    time.sleep(0.05)
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=60)
        if names(tmp_path / "killed"):
            state = safekeeping.newest(tmp_path / "killed")
            assert state is not None
            resumed += state["step"] > 0
            print(f"killed at line {len((tmp_path / 'killed' / 'log.jsonl').read_text().splitlines())}, "
                  f"checkpoint at {state['step']}")  # fmt: skip
    assert resumed
    assert train(tmp_path / "killed", "--data", str(pictures), "--workers", "1", *settings) == 0
    settings[:2] = []
    assert train(tmp_path / "whole", "--data", str(pictures), "--workers", "1", *settings) == 0
    assert_same(checkpoint(tmp_path / "killed"), checkpoint(tmp_path / "whole"), apart_from=("/config/out",))
    logs = [[{**line, "images_per_second": 0} for line in lines(tmp_path / out)] for out in ("killed", "whole")]
    assert logs[0] == logs[1]
    assert not list((tmp_path / "killed").glob("*.new"))
