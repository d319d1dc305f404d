"""Attention in existing models: unchanged outputs and keys, every kind of host, clear errors, complete removal."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from existing_models import (
    Pyramid,
    ResidualBlock,
    Restless,
    Wrapped,
    dcgan_generator,
    patch_discriminator,
    residual_generator,
    unet,
)
from torch_sagan import (
    SAGANGenerator,
    SelfAttention2d,
    apply_spectral_norm,
    insert_self_attention,
    record_attention,
    remove_self_attention,
    remove_spectral_norm,
    spectral_norm,
    spectral_norms,
)

X = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)


class Example(NamedTuple):
    make: Callable[[], nn.Module]
    after: list[str]
    shape: tuple[int, ...]


# Attention sees 32×32 positions at most: whole maps of 128×128 take a gigabyte per sample.
MODELS = {
    "residual generator": Example(
        residual_generator, ["model.9", "model.12", "model.18", "model.10.conv_block"], (3, 32, 32)
    ),
    "patch discriminator": Example(patch_discriminator, ["model.4", "model.7", "model.10"], (3, 32, 32)),
    "dcgan generator": Example(dcgan_generator, ["model.0", "model.1", "model.5"], (3, 8, 8)),
    "unet": Example(
        unet,
        ["model.0", "model.1.model.0", "model.1.model.3.model.3", "model.1.model.3", "model.1.model.4"],
        (3, 32, 32),
    ),
    "whole Sequential": Example(residual_generator, ["model"], (3, 32, 32)),
    "own generator": Example(
        partial(SAGANGenerator, 16, base_channels=4, z_dim=8), ["blocks.0", "blocks.1.conv"], (8,)
    ),
}


@pytest.fixture(params=MODELS, ids=str)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, list[str], Tensor]:
    make, after, shape = MODELS[request.param]
    return make(), after, torch.randn(2, *shape)


def inserted(model: nn.Module) -> list[SelfAttention2d]:
    paths = [path for path, _ in model.named_modules() if path.split(".")[-1] == "inserted_attention"]
    return [model.get_submodule(path) for path in paths]


def wake(model: nn.Module) -> nn.Module:
    for layer in inserted(model):
        nn.init.ones_(layer.gamma)
    return model


def train(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs of three passes in training mode and one in evaluation, with the gradients between them."""
    torch.manual_seed(7)  # dropout
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen = []
    for _ in range(3):
        y = model(x.clone())
        optimizer.zero_grad()
        y.square().sum().backward()
        seen += [y.detach(), *(p.grad.clone() for name, p in model.named_parameters() if "inserted" not in name)]
    seen += [buffer.clone() for name, buffer in model.named_buffers() if "inserted" not in name]
    model.eval()
    return [*seen, model(x.clone()).detach()]


# --- the identity, until it is trained -----------------------------------------------------------------------------


def test_outputs_gradients_and_keys_are_unchanged(case: tuple[nn.Module, list[str], Tensor]) -> None:
    model, after, x = case
    twin, keys = copy.deepcopy(model), list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    assert insert_self_attention(model, after, example_input=x) is model

    kept = [key for key in model.state_dict() if "inserted_attention" not in key]
    assert kept == keys
    assert [type(m) for name, m in model.named_modules() if "inserted_attention" not in name] == classes
    assert sorted(f"{path}.inserted_attention" for path in after) == sorted(
        name for name, module in model.named_modules() if isinstance(module, SelfAttention2d) and "inserted" in name
    )
    for ours, theirs in zip(train(model, x), train(twin, x), strict=True):
        assert torch.equal(ours, theirs)


def test_every_layer_acts_once_it_is_trained(case: tuple[nn.Module, list[str], Tensor]) -> None:
    model, after, x = case
    model.eval()
    before = model(x.clone())
    insert_self_attention(model, after, example_input=x)
    for layer in inserted(model):
        nn.init.ones_(layer.gamma)
        assert not torch.allclose(model(x.clone()), before, atol=1e-4)
        nn.init.zeros_(layer.gamma)
    assert torch.equal(model(x.clone()), before)


