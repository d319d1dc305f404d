"""Evaluation mode inside a block: every module is in it, and has its own mode again afterwards."""

from __future__ import annotations

import pytest
from torch import nn

from torch_sagan._modes import evaluation_mode


class Watched(nn.Linear):
    """A module that does more when its mode is changed by `train`, as some models do."""

    def train(self, mode: bool = True) -> Watched:
        raise AssertionError("train() was called")


@pytest.mark.parametrize("fails", [False, True])
def test_each_module_gets_its_own_mode_back(fails: bool) -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm2d(3)), nn.ReLU())
    model[0].eval()
    model.append(Watched(2, 2))
    before = [module.training for module in model.modules()]
    assert True in before
    assert False in before
    try:
        with evaluation_mode(model):
            assert not any(module.training for module in model.modules())
            if fails:
                raise RuntimeError("inside the block")
    except RuntimeError:
        assert fails
    assert [module.training for module in model.modules()] == before
