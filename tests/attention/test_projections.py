"""The projections of the layers: any module, three 1×1 convolutions as one, and `reset_parameters`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from references import attention_by_loops, max_pool_by_loops
from torch_sagan import (
    SelfAttention1d,
    SelfAttention2d,
    SelfAttention3d,
    apply_spectral_norm,
    spectral_norm,
    spectral_norms,
)
from torch_sagan.attention.layer import SelfAttention

pytestmark = pytest.mark.usefixtures("kernels")  # the branch of the CPU and that of CUDA

VARIANTS: dict[str, Callable[[int], SelfAttention]] = {
    "default": SelfAttention2d,
    "pooled": lambda channels: SelfAttention2d(channels, pool=2),
    "no bias": lambda channels: SelfAttention2d(channels, bias=False),
    "sequence": SelfAttention1d,
    "volume": lambda channels: SelfAttention3d(channels, pool=2),
}


def build(variant: str, channels: int, gamma: float = 0.7) -> SelfAttention:
    layer = VARIANTS[variant](channels).double()
    nn.init.constant_(layer.gamma, gamma)
    return layer


class TutorialProjection(nn.Sequential):
    """4x4 convolution with TensorFlow's "same" padding (one before, two after), batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.ZeroPad2d((1, 2, 1, 2)),
            nn.Conv2d(in_channels, out_channels, 4, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )


def test_the_tensorflow_tutorials_projection() -> None:
    """C = 128 on 7x7, as on the last feature map of an MNIST network."""
    layer = SelfAttention2d(128, projection=TutorialProjection).double()
    with torch.no_grad():
        layer.gamma.fill_(0.7)
    x = torch.randn(3, 128, 7, 7, dtype=torch.float64)
    for _ in range(2):  # let the running statistics leave their defaults
        layer(x)
    layer.eval()
    assert isinstance(layer.out, nn.Identity)
    query, key, value = (p(x).flatten(2) for p in (layer.query, layer.key, layer.value))
    assert query.shape == (3, 16, 49)
    assert value.shape == (3, 128, 49)
    attended, expected_map = attention_by_loops(query, key, value)
    y, attention = layer(x, return_attention=True)
    torch.testing.assert_close(attention, expected_map, rtol=0, atol=1e-10)
    torch.testing.assert_close(y, 0.7 * attended.reshape(x.shape) + x, rtol=0, atol=1e-10)


def test_projection_replaces_every_convolution() -> None:
    calls: list[tuple[int, int]] = []

    def projection(in_channels: int, out_channels: int) -> nn.Module:
        calls.append((in_channels, out_channels))
        return nn.Conv2d(in_channels, out_channels, 3, padding=1)

    layer = SelfAttention2d(16, value_channels=4, pool=2, projection=projection).double()
    assert sorted(calls) == [(4, 16), (16, 2), (16, 2), (16, 4)]
    with torch.no_grad():
        layer.gamma.fill_(2.0)
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64)
    key, value = (max_pool_by_loops(p(x).detach(), 2).flatten(2) for p in (layer.key, layer.value))
    attended, _ = attention_by_loops(layer.query(x).flatten(2), key, value)
    torch.testing.assert_close(layer(x), 2 * layer.out(attended.reshape(2, 4, 5, 7)) + x, rtol=0, atol=1e-10)


# --- one convolution for query, key and value -----------------------------------------------------------------------


class Convolutions(TorchDispatchMode):
    """Counts the convolutions that run."""

    count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += operation is torch.ops.aten.convolution.default
        return operation(*args, **(kwargs or {}))


def convolutions(layer: nn.Module, x: Tensor) -> int:
    with Convolutions() as counter:
        layer(x)
    return counter.count