def test_the_layer_receives_what_the_module_returned() -> None:
    model = insert_self_attention(residual_generator().eval(), "model.12", example_input=torch.randn(1, 3, 16, 16))
    wake(model)
    x = torch.randn(2, 3, 16, 16)
    y = model.model[:12](x)
    y = ResidualBlock.forward(model.model[12], y)  # without hooks
    y = y + (inserted(model)[0](y) - y)
    torch.testing.assert_close(model(x), model.model[13:](y))


def test_a_new_parameter_is_trained() -> None:
    model = insert_self_attention(patch_discriminator(), "model.4", example_input=torch.randn(1, 3, 32, 32))
    (layer,) = inserted(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = copy.deepcopy(layer.state_dict())
    for _ in range(3):  # gamma moves first, and then lets gradients through to the projections
        optimizer.zero_grad()
        model(torch.randn(4, 3, 32, 32)).square().mean().backward()
        optimizer.step()
    assert {name for name in before if not torch.equal(before[name], layer.state_dict()[name])} >= {
        "gamma", "query.weight", "key.weight", "value.weight", "value.bias",
    }  # fmt: skip


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


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_layer_takes_the_mode_and_dtype_of_its_host(training: bool, dtype: torch.dtype) -> None:
    model = dcgan_generator().to(dtype).train(training)
    x = torch.randn(2, 3, 4, 4, dtype=dtype)
    (layer,) = inserted(insert_self_attention(model, "model.2", example_input=x))
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer.training is training
    assert model(x).dtype == dtype


def test_a_layer_takes_the_device_of_its_host() -> None:
    model = insert_self_attention(dcgan_generator().to("meta"), "model.1", example_input=X.to("meta"))
    assert {p.device.type for p in inserted(model)[0].parameters()} == {"meta"}


def test_an_attention_of_your_own() -> None:
    model = insert_self_attention(dcgan_generator(), "model.1", example_input=X, attention=SelfAttention2d.official)
    assert inserted(model)[0].pool == 2
    with pytest.raises(TypeError, match="attention must return a module, got int"):
        insert_self_attention(model, "model.4", example_input=X, attention=lambda channels: channels)


# --- channels ------------------------------------------------------------------------------------------------------


@given(channels=st.integers(1, 24), size=st.integers(1, 12), rate=st.sampled_from([1, 2, 3]))
def test_an_example_tells_any_channels(channels: int, size: int, rate: int) -> None:
    model = nn.Sequential(nn.Conv2d(2, channels * rate**2, 1), nn.PixelShuffle(rate), nn.ReLU())
    x = torch.randn(1, 2, size, size)
    y = model(x)
    insert_self_attention(model, ["1", "2"], example_input=x)
    assert [layer.channels for layer in inserted(model)] == [channels, channels]
    assert torch.equal(model(x), y)


@pytest.mark.parametrize(
    ("module", "channels"),
    [
        (nn.Conv2d(3, 6, 1), 6),
        (nn.ConvTranspose2d(3, 6, 2), 6),
        (nn.BatchNorm2d(6), 6),
        (nn.SyncBatchNorm(6), 6),
        (nn.GroupNorm(2, 6), 6),
        (SelfAttention2d(6), 6),
        (nn.Sequential(nn.Conv2d(3, 9, 1), nn.Conv2d(9, 6, 1), nn.InstanceNorm2d(9), nn.ReLU(), nn.MaxPool2d(2)), 6),
        (nn.Sequential(nn.Sequential(nn.Conv2d(3, 6, 1)), nn.Tanh()), 6),
    ],
    ids=lambda value: type(value).__name__,
)
def test_channels_that_a_module_declares(module: nn.Module, channels: int) -> None:
    model = insert_self_attention(nn.Sequential(module), "0")
    assert inserted(model)[0].channels == channels


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


def test_an_example_may_be_keywords_or_arguments() -> None:
    model = Pyramid()
    example = {"x": torch.randn(2, 3, 6, 6), "scale": torch.ones(1)}
    insert_self_attention(model, "block.0", example_input=example)
    insert_self_attention(model, "narrow", example_input=(example["x"], example["scale"]))
    assert [layer.channels for layer in inserted(model)] == [8, 4]


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


# --- what is not possible ------------------------------------------------------------------------------------------

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
        ("act", EXAMPLE, r"'act' runs 3 times, with \[4, 8\] channels: one layer cannot serve them all"),
        ("split", EXAMPLE, r"'split' returns a tuple of 2, expected a feature map \(B, C, H, W\)"),
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
        with pytest.raises(
            ValueError, match="the model is wrapped in DistributedDataParallel: insert before you wrap it"
        ):
            insert_self_attention(wrapped, "module.0", example_input=X)
    finally:
        dist.destroy_process_group()


def test_a_lazy_module_that_has_not_run() -> None:
    model = insert_self_attention(nn.Sequential(nn.LazyConv2d(4, 1)).double(), "0", example_input=X.double())
    assert model(torch.ones(2, 3, 5, 5, dtype=torch.double)).shape == (2, 4, 5, 5)
    assert inserted(model)[0].gamma.dtype == torch.double


def test_a_second_insertion_is_an_error() -> None:
    model = insert_self_attention(dcgan_generator(), "model.1", example_input=X)
    with pytest.raises(ValueError, match=r"'model\.1' has an inserted attention layer already"):
        insert_self_attention(model, "model.1", example_input=X)


def test_a_sequential_with_a_forward_of_its_own_is_refused() -> None:
    model = nn.Sequential(Dense(nn.Conv2d(3, 3, 1), nn.ReLU()))
    with pytest.raises(ValueError, match="'0' is a Sequential with a forward of its own"):
        insert_self_attention(model, "0", example_input=X)


def test_an_attribute_of_that_name_is_not_overwritten() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    model[0].inserted_attention = "mine"
    with pytest.raises(ValueError, match="has an attribute 'inserted_attention' of its own"):
        insert_self_attention(model, "0", example_input=X)


def test_a_module_that_is_used_twice_attends_twice() -> None:
    model = Pyramid()
    before = model(**EXAMPLE)
    insert_self_attention(model, "block", example_input=EXAMPLE)
    assert torch.equal(model(**EXAMPLE), before)
    with record_attention(model) as records:
        model(**EXAMPLE)
    assert [len(calls) for calls in records.values()] == [2]


# --- checkpoints and copies ----------------------------------------------------------------------------------------


def test_a_checkpoint_from_before_the_insertion_loads(case: tuple[nn.Module, list[str], Tensor]) -> None:
    model, after, x = case
    trained = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.1)
    insert_self_attention(model, after, example_input=x)
    kept = copy.deepcopy([layer.state_dict() for layer in inserted(model)])
    checkpoint = trained.state_dict()
    keys = list(checkpoint)
    model.load_state_dict(checkpoint)  # strict
    assert list(checkpoint) == keys
    assert torch.equal(model.eval()(x.clone()), trained.eval()(x.clone()))
    for layer, values in zip(inserted(model), kept, strict=True):
        assert all(torch.equal(layer.state_dict()[name], value) for name, value in values.items())


