"""Removal: the model is as it was, whatever happened to it since, and keeps what it came with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from existing_models import inserted, wake
from torch_sagan import SAGANGenerator, SelfAttention2d, insert_self_attention, remove_self_attention


def test_removal_restores_the_model(case: tuple[nn.Module, list[str], Tensor]) -> None:
    model, after, x = case
    model.eval()
    names, text, before = [*model.state_dict()], repr(model), model(x.clone())
    insert_self_attention(model, after, example_input=x)
    wake(model)
    assert remove_self_attention(model) is model
    assert [*model.state_dict()] == names
    assert repr(model) == text
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(model(x.clone()), before)
    insert_self_attention(model, after, example_input=x)  # it can be inserted again
    assert len(inserted(model)) == len(after)


def test_removal_leaves_layers_and_hooks_that_the_model_came_with() -> None:
    model = SAGANGenerator(16, base_channels=4)
    calls = []
    insert_self_attention(model, "blocks.0", example_input=torch.randn(2, 128))
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    remove_self_attention(model)
    model(torch.randn(2, 128))
    assert calls == [1]
    assert [path for path, m in model.named_modules() if isinstance(m, SelfAttention2d)] == ["attention.8"]
    with pytest.raises(ValueError, match="SAGANGenerator has no inserted attention"):
        remove_self_attention(model)
