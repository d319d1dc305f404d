"""The Fréchet distance of two sets of features, as two normal distributions:

    ‖μ_r − μ_f‖² + tr(Σ_r + Σ_f − 2 (Σ_r Σ_f)^½)

It is named after the network whose features they are: FID is that of Inception's. It is 0 for equal sets, and for two
samples of one distribution the larger the fewer they are. Source: Heusel et al., arXiv:1706.08500, equation 6.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """The distance between features (N, F) and (M, F), two images or more of each kind."""
    if min(len(real), len(fake)) < 2 or real.shape[1:] != fake.shape[1:]:
        raise ValueError(
            f"expected features (N, F) and (M, F) of two images or more, got {tuple(real.shape)}, {tuple(fake.shape)}"
        )
    real, fake = real.double(), fake.double()
    ours, theirs = _covariance(real), _covariance(fake)  # (F, F)
    # Σ_r Σ_f has the eigenvalues of Σ_r^½ Σ_f Σ_r^½, which is symmetric, so rounding makes none of them complex.
    values, vectors = torch.linalg.eigh(ours)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # (F, F)
    shared = torch.linalg.eigvalsh(root @ theirs @ root).clamp(min=0).sqrt().sum()
    apart = (real.mean(0) - fake.mean(0)).square().sum()
    # Equal sets are at 0, and rounding could take them below it.
    return max(0.0, (apart + ours.trace() + theirs.trace() - 2 * shared).item())


def _covariance(features: Tensor) -> Tensor:
    centered = features - features.mean(0)  # (N, F)
    return centered.T @ centered / (len(features) - 1)  # (F, F)
