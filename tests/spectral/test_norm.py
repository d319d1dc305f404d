"""Spectral normalisation against an SVD, closed forms, torch's own parametrization and the PyTorch reference."""

from __future__ import annotations

import copy
import functools
import math
import re
import warnings
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as legacy_spectral_norm

from references import (
    as_matrix,
    assert_all_close,
    fill,
    largest_singular_value,
    power_iteration_by_numpy,
    spectral_gradient,
)
from torch_sagan import (
    SAGANDiscriminator,
    SelfAttention2d,
    SpectralNorm,
    apply_spectral_norm,
    insert_self_attention,
    remove_spectral_norm,
    reset_power_iteration,
    spectral_norm,
    spectral_norms,
)

# A layer of each kind, the dimension that its outputs are counted along, and the shape of an input.
LAYERS: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(7, 5), 0, (3, 7)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), 0, (2, 4, 8)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2)), 0, (2, 4, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2), 0, (2, 2, 4, 3, 5)),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(4, 6, 3), 1, (2, 4, 8)),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(4, 6, (3, 2)), 1, (2, 4, 6, 5)),
    "transposed conv3d": (lambda: nn.ConvTranspose3d(2, 6, 2), 1, (2, 2, 4, 3, 5)),
    "embedding": (lambda: nn.Embedding(9, 4), 0, (3,)),
}
layers = pytest.mark.parametrize("kind", LAYERS)

# The gradcheck of torch 2.5 calls a vmap that it deprecates.
batched = pytest.mark.filterwarnings("ignore:Please use `torch.vmap`:FutureWarning")


def make(kind: str, **arguments: object) -> nn.Module:
    return spectral_norm(LAYERS[kind][0]().double(), **arguments)


def inputs(kind: str) -> Tensor:
    shape = LAYERS[kind][2]
    return torch.randint(0, 9, shape) if kind == "embedding" else torch.randn(shape, dtype=torch.float64)


def original(layer: nn.Module) -> Tensor:
    return layer.parametrizations.weight.original


def norm_of(layer: nn.Module) -> nn.Module:
    return layer.parametrizations.weight[0]


def u_and_v(layer: nn.Module) -> tuple[Tensor, Tensor]:
    return norm_of(layer)._u.clone(), norm_of(layer)._v.clone()


def converge(layer: nn.Module, reads: int = 400) -> None:
    layer.train()
    with torch.no_grad():
        for _ in range(reads):
            _ = layer.weight
    layer.eval()


# --- sigma ---------------------------------------------------------------------------------------------------------


@layers
def test_converges_to_the_svd(kind: str) -> None:
    layer = make(kind)
    converge(layer)
    dim = LAYERS[kind][1]
    sigma = largest_singular_value(original(layer), dim)
    torch.testing.assert_close(layer.weight, original(layer) / sigma, rtol=1e-5, atol=0)
    assert largest_singular_value(layer.weight, dim) == pytest.approx(1, abs=1e-5)


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), factor=st.sampled_from([1e-3, 1.0, 1e3]))
def test_warmed_up_when_made(rows: int, columns: int, factor: float) -> None:
    """Before any training step, sigma is already near, and never above the true one."""
    weight = factor * torch.randn(rows, columns, dtype=torch.float64)
    norm = SpectralNorm(weight).eval()
    assert 1 - 1e-9 <= largest_singular_value(norm(weight)) < 1.3


