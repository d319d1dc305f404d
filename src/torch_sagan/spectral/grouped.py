"""One power iteration for many weights, in about as many operations as for one.

Each weight has matrix products of its own. What follows them, norms, divisions and choices, is done for all weights at
once: their vectors are the rows of one matrix, padded with zeros to the length of the longest. On a GPU, launching an
operation on a vector of a few hundred numbers takes longer than the operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Iterated", "Member", "iterate"]


class Member(NamedTuple):
    """A weight, the dimension of its outputs, and its vectors u (h,) and v (w,)."""

    weight: Tensor
    dim: int
    u: Tensor
    v: Tensor


class Iterated(NamedTuple):
    """What the division of a weight by its sigma needs; the arguments of ``functional.divide_by_sigma``."""

    u: Tensor  # (h,), divided by sigma, or zero where sigma counts as zero
    v: Tensor  # in the dimensions of the weight, with size 1 along the outputs
    divisor: Tensor  # (), sigma, or 1 where it counts as zero


@torch.no_grad()
def iterate(members: Sequence[Member], *, n_iterations: int, eps: float) -> list[Iterated]:
    """Iterate for each weight as :func:`torch_sagan.functional.power_iteration` does, and store u and v.

    The weights are real, and with their u and v on one device and of one dtype.
    """
    orders = [_storage_order(weight, dim) for weight, dim, _, _ in members]
    matrices = [
        member.weight.permute(order).flatten(1) for member, order in zip(members, orders, strict=True)
    ]  # (h, w)
    shape = len(members), max(size for matrix in matrices for size in matrix.shape)
    buffers = [vector for weight, dim, u, v in members for vector in (u, v.view(_across(weight, dim)))]

    def vectors(us: Tensor, vs: Tensor) -> list[Tensor]:
        """The vectors of all weights, in the order of `buffers`, as parts of the rows of two matrices."""
        parts = []
        for u, v, matrix, (weight, dim, _, _), order in zip(us, vs, matrices, members, orders, strict=True):
            parts += [u[: matrix.shape[0]], _in_dimensions(v[: matrix.shape[1]], weight, dim, order)]
        return parts

    us, vs = matrices[0].new_empty(2, *shape)
    torch._foreach_copy_(vectors(us, vs), buffers)
    for _ in range(n_iterations):
        u_products, v_products = matrices[0].new_zeros(2, *shape)
        for matrix, u, v in zip(matrices, us, v_products, strict=True):
            torch.mv(matrix.mT, u[: matrix.shape[0]], out=v[: matrix.shape[1]])
        vs, _, _ = _unit(v_products, otherwise=vs, eps=eps)
        for matrix, u, v in zip(matrices, u_products, vs, strict=True):
            torch.mv(matrix, v[: matrix.shape[1]], out=u[: matrix.shape[0]])
        us, norms, nonzero = _unit(u_products, otherwise=us, eps=eps)
    torch._foreach_copy_(buffers, vectors(us, vs))
    divisors = torch.where(nonzero, norms, 1.0)  # (K, 1): sigma is u·Wv, and u is Wv / |Wv|
    parts = vectors(us * (nonzero / divisors), vs)
    return [Iterated(u, v, divisor) for u, v, divisor in zip(parts[::2], parts[1::2], divisors.view(-1), strict=True)]


def _unit(rows: Tensor, *, otherwise: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of unit norm, their norms before (K, 1), and whether these are larger than eps; other rows do not count."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)  # (K, 1)
    nonzero = norms > eps
    return torch.where(nonzero, rows / norms, otherwise), norms, nonzero


# The columns of a matrix, and so the entries of v, may be in any order. In the order in which a weight is stored, a
# layout such as channels last gives a matrix that is a view of the weight and not a copy.


def _storage_order(weight: Tensor, dim: int) -> list[int]:
    """The dimension of the outputs, then the others, those with the largest strides first."""
    return [dim, *sorted((i for i in range(weight.ndim) if i != dim), key=lambda i: weight.stride(i), reverse=True)]


def _across(weight: Tensor, dim: int) -> list[int]:
    return [1 if i == dim else size for i, size in enumerate(weight.shape)]


def _in_dimensions(v: Tensor, weight: Tensor, dim: int, order: list[int]) -> Tensor:
    """v in storage order (w,) with the dimensions of the weight, of size 1 along the outputs."""
    shape = _across(weight, dim)
    back = sorted(range(len(order)), key=order.__getitem__)
    return v.view([shape[i] for i in order]).permute(back)
