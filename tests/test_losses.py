"""Losses against their formulas, and the gradient penalty against discriminators whose gradient is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from torch_sagan import (
    SAGANDiscriminator,
    SelfAttention2d,
    gradient_penalty,
    hinge_discriminator_loss,
    hinge_generator_loss,
    relativistic_discriminator_loss,
    relativistic_generator_loss,
    wasserstein_discriminator_loss,
    wasserstein_generator_loss,
    zero_centered_gradient_penalty,
)

both_kernels = pytest.mark.usefixtures("kernels")  # the branch of the CPU and that of CUDA

LOGITS = st.lists(st.floats(-5, 5, allow_subnormal=False), min_size=1, max_size=6)


class Linear(nn.Module):
    """D(x) = ⟨w, x⟩, whose gradient is w everywhere."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, images: Tensor) -> Tensor:
        return (images * self.weight).flatten(1).sum(1)


class Quadratic(nn.Module):
    """D(x) = ‖x‖² / 2, whose gradient is x itself; it remembers where it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.asked.append(images.detach().clone())
        return 0.5 * images.square().flatten(1).sum(1)


class Conditional(nn.Module):
    """D(x, y) = y · Σx."""

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return labels * images.flatten(1).sum(1)


# --- hinge and Wasserstein -----------------------------------------------------------------------------------------


@given(real=LOGITS, fake=LOGITS)
def test_formulas(real: list[float], fake: list[float]) -> None:
    reals, fakes = (torch.tensor(logits, dtype=torch.float64) for logits in (real, fake))

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    expected = {
        hinge_discriminator_loss(reals, fakes): mean([max(0.0, 1 - r) for r in real])
        + mean([max(0.0, 1 + f) for f in fake]),
        wasserstein_discriminator_loss(reals, fakes): mean(fake) - mean(real),
        hinge_generator_loss(fakes): -mean(fake),
        wasserstein_generator_loss(fakes): -mean(fake),
    }
    for loss, value in expected.items():
        assert loss.shape == ()
        assert loss.item() == pytest.approx(value, abs=1e-12)


def test_hinge_stops_at_the_margin() -> None:
    real = torch.tensor([1.5, 0.5, -3.0], requires_grad=True)
    fake = torch.tensor([-1.5, -0.5, 3.0], requires_grad=True)
    hinge_discriminator_loss(real, fake).backward()
    assert real.grad is not None
    assert fake.grad is not None
    torch.testing.assert_close(real.grad, torch.tensor([0.0, -1 / 3, -1 / 3]))
    torch.testing.assert_close(fake.grad, torch.tensor([0.0, 1 / 3, 1 / 3]))


# --- relativistic --------------------------------------------------------------------------------------------------


# Without subnormal numbers: code that torch compiled earlier in this process may have had those flushed to zero.
LOGIT = st.floats(-5, 5, allow_subnormal=False)


@given(pairs=st.lists(st.tuples(LOGIT, LOGIT), min_size=1, max_size=6))
def test_relativistic_formulas(pairs: list[tuple[float, float]]) -> None:
    """-log σ(D(x) - D(G(z))) for D, the same with the roles exchanged for G, averaged over the pairs."""
    real, fake = torch.tensor(pairs, dtype=torch.float64).T

    def negative_log_sigmoid(t: float) -> float:
        return math.log1p(math.exp(-t))

    d_loss = sum(negative_log_sigmoid(r - f) for r, f in pairs) / len(pairs)
    g_loss = sum(negative_log_sigmoid(f - r) for r, f in pairs) / len(pairs)
    # Rounding of a few float64 terms of size 10.
    assert relativistic_discriminator_loss(real, fake).item() == pytest.approx(d_loss, abs=1e-12)
    assert relativistic_generator_loss(real, fake).item() == pytest.approx(g_loss, abs=1e-12)


def test_relativistic_losses_compare_pairs() -> None:
    """What every logit shares cancels; which fake a real image is compared with does not."""
    real, fake = torch.tensor([0.0, 4.0]), torch.tensor([1.0, 3.0])
    loss = relativistic_discriminator_loss(real, fake)
    torch.testing.assert_close(relativistic_discriminator_loss(real + 7, fake + 7), loss)
    assert (relativistic_discriminator_loss(real, fake.flip(0)) - loss).abs() > 0.1


@pytest.mark.parametrize("loss", [relativistic_discriminator_loss, relativistic_generator_loss])
def test_relativistic_losses_need_pairs(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"in pairs, got \(4,\) and \(1,\)"):
        loss(torch.zeros(4), torch.zeros(1))


# --- zero-centerd penalty ------------------------------------------------------------------------------------------


def test_zero_centered_penalty_is_the_mean_squared_norm_at_the_images() -> None:
    """D(x) = ‖x‖² / 2 has gradient x, of length 5 and 13 here; nothing is interpolated."""
    images = torch.zeros(2, 1, 1, 2, dtype=torch.float64)
    images[0, 0, 0] = torch.tensor([3.0, 4.0])
    images[1, 0, 0] = torch.tensor([5.0, 12.0])
    discriminator = Quadratic()
    assert zero_centered_gradient_penalty(discriminator, images).item() == pytest.approx((25 + 169) / 2, abs=1e-12)
    (asked,) = discriminator.asked
    assert torch.equal(asked, images)


def test_zero_centered_penalty_trains_the_discriminator_alone() -> None:
    """‖w‖² of a linear D, whose gradient is 2w; the images stay as they are."""
    weight = torch.randn(3, 4, 4, dtype=torch.float64)
    discriminator, images = Linear(weight), torch.randn(5, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    penalty = zero_centered_gradient_penalty(discriminator, images)
    penalty.backward()
    torch.testing.assert_close(penalty.detach(), weight.square().sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(discriminator.weight.grad, 2 * weight, rtol=1e-12, atol=0)
    assert images.grad is None


def test_zero_centered_penalty_passes_labels_on() -> None:
    penalty = zero_centered_gradient_penalty(Conditional(), torch.randn(3, 1, 1, 4), torch.tensor([0.0, 1.0, 2.0]))
    assert penalty.item() == pytest.approx((0 + 4 + 16) / 3, abs=1e-5)


# --- gradient penalty ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(("norm", "target"), [(1.0, 1.0), (3.0, 1.0), (0.5, 1.0), (3.0, 0.0), (2.0, 5.0)])
def test_penalty_of_a_linear_discriminator(batch: int, norm: float, target: float) -> None:
    """(‖w‖ - target)², whatever the images; its gradient is 2 (‖w‖ - target) w / ‖w‖."""
    weight = torch.randn(3, 4, 4, dtype=torch.float64)
    discriminator = Linear(norm * weight / weight.norm())
    real, fake = torch.randn(2, batch, 3, 4, 4, dtype=torch.float64)
    penalty = gradient_penalty(discriminator, real, fake, target=target)
    assert penalty.shape == ()
    assert penalty.item() == pytest.approx((norm - target) ** 2, abs=1e-12)
    penalty.backward()
    expected = 2 * (norm - target) * discriminator.weight.detach() / norm
    torch.testing.assert_close(discriminator.weight.grad, expected, rtol=0, atol=1e-10)


def test_target_is_one_by_default() -> None:
    discriminator = Linear(torch.full((1, 2, 2), 2.0))
    assert gradient_penalty(discriminator, *torch.randn(2, 3, 1, 2, 2)).item() == pytest.approx(9)


def test_mean_over_the_batch_of_each_samples_norm() -> None:
    """Between an image and itself there is only that image: gradients x of length 3 and 5."""
    images = torch.zeros(2, 1, 1, 2, dtype=torch.float64)
    images[0, 0, 0] = torch.tensor([3.0, 0.0])
    images[1, 0, 0] = torch.tensor([3.0, 4.0])
    penalty = gradient_penalty(Quadratic(), images, images.clone())
    assert penalty.item() == pytest.approx(((3 - 1) ** 2 + (5 - 1) ** 2) / 2)


def test_asks_uniformly_between_real_and_fake() -> None:
    """One share for each sample, the same at all its pixels, uniform on [0, 1]."""
    discriminator = Quadratic()
    real, fake = torch.randn(2, 2000, 3, 2, 2, dtype=torch.float64)
    gradient_penalty(discriminator, real, fake)
    (asked,) = discriminator.asked
    shares = ((asked - fake) / (real - fake)).flatten(1)
    torch.testing.assert_close(shares, shares[:, :1].expand_as(shares), rtol=0, atol=1e-6)
    share = shares[:, 0].sort().values
    assert share.min() >= 0
    assert share.max() <= 1
    assert (share - torch.linspace(0, 1, 2000)).abs().max() < 0.05  # Kolmogorov–Smirnov


def test_labels_reach_the_discriminator() -> None:
    labels = torch.tensor([0.0, 1.0, 2.0])
    real, fake = torch.randn(2, 3, 1, 1, 4)
    penalty = gradient_penalty(Conditional(), real, fake, labels)
    assert penalty.item() == pytest.approx(((0 - 1) ** 2 + (2 - 1) ** 2 + (4 - 1) ** 2) / 3, abs=1e-5)


def test_leaves_its_inputs_alone() -> None:
    """No gradient is accumulated before ``backward``, and none flows into the images then."""
    discriminator = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1), nn.Flatten(0))
    real, fake = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2, requires_grad=True)
    before = real.clone(), fake.detach().clone()
    penalty = gradient_penalty(discriminator, real, fake)
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    penalty.backward()
    assert discriminator[1].weight.grad.abs().max() > 0
    assert fake.grad is None
    assert not real.requires_grad
    assert torch.equal(real, before[0])
    assert torch.equal(fake, before[1])


def test_vanishing_gradient() -> None:
    """A vanishing gradient has no direction: the penalty is target², its gradient finite."""
    discriminator = Linear(torch.zeros(1, 2, 2))
    penalty = gradient_penalty(discriminator, *torch.randn(2, 3, 1, 2, 2))
    penalty.backward()
    assert penalty.item() == pytest.approx(1, abs=1e-5)
    assert discriminator.weight.grad is not None
    assert discriminator.weight.grad.isfinite().all()


@both_kernels
@pytest.mark.parametrize("batch", [1, 3])
def test_double_backward_through_attention(batch: int) -> None:
    """Every parameter that shapes D's slope is moved by the penalty, by as much as finite differences say."""
    network = SAGANDiscriminator(16, base_channels=8, attention_resolutions=(8,), spectral_norm=None).double()
    attention = [module for module in network.modules() if isinstance(module, SelfAttention2d)]
    assert len(attention) == 1
    with torch.no_grad():
        attention[0].gamma.fill_(0.8)
    real, fake = torch.randn(2, batch, 3, 16, 16, dtype=torch.float64)

    def penalty() -> Tensor:
        torch.manual_seed(3)
        return gradient_penalty(network, real, fake)

    penalty().backward()
    grads = {name: parameter.grad for name, parameter in network.named_parameters()}
    for name, parameter in network.named_parameters():
        grad = grads[name]
        if grad is None or grad.abs().max() < 1e-12:
            # A bias that is only added, or that softmax does not see, does not change the slope.
            assert name.endswith("bias"), name
            continue
        assert grad.isfinite().all(), name
        direction = torch.randn_like(parameter)
        direction /= direction.norm()
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(step * direction)
            values.append(penalty().item())
            with torch.no_grad():
                parameter.sub_(step * direction)
        slope = (values[0] - values[1]) / 2e-5
        assert math.isclose(slope, float((grad * direction).sum()), rel_tol=1e-3, abs_tol=1e-5), name
    moved = [name for name, grad in grads.items() if grad is not None and grad.abs().max() > 1e-12]
    for part in ("gamma", "query.weight", "key.weight", "value.weight"):
        assert any(name.endswith(part) for name in moved), part


@both_kernels
def test_penalty_through_a_normalized_discriminator() -> None:
    network = SAGANDiscriminator(16, base_channels=8)
    for module in network.modules():
        if isinstance(module, SelfAttention2d):
            nn.init.constant_(module.gamma, 0.5)
    gradient_penalty(network, *torch.randn(2, 2, 3, 16, 16)).backward()
    weights = [p for name, p in network.named_parameters() if name.endswith("original")]
    assert weights
    for parameter in weights:
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0


def test_images_of_different_shapes() -> None:
    with pytest.raises(ValueError, match="8") as error:
        gradient_penalty(Quadratic(), torch.randn(2, 3, 4, 4), torch.randn(2, 3, 8, 8))
    assert "4" in str(error.value)
    with pytest.raises(ValueError, match="3"):
        gradient_penalty(Quadratic(), torch.randn(2, 3, 4, 4), torch.randn(3, 3, 4, 4))
