"""Scores of features against closed forms and loops."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from evaluation.fid import fid, fid_per_class
from evaluation.inception_score import inception_score
from evaluation.precision_recall import precision_recall

needs_torchmetrics = pytest.mark.skipif(find_spec("torchmetrics") is None, reason="torchmetrics is not installed")


@pytest.mark.parametrize(("count_real", "count_fake"), [(7, 5), (40, 60)])
def test_precision_and_recall_are_shares_of_balls(count_real: int, count_fake: int) -> None:
    real, fake = torch.randn(count_real, 2), torch.randn(count_fake, 2) + 0.7

    def share_inside(points: Tensor, others: Tensor) -> float:
        radii = []
        for other in others:
            radii.append(sorted((other - another).norm().item() for another in others)[3])  # [0] is the point itself
        inside = 0
        for point in points:
            inside += any((point - other).norm().item() <= radius for other, radius in zip(others, radii, strict=True))
        return inside / len(points)

    precision, recall = precision_recall(real, fake)
    assert (precision, recall) == (share_inside(fake, real), share_inside(real, fake))


def test_precision_and_recall_tell_dropped_modes_from_wrong_images() -> None:
    left, right, far = torch.randn(3, 200, 4) * 0.1 + torch.tensor([0.0, 5.0, 50.0])[:, None, None]
    one_mode = precision_recall(torch.cat([left, right]), left[torch.randperm(200)])
    assert one_mode[0] == 1.0
    assert one_mode[1] == pytest.approx(0.5, abs=0.05)  # of the other mode nothing is covered
    half_wrong = precision_recall(left, torch.cat([left, far]))
    assert half_wrong == (0.5, 1.0)


def test_too_few_images_have_no_third_neighbor() -> None:
    with pytest.raises(ValueError, match="more than 3 images of each kind, got 10 and 3"):
        precision_recall(torch.randn(10, 2), torch.randn(3, 2))


@needs_torchmetrics
def test_inception_score_is_the_number_of_classes_drawn_evenly() -> None:
    # p(y | x) is 1 for one class, and each class comes as often. e^-50 is not subnormal: code that torch compiled
    # earlier in this process may have had those flushed to zero, whose logarithm is infinite.
    certain = 50 * torch.eye(5).repeat(200, 1)
    # Ten parts of 100 of these are not exactly even: the expected loss is 4 / (2 · 100) nats of 1.6.
    assert inception_score(certain) == pytest.approx(5, rel=0.05)
    assert inception_score(certain[:1].repeat(50, 1)) == pytest.approx(1, abs=1e-4)
    assert inception_score(torch.zeros(50, 5)) == pytest.approx(1, abs=1e-4)


@needs_torchmetrics
def test_fid_of_a_class_compares_that_class_alone() -> None:
    real, fake = torch.randn(400, 3), torch.randn(300, 3)
    real_labels, fake_labels = torch.arange(400) % 2, torch.arange(300) % 2
    fake[fake_labels == 1] += 2
    scores = fid_per_class(real, real_labels, fake, fake_labels)
    assert scores == {0: fid(real[::2], fake[::2]), 1: fid(real[1::2], fake[1::2])}
    assert scores[1] == pytest.approx(12 + scores[0], abs=1.5)  # three dimensions moved by 2; 150 samples
    assert fid_per_class(real, real_labels, fake[:1], fake_labels[:1]) == {}
