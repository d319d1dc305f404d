"""Spectral norm by the operator norm of the convolution, against a singular value decomposition of the whole map."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from normalized_layers import converge, norm_of, original, u_and_v
from torch_sagan import (
    SAGANDiscriminator,
    SpectralNorm,
    apply_spectral_norm,
    operator_norms,
    recalibrate,
    remove_spectral_norm,
    reset_power_iteration,
    spectral_norm,
    spectral_norms,
)


class Pooled(nn.Conv2d):
    """A convolution with a ``forward`` of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(super()._conv_forward(x, self.weight, self.bias), 2)


# A layer of each kind, and the size of its feature maps.
CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1-D": (lambda: nn.Conv1d(3, 4, 3, padding=1), (9,)),
    "2-D": (lambda: nn.Conv2d(3, 4, 3, padding=1), (6, 5)),
    "3-D": (lambda: nn.Conv3d(2, 3, 2), (4, 3, 5)),
    "strided": (lambda: nn.Conv2d(3, 4, 4, 2, 1), (7, 8)),
    "dilated": (lambda: nn.Conv2d(3, 4, 3, padding=2, dilation=2), (6, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (5, 6)),
    "circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (5, 6)),
    "same": (lambda: nn.Conv2d(3, 4, (4, 3), padding="same"), (5, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 4, 2, 1), (4, 5)),
    "transposed, more": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2), (4, 5)),
    "own forward": (lambda: Pooled(3, 4, 3, padding=1), (6, 8)),
}
kinds = pytest.mark.parametrize("kind", CONVOLUTIONS)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")  # of PyTorch


def make(kind: str, **arguments: object) -> nn.Module:
    layer, size = CONVOLUTIONS[kind]
    return spectral_norm(layer().double(), of="convolution", input_size=size, **arguments)


def dense(kind: str, weight: Tensor) -> Tensor:
    """The matrix (inputs, outputs) of a layer with this weight and without a bias: an image for each unit vector."""
    make_layer, size = CONVOLUTIONS[kind]
    plain = make_layer().double()
    plain.weight, plain.bias = nn.Parameter(weight.detach()), None
    inputs = plain.in_channels * math.prod(size)
    return plain(torch.eye(inputs, dtype=torch.float64).view(inputs, plain.in_channels, *size)).flatten(1).detach()


def true_norm(kind: str, weight: Tensor) -> float:
    return float(torch.linalg.svdvals(dense(kind, weight))[0])


# --- sigma -----------------------------------------------------------------------------------------------------------


@kinds
def test_the_operator_has_norm_one(kind: str) -> None:
    """When it is new, and after iterations; the output is that of the plain layer with W / sigma."""
    layer = make(kind)
    # Warmed up until the residual is a ten-thousandth: the norm is known to that, and never overestimated.
    assert 1 - 1e-9 <= true_norm(kind, layer.eval().weight) < 1 + 1e-3
    converge(layer, 50)
    sigma = true_norm(kind, original(layer))
    torch.testing.assert_close(layer.weight, original(layer) / sigma, rtol=1e-3, atol=0)
    assert spectral_norms(layer)["weight"] == pytest.approx(true_norm(kind, layer.weight), rel=1e-6)


@kinds
def test_one_reading_is_one_iteration(kind: str) -> None:
    """v is the best vector of the space of the adjoint images of u and the seven others, by the dense matrix, and u its
    image; the new space is the image of the old one."""
    layer = make(kind).train()
    with torch.no_grad():
        original(layer).normal_()
    norm = norm_of(layer)
    matrix = dense(kind, original(layer)).mT  # (outputs, inputs)
    followed = torch.cat([norm._u, norm._rivals]).flatten(1)
    assert len(followed) == 8
    space = torch.linalg.svd(matrix.mT @ followed.mT, full_matrices=False).U  # (inputs, 8)
    left, sigma, _ = torch.linalg.svd(matrix @ space, full_matrices=False)
    weight = layer.weight
    # The first eigenvector is that of a power of the Gram matrix, which is within 1e-4 of the largest eigenvalue.
    torch.testing.assert_close(weight, original(layer) / sigma[0], rtol=1e-4, atol=0)
    u, v = (vector.flatten() for vector in u_and_v(layer))
    torch.testing.assert_close(matrix @ v, u * (matrix @ v).norm(), rtol=0, atol=1e-10)
    torch.testing.assert_close(space @ (space.mT @ v), v, rtol=0, atol=1e-10)
    now = torch.cat([norm._u, norm._rivals]).flatten(1)
    torch.testing.assert_close(left @ (left.mT @ now.mT), now.mT, rtol=0, atol=1e-10)
    assert torch.linalg.matrix_rank(now) == torch.linalg.matrix_rank(matrix @ space)