@layers
def test_follows_moving_weights(kind: str) -> None:
    """One iteration per step keeps up with weights that an optimiser moves."""
    layer = make(kind)
    dim = LAYERS[kind][1]
    before = largest_singular_value(original(layer), dim)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.02)
    target = torch.randn_like(original(layer))
    for _ in range(150):
        optimizer.zero_grad()
        (original(layer) * target).sum().backward()
        _ = layer.weight
        optimizer.step()
    layer.eval()
    assert abs(largest_singular_value(original(layer), dim) / before - 1) > 0.5
    assert largest_singular_value(layer.weight, dim) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_diagonal_weight(dtype: torch.dtype) -> None:
    """PyTorch's own check of the value: a diagonal matrix is divided by its largest entry in absolute value."""
    weight = torch.diag(torch.tensor([0.5, -2.0])).to(dtype)
    layer = nn.Linear(2, 2, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    spectral_norm(layer)
    torch.testing.assert_close(layer.weight, weight / 2, rtol=0, atol=1e-6)


@layers
def test_one_reading_is_one_iteration(kind: str) -> None:
    """PyTorch's naive forward, in our order: v from the old u, then u from the new v."""
    layer = make(kind).train()
    matrix = as_matrix(original(layer), LAYERS[kind][1])
    u, v = power_iteration_by_numpy(matrix, *u_and_v(layer))
    weight = layer.weight
    torch.testing.assert_close(weight, original(layer) / (u @ matrix @ v), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(u_and_v(layer), (u, v), rtol=0, atol=1e-12)


def test_n_power_iterations() -> None:
    bare = nn.Linear(7, 5).double()
    once, thrice = spectral_norm(copy.deepcopy(bare)), spectral_norm(bare, n_power_iterations=3)
    thrice.load_state_dict(once.state_dict())
    for _ in range(3):
        _ = once.weight
    _ = thrice.weight
    torch.testing.assert_close(u_and_v(once), u_and_v(thrice), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("conv", (16, 8, 3, 3)), ("linear", (12, 20)), ("conv_transpose", (8, 16, 4, 4))],
)
def test_against_the_pytorch_reference(arrays: Mapping[str, Tensor], kind: str, shape: tuple[int, ...]) -> None:
    """Five successive iterations from the same start; the reference always unfolds along dimension 0."""
    layer: nn.Module = {
        "conv": lambda: nn.Conv2d(8, 16, 3),
        "linear": lambda: nn.Linear(20, 12),
        "conv_transpose": lambda: nn.ConvTranspose2d(8, 16, 4),
    }[kind]()
    layer = spectral_norm(layer.double(), dim=0).train()
    weight = fill("module.weight_bar", shape)
    rows, columns = as_matrix(weight).shape
    start = {
        "parametrizations.weight.original": weight,
        "parametrizations.weight.0._u": fill("module.weight_u", (rows,)),
        "parametrizations.weight.0._v": fill("module.weight_v", (columns,)),
    }
    layer.load_state_dict({**layer.state_dict(), **start})
    ratios = [weight / layer.weight.detach() for _ in range(5)]
    u, v = u_and_v(layer)
    sigmas = torch.stack([ratio.flatten()[0] for ratio in ratios])
    assert_all_close(
        [
            ("one sigma for all entries", ratios[4], sigmas[4].expand(shape)),
            ("sigma", sigmas, arrays[f"spectral_norm/{kind}/sigma"]),
            ("u", u, arrays[f"spectral_norm/{kind}/u"]),
            ("v", v, arrays[f"spectral_norm/{kind}/v"]),
        ],
        atol=1e-10,
    )


@pytest.mark.parametrize("implementation", ["sagan", "torch"])
@given(
    rank=st.integers(1, 3),
    transposed=st.booleans(),
    groups=st.integers(1, 3),
    inputs_each=st.integers(1, 3),
    outputs_each=st.integers(1, 3),
    kernel=st.integers(1, 3),
)
def test_any_convolution(
    implementation: str,
    rank: int,
    transposed: bool,
    groups: int,
    inputs_each: int,
    outputs_each: int,
    kernel: int,
) -> None:
    """Of any rank and number of groups: the plain convolution with W / sigma, sigma from an SVD, before and after."""
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{rank}d")
    layer = kind(groups * inputs_each, groups * outputs_each, kernel, groups=groups).double()
    plain = copy.deepcopy(layer)
    network = apply_spectral_norm(nn.Sequential(layer), implementation=implementation)
    assert 1 - 1e-9 <= spectral_norms(network)["0.weight"] < 1.4  # warmed up, and sigma is never above the true one
    converge(layer, 200)
    with torch.no_grad():
        plain.weight /= largest_singular_value(plain.weight, int(transposed))
    x = torch.randn(2, groups * inputs_each, *range(3, 3 + rank), dtype=torch.float64)
    torch.testing.assert_close(network(x), plain(x), rtol=1e-3, atol=1e-4)
    expected = network(x)
    remove_spectral_norm(network)
    assert torch.equal(network(x), expected)
    assert network[0].state_dict().keys() == plain.state_dict().keys()
    assert largest_singular_value(layer.weight, int(transposed)) == pytest.approx(1, abs=1e-3)


# --- training and evaluation ---------------------------------------------------------------------------------------


@layers
def test_evaluation_changes_nothing(kind: str) -> None:
    layer = make(kind)
    x = inputs(kind)
    layer(x)
    last = layer(x)
    state = copy.deepcopy(layer.state_dict())
    layer.eval()
    assert torch.equal(layer(x), last)  # evaluation continues from the last training forward
    assert torch.equal(layer(x), last)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("trainable", [True, False])
def test_training_updates_u_and_v(trainable: bool) -> None:
    layer = nn.Linear(3, 4).double()
    layer.weight.requires_grad_(trainable)
    layer = spectral_norm(layer).train()
    assert original(layer).requires_grad is trainable
    with torch.no_grad():
        original(layer).add_(torch.randn(4, 3))
    before = u_and_v(layer)
    out = layer(torch.randn(2, 3, dtype=torch.float64))
    assert out.requires_grad
    for old, new in zip(before, u_and_v(layer), strict=True):
        assert not torch.equal(old, new)
        assert new.norm().item() == pytest.approx(1)


def test_u_and_v_are_buffers_outside_the_graph() -> None:
    layer = spectral_norm(nn.Conv2d(4, 6, 3))
    layer(torch.randn(1, 4, 5, 5)).sum().backward()
    norm = norm_of(layer)
    assert isinstance(norm, SpectralNorm)
    assert isinstance(norm, nn.Module)
    assert set(dict(norm.named_buffers())) == {"_u", "_v"}
    assert not list(norm.parameters())
    assert norm._u.shape == (6,)
    assert norm._v.shape == (36,)
    assert not norm._u.requires_grad
    assert not norm._v.requires_grad
    assert isinstance(original(layer), nn.Parameter)
    assert "weight" not in layer._parameters
    assert "weight" not in layer._buffers
    assert layer.weight.shape == original(layer).shape
    assert layer.weight.stride() == original(layer).stride()


def test_two_forwards_before_one_backward() -> None:
    """Each forward is differentiated with its own u and v."""
    layer = make("conv2d").train()
    with torch.no_grad():
        original(layer).add_(torch.randn_like(original(layer)))
    x1, x2 = inputs("conv2d"), inputs("conv2d")
    expected = torch.zeros_like(original(layer))
    twin = copy.deepcopy(layer)
    for x in (x1, x2):
        weight = twin.weight.detach().requires_grad_()
        u, v = u_and_v(twin)
        (grad,) = torch.autograd.grad(nn.functional.conv2d(x, weight, twin.bias).square().sum(), weight)
        expected += spectral_gradient(grad, original(twin), u, v)
    loss = layer(x1).square().sum() + layer(x2).square().sum()
    loss.backward()
    torch.testing.assert_close(original(layer).grad, expected, rtol=1e-10, atol=1e-10)


@batched
def test_forwards_in_training_and_evaluation_before_one_backward() -> None:
    layer = make("linear")
    start = copy.deepcopy(layer.state_dict())

    def four(x: Tensor) -> Tensor:
        layer.load_state_dict(start)
        return sum((layer.train(mode)(x) for mode in (True, False, True, False)), start=torch.zeros(()))

    torch.autograd.gradcheck(four, (inputs("linear").requires_grad_(),), check_batched_grad=True)
    four(inputs("linear")).square().sum().backward()
    assert original(layer).grad is not None
    assert original(layer).grad.isfinite().all()


# --- derivatives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "dim"), [((3, 4), 0), ((3, 4), 1), ((2, 3, 2, 2), 0), ((2, 3, 2, 2), 1)])
def test_gradient_formula(shape: tuple[int, ...], dim: int) -> None:
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    norm = SpectralNorm(weight, dim=dim).eval()
    incoming = torch.randn(shape, dtype=torch.float64)
    norm(weight).backward(incoming)
    expected = spectral_gradient(incoming, weight, norm._u, norm._v, dim)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("shape", "dim"), [((3, 4), 0), ((2, 3, 2), 1), ((3, 1), 0)])
@pytest.mark.parametrize("start", ["warmed up", "cold"])
@batched
def test_derivatives(shape: tuple[int, ...], dim: int, start: str) -> None:
    """Also far from the singular vectors, where no term of the gradient vanishes."""
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    norm = SpectralNorm(weight, dim=dim).eval()
    if start == "cold":
        for vector in (norm._u, norm._v):
            vector.copy_(nn.functional.normalize(vector + 0.4 * torch.randn_like(vector), dim=0))
    assert norm._u @ as_matrix(weight, dim) @ norm._v > 0.3 * largest_singular_value(weight, dim)
    torch.autograd.gradcheck(norm, (weight,), check_batched_grad=True)
    torch.autograd.gradgradcheck(norm, (weight,), check_batched_grad=True)


@layers
def test_batched_gradients(kind: str) -> None:
    """Several gradients in one backward pass (``is_grads_batched``) equal those of separate passes."""
    layer = make(kind).train()
    out = layer(inputs(kind))
    seeds = torch.randn(3, *out.shape, dtype=torch.float64)
    (together,) = torch.autograd.grad(out, original(layer), seeds, retain_graph=True, is_grads_batched=True)
    one_by_one = [torch.autograd.grad(out, original(layer), seed, retain_graph=True)[0] for seed in seeds]
    torch.testing.assert_close(together, torch.stack(one_by_one), rtol=1e-12, atol=1e-12)  # rounding, at about 1


def test_vectorized_jacobian() -> None:
    weight = torch.randn(3, 4, dtype=torch.float64)
    norm = SpectralNorm(weight).eval()
    jacobians = [torch.autograd.functional.jacobian(norm, weight, vectorize=each) for each in (True, False)]
    torch.testing.assert_close(*jacobians, rtol=1e-12, atol=1e-12)  # rounding, at numbers of about 1


