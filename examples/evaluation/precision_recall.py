"""Improved precision and recall: do generated images look real, and do they cover what real images look like?

The real images' manifold is the union of balls around their features, each reaching to its K-th nearest neighbor:

    precision = share of generated images inside the real images' manifold
    recall    = share of real images inside the generated images' manifold

Both are from 0 to 1, larger is better, and depend on the number of images; published values use 50 000. Source:
Kynkäänniemi et al., arXiv:1904.06991, with K = 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOR = 3
ROWS = 1024  # of the matrix of distances, at a time


def precision_recall(real: Tensor, fake: Tensor) -> tuple[float, float]:
    """Precision and recall of features (N, F) and (M, F).

    Raises:
        ValueError: if there are too few images for a third neighbor.
    """
    if min(len(real), len(fake)) <= NEIGHBOR:
        raise ValueError(f"expected more than {NEIGHBOR} images of each kind, got {len(real)} and {len(fake)}")
    return _share_inside(fake, real), _share_inside(real, fake)


def _share_inside(points: Tensor, others: Tensor) -> float:
    """The share of points (N, F) within the manifold of the others (M, F)."""
    radii = torch.cat([torch.cdist(rows, others).kthvalue(NEIGHBOR + 1).values for rows in others.split(ROWS)])  # (M,)
    inside = [(torch.cdist(rows, others) <= radii).any(1) for rows in points.split(ROWS)]
    return torch.cat(inside).double().mean().item()