def test_a_checkpoint_from_after_the_insertion_loads() -> None:
    x = torch.randn(2, 3, 32, 32)
    first, second = (insert_self_attention(unet(), "model.1", example_input=x).eval() for _ in range(2))
    wake(first)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))
    partly = {key: value for key, value in first.state_dict().items() if not key.endswith("query.weight")}
    with pytest.raises(
        RuntimeError, match=r'Missing key\(s\) in state_dict: "model.1.inserted_attention.query.weight"'
    ):
        second.load_state_dict(partly)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*inserted_attention"):
        unet().load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_have_layers_of_their_own(how: Callable[[nn.Module], nn.Module]) -> None:
    x = torch.randn(2, 3, 32, 32)
    model = wake(insert_self_attention(unet(), ["model.0", "model.1"], example_input=x)).eval()
    twin = how(model)
    assert torch.equal(twin(x), model(x))
    for layer in inserted(twin):
        nn.init.zeros_(layer.gamma)
    assert not torch.allclose(twin(x), model(x))
    original = twin(x)
    remove_self_attention(twin)
    assert torch.equal(twin(x), original)
    assert len(inserted(model)) == 2


def test_spectral_norm_and_surgery_go_together() -> None:
    x = torch.randn(2, 3, 32, 32)
    model = insert_self_attention(apply_spectral_norm(patch_discriminator()).eval(), "model.4", example_input=x)
    wake(model)
    assert torch.equal(remove_self_attention(copy.deepcopy(model))(x), apply_free(model, x))
    normalized = insert_self_attention(
        patch_discriminator(), ["model.2"], example_input=x, attention=normalized_attention
    )
    assert set(spectral_norms(normalized)) == {
        f"model.2.inserted_attention.{projection}.weight" for projection in ("query", "key", "value")
    }
    remove_spectral_norm(model.model[2])
    assert len(inserted(model)) == 1


