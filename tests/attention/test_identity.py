"""A new layer returns its input: in every dtype and on every path, with its strides and class; and its
result can be used as that of any other layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_sagan import SelfAttention1d, SelfAttention2d, SelfAttention3d, record_attention
from torch_sagan.attention import equation
from torch_sagan.attention.layer import SelfAttention

pytestmark = pytest.mark.usefixtures("kernels")  # the branch of the CPU and that of CUDA

Build = Callable[[int], SelfAttention]
LAYERS: dict[str, Build] = {
    "default": SelfAttention2d,
    "official": SelfAttention2d.official,
    "l2": lambda channels: SelfAttention2d(channels, similarity="l2"),
    "sequence": SelfAttention1d,
    "volume": SelfAttention3d,
    "pooled volume": SelfAttention3d.official,
}
layers = pytest.mark.parametrize("kind", LAYERS)
# Each layer on a small map, some on one whose attention matrix is not materialized.
layers_and_sizes = pytest.mark.parametrize(
    ("kind", "size"),
    [
        *((kind, 8) for kind in LAYERS),
        *((kind, 33) for kind in ("default", "l2", "pooled volume")),
        *(pytest.param(kind, 33, marks=pytest.mark.exhaustive) for kind in ("official", "sequence", "volume")),
    ],
)


def positions(layer: SelfAttention, size: int) -> tuple[int, ...]:
    """As many in every dimension."""
    return {1: (size * size,), 2: (size, size), 3: {8: (4, 4, 4), 33: (9, 11, 11)}[size]}[layer.spatial_dims]


def traced(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = torch.jit.trace(layer, x, check_trace=False)(x)
    return y


def recorded(layer: nn.Module, x: Tensor) -> Tensor:
    with record_attention(layer) as records:
        y: Tensor = layer(x)
    assert len(records[""]) == 1
    return y


extreme = pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float16, 100.0),  # logits beyond 65504
        (torch.float16, 60000.0),  # features beyond it
        (torch.bfloat16, 1e30),  # logits beyond 3e38
        (torch.float32, 1e30),
    ],
    ids=["float16 logits", "float16 features", "bfloat16", "float32"],
)


def new_layer(kind: str, dtype: torch.dtype, scale: float, size: int) -> tuple[SelfAttention, Tensor]:
    layer = LAYERS[kind](64).to(dtype).eval()
    return layer, (scale * torch.randn(1, 64, *positions(layer, size)).clamp(-1, 1)).to(dtype)


@extreme
@layers_and_sizes
def test_is_the_identity(size: int, kind: str, dtype: torch.dtype, scale: float) -> None:
    """Whatever attention comes to: 0 · NaN would be NaN."""
    layer, x = new_layer(kind, dtype, scale, size)
    assert layer.gamma.shape == (1,)
    assert torch.equal(layer(x), x)
    assert torch.equal(recorded(layer, x), x)
    with torch.no_grad():
        assert torch.equal(layer(x), x)


CALLS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "exported": lambda layer, x: torch.export.export(layer, (x,)).module()(x),
    "traced": traced,
    "compiled": lambda layer, x: torch.compile(layer, fullgraph=True, backend="aot_eager")(x),
    "vmapped": lambda layer, x: torch.func.vmap(layer)(x[None])[0],
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:DeprecationWarning")
@extreme
@pytest.mark.parametrize(
    "call",
    [pytest.param(call, marks=pytest.mark.exhaustive) if call in ("compiled", "exported") else call for call in CALLS],
)
def test_is_the_identity_in_a_program(call: str, dtype: torch.dtype, scale: float) -> None:
    torch._dynamo.reset()
    layer, x = new_layer("default", dtype, scale, 8)
    assert torch.equal(CALLS[call](layer, x), x)


@layers_and_sizes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_is_the_identity_under_autocast(dtype: torch.dtype, size: int, kind: str) -> None:
    """Of float32 inputs that float16 does not hold, and of inputs in half precision."""
    layer = LAYERS[kind](64)
    x = 1e6 * torch.randn(1, 64, *positions(layer, size))
    with torch.autocast("cpu", dtype):
        for tensor in (x, (1e-4 * x).to(dtype)):
            y = layer(tensor)
            assert y.dtype == tensor.dtype
            assert torch.equal(y, tensor)


def test_not_a_number_is_not_hidden_once_gamma_is_not_zero() -> None:
    layer = SelfAttention2d(16).half()
    x = torch.full((1, 16, 4, 4), 6e4, dtype=torch.float16)
    nn.init.constant_(layer.value.weight, 1.0)
    assert torch.equal(layer(x), x)
    nn.init.constant_(layer.gamma, 0.5)
    assert not layer(x).isfinite().any()


@layers
def test_gamma_has_its_gradient_while_it_is_zero(kind: str) -> None:
    """The sum of dy · o, where o is the layer's result for gamma 1, without x."""
    layer = LAYERS[kind](16).double()
    x, gradient = torch.randn(2, 2, 16, *positions(layer, 8), dtype=torch.float64)
    layer(x).backward(gradient)
    actual = layer.gamma.grad.item()
    nn.init.ones_(layer.gamma)
    assert actual == pytest.approx(((layer(x) - x) * gradient).sum().item(), rel=1e-10)


