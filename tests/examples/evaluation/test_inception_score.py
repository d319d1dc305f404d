"""The inception score of logits whose score is known."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from evaluation.inception_score import inception_score

needs_torchmetrics = pytest.mark.skipif(find_spec("torchmetrics") is None, reason="torchmetrics is not installed")


@needs_torchmetrics
def test_inception_score_is_the_number_of_classes_drawn_evenly() -> None:
    # p(y | x) is 1 for one class, and each class comes as often. e^-50 is not subnormal: code that torch compiled
    # earlier in this process may have had those flushed to zero, whose logarithm is infinite.
    certain = 50 * torch.eye(5).repeat(200, 1)
    # Ten parts of 100 of these are not exactly even: the expected loss is 4 / (2 · 100) nats of 1.6.
    assert inception_score(certain) == pytest.approx(5, rel=0.05)
    assert inception_score(certain[:1].repeat(50, 1)) == pytest.approx(1, abs=1e-4)
    assert inception_score(torch.zeros(50, 5)) == pytest.approx(1, abs=1e-4)