@layers
def test_gradient_reaches_the_original(kind: str) -> None:
    layer = make(kind)
    layer(inputs(kind)).square().sum().backward()
    grad = original(layer).grad
    assert grad is not None
    assert grad.isfinite().all()
    assert grad.abs().max() > 1e-6


def test_sparse_gradient_of_an_embedding() -> None:
    """Rows that were not looked up get a gradient, too, through sigma; so it is dense."""
    dense = spectral_norm(nn.Embedding(6, 3).double()).eval()
    sparse = spectral_norm(nn.Embedding(6, 3, sparse=True).double()).eval()
    sparse.load_state_dict(dense.state_dict())
    for layer in (dense, sparse):
        layer(torch.tensor([1, 4, 4])).pow(3).sum().backward()
    torch.testing.assert_close(original(sparse).grad, original(dense).grad)
    assert original(dense).grad.abs().amin(dim=1).min() > 0


@layers
def test_equals_torchs(kind: str) -> None:
    """Same state, same outputs and gradients as torch's parametrization."""
    ours = make(kind).train()
    theirs = parametrizations.spectral_norm(LAYERS[kind][0]().double())
    x = inputs(kind)
    ours(x)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.eval()
    theirs.eval()
    outputs = [layer(x) for layer in (ours, theirs)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)
    grads = []
    for layer, out in zip((ours, theirs), outputs, strict=True):
        out.pow(3).sum().backward()
        grads.append({name: parameter.grad for name, parameter in layer.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-10, atol=1e-10)


# --- state dicts ---------------------------------------------------------------------------------------------------


@layers
def test_state_dicts_move_both_ways(kind: str) -> None:
    def fresh(normalize: Callable[[nn.Module], nn.Module]) -> nn.Module:
        return normalize(LAYERS[kind][0]().double())

    x = inputs(kind)
    for source, destination in [
        (fresh(spectral_norm), fresh(parametrizations.spectral_norm)),
        (fresh(parametrizations.spectral_norm), fresh(spectral_norm)),
    ]:
        for _ in range(3):
            source(x)
        assert set(source.state_dict()) == set(destination.state_dict())
        destination.load_state_dict(source.state_dict(), strict=True)
        torch.testing.assert_close(source.eval()(x), destination.eval()(x), rtol=1e-12, atol=1e-12)
        for name, value in source.state_dict().items():
            assert torch.equal(value, destination.state_dict()[name])


def test_sigma_is_what_u_and_v_say() -> None:
    """In evaluation, a state with any u and v gives W / (uᵀWv), as torch's does, where that is negative too."""
    ours, theirs = make("linear").eval(), parametrizations.spectral_norm(nn.Linear(7, 5).double()).eval()
    for sign in (1, -1):
        state = copy.deepcopy(ours.state_dict())
        state["parametrizations.weight.0._u"] = sign * nn.functional.normalize(original(ours)[:, 0].detach(), dim=0)
        state["parametrizations.weight.0._v"] = torch.eye(7, dtype=torch.float64)[0]
        for layer in (ours, theirs):
            layer.load_state_dict(state)
            expected = original(layer) / (sign * original(layer)[:, 0].norm())
            torch.testing.assert_close(layer.weight, expected)


def test_state_dict_names() -> None:
    assert set(spectral_norm(nn.Linear(3, 5)).state_dict()) == {
        "parametrizations.weight.original",
        "parametrizations.weight.0._u",
        "parametrizations.weight.0._v",
        "bias",
    }


@pytest.mark.parametrize("activate_times", [0, 3])
def test_loading_continues_where_it_was_saved(activate_times: int) -> None:
    x = torch.randn(2, 3)
    layer = spectral_norm(nn.Linear(3, 5)).train()
    for _ in range(activate_times):
        layer(x)

    def run(layer: nn.Module) -> list[Tensor]:
        layer.load_state_dict(state, strict=True)
        return [layer.train(mode)(x).detach() for mode in (False, True, True, False)]

    with torch.no_grad():  # far enough for u and v to lag behind
        original(layer).normal_()
    state = copy.deepcopy(layer.state_dict())
    expected = run(layer)
    assert not torch.equal(expected[0], expected[1])
    assert not torch.equal(expected[1], expected[2])
    assert torch.equal(expected[2], expected[3])
    for actual, out in zip(run(spectral_norm(nn.Linear(3, 5))), expected, strict=True):
        assert torch.equal(actual, out)


def test_loading_what_does_not_fit() -> None:
    layer = spectral_norm(nn.Linear(3, 5))
    state = {**layer.state_dict(), "nonsense": torch.zeros(1)}
    with pytest.raises(RuntimeError, match="nonsense"):
        layer.load_state_dict(state, strict=True)
    while state:
        layer.load_state_dict(state, strict=False)
        state.popitem()
    with pytest.raises(RuntimeError, match=r"_u"):
        layer.load_state_dict({"bias": layer.bias}, strict=True)


# --- weights that are zero, new, or of few bits ----------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_zero_weight(training: bool) -> None:
    layer = make("conv2d").train(training)
    nn.init.zeros_(original(layer))
    before = u_and_v(layer)
    for _ in range(3):
        out = layer(inputs("conv2d"))
    assert torch.equal(layer.weight, torch.zeros_like(layer.weight))
    out.square().sum().backward()
    assert original(layer).grad.isfinite().all()
    torch.testing.assert_close(u_and_v(layer), before, rtol=0, atol=0)
    with torch.no_grad():
        original(layer).normal_()
    converge(layer)
    assert largest_singular_value(layer.weight) == pytest.approx(1, abs=1e-4)


def test_normalizing_a_zero_weight() -> None:
    layer = nn.Linear(4, 3)
    nn.init.zeros_(layer.weight)
    spectral_norm(layer)
    assert torch.equal(layer.weight, torch.zeros(3, 4))
    for vector in u_and_v(layer):
        assert vector.norm().item() == pytest.approx(1)


@layers
@pytest.mark.parametrize("training", [True, False])
def test_new_weight_through_the_parametrization(kind: str, training: bool) -> None:
    """Assigning a weight leaves sigma right, in evaluation too, where nothing else would iterate."""
    layer = make(kind).train(training)
    dim = LAYERS[kind][1]
    weight = torch.randn_like(original(layer))
    matrix = as_matrix(weight, dim)
    left, right = torch.randn(len(matrix)).double(), torch.randn(matrix.shape[1]).double()
    weight += 10 * torch.outer(left, right).reshape(
        [weight.shape[dim], *(size for axis, size in enumerate(weight.shape) if axis != dim)]
    ).movedim(0, dim)
    layer.weight = weight
    torch.testing.assert_close(original(layer).detach(), weight)
    layer.eval()
    assert largest_singular_value(layer.weight, dim) == pytest.approx(1, abs=1e-6)


def test_new_weight_is_a_copy_of_nothing_else() -> None:
    """A weight set through the parametrization stays trainable, and setting it back does nothing to its values."""
    layer = make("linear")
    weight = torch.randn(5, 7, dtype=torch.float64)
    layer.weight = weight
    assert isinstance(original(layer), nn.Parameter)
    assert original(layer).requires_grad
    layer.eval()
    first = layer.weight.detach().clone()
    torch.testing.assert_close(first * float(torch.linalg.matrix_norm(weight, 2)), weight, rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 500.0])
