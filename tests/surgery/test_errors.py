"""What cannot be inserted is a clear error, and leaves the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from existing_models import Pyramid, ResidualBlock, dcgan_generator
from torch_sagan import SelfAttention2d, insert_self_attention, remove_self_attention

X = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)

EXAMPLE = {"x": torch.zeros(2, 3, 6, 6), "scale": torch.ones(1)}


class Dense(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = x + layer(x)
        return x


@pytest.mark.parametrize(
    ("after", "example", "message"),
    [
        ("blok.0", EXAMPLE, r"Pyramid has no module 'blok\.0'; the nearest are 'block\.0'"),
        ("@", EXAMPLE, r"Pyramid has no module '@'; model.named_modules\(\) lists"),
        ("", EXAMPLE, r"Pyramid has no module ''"),
        ([], EXAMPLE, "after names no module"),
        (["stem", "stem"], EXAMPLE, "'stem' names a module that is named already"),
        (["act", "block.2"], EXAMPLE, r"'block\.2' names a module that is named already"),
        (
            "act",
            EXAMPLE,
            r"'act' runs 3 times, with \(B, 4, H, W\) on cpu .* and \(B, 8, H, W\) on cpu .*: one layer cannot",
        ),
        (
            "split",
            EXAMPLE,
            r"'split' returns a tuple of 2, expected a feature map \(B, C, L\), .* or \(B, C, D, H, W\)$",
        ),
        ("head", EXAMPLE, r"'head' returns a tensor \(2, 2\), expected a feature map"),
        ("spare", EXAMPLE, "'spare' is not reached: .* does not call it, but perhaps the modules inside it$"),
        ("spare.0", EXAMPLE, r"'spare\.0' is not reached: .* does not call it$"),
    ],
)
def test_errors_leave_the_model_as_it_was(after: str | list[str], example: dict[str, Tensor], message: str) -> None:
    model = Pyramid()
    text = repr(model)
    paths = after if isinstance(after, list) else ["stem", after]
    with pytest.raises(ValueError, match=message):
        insert_self_attention(model, paths, example_input=example)
    assert repr(model) == text
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"after": 1}, "after takes dotted paths, got int"),
        ({"after": None}, "after takes dotted paths, got NoneType"),
        ({"after": nn.ReLU()}, "after takes dotted paths, got ReLU"),
        ({"after": ["model.0", 1]}, "after takes dotted paths, got int"),
        ({"after": "model.0", "attention": SelfAttention2d(8)}, "attention takes channels .* got SelfAttention2d"),
        ({"after": "model.0", "attention": "official"}, "attention takes channels .* got str"),
        ({"after": "model.2", "example_input": [torch.zeros(1, 3, 4, 4)]}, "example_input takes a tensor, .* got list"),
        ({"after": "model.0", "example_input": "x"}, "example_input takes a tensor, .* got str"),
    ],
)
def test_arguments_of_another_type(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        insert_self_attention(dcgan_generator(), **({"example_input": X} | arguments))


def test_a_path_without_its_beginning_is_completed() -> None:
    with pytest.raises(ValueError, match=r"no module '1'; the nearest are 'model\.1'$"):
        insert_self_attention(dcgan_generator(), "1", example_input=X)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.ReLU(), r"'0' \(ReLU\) does not declare how many channels it returns: give an example_input"),
        (nn.Sequential(nn.Conv2d(3, 6, 1), nn.Flatten()), r"'0' \(Sequential\) does not declare"),
        (nn.Sequential(nn.ReLU()), r"'0' \(Sequential\) does not declare"),
        (ResidualBlock(4), r"'0' \(ResidualBlock\) does not declare"),
        (nn.Linear(3, 4), r"'0' \(Linear\) does not declare"),
        (nn.PixelShuffle(2), r"'0' \(PixelShuffle\) does not declare"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_channels_that_need_an_example(module: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        insert_self_attention(nn.Sequential(module), "0")


@pytest.mark.filterwarnings("ignore:FSDP is switching:UserWarning")  # one process shards nothing
def test_what_would_not_notice_the_layer_is_refused() -> None:
    in_part = nn.Sequential(torch.compile(nn.Conv2d(3, 3, 1), backend="eager"))
    in_place = nn.Sequential(nn.Conv2d(3, 3, 1))
    in_place.compile(backend="eager")
    for model in in_part, in_place:
        with pytest.raises(ValueError, match="Sequential is compiled, and would not run the new layers"):
            insert_self_attention(model, "0", example_input=torch.zeros(1, 3, 4, 4))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Conv2d(3, 3, 1)))
        sharded = FullyShardedDataParallel(nn.Sequential(nn.Conv2d(3, 3, 1)), device_id=torch.device("cpu"))
        for model, kind in (wrapped, "DistributedDataParallel"), (sharded, "FullyShardedDataParallel"):
            with pytest.raises(ValueError, match=rf"the model is wrapped \({kind}\): insert before you wrap it"):
                insert_self_attention(model, "module.0", example_input=X)
    finally:
        dist.destroy_process_group()
    with pytest.raises(ValueError, match=r"the model is wrapped in DataParallel: insert into its \.module"):
        insert_self_attention(nn.DataParallel(nn.Conv2d(3, 3, 1)), "module", example_input=X)


def test_a_second_insertion_is_an_error() -> None:
    model = insert_self_attention(dcgan_generator(), "model.1", example_input=X)
    with pytest.raises(ValueError, match=r"'model\.1' has an inserted attention layer already"):
        insert_self_attention(model, "model.1", example_input=X)


def test_a_sequential_with_a_forward_of_its_own_is_refused() -> None:
    model = nn.Sequential(Dense(nn.Conv2d(3, 3, 1), nn.ReLU()))
    with pytest.raises(ValueError, match="'0' is a Sequential with a forward of its own"):
        insert_self_attention(model, "0", example_input=X)
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))
    parts = list(model[0])
    model[0].forward = lambda x: parts[1](parts[0](x))  # as libraries do that patch instances
    for example in X, None:
        with pytest.raises(ValueError, match="'0' is a Sequential with a forward of its own"):
            insert_self_attention(model, "0", example_input=example)


def test_an_attribute_of_that_name_is_not_overwritten() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    model[0].inserted_attention = "mine"
    with pytest.raises(ValueError, match="'0' has an attribute 'inserted_attention' already"):
        insert_self_attention(model, "0", example_input=X)


def test_children_of_that_name_are_left_alone() -> None:
    """A model may have an ``inserted_attention`` that it calls itself."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inserted_attention = wake_layer(SelfAttention2d(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.inserted_attention(x)

    def wake_layer(layer: SelfAttention2d) -> SelfAttention2d:
        nn.init.ones_(layer.gamma)
        return layer

    model = nn.Sequential(Own())
    assert torch.equal(model(X), model[0].inserted_attention(X))
    assert not model[0]._forward_hooks
    with pytest.raises(ValueError, match="'0' has an attribute 'inserted_attention' already"):
        insert_self_attention(model, "0", example_input=X)
    with pytest.raises(ValueError, match="Sequential has no inserted attention"):
        remove_self_attention(model)
    model[0].inserted_attention = nn.Identity()
    assert torch.equal(model(X), X)


def test_what_is_not_called_as_a_module_is_an_error() -> None:
    """Hooks, and so the layer, run where a module is called, and not where its forward is."""

    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv.forward(x)

    with pytest.raises(ValueError, match=r"'conv' is not reached: with this example_input the model does not call it$"):
        insert_self_attention(Direct(), "conv", example_input=X)


def test_a_module_whose_calls_one_layer_cannot_serve() -> None:
    """Its outputs differ in dtype or in device. The meta device stands in for another one."""

    class Shared(nn.Module):
        def __init__(self, second: torch.dtype | str) -> None:
            super().__init__()
            self.act, self.second = nn.ReLU(), second

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.act(x).to(self.second))

    with pytest.raises(
        ValueError,
        match=r"'act' runs 2 times, with \(B, 3, H, W\) on cpu in torch\.float32 and .* in torch\.float64: one layer",
    ):
        insert_self_attention(Shared(torch.float64), "act", example_input=X)
    with pytest.raises(
        ValueError, match=r"'act' runs 2 times, with \(B, 3, H, W\) on cpu .* and \(B, 3, H, W\) on meta .*: one layer"
    ):
        insert_self_attention(Shared("meta"), "act", example_input=X)
