"""The power iteration and the division by sigma, as pure functions of one weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_sagan._torch import only_plain_operations

__all__ = ["divide_by_sigma", "power_iteration", "spectral_normalize"]


def power_iteration(
    matrix: Tensor, u: Tensor, v: Tensor, *, n_iterations: int = 1, eps: float = 1e-12
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Turn u and v towards the first singular vectors: :math:`v = W^\top u / \lVert W^\top u \rVert`,
    :math:`u = W v / \lVert W v \rVert`, ``n_iterations`` times.

    A product whose norm is at most ``eps`` has no direction, so the old vector is kept. A weight that is zero for some
    steps therefore does not destroy u and v.

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
        v = _unit(matrix.mH @ u, otherwise=v, eps=eps)  # (w,)
        image = matrix @ v  # (h,)
        u = _unit(image, otherwise=u, eps=eps)  # (h,)
    return u, v, torch.vdot(u, image)


def spectral_normalize(
    weight: Tensor, u: Tensor, v: Tensor, sigma: Tensor, *, dim: int = 0, eps: float = 1e-12
) -> Tensor:
    r"""Divide a weight by its spectral norm, :math:`W / \sigma` with :math:`\sigma = u^\top W v`.

    The gradient treats u and v as constants. It is :math:`(G - \langle G, W/\sigma \rangle\, u v^\top) / \sigma` for a
    gradient G of the result: one product, one sum and one division. It can be differentiated again. Where sigma is at
    most ``eps`` in absolute value (an all-zero weight) there is nothing to divide by: the weight is returned as it is.

    Args:
        weight: any shape, reshaped to a matrix (h, w) with h = ``weight.shape[dim]``.
        u: (h,), of unit norm.
        v: (w,), of unit norm.
        sigma: the value of :math:`u^\top W v`, as :func:`power_iteration` returns it.
        dim: the dimension of u.
        eps: a sigma of at most this value counts as zero.

    Returns:
        The normalised weight, in the shape of the weight.

    Source: Miyato et al., arXiv:1802.05957, equations 8 and 12.
    """
    if only_plain_operations(weight):
        u, v = _along(u.detach(), weight, dim), _across(v.detach(), weight, dim)
        sigma = (u.conj() * v * weight).sum()
        return weight / torch.where(sigma.abs() > eps, sigma, 1.0)
    nonzero = sigma.abs() > eps
    divisor = torch.where(nonzero, sigma, 1.0)
    return divide_by_sigma(weight, u * (nonzero / divisor.conj()), v, divisor, dim=dim, eps=eps)


def divide_by_sigma(weight: Tensor, u: Tensor, v: Tensor, divisor: Tensor, *, dim: int, eps: float) -> Tensor:
    """:func:`spectral_normalize` with sigma as it is needed: u divided by it, or zero where sigma counts as zero, and
    the divisor, which is then 1."""
    normalized: Tensor = _DivideBySigma.apply(  # type: ignore[no-untyped-call]
        weight, _along(u, weight, dim), _across(v, weight, dim), divisor, eps
    )
    return normalized


# u and v are given the dimensions of the weight, so that it need not be reshaped.


def _along(u: Tensor, weight: Tensor, dim: int) -> Tensor:
    return u.view([-1 if i == dim else 1 for i in range(weight.ndim)])


def _across(v: Tensor, weight: Tensor, dim: int) -> Tensor:
    return v if v.ndim == weight.ndim else v.view([1 if i == dim else size for i, size in enumerate(weight.shape)])


class _DivideBySigma(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, u: Tensor, v: Tensor, divisor: Tensor, eps: float) -> Tensor:
        # No setup_context: with one, every call inspects the signature of forward, which takes 50 µs.
        ctx.save_for_backward(weight, u, v, divisor)
        ctx.eps = eps
        return weight / divisor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        weight, u, v, divisor = ctx.saved_tensors  # u is divided by sigma
        # nn.Embedding(sparse=True) has a sparse gradient, but the one through sigma reaches every row. A dense gradient
        # stays as it is; a branch on the layout would break compiling in torch 2.5.
        gradient = gradient.to_dense()
        if torch.is_grad_enabled():  # for a double backward, in which sigma depends on the weight
            u = u * divisor.conj()
            sigma = (u.conj() * v * weight).sum()
            nonzero = sigma.abs() > ctx.eps
            divisor = torch.where(nonzero, sigma, 1.0)
            u = u * (nonzero / divisor.conj())
        # (G - <W, G> u / sigma v*) / sigma, with conjugates where the weight is complex. Both are read in the order in
        # which the weight is stored, so that a layout such as channels last needs no copy.
        order = sorted(range(weight.ndim), key=lambda i: weight.stride(i), reverse=True)
        # reshape, because flatten refuses the batched gradients of is_grads_batched
        product = torch.vdot(weight.permute(order).reshape(-1), gradient.permute(order).reshape(-1))
        return torch.addcmul(gradient, product * u, v.conj(), value=-1).div_(divisor.conj()), None, None, None, None


def _unit(direction: Tensor, *, otherwise: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(direction)
    # No branch on the value: that would synchronise with the device and break a compiled graph.
    return torch.where(norm > eps, direction / norm, otherwise)