@pytest.mark.parametrize("change", [lambda layer: None, apply_spectral_norm], ids=["plain", "spectral norm"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_convolution_does_what_three_do(variant: str, change: Callable[[SelfAttention], object]) -> None:
    """In results, gradients and power iterations; a hook that does nothing makes it three."""
    layer = build(variant, 16)
    change(layer)
    twin = copy.deepcopy(layer)
    twin.value.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 16, *(6, 4, 2)[: layer.spatial_dims], dtype=torch.float64)
    assert convolutions(layer, x) == 1
    assert convolutions(twin, x) == 3
    results = []
    for each in (layer, twin):
        each.zero_grad()
        y = each(x)
        y.square().sum().backward()
        results.append([y, *each.state_dict().values(), *(p.grad for p in each.parameters())])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Equalized(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, 2 * weight, bias)


class Called(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class Quantized(Tensor):
    """A weight that knows the convolution alone, as those of torchao know a few operations."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.cat:
            raise NotImplementedError(f"no {function} of quantized weights")
        return super().__torch_function__(function, types, args, kwargs)


def doubled_call(layer: SelfAttention2d) -> None:
    call = layer.key._call_impl
    layer.key._call_impl = lambda x: 2 * call(x)


def quantized(layer: SelfAttention2d) -> None:
    layer.key.weight = nn.Parameter(layer.key.weight.detach().as_subclass(Quantized))


def doubled_forward(layer: SelfAttention2d) -> None:
    forward = layer.key.forward
    layer.key.forward = lambda x: 2 * forward(x)


def doubled_convolution(layer: SelfAttention2d) -> None:
    convolve = layer.key._conv_forward
    layer.key._conv_forward = lambda x, weight, bias: convolve(x, 2 * weight, bias)


CHANGES: dict[str, Callable[[SelfAttention2d], object]] = {
    "forward hook": lambda layer: layer.key.register_forward_hook(lambda _, args, y: 2 * y),
    "forward pre-hook": lambda layer: layer.key.register_forward_pre_hook(lambda _, args: (2 * args[0],)),
    "torch's older spectral norm": lambda layer: torch.nn.utils.spectral_norm(layer.key),
    "torch's older weight norm": lambda layer: torch.nn.utils.weight_norm(layer.key),
    "one bias less": lambda layer: setattr(layer.key, "bias", None),
    "lazy": lambda layer: setattr(layer, "key", nn.LazyConv2d(2, 1, dtype=torch.float64)),
    "call": lambda layer: setattr(layer, "key", Called(16, 2, 1).double()),
    "call of the instance": doubled_call,
    "quantized": quantized,
    "subclass": lambda layer: setattr(layer, "key", Doubled(16, 2, 1).double()),
    "subclass that convolves otherwise": lambda layer: setattr(layer, "key", Equalized(16, 2, 1).double()),
    "the same, parametrized": lambda layer: setattr(layer, "key", spectral_norm(Equalized(16, 2, 1).double())),
    "forward of the instance": doubled_forward,
    "convolution of the instance": doubled_convolution,
    "3x3": lambda layer: setattr(layer, "key", nn.Conv2d(16, 2, 3, padding=1).double()),
    "grouped": lambda layer: setattr(layer, "key", nn.Conv2d(16, 2, 1, groups=2).double()),
    "another module": lambda layer: setattr(layer, "key", nn.Sequential(nn.Conv2d(16, 2, 1), nn.ReLU()).double()),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_other_projections_are_called(change: str) -> None:
    layer = build("default", 16)
    CHANGES[change](layer)
    x = torch.randn(2, 16, 6, 4, dtype=torch.float64)
    assert convolutions(layer.eval(), x) == 3
    query, key, value = (p(x).flatten(2) for p in (layer.query, layer.key, layer.value))
    attended, _ = attention_by_loops(query, key, value)
    torch.testing.assert_close(layer(x), 0.7 * attended.reshape(x.shape) + x, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("kind", "projection"),
    [
        (SelfAttention1d, lambda before, after: nn.Conv1d(before, after, 3, padding=1)),
        (SelfAttention3d, lambda before, after: nn.Conv3d(before, after, (1, 1, 3), padding=(0, 0, 1))),
        (SelfAttention3d, lambda before, after: nn.Conv3d(before, after, 1, groups=2)),
    ],
)
def test_other_convolutions_of_sequences_and_volumes_are_called(
    kind: type[SelfAttention], projection: Callable[[int, int], nn.Module]
) -> None:
    """Those that are 1 in some directions alone, too."""
    layer = kind(16, projection=projection, pool=2).double()
    nn.init.constant_(layer.gamma, 0.7)
    x = torch.randn(2, 16, *(5, 4, 3)[: layer.spatial_dims], dtype=torch.float64)
    assert convolutions(layer, x) == 3
    query, key, value = (p(x).detach() for p in (layer.query, layer.key, layer.value))
    key, value = (max_pool_by_loops(projected, 2).flatten(2) for projected in (key, value))
    attended, _ = attention_by_loops(query.flatten(2), key, value)
    torch.testing.assert_close(layer(x), 0.7 * attended.reshape(x.shape) + x, rtol=0, atol=1e-10)


def test_a_call_that_somebody_has_replaced_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """As recorders of models do, torchview among them."""
    seen, call = [], nn.Module.__call__
    monkeypatch.setattr(nn.Module, "__call__", lambda module, *a, **k: (seen.append(module), call(module, *a, **k))[1])
    layer = build("default", 16)
    layer(torch.randn(2, 16, 6, 4, dtype=torch.float64))
    assert seen == [layer, layer.query, layer.key, layer.value, layer.out]


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_a_projection_run(register: str) -> None:
    layer, seen = build("default", 16), []
    getattr(layer.key, register)(lambda *arguments: seen.append(arguments[-1][0].shape))
    layer(torch.randn(2, 16, 6, 4, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert seen == [(2, 2, 6, 4)]


def test_hooks_of_all_modules_see_the_projections() -> None:
    layer, seen = build("default", 16), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        layer(torch.randn(2, 16, 6, 4, dtype=torch.float64))
    finally:
        handle.remove()
    assert seen == [layer.query, layer.key, layer.value, layer.out, layer]


# --- reset_parameters ------------------------------------------------------------------------------------------------

LAYERS: dict[str, Callable[[], SelfAttention]] = {
    "default": lambda: SelfAttention2d(16),
    "official": lambda: SelfAttention2d.official(16),
    "l2": lambda: SelfAttention2d(16, similarity="l2"),
    "batch norm": lambda: SelfAttention2d(16, projection=TutorialProjection),
    "sequence": lambda: SelfAttention1d.paper(16),
    "volume": lambda: SelfAttention3d(16),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_reset_parameters_makes_a_new_layer(kind: str) -> None:
    """With the random numbers of the constructor, also after the meta device, whose memory may hold anything."""
    torch.manual_seed(1)
    expected = LAYERS[kind]().state_dict()
    with torch.device("meta"):
        layer = LAYERS[kind]()
    layer.to_empty(device="cpu")
    for tensor in layer.state_dict().values():
        tensor.fill_(7)
    torch.manual_seed(1)
    layer.reset_parameters()
    assert layer.gamma.item() == 0
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("implementation", ["sagan", "torch"])
def test_reset_parameters_under_spectral_norm(implementation: Any, training: bool) -> None:
    """The stored weight is drawn like a new one, and u and v are warmed up, whatever they were."""
    layer = SelfAttention2d(64)
    for convolution in (layer.query, layer.key, layer.value):
        spectral_norm(convolution, implementation=implementation)
    for tensor in layer.state_dict().values():
        tensor.fill_(torch.nan)
    layer.train(training).reset_parameters()
    assert all(module.training == training for module in layer.modules())
    assert all(tensor.isfinite().all() for tensor in layer.state_dict().values())
    bound = 64**-0.5  # of a convolution's uniform weights and biases
    for convolution in (layer.query, layer.key, layer.value):
        weight = convolution.parametrizations.weight.original
        assert weight.requires_grad
        assert isinstance(weight, nn.Parameter)
        assert 0.9 * bound < weight.abs().max() <= bound
        assert 0 < convolution.bias.abs().max() <= bound
    # 15 iterations of a random 64×64 matrix come within some per cent.
    assert all(sigma == pytest.approx(1, abs=0.1) for sigma in spectral_norms(layer).values())


def test_reset_parameters_of_other_parametrizations() -> None:
    layer = SelfAttention2d(16)
    parametrizations.weight_norm(layer.key)
    nn.init.constant_(layer.key.parametrizations.weight.original0, 7.0)
    layer.reset_parameters()
    assert parametrize.is_parametrized(layer.key)
    assert 0 < layer.key.weight.abs().max() <= 16**-0.5 + 1e-6


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", [torch.nn.utils.spectral_norm, torch.nn.utils.weight_norm])
def test_reset_parameters_refuses_a_weight_that_a_hook_computes(norm: Callable[[nn.Module], nn.Module]) -> None:
    layer = SelfAttention2d(16)
    norm(layer.key)
    with pytest.raises(ValueError, match=r"a hook computes the weight of Conv2d\(16, 2"):
        layer.reset_parameters()