def test_the_first_singular_vector_is_found_when_another_overtakes_it() -> None:
    """As in training: in a step, the second singular value of a diagonal map becomes the first, and u is orthogonal
    to the new one. A power iteration would stay where it is."""
    layer = spectral_norm(nn.Conv1d(6, 6, 1, groups=6).double(), of="convolution", input_size=4).train()
    assert type(norm_of(layer)).__name__ == "ConvolutionNorm"
    with torch.no_grad():
        original(layer).copy_(torch.tensor([1.01, 1, 0.5, 0.4, 0.3, 0.2]).view(6, 1, 1))
        reset_power_iteration(layer)
        original(layer)[1] = 1.2
    for _ in range(4):
        weight = layer.weight.detach()
    assert float(weight.abs().max()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("kind", ["1-D", "3-D", "circular", "own forward"])
def test_derivatives(kind: str) -> None:
    """First and second order, also far from the singular vectors, where no term vanishes."""
    layer = make(kind).eval()
    norm = norm_of(layer)
    for vector in (norm._u, norm._v):
        vector.copy_(F.normalize((vector + 0.1 * torch.randn_like(vector)).flatten(), dim=0).view_as(vector))
    weight = original(layer).detach().requires_grad_()
    torch.autograd.gradcheck(norm, (weight,))
    torch.autograd.gradgradcheck(norm, (weight,))


def test_n_power_iterations() -> None:
    once = make("2-D")
    thrice = copy.deepcopy(once)
    assert norm_of(make("2-D", n_power_iterations=3)).n_power_iterations == 3
    norm_of(thrice).n_power_iterations = 3
    for layer in (once, thrice):
        with torch.no_grad():
            original(layer).copy_(torch.ones_like(original(layer)))
    for _ in range(3):
        _ = once.weight
    _ = thrice.weight
    torch.testing.assert_close(u_and_v(once), u_and_v(thrice), rtol=0, atol=1e-12)


def test_two_forwards_before_one_backward() -> None:
    """Each is differentiated with its own u and v, which are fresh tensors."""
    layer = make("2-D").train()
    with torch.no_grad():
        original(layer).normal_()
    twin, x = copy.deepcopy(layer), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    expected = torch.zeros_like(original(layer))
    for _ in range(2):
        expected += torch.autograd.grad(twin(x).square().sum(), original(twin))[0]
    (layer(x).square().sum() + layer(x).square().sum()).backward()
    torch.testing.assert_close(original(layer).grad, expected, rtol=1e-12, atol=1e-12)


@kinds
def test_evaluation_changes_nothing(kind: str) -> None:
    layer = make(kind)
    x = torch.randn(2, layer.in_channels, *CONVOLUTIONS[kind][1], dtype=torch.float64)
    layer(x)
    last = layer(x)
    state = copy.deepcopy(layer.state_dict())
    layer.eval()
    assert torch.equal(layer(x), last)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    remove_spectral_norm(layer)
    assert not parametrize.is_parametrized(layer)
    assert torch.equal(layer(x), last)


# --- weights that are zero, new, or of few bits ----------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_weight_without_a_norm_is_returned_and_keeps_its_vectors(value: float, training: bool) -> None:
    layer = make("strided").train(training)
    weight = original(layer).detach().clone()
    before, x = u_and_v(layer), torch.randn(2, 3, 7, 8, dtype=torch.float64)
    with torch.no_grad():
        original(layer).zero_() if value == 0 else original(layer)[0, 0, 0].fill_(value)
    torch.testing.assert_close(layer.weight, original(layer), rtol=0, atol=0, equal_nan=True)
    if value == 0:
        layer(x).square().sum().backward()
        assert original(layer).grad.isfinite().all()
    torch.testing.assert_close(u_and_v(layer), before, rtol=0, atol=0)
    with torch.no_grad():
        original(layer).copy_(weight)
    assert true_norm("strided", layer.weight) == pytest.approx(1, abs=1e-3)


def test_the_gradient_of_a_weight_that_counts_as_zero_is_its_own() -> None:
    layer = make("2-D", eps=1e-3)
    with torch.no_grad():
        original(layer).mul_(1e-5)
    layer.weight.sum().backward()
    assert torch.equal(original(layer).grad, torch.ones_like(original(layer)))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_size_of_a_weight_does_not_matter(scale: float) -> None:
    layer = spectral_norm(nn.Conv2d(3, 4, 3, padding=1), of="convolution", input_size=6, eps=0)
    with torch.no_grad():
        original(layer).mul_(scale)
    for _ in range(3):
        weight = layer.weight
    layer.weight.square().sum().backward()
    expected = spectral_norms(layer)["weight"]
    assert expected == pytest.approx(1, abs=1e-2)
    assert weight.isfinite().all()
    assert original(layer).grad.isfinite().all()


@kinds
def test_a_new_weight_is_warmed_up_on(kind: str) -> None:
    layer = make(kind).eval()
    weight = torch.randn_like(original(layer))
    weight[:1] *= 10
    layer.weight = weight
    assert true_norm(kind, layer.weight) == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match=r"expected a weight \(.*\), got \(2, 3\)"):
        layer.weight = torch.ones(2, 3)
    with pytest.raises(TypeError, match="got NoneType"):
        layer.weight = None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_iterates_in_float32(dtype: torch.dtype) -> None:
    layer = spectral_norm(nn.Conv2d(8, 8, 3, padding=1), of="convolution", input_size=8).to(dtype)
    with torch.no_grad():
        for _ in range(20):
            weight = layer.weight
    assert weight.dtype == dtype
    exact = layer.parametrizations.weight.original.detach().double() / weight.double()
    ratio = exact[weight != 0].median()
    plain = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    plain.weight = nn.Parameter(layer.parametrizations.weight.original.float().detach())
    # u and v are stored with 8 or 11 bits, so sigma is off by their square.
    (row,) = operator_norms(plain, torch.zeros(1, 8, 8, 8)).layers
    assert float(ratio) == pytest.approx(row.upper, rel=1e-2)


