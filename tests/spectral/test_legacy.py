"""PyTorch's older hook: found beside the parametrizations, and removed without a trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import spectral_norm as legacy_spectral_norm

from normalized_layers import NORMALIZERS, normalizers
from torch_sagan import (
    apply_spectral_norm,
    convert_legacy_spectral_norm,
    remove_spectral_norm,
    spectral_norm,
    spectral_norms,
)


def test_two_weights_of_one_module_in_two_ways() -> None:
    """PyTorch's hook on one weight does not affect another weight of the same module."""
    cell = legacy_spectral_norm(nn.LSTMCell(3, 4), "weight_hh")
    spectral_norm(cell, "weight_ih")
    with pytest.raises(ValueError, match="'weight_hh' of ParametrizedLSTMCell is spectrally normalized already"):
        spectral_norm(cell, "weight_hh")
    assert set(spectral_norms(cell)) == {"weight_hh", "weight_ih"}
    remove_spectral_norm(cell, "weight_hh")
    assert set(spectral_norms(cell)) == {"weight_ih"}
    assert set(dict(cell.named_parameters())) >= {"weight_hh", "parametrizations.weight_ih.original"}


def hooks(layer: nn.Module) -> dict[str, int]:
    return {name: len(value) for name, value in vars(layer).items() if "hooks" in name and hasattr(value, "__len__")}


@normalizers
def test_nothing_is_left_after_removal(normalizer: str) -> None:
    """The state dict loads, strictly, into the layer itself; the module has the hooks and the class of a plain one."""
    plain, layer = nn.Conv2d(3, 4, 3), NORMALIZERS[normalizer](nn.Conv2d(3, 4, 3))
    layer(torch.randn(1, 3, 5, 5))
    remove_spectral_norm(layer)
    layer.load_state_dict(layer.state_dict())
    layer.load_state_dict(plain.state_dict())
    plain.load_state_dict(layer.state_dict())
    assert hooks(layer) == hooks(plain)
    assert type(layer) is nn.Conv2d
    assert vars(layer).keys() == vars(plain).keys()


@pytest.mark.parametrize("remove", [remove_spectral_norm, nn.utils.remove_spectral_norm], ids=["ours", "torch's"])
@pytest.mark.parametrize("implementation", ["sagan", "torch"])
def test_an_old_model_is_renewed_saved_and_resumed(
    remove: Callable[[nn.Module], nn.Module], implementation: str, tmp_path: Path
) -> None:
    """PyTorch's own removal leaves a hook behind that asks every state dict for ``weight_orig``."""
    layer = legacy_spectral_norm(nn.Conv2d(3, 4, 3))
    layer(torch.randn(1, 3, 5, 5))
    remove(layer)
    network = apply_spectral_norm(nn.Sequential(layer), implementation=implementation)
    torch.save(network.state_dict(), tmp_path / "network.pt")
    state = torch.load(tmp_path / "network.pt", weights_only=True)
    fresh = apply_spectral_norm(nn.Sequential(nn.Conv2d(3, 4, 3)), implementation=implementation)
    x = torch.randn(1, 3, 5, 5)
    for resumed in (network, fresh):
        resumed.load_state_dict(state)
        assert torch.equal(resumed.eval()(x), network.eval()(x))


def test_removal_leaves_the_hooks_of_other_weights() -> None:
    """A state dict of PyTorch's first form, without v, still loads into the weight that keeps the older norm."""
    cell = legacy_spectral_norm(legacy_spectral_norm(nn.LSTMCell(3, 4), "weight_hh"), "weight_ih")
    twin = copy.deepcopy(cell)
    remove_spectral_norm(cell, "weight_hh")
    cell.load_state_dict(cell.state_dict())
    state = cell.state_dict()
    del state["weight_ih_v"]
    state["weight_ih"] = twin.weight_ih_orig / 2
    state._metadata[""].clear()
    cell.load_state_dict(state)
    sigma = cell.weight_ih_u @ cell.weight_ih_orig @ cell.weight_ih_v
    assert sigma.item() == pytest.approx(2, rel=1e-4)  # as the stored weight says


def test_parameters_that_do_not_require_gradients_stay_so() -> None:
    layer = legacy_spectral_norm(nn.Linear(3, 4).requires_grad_(False))
    remove_spectral_norm(layer)
    assert not layer.weight.requires_grad
    assert isinstance(layer.weight, nn.Parameter)


def test_a_whole_checkpoint_is_not_a_state_dict() -> None:
    state = legacy_spectral_norm(nn.Linear(2, 2)).state_dict()
    with pytest.raises(TypeError, match="got a mapping that has some: give its entry 'D'"):
        convert_legacy_spectral_norm({"D": state, "step": 3})  # type: ignore[dict-item]
