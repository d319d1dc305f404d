"""The Fréchet distance against its closed form, a matrix square root of scipy's, and torchmetrics' FID."""

from __future__ import annotations

import re
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from evaluation.frechet import frechet_distance


def correlated(count: int, width: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=rng)
    return torch.randn(count, width, generator=rng) @ mix + torch.randn(width, generator=rng)


@pytest.mark.parametrize(("count", "width"), [(300, 8), (20, 6)])
def test_it_is_the_formula(count: int, width: int) -> None:
    real, fake = correlated(count, width, 1), correlated(count + 7, width, 2)
    ours, theirs = (np.cov(features.double().numpy(), rowvar=False) for features in (real, fake))
    apart = (real.double().mean(0) - fake.double().mean(0)).square().sum().item()
    expected = apart + np.trace(ours + theirs - 2 * sqrtm(ours @ theirs).real)
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-8)  # float64, condition numbers below 1e5


def test_equal_and_shifted_sets() -> None:
    real = correlated(500, 5, 3)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-9)
    shift = torch.tensor([3.0, 0, 0, -4.0, 0])
    assert frechet_distance(real, real + shift) == pytest.approx(25, rel=1e-5)  # float32 features
    # Of twice the deviation: tr(Σ) (2 − 1)².
    centered = real - real.mean(0)
    trace = real.double().var(0).sum().item()
    assert frechet_distance(centered, 2 * centered) == pytest.approx(trace, rel=1e-5)


def test_equal_sets_are_never_below_zero() -> None:
    """Where rounding takes the sum of the terms below it, as it does for some of these."""
    assert min(frechet_distance(real, real) for real in (correlated(9, 5, seed) for seed in range(20))) == 0


def test_two_images_of_each_kind_suffice() -> None:
    """On a line: means 1 and 2 apart by 1, variances 2 and 8."""
    real, fake = torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [4.0]])
    assert frechet_distance(real, fake) == pytest.approx(1 + 2 + 8 - 2 * (2 * 8) ** 0.5)


@pytest.mark.skipif(find_spec("torchmetrics") is None, reason="torchmetrics is not installed")
@pytest.mark.parametrize("count", [100, 20])
def test_it_is_the_fid_of_torchmetrics(count: int) -> None:
    """Also with fewer images than features, where the covariances are singular."""
    from evaluation.inception import Precomputed, import_torchmetrics

    real, fake = correlated(count, 32, 4), correlated(count, 32, 5)
    metric = import_torchmetrics().fid.FrechetInceptionDistance(Precomputed(32))
    metric.update(real, real=True)
    metric.update(fake, real=False)
    # It takes roots of eigenvalues of a matrix that is not symmetric; those that are 0 are 1e-14, and their roots 1e-7.
    assert frechet_distance(real, fake) == pytest.approx(float(metric.compute()), rel=1e-5)


@pytest.mark.parametrize("shapes", [((1, 3), (5, 3)), ((5, 3), (1, 3)), ((5, 3), (5, 4))])
def test_what_has_no_distance(shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"got {shapes[0]}, {shapes[1]}")):
        frechet_distance(torch.zeros(shapes[0]), torch.zeros(shapes[1]))