def test_autocast_does_not_reach_the_iteration() -> None:
    layer = spectral_norm(nn.Conv2d(4, 6, 3), of="convolution", input_size=7)
    twin, x = copy.deepcopy(layer), torch.randn(2, 4, 7, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    twin(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert original(layer).grad.dtype == torch.float32
    for mine, other in zip(u_and_v(layer), u_and_v(twin), strict=True):
        assert torch.equal(mine, other)


# --- state dicts, copies, averages -----------------------------------------------------------------------------------


def test_a_state_dict_continues_where_it_was_saved() -> None:
    layer, other = make("strided"), make("strided")
    _ = layer.weight
    assert norm_of(layer)._u.shape == (1, 4, 3, 4)
    assert norm_of(layer)._v.shape == (1, 3, 7, 8)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.eval().weight, layer.eval().weight)


def test_the_state_dict_of_another_kind_is_named() -> None:
    matrix = spectral_norm(nn.Conv2d(3, 4, 4, 2, 1).double())
    convolution = make("strided")
    other_size = spectral_norm(nn.Conv2d(3, 4, 4, 2, 1).double(), of="convolution", input_size=16)
    of_torch = parametrizations.spectral_norm(nn.Conv2d(3, 4, 4, 2, 1).double())
    cases = [
        (matrix, convolution, "those of the norm of a matrix, and this is the norm of a convolution of 7×8 feature"),
        (of_torch, convolution, "those of the norm of a matrix, and this is the norm of a convolution of 7×8 feature"),
        (
            convolution,
            matrix,
            "those of the norm of a convolution of 7×8 feature maps, and this is the norm of a matrix",
        ),
        (other_size, convolution, "of 16×16 feature maps, and this is the norm of a convolution of 7×8 feature maps"),
    ]
    for source, destination, message in cases:
        before = copy.deepcopy(u_and_v(destination))
        with pytest.raises(
            RuntimeError, match=rf"weight\.0\._u and _v are {'those.*' * ('those' not in message)}{message}"
        ):
            destination.load_state_dict(source.state_dict())
        torch.testing.assert_close(u_and_v(destination), before, rtol=0, atol=0)


def test_reset_recalibrate_and_averages() -> None:
    network = nn.Sequential(make("2-D"))
    with torch.no_grad():
        original(network[0])[:, :, 0, 0] += 3
    assert spectral_norms(network)["0.weight"] > 1.1
    other = copy.deepcopy(network)
    reset_power_iteration(network)
    recalibrate(other)
    for each in (network, other):
        assert spectral_norms(each)["0.weight"] == pytest.approx(1, abs=1e-3)
    again = copy.deepcopy(other)
    recalibrate(again)
    torch.testing.assert_close(again.state_dict(), other.state_dict(), rtol=0, atol=0)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    with torch.no_grad():
        original(network[0]).normal_()
    network(torch.randn(1, 3, 6, 5, dtype=torch.float64))
    average.update_parameters(network)
    recalibrate(average)
    assert spectral_norms(average)["module.0.weight"] == pytest.approx(1, abs=1e-5)


def test_recalibration_is_exact() -> None:
    layer = make("grouped")
    with torch.no_grad():
        original(layer).normal_()
    recalibrate(layer)
    assert true_norm("grouped", layer.eval().weight) == pytest.approx(1, abs=1e-6)


# --- whole models ----------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1),
        nn.BatchNorm2d(8),
        nn.ConvTranspose2d(8, 4, 4, 2, 1),
        nn.Conv2d(4, 4, 1),
        nn.Flatten(),
        nn.Linear(4 * 8 * 8, 2),
    )


