"""Copies, state dicts and pickles: what can be copied and saved, what is refused, and on which device it is made."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from subjects import ATTENTION, NORMALIZED, SUBJECTS, assert_close, build, channels_last, inputs, subjects
from torch_sagan import SelfAttention2d, spectral_norm


@subjects()
def test_deepcopy(subject: str) -> None:
    """The copy shares nothing with the original, whether it trains or not."""
    module = build(subject)
    state = copy.deepcopy(module.state_dict())
    twin = copy.deepcopy(module)
    x = inputs(subject, 3)
    for _ in range(2):
        twin(*x)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    twin.load_state_dict(state)
    assert torch.equal(twin(*x), module(*x))


@subjects()
def test_safetensors_of_a_channels_last_module(subject: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    module = build(subject).to(memory_format=channels_last(subject))
    if subject in ATTENTION:  # both formats of a 1×1 kernel are the same memory
        safetensors.save_file(module.state_dict(), tmp_path / "weights")
    else:
        with pytest.raises(ValueError, match="contiguous"):
            safetensors.save_file(module.state_dict(), tmp_path / "weights")
    state = {name: value.contiguous() for name, value in module.state_dict().items()}
    safetensors.save_file(state, tmp_path / "weights")
    assert all(torch.equal(value, state[name]) for name, value in safetensors.load_file(tmp_path / "weights").items())


@subjects(NORMALIZED)
def test_pickled_module(subject: str) -> None:
    """Under a parametrization torch refuses, whichever it is. (The rest: ``test_fresh_process.py``.)"""
    module = build(subject)
    for dump in (pickle.dumps, lambda module: torch.save(module, io.BytesIO())):
        with pytest.raises(RuntimeError, match=r"only supported through state_dict\(\)"):
            dump(module)


@pytest.mark.parametrize("assign", [False, True])
@subjects()
def test_meta_device(subject: str, assign: bool) -> None:
    """Made without memory, asked for its shapes, and loaded later."""
    module = build(subject)
    x = inputs(subject, 3)
    with torch.device("meta"):
        empty = SUBJECTS[subject].make().double()
        assert all(value.is_meta for value in empty.state_dict().values())
        shape = empty(*(t.to("meta") for t in x)).shape
    if not assign:
        empty = empty.to_empty(device="cpu")
    empty.load_state_dict(copy.deepcopy(module.state_dict()), assign=assign)
    y = empty(*x)
    assert y.shape == shape
    assert torch.equal(y, module(*x))


def test_state_dict_of_another_variant() -> None:
    """An error that names every key: missing, unexpected, of other sizes. ``strict=False`` forgives the first two."""
    default, official = SelfAttention2d(16), SelfAttention2d.official(16)
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*out\.weight.*Unexpected.*query\.bias.*value\.weight.*16.*8"):
        official.load_state_dict(default.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for value\.weight"):
        official.load_state_dict(default.state_dict(), strict=False)
    projected = SelfAttention2d(16, out_projection=True)
    missing, unexpected = projected.load_state_dict(default.state_dict(), strict=False)
    assert missing == ["out.weight", "out.bias"]
    assert unexpected == []
    assert torch.equal(projected.value.weight, default.value.weight)


def test_state_dict_of_a_plain_layer() -> None:
    plain, normalized = nn.Conv2d(4, 6, 3), spectral_norm(nn.Conv2d(4, 6, 3))
    with pytest.raises(RuntimeError, match=r'(?s)Missing.*parametrizations\.weight\.original.*Unexpected.*"weight"'):
        normalized.load_state_dict(plain.state_dict())


@subjects(NORMALIZED)
def test_state_dicts_of_both_implementations(subject: str) -> None:
    """Strict, in both directions. PyTorch has no norm of a convolution."""
    if subject == "spectral norm of a convolution":
        with pytest.raises(RuntimeError, match=r"size mismatch for parametrizations\.weight\.0\._u"):
            build("torch's spectral norm").load_state_dict(build(subject).state_dict())
        return

    def theirs() -> nn.Module:
        module = build(subject)
        for part in list(module.modules()):
            if parametrize.is_parametrized(part, "weight"):
                dim = part.parametrizations.weight[0].dim
                parametrize.remove_parametrizations(part, "weight", leave_parametrized=False)
                spectral_norm(part, dim=dim, implementation="torch")
        return module

    x = inputs(subject, 3)
    for source, destination in [(build(subject), theirs()), (theirs(), build(subject))]:
        source(*x)
        destination.load_state_dict(source.state_dict(), strict=True)
        assert_close(destination.eval()(*x), source.eval()(*x))
