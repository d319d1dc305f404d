"""The largest singular value of a linear map that is known by its products alone: restarted Lanczos."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["LinearMap", "largest_singular_value", "start"]

LinearMap = Callable[[Tensor], Tensor]

KRYLOV = 24  # products between two restarts, each of which keeps two vectors of every size


def largest_singular_value(
    apply: LinearMap, adjoint: LinearMap, v: Tensor, *, tolerance: float, restarts: int = 100
) -> tuple[Tensor, Tensor]:
    r"""The largest singular value of A from below, and its right singular vector.

    Power iteration uses the last of the vectors :math:`v, A^*A v, (A^*A)^2 v, \dots`. This takes the best one of the
    space that they span (Rayleigh-Ritz), and starts again from it. The spectrum of a convolution is dense at its upper
    end, where power iteration needs hundreds of steps.

    Args:
        apply: A.
        adjoint: its adjoint.
        v: where to start, in the shape that ``apply`` takes; not zero.
        tolerance: it ends when 24 products with A and its adjoint raise sigma by at most so much of it.
        restarts: it ends after so many in any case.

    Returns:
        :math:`\sigma = \lVert A v \rVert`, a scalar tensor, and v, of unit norm: the norm of A is never below sigma,
        apart from rounding.
    """
    shape = v.shape
    v = v.flatten() / torch.linalg.vector_norm(v)  # (n,)
    image = apply(v.view(shape))
    sigma = torch.zeros_like(v[0])
    step: list[Tensor] = []  # in which direction the last restart has moved v, which speeds up the next
    for turn in range(restarts + 1):
        last, sigma = sigma, torch.linalg.vector_norm(image)
        if turn == restarts or (turn and sigma - last <= tolerance * sigma):
            break
        following = adjoint(image).flatten()
        basis, images = torch.stack([v]), torch.stack([image])  # (k, n), (k, *out)
        for direction in [*step, *[None] * KRYLOV]:
            new = _unit_part(following if direction is None else direction, basis)
            if new is None:
                if direction is None:  # the space is invariant
                    break
                continue
            image = apply(new.view(shape))
            basis, images = torch.cat([basis, new[None]]), torch.cat([images, image[None]])
            if direction is None:
                following = adjoint(image).flatten()
        products = images.flatten(1)
        combination = torch.linalg.eigh(products @ products.mT).eigenvectors[:, -1]  # (k,), of the largest
        step = [combination[1:] @ basis[1:]]
        v = combination @ basis
        v, scale = v / torch.linalg.vector_norm(v), torch.linalg.vector_norm(v)
        image = torch.tensordot(combination, images, 1) / scale
    return sigma, v.view(shape)


def _unit_part(x: Tensor, basis: Tensor) -> Tensor | None:
    """The part of x that is orthogonal to the rows of the basis, of unit norm; None if it is rounding."""
    size = torch.linalg.vector_norm(x)
    for _ in range(2):  # once leaves rounding of the first size
        x = x - basis.mT @ (basis @ x)
    rest = torch.linalg.vector_norm(x)
    return x / rest if rest > 16 * torch.finfo(x.dtype).eps * size else None


def start(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Random numbers in float64 that are always the same; those of PyTorch's generator are left alone."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