def test_iterates_in_float32_for_weights_of_few_bits(dtype: torch.dtype, scale: float) -> None:
    """Sigma of the large weight is above the largest float16; in bfloat16 alone it would be off by half a per cent."""
    # Their mean puts sigma at √(64·512) = 181 times the scale, six times above the second singular value: u and v
    # converge whatever the seed. Noise alone leaves the two so close (ratios up to 0.998) that 100 steps may not do.
    weight = (scale * (1 + torch.randn(64, 512))).to(dtype)
    layer = nn.Linear(512, 64, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    layer = spectral_norm(layer)
    with torch.no_grad():
        for _ in range(10):  # each rounds u and v to few bits
            normalized = layer.weight
    assert normalized.dtype == dtype
    assert original(layer).dtype == dtype
    expected = (weight.double() / largest_singular_value(weight)).to(dtype)
    ratio = float((normalized.double() * expected.double()).sum() / expected.double().square().sum())
    # Over 40 seeds 1e-6 at most, and with the iteration in few bits at least 6e-6 (float16) or 7e-5 (bfloat16).
    assert ratio == pytest.approx(1, abs=5e-6)
    layer.weight.float().square().sum().backward()
    assert original(layer).grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moved_to_few_bits_after_it_was_made(dtype: torch.dtype) -> None:
    layer = spectral_norm(nn.Conv2d(16, 32, 3)).to(dtype)
    with torch.no_grad():
        for _ in range(100):
            normalized = layer.weight
    assert normalized.dtype == dtype
    weight = original(layer).detach()
    expected = weight.double() / largest_singular_value(weight)
    ratio = float((normalized.double() * expected).sum() / expected.square().sum())
    assert ratio == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("training", [True, False])
def test_autocast_does_not_reach_the_iteration(training: bool) -> None:
    layer = spectral_norm(nn.Linear(64, 48)).train(training)
    with torch.no_grad():
        original(layer).normal_()
    twin = copy.deepcopy(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = [layer.weight for _ in range(3)][-1]
        out = layer(torch.randn(2, 64))
    outside = [twin.weight for _ in range(3)][-1]
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, outside, rtol=1e-6, atol=1e-6)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert original(layer).grad.dtype == torch.float32
    assert original(layer).grad.isfinite().all()


# --- where it is put, and how it is taken away ---------------------------------------------------------------------


@layers
def test_dim_of_each_layer(kind: str) -> None:
    layer = make(kind)
    outputs = LAYERS[kind][1]
    assert norm_of(layer)._u.shape == (original(layer).shape[outputs],)
    assert norm_of(layer)._v.shape == (original(layer).numel() // original(layer).shape[outputs],)
    assert layer(inputs(kind)).isfinite().all()


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_dim_can_be_chosen(dim: int) -> None:
    layer = make("transposed conv2d", dim=dim)
    assert norm_of(layer)._u.shape == (original(layer).shape[dim],)
    converge(layer)
    assert largest_singular_value(layer.weight, dim % 4) == pytest.approx(1, abs=1e-5)


def test_positional_arguments_are_those_of_torch() -> None:
    ours = spectral_norm(nn.Linear(7, 5), "weight", 2, 1e-6, 1)
    theirs = spectral_norm(nn.Linear(7, 5), "weight", 2, 1e-6, 1, implementation="torch")
    for layer in (ours, theirs):
        norm = norm_of(layer)
        assert (norm.n_power_iterations, norm.eps, norm.dim) == (2, 1e-6, 1)
    with pytest.raises(TypeError, match="positional"):
        spectral_norm(nn.Linear(7, 5), "weight", 2, 1e-6, 1, "torch")


@layers
def test_implementation_of_torch(kind: str) -> None:
    layer = make(kind, implementation="torch")
    theirs = parametrizations.spectral_norm(LAYERS[kind][0]().double())
    assert type(norm_of(layer)) is type(norm_of(theirs))
    assert norm_of(layer).dim == LAYERS[kind][1]
    ours = make(kind)
    ours.load_state_dict(layer.state_dict(), strict=True)
    torch.testing.assert_close(ours.eval().weight, layer.eval().weight)


def test_returns_the_module_and_takes_other_names() -> None:
    attention = nn.MultiheadAttention(4, 2)
    assert spectral_norm(attention, "in_proj_weight") is attention
    assert parametrize.is_parametrized(attention, "in_proj_weight")
    attention.eval()
    assert 0.99 < largest_singular_value(attention.in_proj_weight) < 1.3


def test_a_weight_of_a_recurrent_layer() -> None:
    """Whole models leave these alone, but a call by name reaches them, and the output follows."""
    plain = nn.LSTM(3, 4)
    layer = spectral_norm(copy.deepcopy(plain), "weight_hh_l0").eval()
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        plain.weight_hh_l0.copy_(layer.weight_hh_l0)
    torch.testing.assert_close(layer(x)[0], plain(x)[0])
    assert 0.99 < largest_singular_value(plain.weight_hh_l0) < 1.3


def test_on_a_vector() -> None:
    """As with torch's, a bias is divided by its length, and each weight comes off on its own."""
    layer = spectral_norm(spectral_norm(nn.Linear(5, 7).double()), "bias")
    bias = layer.parametrizations.bias.original
    torch.testing.assert_close(layer.bias, bias / bias.norm())
    assert layer(torch.randn(3, 5, dtype=torch.float64)).isfinite().all()
    parametrize.remove_parametrizations(layer, "bias")
    assert "bias" in layer._parameters
    assert "weight" not in layer._parameters
    parametrize.remove_parametrizations(layer, "weight")
    assert not hasattr(layer, "parametrizations")
    assert not parametrize.is_parametrized(layer)
    assert "weight" in layer._parameters


def test_twice_on_one_weight() -> None:
    """PyTorch stacks a second, useless one; here that is an error, for either implementation."""
    layer = spectral_norm(nn.Linear(5, 7))
    with pytest.raises(ValueError, match="already"):
        spectral_norm(layer, implementation="torch")
    assert len(layer.parametrizations.weight) == 1


@layers
@pytest.mark.parametrize("implementation", ["sagan", "torch"])
def test_remove_keeps_the_normalized_weight(kind: str, implementation: str) -> None:
    layer = make(kind, implementation=implementation)
    x = inputs(kind)
    for _ in range(3):
        before = layer(x).detach()
    layer.eval()
    assert remove_spectral_norm(layer) is layer
    assert not parametrize.is_parametrized(layer)
    assert type(layer) is type(LAYERS[kind][0]())
    assert isinstance(layer.weight, nn.Parameter)
    assert set(layer.state_dict()) == set(LAYERS[kind][0]().state_dict())
    assert torch.equal(layer(x), before)
    spectral_norm(layer, implementation=implementation)  # and it can come back
    assert parametrize.is_parametrized(layer, "weight")


def test_remove_in_training_makes_no_iteration() -> None:
    layer = make("conv2d").train()
    with torch.no_grad():
        original(layer).normal_()
    expected = copy.deepcopy(layer).eval().weight.detach()
    remove_spectral_norm(layer)
    assert layer.training
    assert torch.equal(layer.weight, expected)


def test_remove_by_name() -> None:
    attention = spectral_norm(nn.MultiheadAttention(4, 2), "in_proj_weight")
    remove_spectral_norm(attention, "in_proj_weight")
    assert isinstance(attention.in_proj_weight, nn.Parameter)


def test_removing_what_is_not_there() -> None:
    layer = spectral_norm(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="bias"):
        remove_spectral_norm(layer, "bias")
    remove_spectral_norm(layer)
    with pytest.raises(ValueError, match="weight"):
        remove_spectral_norm(layer)
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="weight"):
        remove_spectral_norm(layer)


def test_a_weight_that_is_computed() -> None:
    """Pruning keeps the parameter under another name; dividing what is computed from it would last one forward pass."""
    layer = prune.random_unstructured(nn.Linear(3, 4), "weight", amount=2)
    with pytest.raises(ValueError, match="'weight' of Linear is not a parameter"):
        spectral_norm(layer)


def test_a_weight_without_a_shape() -> None:
    layer = nn.LazyConv2d(4, 3)
    with pytest.raises(ValueError, match=r"'weight' of LazyConv2d has no shape yet: run one forward pass first"):
        spectral_norm(layer)
    layer(torch.randn(1, 2, 5, 5))
    assert 0.99 < spectral_norms(spectral_norm(layer))["weight"] < 1.4


def test_a_weight_of_integers() -> None:
    with pytest.raises(TypeError, match=r"floating-point or complex weight, got torch\.int8"):
        SpectralNorm(torch.ones(3, 4, dtype=torch.int8))


@pytest.mark.parametrize("implementation", ["sagan", "torch"])
def test_both_implementations_refuse_the_same_weights(implementation: str) -> None:
    layer = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"a weight of shape \(3, 4\) has no dimension 2"):
        spectral_norm(layer, dim=2, implementation=implementation)
    layer.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"floating-point or complex weight, got torch\.int8"):
        spectral_norm(layer, implementation=implementation)


