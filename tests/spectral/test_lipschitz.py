"""Bounds of whole models: never below what inputs do, as tight as they can be, and silent about nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from scipy.special import lambertw
from torch import Tensor, nn

from torch_sagan import SelfAttention2d, operator_norms
from torch_sagan.spectral.lipschitz import l2_attention_constant


class Function(nn.Module):
    """A function of a feature map (1, 4, 6, 6), with a layer."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function
        self.layer = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> object:
        return self.function(x, self.layer)


def largest_jacobian(model: nn.Module, x: Tensor) -> float:
    jacobian = torch.autograd.functional.jacobian(model, x).reshape(-1, x.numel())
    return float(torch.linalg.matrix_norm(jacobian, 2))


def image(scale: float = 1.0) -> Tensor:
    return scale * torch.randn(1, 4, 6, 6, dtype=torch.float64)


# Each with its constant, or None where only that it is a bound can be said. `c` is the norm of the convolution.
FUNCTIONS: dict[str, tuple[Callable[..., object], Callable[[float], float] | None]] = {
    "the same": (lambda x, layer: x, lambda c: 1.0),
    "chain": (lambda x, layer: layer(F.relu(layer(x))), lambda c: c * c),
    "branches": (lambda x, layer: x + layer(x), lambda c: 1 + c),
    "branches in place": (lambda x, layer: layer(x).add_(x), lambda c: 1 + c),
    "an activation in place": (lambda x, layer: F.relu(layer(x), inplace=True), lambda c: c),
    "what shares memory": (lambda x, layer: shared(layer(x)), None),
    "activations": (lambda x, layer: torch.sigmoid(torch.tanh(F.leaky_relu(x, -3.0))), lambda c: 3 / 4),
    "scaled": (lambda x, layer: 2 * x / 5 - 1, lambda c: 2 / 5),
    "by constants": (lambda x, layer: x * (torch.arange(4.0) - 3).view(1, 4, 1, 1), lambda c: 3.0),
    "repeated": (lambda x, layer: x.sum((2, 3), keepdim=True).expand(1, 4, 6, 6), lambda c: 36.0),
    "sum": (lambda x, layer: x.sum((2, 3)), lambda c: 6.0),
    "mean": (lambda x, layer: x.mean(), lambda c: 1 / 12),
    "concatenated": (lambda x, layer: torch.cat([x, 2 * x], 1), lambda c: math.sqrt(5)),
    "average pooling": (lambda x, layer: F.avg_pool2d(x, 2), lambda c: 0.5),
    "average pooling, overlapping": (lambda x, layer: F.avg_pool2d(x, 3, 1, 1), None),
    "adaptive pooling": (lambda x, layer: F.adaptive_avg_pool2d(x, 1), lambda c: 1 / 6),
    "max pooling": (lambda x, layer: F.max_pool2d(x, 2), lambda c: 1.0),
    "max pooling, overlapping": (lambda x, layer: F.max_pool2d(x, 3, 1, 1), lambda c: 3.0),
    "upsampled": (lambda x, layer: F.interpolate(x, scale_factor=2), lambda c: 2.0),
    "views": (lambda x, layer: layer(x).permute(0, 2, 3, 1).reshape(6, -1)[1:, ::2].unsqueeze(0), lambda c: c),
    "padded": (lambda x, layer: layer(F.pad(x, (1, 0, 2, 1))), None),
    "split": (lambda x, layer: torch.cat(layer(x).split(2, dim=1), dim=1), None),
    "functional": (lambda x, layer: F.linear(x.flatten(1), torch.full((1, 144), 2.0, dtype=x.dtype)), lambda c: 24.0),
}


def shared(y: Tensor) -> Tensor:
    part = y[:, :2]
    part.add_(part.clone())
    return y  # half of it is twice as large


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_the_bound_of_a_function(kind: str) -> None:
    function, expected = FUNCTIONS[kind]
    model = Function(function).double()
    found = operator_norms(model, image())
    assert found.unbounded == ()
    for scale in (0.1, 1.0, 10.0):
        assert largest_jacobian(model, image(scale)) <= found.bound * (1 + 1e-9)
    if expected is not None:
        norm = operator_norms(model.layer, image()).bound
        assert found.bound == pytest.approx(expected(norm), rel=1e-6)


