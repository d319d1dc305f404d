"""The layers of every dimension against nested loops, one another and two other implementations; gamma ≠ 0, since 0
hides every error."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from references import (
    assert_all_close,
    attention_shapes,
    filled,
    l2_self_attention_by_loops,
    largest_singular_value,
    official_attention_shapes,
    rand,
    self_attention_by_loops,
)
from torch_sagan import SelfAttention1d, SelfAttention2d, SelfAttention3d
from torch_sagan.attention.layer import SelfAttention

pytestmark = pytest.mark.usefixtures("kernels")  # the branch of the CPU and that of CUDA

LAYERS: dict[int, type[SelfAttention]] = {1: SelfAttention1d, 2: SelfAttention2d, 3: SelfAttention3d}
VARIANTS: dict[str, Callable[[type[SelfAttention], int], SelfAttention]] = {
    "default": lambda kind, channels: kind(channels),
    "paper": lambda kind, channels: kind.paper(channels),
    "official": lambda kind, channels: kind.official(channels),
    "pooled": lambda kind, channels: kind(channels, pool=2),
    "no bias": lambda kind, channels: kind(channels, bias=False),
    "own sizes": lambda kind, channels: kind(channels, qk_channels=3, value_channels=5),
    "projected": lambda kind, channels: kind(channels, out_projection=True),
    "l2": lambda kind, channels: kind(channels, similarity="l2"),
}
variants = pytest.mark.parametrize("variant", VARIANTS)
dimensions = pytest.mark.parametrize("dims", LAYERS)
one_kernel = pytest.mark.parametrize("kernels", ["cpu"], indirect=True)  # none is reached, or it does not matter which


def build(variant: str, channels: int, gamma: float = 0.7, dims: int = 2) -> SelfAttention:
    layer = VARIANTS[variant](LAYERS[dims], channels).double()
    with torch.no_grad():
        layer.gamma.fill_(gamma)
    return layer


# --- what it computes ----------------------------------------------------------------------------------------------


def sizes(smallest: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Of feature maps of one, two or three dimensions, with some 60 positions at most."""
    largest = {1: 60, 2: 8, 3: smallest + 1}
    return st.sampled_from(list(LAYERS)).flatmap(lambda dims: st.tuples(*dims * [st.integers(smallest, largest[dims])]))


@given(variant=st.sampled_from(sorted(VARIANTS)), batch=st.integers(1, 2), channels=st.integers(1, 20), size=sizes(2))
def test_is_the_equation(variant: str, batch: int, channels: int, size: tuple[int, ...]) -> None:
    layer = build(variant, channels, dims=len(size))
    x = torch.randn(batch, channels, *size, dtype=torch.float64)
    if variant == "l2":
        expected, expected_map = l2_self_attention_by_loops(x, layer.state_dict())
    else:
        pool = 2 if variant in ("official", "pooled") else 1
        expected, expected_map = self_attention_by_loops(x, layer.state_dict(), pool)
    y, attention = layer(x, return_attention=True)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(attention, expected_map, rtol=0, atol=1e-10)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-10)


@given(
    pool=st.integers(1, 4),
    qk_channels=st.integers(1, 5),
    value_channels=st.integers(1, 5),
    size=sizes(4),
    bias=st.booleans(),
)
def test_pooling_and_sizes(pool: int, qk_channels: int, value_channels: int, size: tuple[int, ...], bias: bool) -> None:
    layer = LAYERS[len(size)](4, qk_channels=qk_channels, value_channels=value_channels, pool=pool, bias=bias).double()
    with torch.no_grad():
        layer.gamma.fill_(-1.3)
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    expected, expected_map = self_attention_by_loops(x, layer.state_dict(), pool)
    y, attention = layer(x, return_attention=True)
    assert attention.shape == (2, math.prod(size), math.prod(length // pool for length in size))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(attention, expected_map, rtol=0, atol=1e-10)


@given(qk_channels=st.integers(1, 5), value_channels=st.integers(1, 5), bias=st.booleans(), scale=st.floats(0.1, 30))
def test_l2_sizes(qk_channels: int, value_channels: int, bias: bool, scale: float) -> None:
    sizes = {"qk_channels": qk_channels, "value_channels": value_channels}
    layer = SelfAttention2d(4, similarity="l2", out_projection=True, bias=bias, **sizes).double()
    with torch.no_grad():
        layer.gamma.fill_(-1.3)
    x = scale * torch.randn(2, 4, 3, 5, dtype=torch.float64)
    expected, expected_map = l2_self_attention_by_loops(x, layer.state_dict())
    y, attention = layer(x, return_attention=True)
    # The logits are rounded at the size of the squared norms, 1e-16 of some thousands.
    torch.testing.assert_close(attention, expected_map, rtol=0, atol=1e-10)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("official", "pooled")])