def test_errors() -> None:
    with pytest.raises(ValueError, match="heavy"):
        spectral_norm(nn.Linear(3, 4), "heavy")
    with pytest.raises(ValueError, match="bias"):
        spectral_norm(nn.Linear(3, 4, bias=False), "bias")
    with pytest.raises(ValueError, match="Sequential has no parameter named 'weight'; apply_spectral_norm takes whole"):
        spectral_norm(nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(ValueError, match="jax") as error:
        spectral_norm(nn.Linear(3, 4), implementation="jax")
    assert "sagan" in str(error.value)
    assert "torch" in str(error.value)
    for iterations in (0, -1):
        with pytest.raises(ValueError, match=f"n_power_iterations.*{iterations}"):
            spectral_norm(nn.Linear(3, 4), n_power_iterations=iterations)
        with pytest.raises(ValueError, match=f"n_power_iterations.*{iterations}"):
            SpectralNorm(torch.randn(3, 4), n_power_iterations=iterations)
    for dim in (2, -3):
        with pytest.raises((ValueError, IndexError), match=f"(?i)dim.*{dim}"):
            SpectralNorm(torch.randn(3, 4), dim=dim)


# --- whole models --------------------------------------------------------------------------------------------------


def model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(6 * 8 * 8, 5),
    )


def normalized(network: nn.Module) -> set[str]:
    return {name for name, module in network.named_modules() if parametrize.is_parametrized(module)}


def test_apply_normalizes_every_layer_with_a_weight() -> None:
    network = model()
    assert apply_spectral_norm(network) is network
    assert normalized(network) == {"0", "2.0", "4"}
    assert norm_of(network[2][0])._u.shape == (6,)  # outputs of a transposed convolution
    network(torch.randn(2, 3, 8, 8)).sum().backward()
    everything = nn.ModuleList([make_layer() for make_layer, _, _ in LAYERS.values()])
    apply_spectral_norm(everything)
    assert normalized(everything) == {str(index) for index in range(len(LAYERS))}


def test_apply_to_a_single_layer() -> None:
    layer = nn.Linear(3, 4)
    assert apply_spectral_norm(layer) is layer
    assert parametrize.is_parametrized(layer, "weight")


@pytest.mark.parametrize("implementation", ["sagan", "torch"])
def test_spectral_norms_are_exact_and_change_nothing(implementation: str) -> None:
    network = model().double()
    for layer in (network[0], network[2][0], network[4]):
        spectral_norm(layer, implementation=implementation)
    network.train()
    with torch.no_grad():
        original(network[0]).mul_(3)
        original(network[4]).add_(torch.randn_like(original(network[4])))  # u and v are now behind
    state = copy.deepcopy(network.state_dict())
    found = spectral_norms(network)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert network.training
    network.eval()
    expected = {"0": (network[0], 0), "2.0": (network[2][0], 1), "4": (network[4], 0)}
    assert len(found) == 3
    for name, value in found.items():
        layer, dim = expected[name.removesuffix(".weight")]
        assert isinstance(value, float)
        assert value == pytest.approx(largest_singular_value(layer.weight, dim), rel=1e-9)
    assert max(found.values()) > 1.5


WHICH: dict[str, tuple[dict[str, object], set[str]]] = {
    "by name": ({"include": "2.0"}, {"2.0"}),
    "by the name of a container": ({"include": "2"}, {"2.0"}),
    "by several names": ({"include": ["0", "4"]}, {"0", "4"}),
    "by names from a generator": ({"include": (name for name in ("0", "4"))}, {"0", "4"}),
    "by a wildcard": ({"include": "?.0"}, {"2.0"}),
    "by a wildcard that runs over dots": ({"include": "*0"}, {"0", "2.0"}),
    "by a function of the layer": ({"include": lambda _, layer: isinstance(layer, nn.Linear)}, {"4"}),
    "by a function of the name": ({"include": lambda name, _: "." in name}, {"2.0"}),
    "all but a name": ({"exclude": "4"}, {"0", "2.0"}),
    "all but several": ({"exclude": ("2", "4")}, {"0"}),
    "all but what a function names": ({"exclude": lambda _, layer: isinstance(layer, nn.Linear)}, {"0", "2.0"}),
    "all but nothing": ({"exclude": []}, {"0", "2.0", "4"}),
    "a function that happens to exclude nothing": ({"exclude": lambda *_: False}, {"0", "2.0", "4"}),
    "some but a part of them": ({"include": ["0", "2"], "exclude": "2.0"}, {"0"}),
    "excluded wins": ({"include": "*", "exclude": "[04]"}, {"2.0"}),
}


@pytest.mark.parametrize(("arguments", "expected"), WHICH.values(), ids=WHICH)
def test_include_and_exclude(arguments: dict[str, object], expected: set[str]) -> None:
    assert normalized(apply_spectral_norm(model(), **arguments)) == expected