def normalized_attention(channels: int) -> nn.Module:
    return apply_spectral_norm(SelfAttention2d(channels))


def apply_free(model: nn.Module, x: Tensor) -> Tensor:
    """The model's layers in order, without the inserted one."""
    for layer in model.model:
        x = type(layer).forward(layer, x)
    return x


@pytest.mark.slow  # the compiler takes seconds
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_it_compiles_in_one_graph_and_exports() -> None:
    x = torch.randn(2, 3, 32, 32)
    model = wake(insert_self_attention(unet(), ["model.0", "model.1", "model.2"], example_input=x)).eval()
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    with record_attention(compiled) as records:
        torch.testing.assert_close(compiled(x), expected)
    assert [len(calls) for calls in records.values()] == [1, 1, 1]


# --- conversions after the insertion -------------------------------------------------------------------------------


class Quantized(nn.Module):
    """A model to convert: a convolution, its norm and an activation, beside a block that contains another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.act(self.bn(self.conv(x))))


HOSTS = ["conv", "bn", "act", "block", "block.1"]
IMAGES = torch.linspace(-1, 1, 2 * 3 * 9 * 9).sin().view(2, 3, 9, 9)
quantization_is_deprecated = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def attentive(after: str | list[str]) -> nn.Module:
    """With statistics and a gamma for which every layer has an effect."""
    model = Quantized()
    model(2 * torch.randn(8, 3, 9, 9) + 1)
    return wake(insert_self_attention(model, after, example_input=IMAGES))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("after", HOSTS)
def test_synchronised_batch_norm_keeps_the_layer(after: str, training: bool) -> None:
    model = attentive(after).train(training)
    twin, keys = copy.deepcopy(model), list(model.state_dict())
    without = remove_self_attention(copy.deepcopy(model))(IMAGES)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(converted.bn, nn.SyncBatchNorm)
    assert isinstance(converted.block[1], nn.SyncBatchNorm)
    assert list(converted.state_dict()) == keys
    with record_attention(converted) as records:
        converted(IMAGES)
    assert [len(calls) for calls in records.values()] == [1]
    twin(IMAGES)
    expected = twin(IMAGES)
    assert torch.equal(converted(IMAGES), expected)
    assert not torch.allclose(expected, without, atol=1e-3)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_can_be_converted_and_converted_models_copied(how: Callable[[nn.Module], nn.Module]) -> None:
    model = attentive(HOSTS[:4]).eval()
    expected = model(IMAGES)
    first = nn.SyncBatchNorm.convert_sync_batchnorm(how(model))
    second = how(nn.SyncBatchNorm.convert_sync_batchnorm(model))
    for converted in first, second:
        assert torch.equal(converted(IMAGES), expected)
        nn.init.zeros_(converted.bn.inserted_attention.gamma)  # its own
        assert not torch.allclose(converted(IMAGES), expected, atol=1e-3)
    assert torch.equal(model(IMAGES), expected)
    loaded = attentive(HOSTS[:4])
    loaded.load_state_dict(nn.SyncBatchNorm.convert_sync_batchnorm(model).state_dict())
    assert torch.equal(loaded.eval()(IMAGES), expected)


def test_a_converted_module_attends_once_however_often_it_is_converted() -> None:
    model = attentive("bn").eval()
    expected = model(IMAGES)
    for _ in range(3):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.bn.add_module("inserted_attention", model.bn.inserted_attention)
    assert torch.equal(model(IMAGES), expected)
    assert not remove_self_attention(model).bn._forward_hooks


def test_a_module_with_two_parents_is_converted_in_both() -> None:
    model = attentive("bn").eval()
    model.again = nn.Sequential(nn.Conv2d(8, 8, 1), model.bn)
    expected, again = model(IMAGES), model.again(torch.ones(2, 8, 3, 3).triu())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert torch.equal(converted(IMAGES), expected)
    assert torch.equal(converted.again(torch.ones(2, 8, 3, 3).triu()), again)


def test_under_distributed_data_parallel() -> None:
    """Which refuses synchronised batch norm on the CPU."""
    model = attentive(["conv", "bn"]).eval()
    expected = model(IMAGES)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        y = nn.parallel.DistributedDataParallel(model)(IMAGES)
        y.square().sum().backward()
    finally:
        dist.destroy_process_group()
    assert torch.equal(y, expected)
    for host in model.conv, model.bn:
        assert host.inserted_attention.gamma.grad.abs().sum() > 0


class AttentionLeaves(torch.fx.Tracer):
    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return isinstance(module, SelfAttention2d) or super().is_leaf_module(module, path)


@pytest.mark.parametrize("tracer", [torch.fx.Tracer, AttentionLeaves])
def test_features_of_a_traced_model(tracer: type[torch.fx.Tracer]) -> None:
    """As torchvision's feature extractor makes them: trace, and return what the nodes below a path have computed."""
    model = attentive(["bn", "block"]).eval()
    features = []
    handle = model.block.inserted_attention.register_forward_hook(lambda *call: features.append(call[-1]))
    expected = model(IMAGES)
    handle.remove()
    graph = tracer().trace(model)
    traced = torch.fx.GraphModule(model, graph)
    # Traced into, the layer calls its three projections; by itself it makes one convolution of them: rounding differs.
    torch.testing.assert_close(traced(IMAGES), expected)
    leaves = [node.target for node in graph.nodes if node.op == "call_module"]
    assert ("block.inserted_attention" in leaves) == (tracer is AttentionLeaves)
    assert ("block.inserted_attention.query" in leaves) == (tracer is not AttentionLeaves)
    *_, last, output = graph.nodes
    output.args = ({"attended": last},)
    graph.eliminate_dead_code()
    extractor = torch.fx.GraphModule(model, graph)
    torch.testing.assert_close(extractor(IMAGES)["attended"], features[0])


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of the compiler's own modules
def test_a_converted_model_compiles_in_one_graph_and_exports() -> None:
    model = attentive(["conv", "bn"]).eval()
    expected = model(IMAGES)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(converted, fullgraph=True, backend="aot_eager")(IMAGES), expected)
    torch.testing.assert_close(torch.export.export(converted, (IMAGES,)).module()(IMAGES), expected)


