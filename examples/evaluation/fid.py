"""Fréchet Inception distance: that of frechet.py between Inception's features of two sets of images.

Smaller is better. It falls with the number of images, so compare only equal numbers; published values use
50 000 generated images. Source: Heusel et al., arXiv:1706.08500.
"""

from __future__ import annotations

from torch import Tensor

from evaluation.frechet import frechet_distance


def fid(real: Tensor, fake: Tensor) -> float:
    """The distance between features (N, F) and (M, F), two images or more of each kind."""
    return frechet_distance(real, fake)


def fid_per_class(real: Tensor, real_labels: Tensor, fake: Tensor, fake_labels: Tensor) -> dict[int, float]:
    """The distance within each class that has two images or more of both kinds.

    The fewer images a class has, the larger its FID: compare classes of one size, or one class over time.
    """
    distances = {}
    for label in real_labels.unique().tolist():
        of_class, generated = real[real_labels == label], fake[fake_labels == label]
        if min(len(of_class), len(generated)) >= 2:
            distances[label] = fid(of_class, generated)
    return distances