def read(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x) if x.mean() > 0 else x


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, layer: layer(x).softmax(1), "aten._softmax has no known bound"),
        (lambda x, layer: x * layer(x), "aten.mul has no known bound"),
        (lambda x, layer: x.flatten(1) @ x.flatten(1).T, "two tensors that both depend on the input"),
        (lambda x, layer: x / layer(x), "aten.div has no known bound"),
        (read, "the pass depends on a value"),
        (lambda x, layer: x.long().to(x.dtype), "integers that depend on the input"),
        (lambda x, layer: layer(torch.from_numpy(x.numpy())), "a tensor whose origin is not known"),
        (lambda x, layer: x.view(torch.int64).view(torch.float64), "aten.view has no known bound"),
    ],
    ids=range(8),
)
def test_what_has_no_bound_is_named(function: Callable[..., Tensor], reason: str) -> None:
    found = operator_norms(Function(function).double(), image())
    assert found.bound == math.inf
    assert any(reason in each for each in found.unbounded), found.unbounded
    assert "Lipschitz constant of the model: at most unknown" in str(found)
    assert f"no bound: {found.unbounded[0]}" in str(found)


def test_batch_norm_as_evaluation_has_it() -> None:
    norm = nn.BatchNorm2d(4).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -3.0, 2.0, 0.5]))
        norm.running_var.copy_(torch.tensor([1.0, 0.25, 4.0, 1e-9]))
    model = nn.Sequential(norm).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = operator_norms(model, image())
    assert found.bound == pytest.approx(0.5 / math.sqrt(1e-9 + 1e-5), rel=1e-9)
    assert model.training
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


# --- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.7])
@pytest.mark.parametrize("out_projection", [False, True])
def test_l2_attention(gamma: float, out_projection: bool) -> None:
    """The constant is that of the documentation, and no Jacobian exceeds it."""
    layer = SelfAttention2d(4, qk_channels=3, similarity="l2", out_projection=out_projection).double()
    with torch.no_grad():
        layer.gamma.fill_(gamma)
    found = operator_norms(nn.Sequential(layer), image())
    norms = [
        float(torch.linalg.matrix_norm(projection.weight.detach().flatten(1), 2))
        for projection in (layer.query, layer.value, *([layer.out] if out_projection else []))
    ]
    c = found_c(36)
    assert found.bound == pytest.approx(1 + gamma * math.prod(norms) * 6 * (4 * c + 1), rel=1e-6)
    assert found.unbounded == ()
    paths = ["0.query", "0.value", *(["0.out"] if out_projection else [])]
    assert [row.path for row in found.layers] == paths
    for scale in (0.1, 1.0, 10.0):
        assert largest_jacobian(layer, image(scale)) <= found.bound


def found_c(positions: int) -> float:
    """c exp(c + 1) = N - 1, by Lambert's function."""
    return float(lambertw((positions - 1) / math.e).real)


@pytest.mark.parametrize("positions", [1, 2, 64, 4096])
def test_the_constant_of_l2_attention(positions: int) -> None:
    expected = math.sqrt(positions) * (4 * found_c(positions) + 1)
    assert l2_attention_constant(positions) == pytest.approx(expected, rel=1e-9)


def test_attention_by_dot_products_is_named_unless_it_is_the_identity() -> None:
    layer = SelfAttention2d(4).double()
    assert operator_norms(layer, image()).bound == 1
    with torch.no_grad():
        layer.gamma.fill_(0.1)
    found = operator_norms(nn.Sequential(nn.ReLU(), layer), image())
    assert found.bound == math.inf
    assert found.unbounded == ('1: attention by dot products has no Lipschitz constant; that of "l2" has',)
    assert [row.path for row in found.layers] == ["1.query", "1.key", "1.value"]
