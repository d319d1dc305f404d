"""A resumed run continues as if it had never stopped, with the settings of its checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tiny_runs import assert_same, checkpoint, leave_out_images, lines, resume, train
from training.output import model_card
from training.runs import checkpointing


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a tiny run's time, and no test here looks at images."""
    leave_out_images(monkeypatch)


@pytest.mark.parametrize("loss", ["hinge", pytest.param("wgan-gp", marks=pytest.mark.exhaustive)])
def test_a_resumed_run_equals_an_uninterrupted_one(loss: str, folder: Path, tmp_path: Path) -> None:
    settings = ["--data", str(folder), "--no-cache", "--num-workers", "1", "--loss", loss, "--lr-g", "0.01"]
    settings += ["--lr-decay", "linear", "--log-every", "1", "--tensorboard"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(whole, *settings, "--steps", "5", "--sample-every", "2")
    train(halves, *settings, "--steps", "5", "--save-every", "3")
    (halves / "checkpoint-000005.pt").unlink()  # as if it had been killed at step 3
    assert resume(halves) == 0
    assert_same(
        checkpoint(whole),
        checkpoint(halves),
        apart_from=("/config/out", "/config/sample_every", "/config/save_every"),
    )
    logs = [[{**line, "images_per_second": 0} for line in lines(out)] for out in (whole, halves)]
    assert logs[0] == logs[1]


def test_a_checkpoint_holds_everything(tmp_path: Path) -> None:
    train(tmp_path, "--steps", "1")
    state = checkpoint(tmp_path)
    assert (state["step"], state["images"], state["classes"], state["scores"]) == (1, 4, {}, {})
    assert state["config"]["image_size"] == 16
    assert "random" not in state  # each step starts its random numbers anew
    assert state["versions"].keys() == {"python", "torch", "torch_sagan"}
    assert state["average"]["to_image.weight"].shape == state["generator"]["to_image.weight"].shape
    for network, rate in (("generator", 1e-4), ("discriminator", 4e-4)):
        (group,) = state[f"{network}_optimizer"]["param_groups"]
        assert (group["lr"], group["betas"]) == (rate, (0.0, 0.9))
        assert len(state[f"{network}_optimizer"]["state"]) == len(group["params"])
        assert state[f"{network}_scheduler"]["last_epoch"] == 1


def test_resuming_keeps_the_settings_except_those_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, "--steps", "1", "--lr-g", "0.003", "--seed", "7")
    resume(tmp_path / "checkpoint.pt", "--steps", "2", "--lr-d", "0.007", "--seed", "7")
    state = checkpoint(tmp_path)
    assert state["config"]["seed"] == 7
    assert state["generator_optimizer"]["param_groups"][0]["lr"] == 0.003
    assert state["discriminator_optimizer"]["param_groups"][0]["lr"] == 0.007
    assert "changed   --steps 2 (it has 1), --lr-d 0.007 (it has 0.0004)\n" in capsys.readouterr().out


def test_auto_begins_goes_on_and_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for steps in ("2", "4", "4"):
        assert train(tmp_path, "--resume", "auto", "--steps", steps) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"complete  {tmp_path} is at step 4 (--steps 4); a larger --steps trains on"
    assert [line["step"] for line in lines(tmp_path)] == [2, 4]
    assert not list(tmp_path.glob("earlier-*"))


def test_no_file_is_read_where_reading_is_not_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, "--steps", "1")
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.5.1+cpu"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("read"))
    message = r"^torch 2\.5\.1\+cpu can execute code .*CVE-2025-32434\): the examples need 2\.6 or newer$"
    for refused in (
        lambda: train(tmp_path / "new", "--steps", "1"),  # it could not be resumed
        lambda: checkpointing.load(tmp_path / "checkpoint.pt"),
        lambda: model_card.open_generator(tmp_path),
    ):
        with pytest.raises(SystemExit, match=message):
            refused()
    assert not (tmp_path / "new").exists()


def test_other_versions_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, "--steps", "1")
    state = checkpoint(tmp_path)
    state["versions"]["torch"] = "1.0"
    torch.save(state, tmp_path / "checkpoint-000001.pt")
    resume(tmp_path, "--steps", "2")
    assert "made with torch 1.0\n" in capsys.readouterr().out
