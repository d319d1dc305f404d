"""The power iteration and the division by sigma, as pure functions of one weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_sagan._torch import only_plain_operations

__all__ = ["divide_by_sigma", "divisor", "power_iteration", "spectral_normalize", "unit"]


def power_iteration(
    matrix: Tensor, u: Tensor, v: Tensor, *, n_iterations: int = 1, eps: float = 1e-12
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Turn u and v toward the first singular vectors: :math:`v = W^\top u / \lVert W^\top u \rVert`,
    :math:`u = W v / \lVert W v \rVert`, ``n_iterations`` times.

    A product that is not finite, or whose norm is at most ``eps``, has no direction: the old vector is kept. A weight
    that is zero or diverges for some steps therefore does not destroy u and v.

    Args:
        matrix: (h, w).
        u: (h,), of unit norm.
        v: (w,), of unit norm.
        n_iterations: how often to iterate; with 0, sigma is estimated from u and v as they are.
        eps: norms of at most this value count as zero.

    Returns:
        New u (h,), new v (w,), and the estimate of the spectral norm :math:`\sigma = u^\top W v`, a scalar tensor.
        The arguments are not modified.

    Source: Miyato et al., *Spectral Normalization for GANs*, arXiv:1802.05957, algorithm 1.
    """
    if n_iterations == 0:
        return u, v, torch.vdot(u, matrix @ v)
    for _ in range(n_iterations):
        v, _, _ = unit(matrix.mH @ u, otherwise=v, eps=eps)  # (w,)
        image = matrix @ v  # (h,)
        u, _, _ = unit(image, otherwise=u, eps=eps)  # (h,)
    return u, v, torch.vdot(u, image)


def unit(rows: Tensor, *, otherwise: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (..., n) of unit norm, the norms that they had (..., 1), and whether these count; if not, other rows."""
    # First divided by their largest entry: the squares of 1e30 and 1e-30 do not fit into float32. No branch on a value:
    # that would synchronize with the device and break a compiled graph.
    largest = torch.linalg.vector_norm(rows, math.inf, dim=-1, keepdim=True)
    rows = rows / largest
    scaled = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    norms = largest * scaled
    nonzero = norms > eps  # also false for NaN, which zero and infinity become
    return torch.where(nonzero, rows / scaled, otherwise), norms, nonzero


def divisor(sigma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Sigma, or 1 where there is nothing to divide by, since it is at most eps in absolute value or not finite; and
    whether it is sigma."""
    size = sigma.abs()
    nonzero = (size > eps) & (size < math.inf)
    return torch.where(nonzero, sigma, 1.0), nonzero


def spectral_normalize(
    weight: Tensor, u: Tensor, v: Tensor, sigma: Tensor, *, dim: int = 0, eps: float = 1e-12
) -> Tensor:
    r"""Divide a weight by its spectral norm, :math:`W / \sigma` with :math:`\sigma = u^\top W v`.

    The gradient treats u and v as constants. It is :math:`(G - \langle G, W/\sigma \rangle\, u v^\top) / \sigma` for a
    gradient G of the result, and can be differentiated again. Where sigma is at most ``eps`` in absolute value (an
    all-zero weight) or not finite, there is nothing to divide by: the weight is returned as it is.

    Args:
        weight: any shape, reshaped to a matrix (h, w) with h = ``weight.shape[dim]``.
        u: (h,), of unit norm.
        v: (w,), of unit norm.
        sigma: the value of :math:`u^\top W v`, as :func:`power_iteration` returns it.
        dim: the dimension of u.
        eps: a sigma of at most this value counts as zero.

    Returns:
        The normalized weight, in the shape of the weight.

    Source: Miyato et al., arXiv:1802.05957, equations 8 and 12.
    """
    if only_plain_operations(weight):
        sigma = _sigma(weight, _along(u.detach(), weight, dim), _across(v.detach(), weight, dim))
        return weight / divisor(sigma, eps)[0]
    divided_by, nonzero = divisor(sigma, eps)
    return divide_by_sigma(weight, u * nonzero, v, divided_by, dim=dim, eps=eps)


def divide_by_sigma(weight: Tensor, u: Tensor, v: Tensor, divided_by: Tensor, *, dim: int, eps: float) -> Tensor:
    """:func:`spectral_normalize` with the :func:`divisor`, and u zero where that is not sigma. v may have the
    dimensions of the weight, with size 1 along the outputs."""
    u, v = _along(u, weight, dim), _across(v, weight, dim)
    normalized: Tensor = _DivideBySigma.apply(weight, u, v, divided_by, eps)  # type: ignore[no-untyped-call]
    return normalized


# u and v are given the dimensions of the weight, so that it need not be reshaped.


def _along(u: Tensor, weight: Tensor, dim: int) -> Tensor:
    return u.view([-1 if i == dim else 1 for i in range(weight.ndim)])


def _across(v: Tensor, weight: Tensor, dim: int) -> Tensor:
    return v if v.ndim == weight.ndim else v.view([1 if i == dim else size for i, size in enumerate(weight.shape)])


def _sigma(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return (u.conj() * v * weight).sum()


class _DivideBySigma(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, u: Tensor, v: Tensor, divided_by: Tensor, eps: float) -> Tensor:
        # No setup_context: with one, every call inspects the signature of forward, which takes 50 µs.
        normalized = weight / divided_by
        ctx.save_for_backward(weight, normalized, u, v, divided_by)
        ctx.eps = eps
        return normalized

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        weight, normalized, u, v, divided_by = ctx.saved_tensors
        # nn.Embedding(sparse=True) has a sparse gradient, but the one through sigma reaches every row. A dense gradient
        # stays as it is; a branch on the layout would break compiling in torch 2.5.
        gradient = gradient.to_dense()
        if torch.is_grad_enabled():  # for a double backward, in which sigma depends on the weight
            divided_by, _ = divisor(_sigma(weight, u, v), ctx.eps)
        # (G - <W / sigma, G> u v*) / sigma, with conjugates where the weight is complex. Both are read in the order in
        # which the weight is stored, so that a layout such as channels last needs no copy.
        order = sorted(range(weight.ndim), key=lambda i: weight.stride(i), reverse=True)
        # reshape, because flatten refuses the batched gradients of is_grads_batched
        product = torch.vdot(normalized.permute(order).reshape(-1), gradient.permute(order).reshape(-1))
        return torch.addcmul(gradient, product * u, v.conj(), value=-1).div_(divided_by.conj()), None, None, None, None