def test_finite_attention_is_added_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside the compiler, float32 pays no pass over the map for what does not overflow."""
    monkeypatch.setattr(Tensor, "masked_fill", lambda *_: 1 / 0)
    for gamma in (0.0, 0.5):
        layer = SelfAttention2d(16)
        nn.init.constant_(layer.gamma, gamma)
        layer(torch.randn(2, 16, 5, 5))


# --- strides -------------------------------------------------------------------------------------------------------


def channels_last(x: Tensor) -> Tensor:
    """Of a sequence, too, for which PyTorch has no memory format."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


ARRANGEMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": channels_last,
    "transposed": lambda x: x.transpose(2, -1).contiguous().transpose(2, -1),
    "sliced": lambda x: torch.cat([x, x], dim=1)[:, :16],
    "sliced channels last": lambda x: channels_last(torch.cat([x, x], 1))[:, :16],
    "expanded batch": lambda x: x[:1].expand(2, *x.shape[1:]),
    "expanded map": lambda x: x.flatten(2)[..., :1].view(*x.shape[:2], *[1] * (x.ndim - 2)).expand_as(x),
}


SIZES = [(1, 1), (1, 7), (7, 1), (2, 2), (6, 5), (1,), (7,), (1, 1, 1), (3, 1, 5), (2, 4, 3)]


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        pytest.param(kind, size, id=f"{kind}-{size}")
        for kind, size in itertools.product(LAYERS, SIZES)
        if len(size) == LAYERS[kind](8).spatial_dims and not (LAYERS[kind](8).pool > min(size))
    ],
)
def test_strides_are_those_of_the_input(size: tuple[int, ...], kind: str) -> None:
    """Those of `empty_like`: the same, or for a part of a larger tensor its order of dimensions, without gaps."""
    layer, data = LAYERS[kind](16), torch.randn(2, 16, *size)
    for gamma in (0.0, 0.5):
        nn.init.constant_(layer.gamma, gamma)
        for name, arrange in ARRANGEMENTS.items():
            x = arrange(data)
            for y in (layer(x), layer(x, return_attention=True)[0]):
                assert y.stride() == torch.empty_like(x).stride(), name
                y.sum().backward()
        layer(data).view(2, -1)  # which a map of another layout may refuse


# --- in place ------------------------------------------------------------------------------------------------------


