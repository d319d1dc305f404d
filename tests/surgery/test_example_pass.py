"""The pass of an example leaves no trace: modes, buffers, hooks and random states stay, after an error too."""

from __future__ import annotations

import copy
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from existing_models import Restless, Wrapped
from torch_sagan import insert_self_attention, insertion_points, spectral_norm


def test_the_pass_of_an_example_leaves_no_trace() -> None:
    model = nn.Sequential(Restless(), nn.Dropout(), spectral_norm(nn.Conv2d(3, 4, 1)), nn.ReLU())
    model[1].eval()  # modes may differ
    modes = [module.training for module in model.modules()]
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    # A layer without weights, since weights would be drawn.
    insert_self_attention(model, "3", example_input=torch.zeros(2, 3, 4, 4), attention=lambda channels: nn.Identity())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()][: len(modes)] == modes
    assert not any(module._forward_hooks for module in list(model)[:3])
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_pass_that_fails_leaves_no_trace() -> None:
    model = Wrapped(Restless(), nn.Conv2d(3, 4, 1))
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        insert_self_attention(model, "model.0", example_input=torch.randn(1, 5, 4, 4))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert model.model[0].count == 0


def test_no_random_state_advances() -> None:
    """Neither PyTorch's, nor NumPy's, nor Python's, whether the pass succeeds or not."""

    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x + random.random() + np.random.rand() + torch.rand(1))  # noqa: NPY002  the global state

    def states() -> tuple[object, ...]:
        numpy = np.random.get_state()  # noqa: NPY002
        return random.getstate(), numpy[1].tolist(), numpy[2:], torch.get_rng_state().tolist()

    model, x = Drawing(), torch.zeros(1, 3, 4, 4)
    before = states()
    insertion_points(model, x)
    assert states() == before
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        insertion_points(model, torch.zeros(1, 5, 4, 4))
    assert states() == before
    model(x)
    assert states() != before


@pytest.mark.exhaustive  # a fresh process that imports torch
def test_numpy_is_not_needed() -> None:
    """Where NumPy is not loaded, as without it PyTorch works too, it is neither loaded nor asked."""
    code = """
import sys
sys.modules["numpy"] = None  # as if it were not installed
import warnings
warnings.simplefilter("ignore")
import torch
from torch_sagan import insertion_points
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1))
print([point.path for point in insertion_points(model, torch.zeros(1, 3, 4, 4))])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "['0']\n", done.stderr