@quantization_is_deprecated
@pytest.mark.parametrize("after", HOSTS)
def test_quantization_keeps_the_layer_or_is_an_error(after: str) -> None:
    """It creates a new convolution without the children of the old one."""
    model = attentive(after).train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    prepared = torch.ao.quantization.prepare_qat(model)
    if after == "conv":
        with pytest.raises(RuntimeError, match=r"^Conv2d has lost the attention that was inserted after it"):
            prepared(IMAGES)
        assert remove_self_attention(prepared)(IMAGES).shape == (2, 8, 7, 7)
    else:
        with record_attention(prepared) as records:
            prepared(IMAGES)
        assert {path: len(calls) for path, calls in records.items()} == {f"{after}.inserted_attention": 1}


@pytest.mark.parametrize("after", HOSTS)
def test_a_replacement_without_the_layer_is_refused(after: str) -> None:
    model = attentive(after).eval()
    expected = model(IMAGES)
    path, _, name = after.rpartition(".")
    parent = model.get_submodule(path)
    message = rf"'{name}' of \w+ has inserted attention, which its replacement \(Identity\) lacks"
    with pytest.raises(RuntimeError, match=message):
        setattr(parent, name, nn.Identity())
    with pytest.raises(RuntimeError, match=message):
        parent.add_module(name, nn.Identity())
    with pytest.raises(RuntimeError, match=r"has inserted attention, which its replacement \(NoneType\) lacks"):
        setattr(parent, name, None)
    assert torch.equal(model(IMAGES), expected)
    setattr(parent, name, copy.deepcopy(getattr(parent, name)))  # with a layer of its own
    assert torch.equal(model(IMAGES), expected)
    setattr(parent, name, nn.Sequential(getattr(parent, name)))  # wrapped
    assert torch.equal(model(IMAGES), expected)
    remove_self_attention(model)
    setattr(parent, name, nn.Identity())


