"""Attention in existing models: their outputs and keys stay, after every kind of host, until the layers are trained."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from existing_models import (
    Pyramid,
    ResidualBlock,
    dcgan_generator,
    inserted,
    patch_discriminator,
    residual_generator,
    wake,
)
from torch_sagan import (
    SelfAttention2d,
    apply_spectral_norm,
    insert_self_attention,
    record_attention,
    remove_self_attention,
    remove_spectral_norm,
    spectral_norms,
)
from torch_sagan.attention.layer import SelfAttention

X = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)

EXAMPLE = {"x": torch.zeros(2, 3, 6, 6), "scale": torch.ones(1)}


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


def test_outputs_gradients_and_keys_are_unchanged(case: tuple[nn.Module, list[str], Tensor]) -> None:
    model, after, x = case
    twin, keys = copy.deepcopy(model), list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    assert insert_self_attention(model, after, example_input=x) is model

    kept = [key for key in model.state_dict() if "inserted_attention" not in key]
    assert kept == keys
    assert [type(m) for name, m in model.named_modules() if "inserted_attention" not in name] == classes
    assert sorted(f"{path}.inserted_attention" for path in after) == sorted(
        name for name, module in model.named_modules() if isinstance(module, SelfAttention) and "inserted" in name
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


def test_a_module_that_is_used_twice_attends_twice() -> None:
    model = Pyramid()
    before = model(**EXAMPLE)
    insert_self_attention(model, "block", example_input=EXAMPLE)
    assert torch.equal(model(**EXAMPLE), before)
    with record_attention(model) as records:
        model(**EXAMPLE)
    assert [len(calls) for calls in records.values()] == [2]


def test_a_sequential_grows_by_one() -> None:
    model = insert_self_attention(residual_generator(), "model", example_input=torch.randn(1, 3, 16, 16))
    assert len(model.model) == len(residual_generator().model) + 1
    assert model.model[-1] is model.model.inserted_attention


def test_an_attention_of_your_own() -> None:
    model = insert_self_attention(dcgan_generator(), "model.1", example_input=X, attention=SelfAttention2d.official)
    assert inserted(model)[0].pool == 2
    with pytest.raises(TypeError, match="attention must return a module, got int"):
        insert_self_attention(model, "model.4", example_input=X, attention=lambda channels: channels)


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


# --- channels, dtypes and devices ------------------------------------------------------------------------------------


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
        (nn.Sequential(nn.Conv2d(3, 9, 1), nn.SyncBatchNorm(6)), 6),
        (nn.Sequential(nn.Conv2d(3, 9, 1), nn.GroupNorm(2, 6)), 6),
        (SelfAttention2d(6), 6),
        (nn.Sequential(nn.Conv2d(3, 9, 1), nn.Conv2d(9, 6, 1), nn.InstanceNorm2d(9), nn.ReLU(), nn.MaxPool2d(2)), 6),
        (nn.Sequential(nn.Sequential(nn.Conv2d(3, 6, 1)), nn.Tanh()), 6),
    ],
    ids=lambda value: type(value).__name__,
)
def test_channels_that_a_module_declares(module: nn.Module, channels: int) -> None:
    model = insert_self_attention(nn.Sequential(module), "0")
    assert inserted(model)[0].channels == channels


def test_an_example_may_be_keywords_or_arguments() -> None:
    model = Pyramid()
    example = {"x": torch.randn(2, 3, 6, 6), "scale": torch.ones(1)}
    insert_self_attention(model, "block.0", example_input=example)
    insert_self_attention(model, "narrow", example_input=(example["x"], example["scale"]))
    assert [layer.channels for layer in inserted(model)] == [8, 4]


def test_an_example_decides_dtype_and_device() -> None:
    """And not the first parameter: norms may be in another precision, and parts of a model on another device."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(1, 3)
            self.near = nn.Conv2d(3, 4, 1, dtype=torch.bfloat16)
            self.far = nn.Conv2d(4, 8, 1, dtype=torch.bfloat16, device="meta")  # stands in for a second device
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return (
                self.far(self.near(self.norm(x).bfloat16()).to("meta")).float() + self.act(x.double()).to("meta").mean()
            )

    model = insert_self_attention(Parts(), ["norm", "near", "far", "act"], example_input=X)
    for host, dtype, device in [
        (model.norm, torch.float32, "cpu"),
        (model.near, torch.bfloat16, "cpu"),
        (model.far, torch.bfloat16, "meta"),
        (model.act, torch.float64, "cpu"),
    ]:
        assert {(p.dtype, p.device.type) for p in host.inserted_attention.parameters()} == {(dtype, device)}
    assert model(X).shape == (2, 8, 4, 4)


def test_without_an_example_the_own_parameters_decide() -> None:
    model = nn.Sequential(
        nn.GroupNorm(1, 3), nn.Conv2d(3, 4, 1, dtype=torch.bfloat16), nn.Sequential(nn.Conv2d(4, 4, 1))
    )
    insert_self_attention(model, ["1", "2"])
    assert [layer.gamma.dtype for layer in inserted(model)] == [torch.bfloat16, torch.float32]
    assert not inserted(insert_self_attention(nn.Sequential(nn.InstanceNorm2d(3), nn.GroupNorm(1, 3)).half(), "1"))[
        0
    ].gamma.any()


@pytest.mark.parametrize("inside", [True, False])
def test_under_autocast_weights_stay_in_the_precision_of_the_model(inside: bool) -> None:
    """Its outputs are in half precision then, the weights that are trained are not."""

    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                return self.conv(x)

    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        model = insert_self_attention(
            Casting() if inside else nn.Sequential(Casting()), "conv" if inside else "0.conv", example_input=X
        )
        assert {p.dtype for layer in inserted(model) for p in layer.parameters()} == {torch.float32}


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


def test_a_lazy_module_that_has_not_run() -> None:
    model = insert_self_attention(nn.Sequential(nn.LazyConv2d(4, 1)).double(), "0", example_input=X.double())
    assert model(torch.ones(2, 3, 5, 5, dtype=torch.double)).shape == (2, 4, 5, 5)
    assert inserted(model)[0].gamma.dtype == torch.double


# --- neutrality ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (4, 6)], ids=str)
@pytest.mark.parametrize("attention", [SelfAttention2d, SelfAttention2d.paper])
def test_a_new_layer_keeps_bits_and_strides(
    attention: Callable[[int], nn.Module], size: tuple[int, int], layout: torch.memory_format
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()).to(memory_format=layout)
    x = torch.randn(2, 3, *size).to(memory_format=layout)
    before = model(x)
    insert_self_attention(model, ["0", "1"], example_input=x, attention=attention)
    after = model(x)
    assert torch.equal(after, before)
    assert after.stride() == before.stride()


def test_without_an_example_a_layer_is_where_its_host_or_the_model_is() -> None:
    # meta stands in for a second device
    model = nn.Sequential(nn.Conv2d(3, 4, 1, device="meta"), nn.GroupNorm(1, 4, affine=False))
    insert_self_attention(model, ["0", "1"])
    assert [layer.gamma.device.type for layer in inserted(model)] == ["meta", "meta"]
    model = nn.Sequential(nn.GroupNorm(1, 4, affine=False))  # nothing tells
    insert_self_attention(model, "0", attention=SelfAttention2d)
    assert [layer.gamma.device.type for layer in inserted(model)] == ["cpu"]