class OwnConvolution(nn.Conv2d):
    """A layer of another library that uses its weight in its own way."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight.flip(3), self.bias)


def test_an_inserted_layer_is_not_below_the_module_it_follows() -> None:
    """It is beside the layer: the name of the container of both matches both."""

    def inserted() -> nn.Sequential:
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)))
        return insert_self_attention(network, after=["0", "2.0"], example_input=torch.randn(1, 3, 9, 9))

    def path(network: nn.Module, number: int) -> str:
        return [name for name, part in network.named_modules() if isinstance(part, SelfAttention2d)][number]

    def projections(layer: str) -> set[str]:
        return {f"{layer}.{name}.weight" for name in ("query", "key", "value")}

    network = inserted()
    first, second = path(network, 0), path(network, 1)
    own, all_projections = {"0.weight", "2.0.weight", "2.1.weight"}, projections(first) | projections(second)
    for arguments, expected in [
        ({"include": "0"}, {"0.weight"}),
        ({"include": "?"}, own | projections(second)),
        ({"include": "2"}, {"2.0.weight", "2.1.weight"} | projections(second)),
        ({"include": "2.0"}, {"2.0.weight"}),
        ({"include": ["0", first]}, {"0.weight"} | projections(first)),
        ({"include": f"{second}.query"}, {f"{second}.query.weight"}),
        ({"include": "*"}, own | all_projections),
        ({}, own | all_projections),
        ({"exclude": "0"}, own - {"0.weight"} | all_projections),
        ({"exclude": [first, second]}, own),
    ]:
        assert set(spectral_norms(apply_spectral_norm(inserted(), **arguments))) == expected, arguments


def test_a_child_that_only_has_the_name_of_an_inserted_layer() -> None:
    """A model may have a child of this name; it is below its container like any other."""
    block = nn.Sequential(nn.Conv2d(3, 8, 3))
    block.add_module("inserted_attention", nn.Conv2d(8, 8, 1))
    network = apply_spectral_norm(nn.Sequential(block, nn.Linear(2, 2)), include="0")
    assert set(spectral_norms(network)) == {"0.0.weight", "0.inserted_attention.weight"}


def test_subclasses_of_layers() -> None:
    plain = OwnConvolution(3, 4, 2)
    layer = apply_spectral_norm(nn.Sequential(copy.deepcopy(plain))).eval()[0]
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
    x = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(layer(x), plain(x))
    assert isinstance(layer, OwnConvolution)
    assert 0.99 < largest_singular_value(plain.weight) < 1.4


@pytest.mark.parametrize("training", [True, False])
def test_attention_and_recurrent_layers(training: bool) -> None:
    """The output projection and the feed-forward layers are linear; the input projection and LSTM weights no layers."""
    network = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), nn.LSTM(8, 4))
    plain = copy.deepcopy(network)
    apply_spectral_norm(network)
    assert set(spectral_norms(network)) == {f"0.{name}.weight" for name in ("self_attn.out_proj", "linear1", "linear2")}
    for layer, other in zip(network.modules(), plain.modules(), strict=False):
        layer.train(training), other.train(training)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():  # in evaluation, this is what PyTorch's fast path asks for
        actual = network(x)[0]
        network.eval()
        for name in spectral_norms(network):
            layer = plain.get_submodule(name.removesuffix(".weight"))
            layer.weight.copy_(network.get_submodule(name.removesuffix(".weight")).weight)
        torch.testing.assert_close(actual, plain.train(training)(x)[0], rtol=1e-5, atol=1e-5)


# --- whole models: normalised already ---------------------------------------------------------------------------------

NORMALIZERS: dict[str, Callable[..., nn.Module]] = {
    "sagan": spectral_norm,
    "torch": parametrizations.spectral_norm,
    "legacy": legacy_spectral_norm,
}
normalizers = pytest.mark.parametrize("normalizer", NORMALIZERS)


@normalizers
@pytest.mark.parametrize("implementation", ["sagan", "torch"])
def test_normalized_already(normalizer: str, implementation: str) -> None:
    """A warning names them and they are not normalised twice; if they are excluded, there is no warning."""
    network = model()
    NORMALIZERS[normalizer](network[0])
    NORMALIZERS[normalizer](network[2][0])
    quiet = copy.deepcopy(network)
    keys = set(network[0].state_dict())
    with pytest.warns(UserWarning, match=r"already, and left alone: '0', '2\.0' \(.*exclude") as caught:
        apply_spectral_norm(network, implementation=implementation)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert set(network[0].state_dict()) == keys
    assert set(spectral_norms(network)) == {"0.weight", "2.0.weight", "4.weight"}
    apply_spectral_norm(quiet, exclude=["0", "2"], implementation=implementation)
    assert quiet.state_dict().keys() == network.state_dict().keys()
    with pytest.raises(ValueError, match=r"'weight' of .*Conv2d is spectrally normalised already"):
        spectral_norm(network[0], implementation=implementation)


def test_a_warning_made_an_error_leaves_the_model_as_it_was() -> None:
    network = model()
    spectral_norm(network[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="already"):
            apply_spectral_norm(network)
    assert normalized(network) == {"0"}


def test_the_rest_of_the_discriminator() -> None:
    """The reference's discriminator has plain attention projections and a plain last layer."""
    discriminator = SAGANDiscriminator(32, base_channels=8)
    before = set(spectral_norms(discriminator))
    plain = {
        f"{name}.weight"
        for name, layer in discriminator.named_modules()
        if isinstance(layer, nn.Conv2d) and not parametrize.is_parametrized(layer)
    }
    assert before
    assert any("query" in name for name in plain)
    with pytest.warns(UserWarning, match=re.escape(min(before).removesuffix(".weight"))):
        apply_spectral_norm(discriminator)
    assert set(spectral_norms(discriminator)) == before | plain
    assert discriminator(torch.randn(2, 3, 32, 32)).shape == (2,)


@normalizers
def test_exact_norms_and_reset_of_every_kind(normalizer: str) -> None:
    layer = NORMALIZERS[normalizer](nn.ConvTranspose2d(4, 3, 3).double())
    network = nn.Sequential(layer).train()
    network(torch.randn(1, 4, 5, 5, dtype=torch.float64))
    raw = layer.weight_orig if normalizer == "legacy" else original(layer)
    with torch.no_grad():
        raw.normal_(std=2.0)
    state = copy.deepcopy(network.state_dict())
    stale = spectral_norms(network)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    network.eval()(torch.randn(1, 4, 5, 5, dtype=torch.float64))
    assert stale == {"0.weight": pytest.approx(largest_singular_value(layer.weight, 1))}
    assert not 0.9 < stale["0.weight"] < 1.4
    reset_power_iteration(network)
    assert 1 - 1e-9 <= spectral_norms(network)["0.weight"] < 1.4
    network(torch.randn(1, 4, 5, 5, dtype=torch.float64))
    assert 1 - 1e-9 <= largest_singular_value(layer.weight, 1) < 1.4


# --- whole models: shared and tied weights, other parametrizations ----------------------------------------------------


