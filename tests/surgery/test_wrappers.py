"""Wrappers, such as those of activation checkpointing and parallel training, also some that pass for what they wrap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from existing_models import wake
from torch_sagan import (
    SelfAttention2d,
    insert_self_attention,
    record_attention,
    remove_self_attention,
)

IMAGES = torch.linspace(-1, 1, 2 * 3 * 9 * 9).sin().view(2, 3, 9, 9)


class Forwarding(nn.Module):
    """It answers for the module inside, whatever it is asked."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()


@pytest.mark.parametrize("wrapper", [checkpoint_wrapper, Forwarding, nn.Sequential], ids=lambda f: f.__name__)
@pytest.mark.parametrize("what", ["host", "layer", "model"])
def test_a_wrapper_keeps_the_layer_and_loses_it_by_removal(wrapper: Any, what: str) -> None:
    model = network()
    without = model(IMAGES)
    wake(insert_self_attention(model, "1", example_input=IMAGES))
    expected = model(IMAGES)
    assert not torch.allclose(expected, without, atol=1e-3)
    if what == "host":
        model[1] = wrapper(model[1])
    elif what == "layer":
        model[1].inserted_attention = wrapper(model[1].inserted_attention)
    else:
        model = wrapper(model)
    assert torch.equal(model(IMAGES), expected)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert torch.equal(model(IMAGES), expected)
    with record_attention(model) as records:
        model(IMAGES)
    assert [len(calls) for calls in records.values()] == [1]
    remove_self_attention(model)
    assert torch.equal(model(IMAGES), without)
    assert not any(isinstance(module, SelfAttention2d) for module in model.modules())
    with pytest.raises(ValueError, match="has no inserted attention"):
        remove_self_attention(model)
