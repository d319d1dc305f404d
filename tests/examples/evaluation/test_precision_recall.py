"""Precision and recall of features, against loops over pairs and where their values are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evaluation import precision_recall as module
from evaluation.precision_recall import precision_recall


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


def test_a_collapsed_generator_covers_the_one_image_that_it_draws() -> None:
    """Its balls have radius 0, and a ball has its center and its border in it."""
    real = torch.randn(8, 2)
    assert precision_recall(real, real[:1].expand(5, 2)) == (1.0, 1 / 8)


def test_the_rows_at_a_time_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = torch.randn(40, 2), torch.randn(60, 2) + 0.7
    expected = precision_recall(real, fake)
    monkeypatch.setattr(module, "ROWS", 16)
    assert precision_recall(real, fake) == expected


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
