"""Pure functions: attention over positions, and the power iteration behind spectral normalisation.

No modules and no state. Everything here works on plain tensors, so that the mathematics can be read and tested alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention", "attention_map", "power_iteration", "spectral_normalize"]


def attention_map(query: Tensor, key: Tensor) -> Tensor:
    r"""Where every query position looks: :math:`\beta_{ji} = \operatorname{softmax}_i(f_j^\top g_i)`.

    There is no :math:`1/\sqrt{D}`: the paper has none.

    Args:
        query: (B, D, N), one column per query position.
        key: (B, D, M), one column per key position.

    Returns:
        (B, N, M); each row is a distribution over the keys and sums to 1.

    Source: Zhang et al., arXiv:1805.08318, equation 1.
    """
    return torch.softmax(query.transpose(1, 2) @ key, dim=-1)  # (B, N, M)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    r"""Exact softmax attention over positions: :math:`o_j = \sum_i \beta_{ji} h_i`.

    Args:
        query: (B, D, N).
        key: (B, D, M).
        value: (B, E, M). E may differ from D.

    Returns:
        (B, E, N). Differentiable twice, so a gradient penalty may pass through it.

    Source: Zhang et al., arXiv:1805.08318, equation 2 without the output projection.
    """
    return value @ attention_map(query, key).transpose(1, 2)  # (B, E, N)


def power_iteration(
    matrix: Tensor, u: Tensor, v: Tensor, *, n_iterations: int = 1, eps: float = 1e-12
) -> tuple[Tensor, Tensor]:
    r"""Turn u and v towards the first singular vectors: :math:`v = W^\top u / \lVert W^\top u \rVert`,
    :math:`u = W v / \lVert W v \rVert`, ``n_iterations`` times.

    A direction whose norm is at most ``eps`` is not followed: the old vector stays. A matrix that is zero for a
    while therefore does not destroy u and v.

    Args:
        matrix: (h, w).
        u: (h,), of unit norm.
        v: (w,), of unit norm.
        n_iterations: how often to iterate.
        eps: norms up to this one count as zero.

    Returns:
        New u (h,) and v (w,). The arguments are not modified.

    Source: Miyato et al., *Spectral Normalization for GANs*, arXiv:1802.05957, algorithm 1.
    """
    for _ in range(n_iterations):
        v = _unit(matrix.mH @ u, otherwise=v, eps=eps)
        u = _unit(matrix @ v, otherwise=u, eps=eps)
    return u, v


def spectral_normalize(matrix: Tensor, u: Tensor, v: Tensor, *, eps: float = 1e-12) -> Tensor:
    r"""Divide a matrix by its spectral norm, :math:`W / \sigma` with :math:`\sigma = u^\top W v`.

    u and v are constants to the gradient. Where :math:`|\sigma| \le` ``eps`` (an all-zero matrix) there is nothing to
    divide by, and the matrix is returned as it is.

    Args:
        matrix: (h, w).
        u: (h,), of unit norm.
        v: (w,), of unit norm.
        eps: a sigma up to this one counts as zero.

    Returns:
        (h, w).

    Source: Miyato et al., arXiv:1802.05957, equation 8.
    """
    sigma = torch.vdot(u, matrix @ v)
    return matrix / torch.where(sigma.abs() > eps, sigma, 1.0)


def _unit(direction: Tensor, *, otherwise: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(direction)
    # No branch on the value: that would synchronise with the device and break a compiled graph.
    return torch.where(norm > eps, direction / norm, otherwise)