def test_a_layer_with_two_names() -> None:
    """One layer, normalised once; either of its names matches it."""
    shared = nn.Linear(3, 3)
    network = nn.ModuleDict({"first": shared, "between": nn.Linear(3, 3), "second": nn.Sequential(shared)})
    for name in ("first", "second.0"):
        assert set(spectral_norms(apply_spectral_norm(copy.deepcopy(network), include=name))) == {"first.weight"}
        assert set(spectral_norms(apply_spectral_norm(copy.deepcopy(network), exclude=name))) == {"between.weight"}
    apply_spectral_norm(network)
    assert len(shared.parametrizations.weight) == 1
    assert network["second"][0] is network["first"]
    remove_spectral_norm(network)
    assert normalized(network) == set()


def tied() -> nn.ModuleDict:
    network = nn.ModuleDict({"in": nn.Embedding(5, 3), "middle": nn.Linear(3, 3), "out": nn.Linear(3, 5)})
    network["out"].weight = network["in"].weight
    return network


@pytest.mark.parametrize("arguments", [{}, {"exclude": "out"}, {"include": "out"}, {"include": ["in", "out"]}])
def test_tied_weights_are_not_untied(arguments: dict[str, object]) -> None:
    network = tied()
    with pytest.raises(ValueError, match=r"'in\.weight' and 'out\.weight' are one parameter.*exclude"):
        apply_spectral_norm(network, **arguments)
    assert normalized(network) == set()
    apply_spectral_norm(network, exclude=["in", "out"])
    assert normalized(network) == {"middle"}
    assert network["in"].weight is network["out"].weight


def test_tied_within_a_single_layer() -> None:
    layer = nn.Linear(3, 3)
    layer.register_parameter("also", layer.weight)
    with pytest.raises(ValueError, match=r"'weight' and 'also' are one parameter"):
        apply_spectral_norm(layer)


def test_tied_to_what_is_normalized_already() -> None:
    network = tied()
    spectral_norm(network["in"])
    with pytest.raises(
        ValueError, match=r"'in\.parametrizations\.weight\.original' and 'out\.weight' are one parameter"
    ):
        apply_spectral_norm(network)


@pytest.mark.parametrize("other", [parametrizations.weight_norm, parametrizations.orthogonal])
@pytest.mark.parametrize("implementation", ["sagan", "torch"])
def test_on_top_of_another_parametrization(other: Callable[[nn.Module], nn.Module], implementation: str) -> None:
    """The output of the other parametrization is normalised, and u and v are warmed up on it."""
    layer = other(nn.Linear(5, 5).double())
    network = apply_spectral_norm(nn.Sequential(layer, nn.Linear(5, 4)), implementation=implementation)
    assert len(layer.parametrizations.weight) == 2
    with torch.no_grad():
        for parameter in layer.parametrizations.weight.parameters():
            parameter.copy_(torch.randn_like(parameter))
    reset_power_iteration(network)
    network.train()
    for _ in range(100):
        out = layer(torch.randn(2, 5, dtype=torch.float64))
    assert spectral_norms(network)["0.weight"] == pytest.approx(1, abs=1e-3)
    layer.eval()
    assert largest_singular_value(layer.weight) == pytest.approx(1, abs=1e-3)
    out.square().sum().backward()
    for parameter in layer.parametrizations.weight.parameters():
        assert parameter.grad.abs().max() > 0
    with pytest.raises(ValueError, match=r"'0\.weight' has 2 parametrizations, expected one"):
        remove_spectral_norm(network)
    assert normalized(network) == {"0", "1"}


@pytest.mark.parametrize("implementation", ["sagan", "torch"])
def test_reset_warms_up_on_what_the_norm_sees(implementation: str) -> None:
    """Weight norm's magnitudes turn the singular vectors; those of its directions alone would be wrong."""
    layer = parametrizations.weight_norm(nn.Linear(6, 4).double())
    spectral_norm(layer, implementation=implementation)
    with torch.no_grad():
        layer.parametrizations.weight.original0.copy_(torch.tensor([[1.0], [1.0], [1.0], [100.0]]))
    layer.eval()
    assert largest_singular_value(layer.weight) > 1.5
    reset_power_iteration(layer)
    assert largest_singular_value(layer.weight) == pytest.approx(1, abs=1e-6)


# --- whole models: errors change nothing ------------------------------------------------------------------------------


def with_lazy() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.LazyConv2d(4, 3)))


def with_pruned() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), prune.random_unstructured(nn.Linear(3, 4), "weight", amount=2))


def with_integers() -> nn.Module:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(3, 4))
    network[1].weight = nn.Parameter(torch.ones(4, 3, dtype=torch.int8), requires_grad=False)
    return network


WRONG: dict[str, tuple[Callable[[], nn.Module], dict[str, object], type[Exception], str]] = {
    "no layers": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), {}, ValueError, "Sequential has no convolution"),
    "a name that is not there": (model, {"include": "2.1"}, ValueError, r"include: '2\.1' matches .*nearest: '2\.0'"),
    "the end of a name": (
        lambda: nn.ModuleDict({"generator": nn.ModuleDict({"convolution": nn.Conv2d(3, 4, 3)})}),
        {"include": "convolution"}, ValueError, r"nearest: 'generator\.convolution'$",
    ),
    "one of several": (model, {"exclude": ["0", "5"]}, ValueError, "exclude: '5' matches .* of Sequential; nearest: "),
    "a name of another module": (model, {"exclude": "1"}, ValueError, "exclude: '1' matches no convolution"),
    "a pattern": (model, {"exclude": "features.*"}, ValueError, r"exclude: 'features\.\*' matches no"),
    "the empty name": (model, {"include": ""}, ValueError, "include: '' matches no"),
    "the name of a weight": (model, {"include": "0.weight"}, ValueError, r"'0\.weight' matches no .*nearest: .*'0'"),
    "no names": (model, {"include": []}, ValueError, "leave none of the 3 layers of Sequential"),
    "a function that matches none": (model, {"include": lambda *_: False}, ValueError, "leave none of the 3 layers"),
    "all excluded": (model, {"exclude": "*"}, ValueError, "leave none of the 3 layers of Sequential to normalise"),
    "a class": (model, {"exclude": nn.Linear}, TypeError, "exclude takes dotted names, or a function .* got type"),
    "a number": (model, {"exclude": 4}, TypeError, "got int"),
    "a layer": (model, {"exclude": nn.Linear(2, 2)}, TypeError, "got Linear"),
    "layers": (model, {"include": ["0", nn.Linear(2, 2)]}, TypeError, "include takes dotted names.* got Linear"),
    "iterations": (model, {"n_power_iterations": 0}, ValueError, "^n_power_iterations must be at least 1, got 0"),
    "implementation": (model, {"implementation": "jax"}, ValueError, "^implementation must be .*'jax'"),
    "a lazy layer": (with_lazy, {}, ValueError, r"^1\.0: .*LazyConv2d has no shape yet.*exclude='1\.0'"),
    "a pruned layer": (with_pruned, {}, ValueError, "^1: 'weight' of Linear is not a parameter.*exclude='1'"),
    "a weight of integers": (with_integers, {}, TypeError, r"^1: expected .*floating-point.*int8.*exclude='1'"),
}  # fmt: skip


