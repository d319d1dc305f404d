"""Settings of the training change what is trained, and only that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tiny_runs import checkpoint, leave_out_images, leaves, lines, resume, train
from training import objectives
from training.flags import Config
from training.objectives import LOSSES


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a tiny run's time, and no test here looks at images."""
    leave_out_images(monkeypatch)


def test_discriminator_steps(tmp_path: Path) -> None:
    train(tmp_path, "--steps", "2", "--d-steps", "3")
    assert checkpoint(tmp_path)["images"] == 2 * 3 * 4
    steps = {state["step"].item() for state in checkpoint(tmp_path)["discriminator_optimizer"]["state"].values()}
    assert steps == {6}


@pytest.mark.parametrize(("loss", "normalized"), [("hinge", True), ("wgan-gp", False), ("relativistic", True)])
def test_losses(loss: str, normalized: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, "--loss", loss, "--steps", "2")
    assert ("without spectral norm" in capsys.readouterr().out) is not normalized
    state = checkpoint(tmp_path)
    assert any("parametrizations" in name for name in state["discriminator"]) is normalized
    assert any("parametrizations" in name for name in state["generator"])


def test_the_weight_of_a_penalty() -> None:
    assert [Config(loss=loss).penalty for loss in LOSSES] == [0.0, 10.0, 1.0]  # the papers' own
    assert Config(loss="relativistic", penalty_weight="0.05").penalty == 0.05
    assert [Config(loss=loss).has_penalty for loss in LOSSES] == [False, True, True]


def test_in_pieces_every_step_sees_the_whole_batch(tmp_path: Path) -> None:
    train(tmp_path, "--steps", "3", "--grad-accum-steps", "2", "--d-steps", "2")
    state = checkpoint(tmp_path)
    assert state["images"] == 3 * 2 * 4
    assert {value["step"].item() for value in state["generator_optimizer"]["state"].values()} == {3}


def test_linear_decay_ends_at_zero(tmp_path: Path) -> None:
    train(tmp_path, "--steps", "6", "--lr-decay", "linear", "--decay-from", "2", "--lr-g", "0.004", "--log-every", "1")
    rates = [0.004, 0.004, 0.003, 0.002, 0.001, 0.0]  # for the step after each line
    assert [line["lr_g"] for line in lines(tmp_path)] == pytest.approx(rates)
    (group,) = checkpoint(tmp_path)["generator_optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(0.0)
    resume(tmp_path, "--steps", "10")  # of a longer run the rates are those of its own line
    assert [line["lr_g"] for line in lines(tmp_path)][6:] == pytest.approx([0.0015, 0.001, 0.0005, 0.0])


@pytest.mark.exhaustive  # tracing takes many seconds; aot_eager spares the compiler, which changes no graph
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'>:DeprecationWarning")  # the tracer's own
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("loss", ["hinge", "wgan-gp"])
def test_compiled(
    loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled = []
    plain = torch.nn.Module.compile

    def compile_without_inductor(module: torch.nn.Module, **more: object) -> None:
        compiled.append(type(module).__name__)
        plain(module, backend="aot_eager", **more)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_inductor)
    torch._dynamo.reset()
    train(tmp_path / "compiled", "--steps", "3", "--compile", "--loss", loss, "--image-size", "8", "--log-every", "1")
    assert compiled == ["SAGANGenerator"] + ["SAGANDiscriminator"] * (loss == "hinge")
    assert ("D not" in capsys.readouterr().out) is (loss == "wgan-gp")
    train(tmp_path / "eager", "--steps", "3", "--loss", loss, "--image-size", "8", "--log-every", "1")
    for one, other in zip(lines(tmp_path / "compiled"), lines(tmp_path / "eager"), strict=True):
        assert (one["loss_d"], one["loss_g"]) == pytest.approx((other["loss_d"], other["loss_g"]), rel=1e-4, abs=1e-5)
    eager, traced = (checkpoint(tmp_path / out)["generator"] for out in ("eager", "compiled"))
    assert eager.keys() == traced.keys()
    torch._dynamo.reset()


def test_losses_that_are_not_finite_stop_the_run_and_not_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hinge = objectives.hinge_discriminator_loss
    calls = []

    def diverging(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return hinge(real, fake) * (float("nan") if len(calls) > 2 else 1)

    monkeypatch.setattr(objectives, "hinge_discriminator_loss", diverging)
    with pytest.raises(SystemExit, match=r"step 4: .*no longer finite: loss of D nan, .*D's \d+ weight.* step 2, loss"):
        train(tmp_path, "--steps", "9", "--save-every", "2")
    state = checkpoint(tmp_path)
    assert state["step"] == 2
    weights = {name: value for name, value in state.items() if name != "best"}
    assert all(value.isfinite().all() for _, value in leaves(weights) if isinstance(value, torch.Tensor))
