"""`SelfAttention2d` on the device, against itself in float64, which takes the plain equation."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from numerics import HAS_GPU, TOLERANCE, captured, error, taken
from torch_sagan import SelfAttention2d, gradient_penalty

Layer = Callable[[int], SelfAttention2d]
LAYERS: dict[str, Layer] = {
    "own": SelfAttention2d,
    "paper": SelfAttention2d.paper,
    "official": SelfAttention2d.official,
    "l2": lambda channels: SelfAttention2d(channels, similarity="l2"),
}
of_each_layer = pytest.mark.parametrize("kind", LAYERS)


def build(kind: str, device: torch.device, channels: int = 64, size: int = 16) -> tuple[SelfAttention2d, Tensor]:
    layer = LAYERS[kind](channels).to(device)
    nn.init.constant_(layer.gamma, 0.5)  # a new layer is the identity
    return layer, torch.randn(4, channels, size, size, device=device, requires_grad=True)


def results(module: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """The output, and the gradients of the input and of all parameters."""
    y = (call or module)(x)
    leaves = [x, *module.parameters()]
    for leaf in leaves:
        leaf.grad = None
    (y * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y).to(y.dtype)).sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def exact(layer: nn.Module, x: Tensor) -> list[Tensor]:
    return results(copy.deepcopy(layer).double(), x.detach().double().requires_grad_())


def assert_close(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype, *, pooled: bool = False) -> None:
    """Relative to the norm, which for a gradient that is zero (of the key's bias) is that of what is summed up."""
    scale = theirs[1].norm()
    errors = [error(x, y, torch.maximum(y.norm(), 1e-2 * scale)) for x, y in zip(ours, theirs, strict=True)]
    # Convolutions, before and after attention, round as well. Where the largest two values under a pooling differ by
    # less than their rounding, it takes the other one: one key in some hundred then has another position's gradient.
    assert max(errors) < max(4 * TOLERANCE[dtype], 0.1 * pooled), errors


@of_each_layer
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_memory_formats(kind: str, memory_format: torch.memory_format, device: torch.device) -> None:
    layer, x = build(kind, device)
    x = x.detach().to(memory_format=memory_format).requires_grad_()
    layer = layer.to(memory_format=memory_format)
    assert_close(results(layer, x), exact(layer, x), torch.float32)


@of_each_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_autocast(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """In half precision inside; the gradients of weights are float32 as they are."""
    layer, x = build(kind, device)

    def call(x: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype):
            return layer(x)

    ours = results(layer, x, call)
    assert {gradient.dtype for gradient in ours[1:]} == {torch.float32}
    assert_close(ours, exact(layer, x), dtype, pooled=kind == "official")


@of_each_layer
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 1e3), (torch.bfloat16, 1e3), (torch.float16, 6e4)],  # which overflows in float16's convolutions
    ids=["float32", "bf16", "f16"],
)
def test_a_new_layer_is_the_identity(kind: str, dtype: torch.dtype, scale: float, device: torch.device) -> None:
    layer, x = build(kind, device)
    nn.init.zeros_(layer.gamma)
    x = (scale * x.detach().clamp(-1, 1)).to(dtype).contiguous(memory_format=torch.channels_last)
    for y in (layer.to(dtype)(x), layer(x, return_attention=True)[0]):
        assert torch.equal(y, x)
        assert y.stride() == x.stride()
        assert y.relu_().min() == 0


@pytest.mark.skipif(not HAS_GPU, reason="tests/attention and tests/ecosystem compile on the CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_compiled(dtype: torch.dtype, device: torch.device) -> None:
    """As one graph, forward and backward."""
    layer, x = build("own", device)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)

    def call(x: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return compiled(x)

    assert_close(results(layer, x, call), exact(layer, x), dtype)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_in_two_passes(use_reentrant: bool, device: torch.device) -> None:
    """A region with two attention layers is computed twice, not once more for each; the gradients are the same."""
    (first, x), (second, _) = build("own", device), build("official", device)
    region, passes = nn.Sequential(first, nn.Conv2d(64, 64, 1, device=device), second), []
    expected = results(region, x)
    region.register_forward_pre_hook(lambda *_: passes.append(1))
    assert_close(
        results(region, x, lambda x: checkpoint(region, x, use_reentrant=use_reentrant)), expected, torch.float32
    )
    assert len(passes) == 2


def test_in_a_cuda_graph(device: torch.device) -> None:
    """Forward and backward are captured once, and replayed on other values."""
    layer, x = build("own", device)

    ours, graph = captured(lambda: results(layer, x))
    for _ in range(2):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
            layer.query.weight.mul_(1.5)
        graph.replay()
        assert_close(ours, exact(layer, x), torch.float32)


def penalty(network: nn.Module, x: Tensor) -> list[Tensor]:
    """WGAN-GP's penalty, and its gradients with respect to the parameters that it depends on."""
    torch.manual_seed(1)
    value = gradient_penalty(network, x, x)  # of x alone: no random number of the device matters
    gradients = torch.autograd.grad(value, list(network.parameters()), allow_unused=True)
    return [value.detach(), *(gradient for gradient in gradients if gradient is not None)]


def discriminator(kind: str, device: torch.device, size: int) -> tuple[nn.Module, Tensor]:
    layer, x = build(kind, device, size=size)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(64 * size * size, 1, device=device), nn.Flatten(0)), x


@of_each_layer
def test_gradient_penalty(kind: str, device: torch.device) -> None:
    network, x = discriminator(kind, device, 16)
    network[2].weight.data *= 100  # norms around the target, 1
    expected = penalty(copy.deepcopy(network).double(), x.double())
    assert_close(penalty(network, x), expected, torch.float32)


@pytest.mark.skipif(
    not HAS_GPU, reason="takes minutes without a GPU; test_gradient_penalty is the same on smaller maps"
)
def test_gradient_penalty_of_a_large_map(device: torch.device) -> None:
    """Of 128×128 positions: the attention matrix of one image is 1 GiB, and the plain equation needs a dozen."""
    network, x = discriminator("own", device, 128)
    assert taken(device, lambda: penalty(network, x[:1])) < 3 * 2**30
    assert all(gradient.isfinite().all() for gradient in penalty(network, x[:1]))
