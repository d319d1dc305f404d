"""The averaged generator: weights are averaged, buffers copied, and a recalibrated copy is drawn and scored."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import train_celeba
from tiny_runs import assert_same, noise, tiny_state
from torch_sagan import spectral_norms
from training.average import update_average
from training.output import sampling
from training.output.sampling import draw
from training.step import training_step


def test_the_average_averages_weights_and_copies_buffers() -> None:
    state = tiny_state(lr_g=0.01, ema_decay=0.2)
    expected = [weight.double().clone() for weight in state.average.parameters()]
    batches = noise(state)
    for step in range(4):
        state.advance(batches)
        weights = [weight.detach().double() for weight in state.generator.parameters()]
        decay = min(0.2, (1 + step) / (10 + step))
        expected = [decay * a + (1 - decay) * b for a, b in zip(expected, weights, strict=True)]
    averaged = list(state.average.parameters())
    for a, b in zip(averaged, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-7)  # four roundings in float32
    assert not torch.equal(averaged[0], next(state.generator.parameters()))
    buffers = dict(state.generator.named_buffers())
    assert {name.rsplit(".")[-1] for name in buffers} >= {"_u", "_v", "running_mean", "running_var"}
    for name, buffer in state.average.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=0, atol=0)
    assert not state.average.training


def test_buffers_of_the_average_are_copied_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One operator for each type of number, not one for each buffer; and what is copied is equal, integers too."""
    state = tiny_state(architecture="resnet")
    training_step(state.gan, noise(state))
    copied, copy_all = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *tensors: copied.append(tensors[0]) or copy_all(*tensors))
    update_average(state.average, state.generator, decay=0.5, steps=0)
    assert {len({tensor.dtype for tensor in tensors}) for tensors in copied} == {1}
    assert sorted(str(tensors[0].dtype) for tensors in copied) == ["torch.float32", "torch.int64"]
    buffers = dict(state.generator.named_buffers())
    assert any(name.endswith("num_batches_tracked") and count == 1 for name, count in buffers.items())
    for name, buffer in state.average.named_buffers():
        assert torch.equal(buffer, buffers[name])


def test_drawing_and_scoring_recalibrate_a_copy_of_the_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With sigmas of 1, although those of the average itself are not; and no number of the run changes."""
    state = tiny_state(lr_g=0.05, ema_decay=0.5)
    batches = noise(state)
    for _ in range(3):
        state.advance(batches)
    before = copy.deepcopy(state.state_dict())
    worst = []

    def evaluate(generator: torch.nn.Module, seed: int) -> dict[str, float]:
        worst.append(max(abs(norm - 1) for norm in spectral_norms(generator).values()))
        assert not generator.training
        torch.rand(3)  # the numbers that an evaluation draws are not the training's
        return {"swd": float(generator(torch.ones(2, state.config.z_dim)).sum())}

    scores = []
    for _ in range(2):
        train_celeba.evaluate_average(state, evaluate)
        scores.append(state.scores)
    assert scores[0] == scores[1]
    assert worst[0] < 1e-5  # rounding in float32
    assert max(abs(norm - 1) for norm in spectral_norms(state.average).values()) > 1e-3
    state.best, state.scores = before["best"], before["scores"]
    drawn = [draw(state, tmp_path)["samples"].read_bytes() for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert_same(state.state_dict(), before)
    monkeypatch.setattr(sampling, "recalibrated", lambda average, counts: average)
    assert draw(state, tmp_path)["samples"].read_bytes() != drawn[0]


def test_a_diverged_run_ends_in_one_line(tmp_path: Path) -> None:
    state = tiny_state()
    with torch.no_grad():
        next(state.average.parameters()).fill_(float("nan"))
    for use in (
        lambda: draw(state, tmp_path),
        lambda: train_celeba.evaluate_average(state, lambda *_: pytest.fail("evaluated")),
    ):
        with pytest.raises(SystemExit, match=r"step 0: training has diverged, the averaged generator holds"):
            use()
