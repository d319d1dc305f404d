"""SpectralNorm of one weight against an SVD, torch's own parametrization and the PyTorch reference."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from normalized_layers import (
    LAYERS,
    batched,
    converge,
    inputs,
    layers,
    make,
    norm_of,
    original,
    u_and_v,
)
from references import (
    as_matrix,
    assert_all_close,
    fill,
    largest_singular_value,
    power_iteration_by_numpy,
    spectral_gradient,
)
from torch_sagan import (
    SpectralNorm,
    spectral_norm,
)

# --- sigma -----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("kind", ["linear", "conv2d", "transposed conv2d", "embedding"])  # the rank makes no difference
def test_follows_moving_weights(kind: str) -> None:
    """One iteration per step keeps up with weights that an optimizer moves."""
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


# --- training and evaluation -----------------------------------------------------------------------------------------


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


# --- state dicts -----------------------------------------------------------------------------------------------------


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


# --- weights at the ends of the range, or beyond ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float64, 1e-200), (torch.float64, 1e200), (torch.float32, 1e-30), (torch.float32, 1e30),
        (torch.bfloat16, 1e-30), (torch.bfloat16, 1e30), (torch.float16, 1e-6), (torch.float16, 3e4),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("shape", [(6, 8), (8,)])
@pytest.mark.parametrize("training", [True, False])
def test_the_size_of_a_weight_does_not_matter(
    dtype: torch.dtype, scale: float, shape: tuple[int, ...], training: bool
) -> None:
    weight = (scale * torch.rand(shape, dtype=torch.float64)).to(dtype)  # all positive, so it is almost of rank one
    normalized = SpectralNorm(weight, eps=0).train(training)(weight)
    sigma = largest_singular_value(weight.view(len(weight), -1))
    torch.testing.assert_close(
        normalized, (weight.double() / sigma).to(dtype), rtol=8 * torch.finfo(dtype).eps, atol=1e-5
    )


def test_a_weight_below_eps_is_returned_as_it_is() -> None:
    """With the default, as small as 1e-13; so the gradient is at most 1e12 times that of the result."""
    weight = torch.full((1, 1), 1e-13, requires_grad=True)
    (normalized := SpectralNorm(weight)(weight)).backward()
    assert torch.equal(normalized, weight)
    assert weight.grad.item() == 1
    above = torch.full((1, 1), 1e-11)
    assert SpectralNorm(above)(above).item() == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("shape", [(4, 5), (5,)])
def test_a_weight_that_diverged_and_is_restored(value: float, shape: tuple[int, ...]) -> None:
    """While it is not finite it is returned as it is. u and v are kept: sigma is right again when the weight is."""
    weight = torch.randn(shape)
    norm = SpectralNorm(weight)
    expected = copy.deepcopy(norm).eval()(weight)
    diverged = weight.clone().index_fill_(0, torch.tensor([2]), value)
    for mode in (True, False):
        torch.testing.assert_close(norm.train(mode)(diverged), diverged, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(norm(weight), expected)


def test_the_gradient_of_a_zero_vector() -> None:
    layer = spectral_norm(nn.Linear(3, 4), "bias")
    nn.init.zeros_(layer.parametrizations.bias.original)
    layer(torch.randn(2, 3)).sum().backward()
    assert torch.equal(layer.parametrizations.bias.original.grad, torch.full((4,), 2.0))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_a_weight_without_entries(shape: tuple[int, int]) -> None:
    layer = spectral_norm(nn.Linear(*shape))
    assert layer(torch.ones(2, shape[0])).shape == (2, shape[1])
    assert layer.weight.shape == shape[::-1]


def test_made_in_inference_mode() -> None:
    with torch.inference_mode():
        layer = spectral_norm(nn.Linear(3, 4))
        layer(torch.randn(2, 3))
        assert 0.99 < largest_singular_value(layer.weight) < 1.3