def test_whatever_contains_a_layer_may_be_replaced() -> None:
    model = nn.Sequential(nn.Sequential(attentive("bn")), nn.ReLU())
    model[0] = nn.Identity()
    assert torch.equal(model(IMAGES), IMAGES.relu())


def test_fusing_a_norm_with_its_convolution() -> None:
    """The fused convolution contains the norm, whose layer would be lost with it; one after the activation stays."""
    model = attentive("bn").eval()
    fused = nn.utils.fusion.fuse_conv_bn_eval(model.conv, model.bn)
    with pytest.raises(RuntimeError, match="'bn' of Quantized has inserted attention"):
        model.bn = nn.Identity()
    remove_self_attention(model)
    model.conv, model.bn = fused, nn.Identity()
    model = attentive("act").eval()
    expected = model(IMAGES)
    model.conv, model.bn = nn.utils.fusion.fuse_conv_bn_eval(model.conv, model.bn), nn.Identity()
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-4, atol=1e-5)  # float32, in another order


@quantization_is_deprecated
@pytest.mark.parametrize("after", ["bn", "act"])
def test_fusing_for_quantization_does_not_drop_the_layer(after: str) -> None:
    with pytest.raises(RuntimeError, match=f"'{after}' of Quantized has inserted attention"):
        torch.ao.quantization.fuse_modules(attentive(after).eval(), ["conv", "bn", "act"])


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
    assert torch.equal(model(IMAGES), model[0].inserted_attention(IMAGES))
    assert not model[0]._forward_hooks
    with pytest.raises(ValueError, match="'0' has an attribute 'inserted_attention' of its own"):
        insert_self_attention(model, "0", example_input=IMAGES)
    with pytest.raises(ValueError, match="Sequential has no inserted attention"):
        remove_self_attention(model)
    model[0].inserted_attention = nn.Identity()
    assert torch.equal(model(IMAGES), IMAGES)


def test_a_sequential_grows_by_one() -> None:
    model = insert_self_attention(residual_generator(), "model", example_input=torch.randn(1, 3, 16, 16))
    assert len(model.model) == len(residual_generator().model) + 1
    assert model.model[-1] is model.model.inserted_attention


# --- recording -----------------------------------------------------------------------------------------------------


def test_maps_are_those_that_the_layer_returns(case: tuple[nn.Module, list[str], Tensor]) -> None:
    model, after, x = case
    model.eval()
    wake(insert_self_attention(model, after, example_input=x))
    inputs: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
        for name, layer in model.named_modules()
        if isinstance(layer, SelfAttention2d)
    ]
    expected = model(x.clone())
    for handle in handles:
        handle.remove()
    with record_attention(model) as records:
        output = model(x.clone())
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)  # the held map sums in another order
    assert set(records) == set(inputs)
    for name, calls in records.items():
        (record,) = calls
        _, attention = model.get_submodule(name)(inputs[name], return_attention=True)
        torch.testing.assert_close(record.attention, attention)
        assert record.query_size == tuple(inputs[name].shape[2:])
        assert not record.attention.requires_grad


