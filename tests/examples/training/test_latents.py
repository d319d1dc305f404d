"""Latent vectors: draws that do not depend on their number, truncation, arcs and walks."""

from __future__ import annotations

import math

import pytest
import torch

from training.latents import draw_labels, draw_latents, slerp, walk


def test_latents_do_not_depend_on_how_many_follow() -> None:
    few, many = (draw_latents(n, 100, torch.Generator().manual_seed(5)) for n in (2, 7))
    assert torch.equal(few, many[:2])
    assert abs(draw_latents(400, 100, torch.Generator().manual_seed(0)).std() - 1) < 0.02


@pytest.mark.parametrize("bound", [0.05, 0.5, 1.5])
def test_truncation_is_the_normal_between_the_bounds(bound: float) -> None:
    z = draw_latents(400, 100, torch.Generator().manual_seed(0), bound)
    assert z.abs().max() <= bound
    # The variance of the truncated normal: 1 − 2 t φ(t) / (2 Φ(t) − 1), from 40 000 draws.
    density = math.exp(-(bound**2) / 2) / math.sqrt(2 * math.pi)
    variance = 1 - 2 * bound * density / math.erf(bound / math.sqrt(2))
    assert z.var().item() == pytest.approx(variance, rel=0.03)


def test_labels_are_as_frequent_as_the_images_of_their_classes() -> None:
    labels = draw_labels(22_660, [5, 0, 2261], torch.Generator().manual_seed(0))
    counts = torch.bincount(labels, minlength=3).tolist()
    assert counts[1] == 0
    # 50 are expected, with a standard deviation of 7: five of them. As frequent as the others would be 7,553.
    assert abs(counts[0] - 50) < 35


def test_slerp_follows_the_arc() -> None:
    a, b = torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 0.0])
    share = torch.tensor([0.0, 1 / 3, 0.5, 1.0])
    expected = [[2 * math.cos(t * math.pi / 2), 2 * math.sin(t * math.pi / 2), 0] for t in share.tolist()]
    torch.testing.assert_close(slerp(a, b, share), torch.tensor(expected))
    torch.testing.assert_close(slerp(a, 3 * a, share), torch.lerp(a, 3 * a, share[:, None]))
    assert slerp(a, -a, share).isfinite().all()


def test_a_walk_begins_at_each_stop() -> None:
    stops = torch.randn(3, 8)
    assert walk(stops, 4, closed=False).shape == (2, 4, 8)
    legs = walk(stops, 4, closed=True)
    assert legs.shape == (3, 4, 8)
    torch.testing.assert_close(legs[:, 0], stops)