def test_a_model_takes_its_sizes_from_a_pass() -> None:
    model, x = network().train(), torch.randn(2, 3, 8, 8)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    apply_spectral_norm(model, of="convolution", example_input=x, include=["0", "2"])
    assert all(torch.equal(model.state_dict().get(name, value), value) for name, value in state.items())
    assert not torch.equal(random, torch.get_rng_state())  # u and v are drawn, as those of a matrix are
    assert model.training
    assert [norm_of(model[i]).layer.input_size for i in (0, 2)] == [(8, 8), (4, 4)]
    apply_spectral_norm(model, of="convolution", example_input=x, exclude=["0", "2"])
    # A matrix is its own map, and so is a 1×1 convolution.
    assert [type(norm_of(model[i])).__name__ for i in (0, 2, 3, 5)] == [*["ConvolutionNorm"] * 2, *["SpectralNorm"] * 2]
    assert all(isinstance(norm_of(model[i]), SpectralNorm) for i in (0, 2, 3, 5))
    for row in operator_norms(model, x[:1]).layers:
        assert row.lower <= 1.3  # the matrices after 15 iterations
    for value in list(spectral_norms(model).values())[:2]:
        assert value == pytest.approx(1, abs=1e-3)
    with pytest.warns(UserWarning, match="already"):
        apply_spectral_norm(model, of="convolution", example_input=x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"of": "convolution"}, "needs an example_input"),
        ({"example_input": torch.zeros(1, 3, 8, 8)}, "example_input has no effect on the norm of a matrix"),
        ({"of": "kernel"}, "of must be one of 'matrix', 'convolution', got 'kernel'"),
        (
            {"of": "convolution", "example_input": torch.zeros(1, 3, 8, 8), "implementation": "torch"},
            '0: implementation="torch" has the norm of a matrix alone',
        ),
    ],
)
def test_arguments_of_a_model(arguments: dict[str, object], message: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=message):
        apply_spectral_norm(model, **arguments)
    assert not spectral_norms(model)


def test_layers_of_a_pass_without_one_size() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.idle = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x))

    model, x = Twice(), torch.zeros(1, 3, 8, 8)
    with pytest.raises(
        ValueError, match=r"conv: expected feature maps of one size, got maps of \[\(6, 6\), \(8, 8\)\]"
    ):
        apply_spectral_norm(model, of="convolution", example_input=x)
    with pytest.raises(ValueError, match=r"idle: expected .*, got none: it was not called \(exclude='idle'"):
        apply_spectral_norm(model, of="convolution", example_input=x, exclude="conv")
    assert not spectral_norms(model)