@given(height=st.integers(2, 9), width=st.integers(2, 9), pool=st.integers(1, 2))
def test_sizes_of_queries_and_keys(height: int, width: int, pool: int) -> None:
    layer = SelfAttention2d(4, pool=pool)
    with record_attention(layer) as records:
        layer(torch.randn(1, 4, height, width))
    (record,) = records[""]
    assert record.query_size == (height, width)
    assert record.key_size == (height // pool, width // pool)
    assert record.attention.shape == (1, height * width, record.key_size[0] * record.key_size[1])


def test_the_gamma_is_that_of_the_call() -> None:
    layer = SelfAttention2d(4)
    with record_attention(layer) as records:
        for gamma in (-0.5, 0.25):
            nn.init.constant_(layer.gamma, gamma)
            layer(torch.randn(1, 4, 3, 3))
    gammas = [record.gamma for record in records[""]]
    assert [gamma.tolist() for gamma in gammas] == [[-0.5], [0.25]]
    assert not any(gamma.requires_grad for gamma in gammas)


def test_recording_leaves_no_trace() -> None:
    model = SAGANGenerator(16, base_channels=4)
    seen = []
    layer = model.attention["8"]
    layer.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    z = torch.randn(2, 128)
    with contextlib.suppress(KeyError), record_attention(model) as records:
        model(z)
        model(z)
        raise KeyError
    assert [len(calls) for calls in records.values()] == [2]
    assert len(layer._forward_hooks) == 1
    assert not layer._forward_pre_hooks
    model(z)
    assert len(records["attention.8"]) == 2
    assert seen == [Tensor] * 3  # the model's own hooks see what they always see


def test_recording_gives_the_map_to_those_who_ask_for_it() -> None:
    model = SAGANGenerator(16, base_channels=4).eval()
    z = torch.randn(2, 128)
    with record_attention(model) as outer, record_attention(model) as inner:
        _, (asked,) = model(z, return_attention=True)
        model(z)
    for records in (outer, inner):
        first, second = records["attention.8"]
        assert torch.equal(first.attention, asked)
        assert torch.equal(second.attention, asked)


def test_layers_that_do_not_run_have_no_records() -> None:
    model = nn.ModuleDict({"a": SelfAttention2d(4), "b": SelfAttention2d(4)})
    with record_attention(model) as records:
        model["b"](torch.randn(1, 4, 3, 3))
    assert {path: len(calls) for path, calls in records.items()} == {"a": 0, "b": 1}
    with pytest.raises(ValueError, match="Linear has no SelfAttention2d to record"), record_attention(nn.Linear(1, 1)):
        pass


# --- a model of somebody else --------------------------------------------------------------------------------------


@pytest.mark.slow  # importing the package takes seconds
@pytest.mark.filterwarnings("ignore")  # what another package warns of is its own affair
def test_the_unet_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    ).eval()
    example = {"sample": torch.randn(2, 3, 16, 16), "timestep": torch.tensor(7)}
    before, keys = model(**example).sample, list(model.state_dict())
    paths = ["conv_in", "down_blocks.0.resnets.0", "mid_block", "up_blocks.0.resnets.1", "up_blocks.1"]
    insert_self_attention(model, paths, example_input=example)
    assert torch.equal(model(**example).sample, before)
    assert [key for key in model.state_dict() if "inserted_attention" not in key] == keys
    with record_attention(wake(model)) as records:
        assert not torch.allclose(model(**example).sample, before)
    assert {path: len(calls) for path, calls in records.items()} == {f"{at}.inserted_attention": 1 for at in paths}
    with pytest.raises(ValueError, match=r"'down_blocks.0' returns a tuple of 2"):
        insert_self_attention(model, "down_blocks.0", example_input=example)
    assert torch.equal(remove_self_attention(model)(**example).sample, before)