def test_a_volume_is_the_sequence_of_its_positions(variant: str) -> None:
    """In results, maps and gradients; a plane is that, too."""
    sequence = build(variant, 16, dims=1)
    x = torch.randn(2, 16, 24, dtype=torch.float64)
    expected = results(sequence, x)
    for size in ((4, 6), (2, 3, 4)):
        layer = build(variant, 16, dims=len(size))
        ones = [1] * len(size)
        state = sequence.state_dict().items()
        layer.load_state_dict({name: w.view(*w.shape[:2], *ones) if w.ndim == 3 else w for name, w in state})
        for actual, other in zip(results(layer, x.unflatten(2, size)), expected, strict=True):
            torch.testing.assert_close(actual.reshape(other.shape), other, rtol=0, atol=1e-10)


def results(layer: SelfAttention, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y, attention = layer(x, return_attention=True)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [layer(x), y, attention, *torch.autograd.grad((y * weights).sum(), [x, *layer.parameters()])]


def l2_bound(layer: SelfAttention2d, positions: int) -> float:
    """The bound of docs/variants.md. c exp(c + 1) = positions - 1 is solved by bisection."""
    low, high = 0.0, float(positions)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * math.exp(middle + 1) < positions - 1 else (low, middle)
    projections = [layer.query, layer.value] + [layer.out] * isinstance(layer.out, nn.Conv2d)
    norms = math.prod(largest_singular_value(projection.weight) for projection in projections)
    return 1 + abs(layer.gamma.item()) * norms * math.sqrt(positions) * (4 * low + 1)


def jacobian_norm(layer: SelfAttention2d, x: Tensor) -> float:
    jacobian = torch.autograd.functional.jacobian(layer, x).reshape(x.numel(), x.numel())
    return float(torch.linalg.matrix_norm(jacobian, 2))


@one_kernel
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("qk_channels", [1, 4])
def test_l2_is_bounded(qk_channels: int, scale: float) -> None:
    """On inputs of every size, and also where positions differ most in directions that the query does not see."""
    arguments = {"qk_channels": qk_channels, "value_channels": 3, "bias": False}
    layer = SelfAttention2d(4, similarity="l2", **arguments).double()
    with torch.no_grad():
        layer.gamma.fill_(2.0)
    bound = l2_bound(layer, 9)
    for _ in range(2):
        x = torch.randn(1, 4, 3, 3, dtype=torch.float64)
        seen = torch.linalg.pinv(layer.query.weight.flatten(1)) @ layer.query.weight.flatten(1)
        unseen = torch.einsum("oc,bchw->bohw", torch.eye(4).double() - seen, x)
        for point in (scale * x, x + scale * unseen):
            assert jacobian_norm(layer, point.detach()) <= bound


def test_dot_products_exceed_the_l2_bound() -> None:
    """One position at zero attends to all others alike, and moves with their variance."""
    layer, bounded = (SelfAttention2d(4, qk_channels=4, similarity=kind, bias=False).double() for kind in ("dot", "l2"))
    weights = {name: torch.eye(4).double()[..., None, None] for name in ("query.weight", "key.weight", "value.weight")}
    layer.load_state_dict({"gamma": torch.ones(1), **weights})
    bounded.load_state_dict({"gamma": torch.ones(1), **{name: w for name, w in weights.items() if "key" not in name}})
    x = 100 * torch.randn(1, 4, 3, 3, dtype=torch.float64)
    x[..., 0, 0] = 0
    assert jacobian_norm(layer, x) > 10 * l2_bound(bounded, 9)
    assert jacobian_norm(bounded, x) < l2_bound(bounded, 9)


def test_l2_attention_of_many_positions() -> None:
    """In tiles, float32, and with an offset that is much larger than the distances."""
    layer = SelfAttention2d(8, qk_channels=3, similarity="l2")
    with torch.no_grad():
        layer.gamma.fill_(0.7)
    x = torch.randn(1, 8, 33, 33) + 30
    y, attention = layer.double()(x.double(), return_attention=True)
    torch.testing.assert_close(attention.sum(2), torch.ones_like(attention[..., 0]))
    # Features of size 30 are rounded to 30 * 6e-8 in float32, distances of some ones therefore to some 1e-5.
    torch.testing.assert_close(layer.float()(x).double(), y, rtol=0, atol=1e-4)


@variants
def test_gamma_learns_from_the_first_step(variant: str) -> None:
    layer = VARIANTS[variant](SelfAttention2d, 16)
    x = torch.randn(2, 16, 6, 5)
    layer(x).square().sum().backward()
    assert layer.gamma.grad is not None
    assert layer.gamma.grad.abs().item() > 1e-6


@variants
def test_rows_sum_to_one_and_columns_do_not(variant: str) -> None:
    layer = build(variant, 16)
    _, attention = layer(3 * torch.randn(2, 16, 6, 4, dtype=torch.float64), return_attention=True)
    assert attention.shape[:2] == (2, 24)
    torch.testing.assert_close(attention.sum(2), torch.ones(2, 24, dtype=torch.float64))
    shares = attention.sum(1) * attention.shape[2] / attention.shape[1]
    assert (shares - 1).abs().max() > 0.01


@dimensions
@variants
def test_every_position_attends_to_every_other(variant: str, dims: int) -> None:
    """Changing one corner changes the output in the corner opposite to it."""
    layer = build(variant, 16, dims=dims)
    x = torch.randn(1, 16, *(8, 6, 4)[:dims], dtype=torch.float64)
    changed = x.clone()
    changed.flatten(2)[..., 0] += 10
    assert (layer(changed) - layer(x)).flatten(2)[..., -1].abs().max() > 1e-6


def test_against_the_pytorch_reference(arrays: Mapping[str, Tensor]) -> None:
    layer = SelfAttention2d(64).double()
    weights = filled(attention_shapes(64))
    layer.load_state_dict({name.replace("_conv", ""): value for name, value in weights.items()}, strict=False)
    assert {name.replace("_conv", "") for name in weights} == set(layer.state_dict())
    x = rand(1, 2, 64, 6, 5).requires_grad_()
    y, attention = layer(x, return_attention=True)
    (y * rand(2, 2, 64, 6, 5)).sum().backward()
    grads = dict(layer.named_parameters())
    assert_all_close(
        [
            ("y", y, arrays["attention/y"]),
            ("y without the attention map", layer(x), arrays["attention/y"]),
            ("map", attention, arrays["attention/map"]),
            ("grad_x", x.grad, arrays["attention/grad_x"]),
            *((n, grads[n.replace("_conv", "")].grad, arrays[f"attention/grad/{n}"]) for n in weights),
        ],
        atol=1e-10,
    )


@pytest.mark.parametrize("return_attention", [False, True])
def test_against_the_official_block(arrays: Mapping[str, Tensor], return_attention: bool) -> None:
    layer = SelfAttention2d.official(64).double()
    ours = {"theta": "query", "phi": "key", "g": "value", "o": "out"}
    weights = {
        ".".join(ours.get(part, part) for part in name.split(".")): value
        for name, value in filled(official_attention_shapes(64)).items()
    }
    weights["gamma"] = weights["gamma"].reshape(1)
    layer.load_state_dict(weights)
    x = rand(5, 2, 64, 8, 6).requires_grad_()
    y = layer(x, return_attention=True)[0] if return_attention else layer(x)
    (y * rand(6, 2, 64, 8, 6)).sum().backward()
    assert_all_close(
        [("y", y, arrays["official_attention/y"]), ("grad_x", x.grad, arrays["official_attention/grad_x"])],
        atol=1e-10,
    )


# --- layout --------------------------------------------------------------------------------------------------------


@one_kernel
@pytest.mark.parametrize(
    ("layer", "qk", "value", "projected", "bias"),
    [
        (SelfAttention2d(64), 8, 64, False, True),
        (SelfAttention2d.paper(64), 8, 8, True, True),
        (SelfAttention2d.official(64), 8, 32, True, False),
        (SelfAttention2d(4), 1, 4, False, True),
        (SelfAttention2d.paper(4), 1, 1, True, True),
        (SelfAttention2d.official(1), 1, 1, True, False),
        (SelfAttention2d(64, value_channels=16), 8, 16, True, True),
        (SelfAttention2d(64, out_projection=True), 8, 64, True, True),
        (SelfAttention2d(64, qk_channels=5, bias=False), 5, 64, False, False),
    ],
)
def test_sizes_of_the_variants(layer: SelfAttention2d, qk: int, value: int, projected: bool, bias: bool) -> None:
    assert layer.query.weight.shape[0] == qk
    assert layer.key.weight.shape[0] == qk
    assert layer.value.weight.shape[0] == value
    assert isinstance(layer.out, nn.Identity) is not projected
    if projected:
        assert layer.out.weight.shape[1] == value
        assert (layer.out.bias is not None) is bias
    for convolution in (layer.query, layer.key, layer.value):
        assert isinstance(convolution, nn.Conv2d)
        assert convolution.kernel_size == (1, 1)
        assert (convolution.bias is not None) is bias


@one_kernel
def test_state_dict_names() -> None:
    plain = {"gamma", *(f"{n}.{p}" for n in ("query", "key", "value") for p in ("weight", "bias"))}
    assert set(SelfAttention2d(8).state_dict()) == plain
    assert set(SelfAttention2d.paper(8).state_dict()) == plain | {"out.weight", "out.bias"}


@one_kernel
@dimensions
def test_variants_are_layers_of_their_class(dims: int) -> None:
    kind = LAYERS[dims]

    class Own(kind):  # type: ignore[misc, valid-type]
        pass

    for layer in (kind(8), kind.paper(8), kind.official(8)):
        assert type(layer) is kind
        assert isinstance(layer.query, {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims])
    assert type(Own.official(8)) is Own


# --- derivatives ---------------------------------------------------------------------------------------------------


def functional_form(layer: SelfAttention) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The layer as a function of its input and of all parameters, for gradcheck."""
    names, values = zip(*layer.named_parameters(), strict=True)

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))
        return out

    return call, [value.detach().clone().requires_grad_() for value in values]


@pytest.mark.parametrize(
    "size",
    [pytest.param((8,), marks=pytest.mark.exhaustive), (4, 2), pytest.param((2, 2, 3), marks=pytest.mark.exhaustive)],
)
@variants
def test_derivatives(variant: str, size: tuple[int, ...]) -> None:
    call, parameters = functional_form(build(variant, 2, dims=len(size)))
    x = torch.randn(1, 2, *size, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(call, (x, *parameters))
    torch.autograd.gradgradcheck(call, (x, *parameters), fast_mode=True)


def test_derivatives_of_the_map() -> None:
    layer = build("default", 3)
    x = torch.randn(1, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda t: layer(t, return_attention=True), (x,))


def test_key_bias_gets_no_gradient() -> None:
    """A shift that all keys share adds the same number to every logit of a row, which softmax ignores."""
    layer = build("default", 16)
    layer(torch.randn(2, 16, 4, 4, dtype=torch.float64)).square().sum().backward()
    assert layer.key.bias.grad.abs().max() < 1e-10
    assert layer.query.bias.grad.abs().max() > 1e-6


# --- numbers of other kinds ----------------------------------------------------------------------------------------


@variants
def test_bfloat16(variant: str) -> None:
    layer = build(variant, 16)
    x = torch.randn(2, 16, 6, 5, dtype=torch.float64)
    expected = layer(x)
    low = layer.bfloat16()
    y = low(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=0.05)
    assert (y.double() - x).abs().max() > 0.2  # the tolerance would not let the identity pass


def test_autocast() -> None:
    layer = build("default", 16).float()
    x = torch.randn(2, 16, 6, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    torch.testing.assert_close(y.float(), layer(x), rtol=0, atol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(SelfAttention2d(16)(x).float(), x)


@variants
def test_memory_layouts(variant: str) -> None:
    layer = build(variant, 16)
    x = torch.randn(2, 16, 6, 5, dtype=torch.float64)
    expected = layer(x)
    for other in (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.cat([x, x], dim=1)[:, :16],
        torch.stack([x, x], dim=-1)[..., 0],
    ):
        assert not other.is_contiguous()
        torch.testing.assert_close(layer(other), expected)
    layer = layer.to(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x.contiguous(memory_format=torch.channels_last)), expected)


def test_input_is_not_changed() -> None:
    layer = build("default", 16)
    x = torch.randn(2, 16, 4, 4, dtype=torch.float64)
    before = x.clone()
    layer(x)
    assert torch.equal(x, before)


def test_samples_do_not_mix() -> None:
    layer = build("official", 16)
    x = torch.randn(3, 16, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), torch.cat([layer(sample[None]) for sample in x]))


# --- PyTorch's older exporter ----------------------------------------------------------------------------------------


@pytest.mark.skipif(not (find_spec("onnxscript") and find_spec("onnxruntime")), reason="needs onnx and onnxruntime")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("variant", "size"),  # the attention matrix of the larger size is not materialized in eager mode
    [
        ("default", 33),
        ("official", 6),
        *(pytest.param(*rest, marks=pytest.mark.exhaustive) for rest in (("default", 6), ("official", 33))),
        *(pytest.param("l2", size, marks=pytest.mark.exhaustive) for size in (6, 33)),
    ],
)
def test_onnx_without_dynamo(variant: str, size: int) -> None:
    """This exporter passes every argument by position, return_attention too."""
    import onnxruntime

    model, x, file = build(variant, 8).float().eval(), torch.randn(2, 8, size, size), io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=False, opset_version=17)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(
        torch.from_numpy(y), model(x).detach(), rtol=1e-4, atol=1e-5
    )  # float32, sums of hundreds


# --- errors --------------------------------------------------------------------------------------------------------


@one_kernel
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels.*0"),
        ({"channels": -3}, "channels.*-3"),
        ({"channels": 8, "qk_channels": 0}, "qk_channels.*0"),
        ({"channels": 8, "value_channels": -1}, "value_channels.*-1"),
        ({"channels": 8, "pool": 0}, "pool.*0"),
        ({"channels": 8, "value_channels": 4, "out_projection": False}, "projection.*8.*4"),
        ({"channels": 8, "similarity": "cosine"}, "similarity must be one of 'dot', 'l2', got 'cosine'"),
        ({"channels": 8, "similarity": "l2", "pool": 2}, "needs pool=1, got 2"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfAttention2d(**arguments)


EXPECTED = {1: "(B, 8, L)", 2: "(B, 8, H, W)", 3: "(B, 8, D, H, W)"}


@one_kernel
@dimensions
@pytest.mark.parametrize("shape", [(2, 4, 6, 5), (8, 6, 5), (2, 8), (2, 8, 30), (2, 8, 6, 5), (2, 8, 1, 6, 5)], ids=str)
def test_wrong_input_names_what_was_expected_and_what_came(shape: tuple[int, ...], dims: int) -> None:
    if len(shape) == dims + 2 and shape[1] == 8:
        pytest.skip("it is right")
    with pytest.raises(ValueError, match="feature map") as error:
        LAYERS[dims](8)(torch.randn(shape))
    assert str(error.value) == f"expected a feature map {EXPECTED[dims]}, got {shape}"


@one_kernel
@dimensions
def test_input_that_is_not_a_tensor(dims: int) -> None:
    with pytest.raises(TypeError, match=re.escape(f"expected a tensor {EXPECTED[dims]}, got list")):
        LAYERS[dims](8)([1.0, 2.0])


@one_kernel
@pytest.mark.parametrize("size", [(1,), (1, 5), (4, 1, 5)], ids=str)
def test_input_smaller_than_one_tile(size: tuple[int, ...]) -> None:
    """Without a whole tile there are no keys: an error, not NaN."""
    with pytest.raises(ValueError, match=re.escape(f"a feature map of {size} is smaller than pool=2: no key is left")):
        LAYERS[len(size)](8, pool=2)(torch.randn(1, 8, *size))
