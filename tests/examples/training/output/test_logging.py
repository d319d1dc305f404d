"""The log: lines that survive a kill, TensorBoard's files, and numbers that stay on the device until they are read."""

from __future__ import annotations

import builtins
import errno
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from refused_calls import refuse_fsync
from tiny_runs import lines, resume, train
from training.output.logging import Means, RunLog, one_report
from training.runs.distributed import SINGLE_PROCESS

pytestmark = pytest.mark.usefixtures("small_figures")


def events(out: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(out / "tensorboard"))
    accumulator.Reload()
    return accumulator


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with a line of the log for each."""
    out = tmp_path_factory.mktemp("run")
    train(out, "--no-tensorboard", "--steps", "2", "--log-every", "1")
    return out


@pytest.fixture
def out(two_steps: Path, tmp_path: Path) -> Path:
    """That run, to go on with."""
    return Path(shutil.copytree(two_steps, tmp_path / "run", symlinks=True))


def test_lines_that_the_checkpoint_does_not_know_are_logged_once(out: Path) -> None:
    with open(out / "log.jsonl", "ab") as file:
        file.write(b'{"step": 3}\n{"step": 4, "ima')  # as if it had gone on and been killed before it saved again
    resume(out, "--steps", "4")
    assert [line["step"] for line in lines(out)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "cut",
    [
        b'{"step": 4, "gamma": {"G": 0.1}',
        b"",
        b'{"step": 4}{"step": 5}',
        b"null\n[1]\n{}\n\xff\xfe\n" + b'{"step": 1%s}' % (b"0" * 400),
    ],
)
def test_lines_that_are_no_lines_are_dropped(cut: bytes, out: Path) -> None:
    with open(out / "log.jsonl", "ab") as file:
        file.write(b'{"step": 3}\n' + cut)
    RunLog(out, 2, 4, 4, tensorboard=False).close()
    assert [line["step"] for line in lines(out)] == [1, 2]


def test_the_log_is_never_half_written(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.replace", lambda *_: sys.exit("killed"))  # between writing the file anew and naming it
    with pytest.raises(SystemExit):
        resume(out, "--steps", "4")
    assert [line["step"] for line in lines(out)] == [1, 2]


def test_a_file_system_without_fsync(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse_fsync(monkeypatch, errno.EINVAL)
    log = RunLog(out, 2, 4, 4, tensorboard=False)
    for step in (3, 4):
        log.write(step, {"loss_d": 1.0, "loss_g": 2.0})
    log.close()
    assert [line["step"] for line in lines(out)] == [1, 2, 3, 4]
    assert capsys.readouterr().err.count(f"the file system of {out} cannot force files onto the disk") == 1


def test_a_disk_that_loses_a_line_is_an_error(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(out, 2, 4, 4, tensorboard=False)
    refuse_fsync(monkeypatch, errno.ENOSPC)
    with pytest.raises(OSError, match="No space left on device"):
        log.write(3, {"loss_d": 1.0, "loss_g": 2.0})
    log.close()


def test_tensorboard_shows_what_the_log_and_the_images_do(tmp_path: Path) -> None:
    settings = ["--tensorboard", "--log-every", "1", "--sample-every", "2", "--save-every", "2", "--eval-every", "2"]
    train(tmp_path, *settings, "--steps", "3", open_evaluator=lambda *_: lambda *_: {"fid": 7.0})
    (tmp_path / "checkpoint-000003.pt").unlink()  # as if it had been killed before it saved at step 3
    resume(tmp_path, "--steps", "5", "--eval-every", "0")
    seen = events(tmp_path)
    assert [line["step"] for line in lines(tmp_path) if line.get("scores") == {"fid": 7.0}] == [2]
    assert [(scalar.step, scalar.value) for scalar in seen.Scalars("scores/fid")] == [(2, 7.0)]
    for name in ("loss_d", "loss_g", "lr_g", "images_per_second"):
        assert [scalar.step for scalar in seen.Scalars(name)] == [1, 2, 3, 4, 5]
    losses = [line["loss_d"] for line in lines(tmp_path)]
    assert [scalar.value for scalar in seen.Scalars("loss_d")] == pytest.approx(losses)
    assert "gamma/G.attention.8" in seen.Tags()["scalars"]
    assert [image.step for image in seen.Images("samples")] == [2, 4]
    assert [image.step for image in seen.Images("attention")] == [2, 4]
    sigma = {tag: seen.Scalars(tag)[0].value for tag in seen.Tags()["scalars"] if tag.startswith("sigma_")}
    assert len({tag.split("/")[0] for tag in sigma}) == 2
    assert all(0.5 < value < 2 for value in sigma.values())


@pytest.mark.parametrize("at", [0, 20])  # while it opens the file, and in the second line of the log
def test_a_disk_that_is_full_for_tensorboard_is_one_line(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The package writes in a thread, whose errors are printed with their traceback unless they are caught."""
    written: list[bytes] = []

    def write(writer: object, data: bytes) -> None:
        written.append(data)
        if len(written) > at:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", write)
    with pytest.raises(SystemExit, match=r"^train_celeba\.py: \[Errno 28\] No space left on device$"):
        train(tmp_path, "--tensorboard", "--log-every", "1", "--steps", "9")
    assert len(written) == at + 1
    assert "Traceback" not in capfd.readouterr().err


def test_errors_of_other_threads_are_still_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda error: reported.append(str(error.exc_value)))

    def fail() -> None:
        raise OSError("full")

    with one_report():
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
    assert reported == ["full"]


def test_without_the_package_it_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = builtins.__import__

    def without(name: str, *args: object, **more: object) -> object:
        if name.startswith(("tensorboard", "torch.utils.tensorboard")):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return load(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert train(tmp_path, "--tensorboard", "--steps", "1") == 0
    assert capsys.readouterr().err.count("pip install tensorboard") == 1
    assert not (tmp_path / "tensorboard").exists()


def test_no_tensorboard(two_steps: Path) -> None:
    assert not (two_steps / "tensorboard").exists()


def test_means_are_those_since_the_last_reading() -> None:
    network = torch.nn.Linear(1, 1)
    means = Means({"G": network}, SINGLE_PROCESS)
    for losses in ((1.0, 5.0), (3.0, 7.0)):
        means.add(torch.tensor(losses))
    line = means.read(2, 4)
    assert (line["loss_d"], line["loss_g"]) == (2.0, 6.0)
    means.add(torch.tensor((9.0, 0.0)))
    means.check(3)  # a checkpoint is made here, but no line
    assert means.losses.tolist() == [[9.0, 0.0]]
    means.add(torch.tensor((11.0, 2.0)))
    line = means.read(3, 4)
    assert (line["loss_d"], line["loss_g"]) == (10.0, 1.0)
    assert means.losses.shape == (0, 2)
    with torch.no_grad():
        network.weight.fill_(float("inf"))
    means.add(torch.tensor((9.0, 0.0)))
    with pytest.raises(SystemExit, match=r"step 4: .*1 of G's 2 weight tensors.* step 3, loss of D 10, of G 1"):
        means.read(4, 4)
