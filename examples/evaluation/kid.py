"""Kernel Inception distance: the squared maximum mean discrepancy of features, with k(x, y) = (xᵀy / F + 1)³, times
1000.

Smaller is better. Unlike FID it is unbiased, so it is the better choice for few images. It is the mean over 100 random
subsets of 1000 images, or of all where there are fewer. Source: Bińkowski et al., arXiv:1801.01401.
"""

from __future__ import annotations

import warnings

from torch import Tensor

from evaluation.inception import Precomputed, import_torchmetrics


def kid(real: Tensor, fake: Tensor) -> float:
    """The distance between features (N, F) and (M, F), drawing from torch's global random state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns each time that it keeps the features
        metric = import_torchmetrics().kid.KernelInceptionDistance(
            Precomputed(real.shape[1]), subset_size=min(1000, len(real), len(fake)), sync_on_compute=False
        )
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return 1000 * float(metric.compute()[0])
