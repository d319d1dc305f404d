"""KID of features, against its definition."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from evaluation.kid import kid

needs_torchmetrics = pytest.mark.skipif(find_spec("torchmetrics") is None, reason="torchmetrics is not installed")


@needs_torchmetrics
@pytest.mark.parametrize("features", [2, 5])
def test_kid_is_the_unbiased_polynomial_distance(features: int) -> None:
    count = 60  # fewer than a subset of 1000, so that all 100 subsets are the whole set
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(2, count, features, generator=generator)
    fake = 0.5 * fake + 0.3

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() @ b.double().T / features + 1) ** 3

    def off_diagonal(k: Tensor) -> Tensor:
        return (k.sum() - k.trace()) / (count * (count - 1))

    expected = off_diagonal(kernel(real, real)) + off_diagonal(kernel(fake, fake)) - 2 * kernel(real, fake).mean()
    assert kid(real, fake) == pytest.approx(1000 * expected.item(), rel=1e-3)  # it computes in float32
