"""The state of a run: who learns from what, in which precision and layout, and what a checkpoint keeps of it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tiny_runs import checkpoint, leaves, noise, tiny_state, train
from training import objectives
from training.step import discriminator_step, generate, generator_step

pytestmark = pytest.mark.usefixtures("small_figures")


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def test_fakes_do_not_reach_the_generator_nor_gradients_the_discriminator() -> None:
    state = tiny_state()
    batch = next(noise(state))
    fakes = list(generate(state.gan, batch, learn=True))
    discriminator_step(state.gan, batch, fakes)
    assert all(weight.grad is None for weight in state.generator.parameters())
    before = gradients(state.discriminator)
    generator_step(state.gan, batch, fakes)
    assert all(weight.grad is not None for weight in state.generator.parameters())
    assert all(weight.requires_grad for weight in state.discriminator.parameters())
    for name, gradient in gradients(state.discriminator).items():
        torch.testing.assert_close(gradient, before[name], rtol=0, atol=0)


@pytest.mark.parametrize(("loss", "penalties"), [("hinge", 0), ("wgan-gp", 2), ("relativistic", 4)])
def test_half_precision_keeps_weights_in_float32(
    loss: str, penalties: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watch(name: str) -> None:
        penalty = getattr(objectives, name)

        def watched(discriminator: torch.nn.Module, images: torch.Tensor, *more: object, **named: object) -> object:
            seen.append((images.dtype, torch.is_autocast_enabled("cpu")))
            return penalty(discriminator, images, *more, **named)

        monkeypatch.setattr(objectives, name, watched)

    watch("gradient_penalty")
    watch("zero_centered_gradient_penalty")
    train(tmp_path, "--steps", "2", "--precision", "bf16", "--loss", loss)
    tensors = [value for _, value in leaves(checkpoint(tmp_path)) if isinstance(value, torch.Tensor)]
    assert torch.bfloat16 not in {tensor.dtype for tensor in tensors}
    assert seen == [(torch.float32, False)] * penalties
    state, dtypes = tiny_state(precision="bf16"), []
    for network in (state.generator, state.discriminator):
        network.register_forward_hook(lambda *passed: dtypes.append(passed[-1].dtype))
    state.advance(noise(state))
    assert dtypes == [torch.bfloat16] * 3  # G, D in its own step and in G's


def test_channels_last_changes_the_layout_alone() -> None:
    losses = []
    for layout in ("yes", "no"):
        state = tiny_state(channels_last=layout)
        losses.append(state.advance(noise(state)))
        wide = [weight for weight in state.discriminator.parameters() if weight.ndim == 4 and min(weight.shape[1:]) > 1]
        assert all(weight.is_contiguous(memory_format=torch.channels_last) is (layout == "yes") for weight in wide)
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize(("before", "after"), [("no", "yes"), ("yes", "no")])
def test_moments_take_the_layout_of_their_weights(before: str, after: str) -> None:
    """The next update is bitwise that of a run that never changed its layout. (Gradients are given, since convolutions
    of another layout round differently.)"""
    first = tiny_state(channels_last=before, beta1=0.5, lr_g=0.01, lr_d=0.01)
    drawn = noise(first)
    for _ in range(2):
        first.advance(drawn)
    saved = copy.deepcopy(first.state_dict())
    updated = []
    for layout in (before, after):
        state = tiny_state(channels_last=layout, beta1=0.5, lr_g=0.01, lr_d=0.01)
        state.load_state_dict(copy.deepcopy(saved))
        rng = torch.Generator().manual_seed(1)
        for network in ("generator", "discriminator"):
            optimizer = getattr(state, f"{network}_optimizer")
            for weight in getattr(state, network).parameters():
                for moment in ("exp_avg", "exp_avg_sq"):
                    assert optimizer.state[weight][moment].stride() == weight.stride()
                weight.grad = torch.empty_like(weight).copy_(torch.randn(weight.shape, generator=rng))
            optimizer.step()
        updated.append([dict(getattr(state, network).named_parameters()) for network in ("generator", "discriminator")])
    changed = 0
    for one, other in zip(*updated, strict=True):
        for name, weight in one.items():
            assert torch.equal(weight, other[name]), name
            changed += weight.stride() != other[name].stride()
    assert changed > 2


def test_how_adam_computes_is_a_setting_of_the_run_and_not_of_the_checkpoint() -> None:
    state = tiny_state()
    state.advance(noise(state))
    saved, groups = state.state_dict(), copy.deepcopy(state.generator_optimizer.state_dict()["param_groups"])
    (group,) = saved["generator_optimizer"]["param_groups"]
    other = {
        "fused": None,
        "foreach": True,
        "capturable": True,
        "lr": torch.tensor(0.5),
        "eps": 1.0,
        "betas": (0.1, 0.2),
    }
    saved["generator_optimizer"]["param_groups"] = [group | other]
    state.load_state_dict(saved)
    assert state.generator_optimizer.state_dict()["param_groups"] == groups


class Readings(TorchDispatchMode):
    """Counts the operations that copy a number from a tensor to Python, which would wait for the GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        packet = function.overloadpacket
        self.count += packet in (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero, torch.ops.aten.nonzero)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_step_reads_no_number_back(pieces: int) -> None:
    # With wgan-gp, since the gradient of D's spectral norm has a way of its own on the CPU that does.
    state = tiny_state(loss="wgan-gp", grad_accum_steps=pieces, lr_decay="linear")
    with Readings() as readings:
        state.advance(noise(state))
    assert readings.count == 0
    with Readings() as readings:
        state.numbers()
    assert readings.count == len(state.numbers()["gamma"]) > 0