@layers_and_sizes
@pytest.mark.parametrize("batch", [1, 4])
def test_the_result_may_be_changed_in_place(batch: int, size: int, kind: str) -> None:
    layer = LAYERS[kind](8)
    x = torch.randn(batch, 8, *positions(layer, size), requires_grad=True)
    nn.init.constant_(layer.gamma, 0.5)
    expected = torch.autograd.grad(torch.relu(layer(x) + 1).sum(), x)
    for y in (layer(x), layer(x, return_attention=True)[0]):
        y += 1
        torch.testing.assert_close(torch.autograd.grad(nn.ReLU(inplace=True)(y).sum(), x), expected)
    with torch.no_grad():
        assert layer.eval()(x).relu_().min() == 0


# --- subclasses of Tensor ------------------------------------------------------------------------------------------


class WithMetadata(Tensor):
    """As MONAI's MetaTensor: metadata on every result, and a `new_empty` that takes one size, not several."""

    meta: dict[str, str]

    @staticmethod
    def __new__(cls, data: Tensor, meta: dict[str, str] | None = None) -> WithMetadata:
        tensor: WithMetadata = data.as_subclass(cls)
        tensor.meta = meta or {}
        return tensor

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(function, types, args, kwargs)
        sources = [argument for argument in args if isinstance(argument, cls)]
        for part in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(part, cls) and sources:
                part.meta = getattr(sources[0], "meta", {})
        return result

    def new_empty(self, size: Any, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> WithMetadata:
        plain = self.as_subclass(Tensor)
        return type(self)(plain.new_empty(size, dtype=dtype, device=device, requires_grad=requires_grad))


class OfAnImage(WithMetadata):
    """As fastai's TensorImage: a `new_ones` that takes one argument."""

    def new_empty(self, *size: Any, **options: Any) -> WithMetadata:
        return self.as_subclass(Tensor).new_empty(*size, **options).as_subclass(type(self))

    def new_ones(self, data: Any, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> WithMetadata:
        plain = self.as_subclass(Tensor)
        return plain.new_ones(data, dtype=dtype, device=device, requires_grad=requires_grad).as_subclass(type(self))


def twice_differentiated(layer: SelfAttention, x: Tensor) -> list[Tensor]:
    """The result, the gradient, and the gradients of that one's square."""
    y = layer(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, torch.ones_like(y.sum()), create_graph=True)
    return [y, gradient, *torch.autograd.grad(gradient.square().sum(), [x, *layer.parameters()], allow_unused=True)]


@pytest.mark.parametrize("subclass", [WithMetadata, OfAnImage])
@layers_and_sizes
def test_subclasses(size: int, kind: str, subclass: type[WithMetadata]) -> None:
    """The result has the class and the metadata; all numbers are those of a plain tensor."""
    layer = LAYERS[kind](8)
    data = torch.randn(2, 8, *positions(layer, size))
    nn.init.constant_(layer.gamma, 0.5)
    x = subclass(data.clone(), {"path": "scan.nii"}).requires_grad_()
    y = layer(x)
    assert type(y) is subclass
    assert y.meta == {"path": "scan.nii"}
    assert type(layer(x, return_attention=True)[1]) is Tensor
    for mine, other in zip(
        twice_differentiated(layer, x), twice_differentiated(layer, data.requires_grad_()), strict=True
    ):
        if other is not None:
            torch.testing.assert_close(mine.as_subclass(Tensor), other)


@pytest.mark.parametrize("subclass", [WithMetadata, OfAnImage])
@pytest.mark.parametrize("small", [0, 2**40])
def test_subclasses_in_the_function(small: int, subclass: type[WithMetadata], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also as a gradient that comes from outside."""
    monkeypatch.setitem(equation.SMALL_MATRIX, "cpu", small)
    query, key, value = (subclass(torch.randn(2, 3, 20)).requires_grad_() for _ in range(3))
    y = equation.attention(query, key, value)
    assert type(y) is Tensor
    gradients = torch.autograd.grad(y, (query, key, value), subclass(torch.ones(2, 3, 20)), create_graph=True)
    sum(gradient.square().sum() for gradient in gradients).backward()
    assert query.grad.isfinite().all()
    assert torch.equal(equation.attention_map(query, key).sum(2).round(), torch.ones(2, 20))
