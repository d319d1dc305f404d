"""Wrappers, such as those of activation checkpointing and parallel training, also some that pass for what they wrap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh

from existing_models import wake
from torch_sagan import (
    SelfAttention2d,
    insert_self_attention,
    insertion_points,
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


@pytest.mark.filterwarnings("ignore:FSDP is switching:UserWarning")  # one process shards nothing
def test_sharded_models_keep_the_layer() -> None:
    def sharded_in_place(model: nn.Sequential) -> nn.Module:
        mesh = init_device_mesh("cpu", (1,))
        fsdp.fully_shard(model[1], mesh=mesh)
        fsdp.fully_shard(model, mesh=mesh)
        return model

    def wrapped(model: nn.Sequential) -> nn.Module:
        model[1] = fsdp.FullyShardedDataParallel(model[1], device_id=torch.device("cpu"))
        return fsdp.FullyShardedDataParallel(model, device_id=torch.device("cpu"))

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        # Up to torch 2.5 fully_shard is not public.
        for shard in (wrapped, *([sharded_in_place] if hasattr(fsdp, "fully_shard") else [])):
            model = network()
            without = model(IMAGES)
            expected = wake(insert_self_attention(model, "1", example_input=IMAGES))(IMAGES)
            sharded = shard(model)
            torch.testing.assert_close(sharded(IMAGES), expected)
            torch.testing.assert_close(remove_self_attention(sharded)(IMAGES), without)
            assert not torch.allclose(expected, without, atol=1e-3)
    finally:
        dist.destroy_process_group()


def test_attention_is_not_inserted_after_a_wrapper_that_renames_keys() -> None:
    """But after the module inside, as checkpoints of the model without wrappers have it."""
    model = network()
    model[0] = checkpoint_wrapper(model[0])
    with pytest.raises(ValueError, match=r"'0' is a CheckpointWrapper, which renames .*: name the module inside it"):
        insert_self_attention(model, "0", example_input=IMAGES)
    paths = [point.path for point in insertion_points(model, IMAGES)]
    assert paths == ["0._checkpoint_wrapped_module", "1", "2", "3"]
    wake(insert_self_attention(model, paths[0], example_input=IMAGES))
    plain = insert_self_attention(network(), "0", example_input=IMAGES)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(IMAGES), model(IMAGES))
    model.load_state_dict(network().state_dict())
    assert model[0].inserted_attention.gamma == 0


def test_a_wrapper_that_answers_for_an_attended_module() -> None:
    model = insert_self_attention(network(), "0", example_input=IMAGES)
    model[0] = Forwarding(model[0])
    with pytest.raises(
        ValueError, match="'0' has an attribute 'inserted_attention' already, its own or that of a module"
    ):
        insert_self_attention(model, "0", example_input=IMAGES)