@pytest.mark.parametrize(
    ("layer", "arguments", "kind", "message"),
    [
        (nn.Conv2d(3, 4, 3), {}, ValueError, "needs the size of the feature maps, input_size, 2 numbers .* got None"),
        (nn.Conv2d(3, 4, 3), {"input_size": (8,)}, ValueError, r"2 numbers of at least 1, got \(8,\)"),
        (nn.Conv2d(3, 4, 3), {"input_size": 0}, ValueError, "2 numbers of at least 1, got 0"),
        (nn.Conv2d(3, 4, 3), {"input_size": 2}, ValueError, r"Conv2d is no linear map of feature maps \(3, 2×2\)"),
        (nn.Linear(3, 4), {"input_size": 8}, ValueError, "for the weight of a convolution, got 'weight' of Linear"),
        (nn.Conv2d(3, 4, 3), {"input_size": 8, "name": "bias"}, ValueError, "got 'bias' of Conv2d"),
        (nn.Conv2d(3, 4, 3), {"input_size": 8, "of": "matrix"}, ValueError, "input_size=8 has no effect on the norm"),
        (nn.Conv2d(3, 4, 3, dtype=torch.complex64), {"input_size": 8}, TypeError, "expected a real weight"),
    ],
    ids=range(8),
)
def test_arguments_of_a_layer(
    layer: nn.Module, arguments: dict[str, object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        spectral_norm(layer, **{"of": "convolution", **arguments})
    assert not parametrize.is_parametrized(layer)


def test_a_forward_that_is_no_linear_map() -> None:
    class Shifted(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    with pytest.raises(ValueError, match=r"Shifted is no linear map .* it does not map zeros to zeros"):
        spectral_norm(Shifted(3, 4, 3), of="convolution", input_size=8)


# --- while a discriminator trains ------------------------------------------------------------------------------------

DISCRIMINATORS: dict[str, Callable[..., nn.Module]] = {
    "convolutions": lambda spectral_norm: nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 16, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 1, 4)
    ),
    "dcgan": partial(SAGANDiscriminator, 16, base_channels=4),
    "resnet": partial(SAGANDiscriminator, 16, base_channels=12, architecture="resnet"),
}


@pytest.mark.parametrize(
    "architecture",
    ["convolutions", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("dcgan", "resnet"))],
)
def test_every_layer_stays_at_one_while_a_discriminator_trains(architecture: str) -> None:
    """As a training pass uses the weight. The optimizer then moves it, by up to a per cent of the norm at this rate
    that no u and v from before can know of; recalibrated, it is exact again. Under the norm of the matrix layers exceed
    1 by a fifth at least."""
    torch.manual_seed(0)
    x, model = torch.randn(8, 3, 16, 16), DISCRIMINATORS[architecture](spectral_norm=None)
    apply_spectral_norm(model, of="convolution", example_input=x[:1])
    matrix = apply_spectral_norm(DISCRIMINATORS[architecture](spectral_norm=None))
    assert max(row.lower for row in operator_norms(matrix, x[:1]).layers) > 1.2
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-4, betas=(0.0, 0.9))
    start = copy.deepcopy(model.state_dict())
    for step in range(30):
        optimizer.zero_grad()
        real, fake = model(x.roll(step, 2)), model(torch.randn_like(x))
        (F.relu(1 - real).mean() + F.relu(1 + fake).mean()).backward()
        measured = step % 29 == 0
        used = copy.deepcopy(model) if measured else model
        optimizer.step()
        if measured:
            for each in (used, recalibrate(copy.deepcopy(model))):
                found = operator_norms(each, x[:1])
                assert len(found.layers) == len(spectral_norms(each))
                for row in found.layers:
                    is_matrix = type(norm_of(each.get_submodule(row.path))) is SpectralNorm
                    most = 1.01 if is_matrix else 1.001  # matrices are warmed up by 15 steps alone
                    assert row.lower <= most, str(found)
    moved = [(value - start[name]).norm() / start[name].norm() for name, value in model.state_dict().items()]
    assert max(moved) > 0.05