@pytest.mark.parametrize(("build", "arguments", "kind", "message"), WRONG.values(), ids=WRONG)
def test_errors_leave_the_model_as_it_was(
    build: Callable[[], nn.Module], arguments: dict[str, object], kind: type[Exception], message: str
) -> None:
    network = build()
    before = [(name, type(module), dict(module._parameters)) for name, module in network.named_modules()]
    with pytest.raises(kind, match=message):
        apply_spectral_norm(network, **arguments)
    after = [(name, type(module), dict(module._parameters)) for name, module in network.named_modules()]
    assert after == before
    assert spectral_norms(network) == {}


@pytest.mark.parametrize("build", [with_lazy, with_pruned, with_integers])
def test_exclude_is_the_way_out(build: Callable[[], nn.Module]) -> None:
    assert set(spectral_norms(apply_spectral_norm(build(), exclude="1"))) == {"0.weight"}


# --- whole models: and back again -------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_remove_from_a_whole_model(training: bool) -> None:
    """All three kinds at once: exactly what evaluation computes, and the keys of a plain model."""
    plain, network = model(), model()
    spectral_norm(network[0])
    spectral_norm(network[0], "bias")
    legacy_spectral_norm(network[2][0])
    spectral_norm(network[4], implementation="torch")
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        network(x)
        # So far from u and v that an iteration would show.
        for raw in (original(network[0]), network[2][0].weight_orig, original(network[4])):
            raw.normal_()
    expected = copy.deepcopy(network).eval()(x)
    network.train(training)
    assert remove_spectral_norm(network) is network
    assert {module.training for module in network.modules()} == {training}
    assert torch.equal(network.eval()(x), expected)
    assert network.state_dict().keys() == plain.state_dict().keys()
    assert [type(module) for module in network.modules()] == [type(module) for module in plain.modules()]
    assert not any(module._forward_pre_hooks for module in network.modules())
    plain.load_state_dict(network.state_dict())
    assert torch.equal(plain.eval()(x), expected)


def test_remove_one_name_of_a_model() -> None:
    network = nn.Sequential(spectral_norm(spectral_norm(nn.Linear(3, 4)), "bias"), spectral_norm(nn.Linear(4, 4)))
    remove_spectral_norm(network, "bias")
    assert set(spectral_norms(network)) == {"0.weight", "1.weight"}
    with pytest.raises(ValueError, match="Sequential has no spectrally normalised 'bias'"):
        remove_spectral_norm(network, "bias")
    remove_spectral_norm(network, name="weight")
    with pytest.raises(ValueError, match="Sequential has no spectrally normalised weight"):
        remove_spectral_norm(network)


def test_two_weights_of_one_module_in_two_ways() -> None:
    """PyTorch's hook on one weight does not affect another weight of the same module."""
    cell = legacy_spectral_norm(nn.LSTMCell(3, 4), "weight_hh")
    spectral_norm(cell, "weight_ih")
    with pytest.raises(ValueError, match="'weight_hh' of ParametrizedLSTMCell is spectrally normalised already"):
        spectral_norm(cell, "weight_hh")
    assert set(spectral_norms(cell)) == {"weight_hh", "weight_ih"}
    remove_spectral_norm(cell, "weight_hh")
    assert set(spectral_norms(cell)) == {"weight_ih"}
    assert set(dict(cell.named_parameters())) >= {"weight_hh", "parametrizations.weight_ih.original"}


def test_removing_changes_nothing_when_one_cannot_be() -> None:
    network = nn.Sequential(nn.Linear(3, 3), parametrizations.orthogonal(nn.Linear(3, 3)))
    legacy_spectral_norm(network[0])
    spectral_norm(network[1])
    before = set(network.state_dict())
    with pytest.raises(ValueError, match=r"'1\.weight' has 2 parametrizations.*remove_parametrizations"):
        remove_spectral_norm(network)
    assert set(network.state_dict()) == before


@normalizers
@pytest.mark.parametrize("trainable", [True, False])
def test_parameters_stay_the_same_objects(normalizer: str, trainable: bool) -> None:
    """An existing optimiser keeps updating the weights, normalised and after removal; frozen ones stay frozen."""
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).requires_grad_(trainable)
    before = set(network.parameters())
    for layer in network:
        NORMALIZERS[normalizer](layer)
    assert set(network.parameters()) == before
    remove_spectral_norm(network)
    assert set(network.parameters()) == before
    assert {parameter.requires_grad for parameter in network.parameters()} == {trainable}
    apply_spectral_norm(network)
    assert set(network.parameters()) == before


def test_spectral_norms_of_a_complex_weight() -> None:
    layer = spectral_norm(nn.Linear(3, 4, dtype=torch.complex64)).eval()
    expected = torch.linalg.svdvals(layer.weight.to(torch.complex128))[0].item()
    assert spectral_norms(layer)["weight"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@normalizers
def test_spectral_norms_of_a_weight_that_is_not_finite(normalizer: str, value: float) -> None:
    """It is listed with the others, whose norms do not change, so that a diverged layer can be found."""
    network = nn.Sequential(*(NORMALIZERS[normalizer](nn.Linear(3, 3)) for _ in range(2)))
    with torch.no_grad():
        next(p for p in network[1].parameters() if p.ndim == 2)[0, 0] = value
    norms = spectral_norms(network.eval())
    assert 0 < norms["0.weight"] < math.inf
    assert math.isnan(norms["1.weight"])


def test_spectral_norms_of_a_model_without_any() -> None:
    assert spectral_norms(model()) == {}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("initialize", [functools.partial(nn.init.normal_, std=2.0), nn.init.zeros_])
def test_reset_after_new_weights(training: bool, initialize: Callable[[Tensor], Tensor]) -> None:
    """Weights that were initialised without updating u and v: sigma is wrong before the reset and right after it."""
    network = apply_spectral_norm(model()).train(training)
    for layer in (network[0], network[2][0], network[4]):
        initialize(original(layer))
    stale = max(spectral_norms(network.eval()).values())
    network.train(training)
    reset_power_iteration(network)
    assert network.training is training
    fresh = spectral_norms(network.eval())
    if initialize is nn.init.zeros_:
        assert set(fresh.values()) == {0.0}
    else:
        assert stale > 2
        for value in fresh.values():
            assert 0.999 < value < 1.3


def test_sigma_of_a_network_in_training() -> None:
    """Twenty optimiser steps on a loss: every weight still has a largest singular value of about 1."""
    network = apply_spectral_norm(model())
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2, betas=(0.0, 0.9))
    start = copy.deepcopy(network.state_dict())
    for _ in range(40):
        optimizer.zero_grad()
        network(torch.randn(4, 3, 8, 8)).square().mean().neg().backward()
        optimizer.step()
    moved = original(network[4]) - start["4.parametrizations.weight.original"]
    assert moved.norm() > 0.5
    for value in spectral_norms(network.eval()).values():
        assert value == pytest.approx(1, abs=0.1)
