"""Fréchet Inception distance: ‖μ_r − μ_f‖² + tr(Σ_r + Σ_f − 2 (Σ_r Σ_f)^½), of the features of two sets of images.

Smaller is better. It falls with the number of images, so compare only equal numbers; published values use
50 000 generated images. Source: Heusel et al., arXiv:1706.08500.
"""

from __future__ import annotations

from torch import Tensor

from evaluation.inception import Precomputed, import_torchmetrics


def fid(real: Tensor, fake: Tensor) -> float:
    """The distance between features (N, F) and (M, F), two images or more of each kind."""
    # Only one of several processes evaluates; the others would not answer.
    metric = import_torchmetrics().fid.FrechetInceptionDistance(Precomputed(real.shape[1]), sync_on_compute=False)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return float(metric.compute())


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
