"""Inception score: exp of the mean over images of KL(p(y | x) ‖ p(y)), with Inception's classes y.

Larger is better, from 1 to the number of classes. It uses no real images, and means little for images that do not
show ImageNet's classes. The mean over 10 parts of the images, as published. Source: Salimans et al.,
arXiv:1606.03498.
"""

from __future__ import annotations

import warnings

from torch import Tensor

from evaluation.inception import Precomputed, import_torchmetrics

PARTS = 10


def inception_score(logits: Tensor) -> float:
    """The score of logits (N, K), drawing the order of the images from torch's global random state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns each time that it keeps the logits
        metric = import_torchmetrics().inception.InceptionScore(
            Precomputed(logits.shape[1]), splits=min(PARTS, len(logits)), sync_on_compute=False
        )
    metric.update(logits)
    return float(metric.compute()[0])
