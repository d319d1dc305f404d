"""The power iterations of all weights of a network at once, in about as many operations as those of one.

Each weight has matrix products of its own. What follows them, norms, divisions and choices, is done for all weights at
once: their vectors are the rows of one matrix, padded with zeros to the length of the longest. On a GPU, launching an
operation on a vector of a few hundred numbers takes longer than the operation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torch_sagan._torch import no_autocast, runs_custom_operations
from torch_sagan.spectral.iteration import unit
from torch_sagan.spectral.norm import SpectralNorm

__all__ = ["iterate_together"]


class _Member(NamedTuple):
    norm: SpectralNorm
    weight: Tensor

    # The columns of a matrix, and so the entries of v, may be in any order. In the order in which a weight is stored, a
    # layout such as channels last gives a matrix that is a view of the weight and not a copy.

    def order(self) -> list[int]:
        """The dimension of the outputs, then the others, those with the largest strides first."""
        others = [i for i in range(self.weight.ndim) if i != self.norm.dim]
        return [self.norm.dim, *sorted(others, key=self.weight.stride, reverse=True)]

    def matrix(self) -> Tensor:
        """The weight (h, w), columns in the order of storage."""
        return self.weight.permute(self.order()).flatten(1)

    def in_dimensions(self, v: Tensor, order: Sequence[int]) -> Tensor:
        """v (w,) with the dimensions of the weight, of size 1 along the outputs, from entries in the order given."""
        sizes = [1 if i == self.norm.dim else size for i, size in enumerate(self.weight.shape)]
        back = sorted(range(len(order)), key=order.__getitem__)
        return v.view([sizes[i] for i in order]).permute(back)


def iterate_together(model: nn.Module) -> None:
    """Run the power iterations of a model's next pass in training mode, those of all weights at once.

    Each :class:`SpectralNorm` uses what was computed for it when its weight is next read, unless the weight has changed
    by then. Weights in half precision, of tensor subclasses, or computed by other parametrizations iterate on their
    own, when they are read, as all do under a compiler or a transform.
    """
    groups: dict[tuple[torch.device, torch.dtype, int, float], list[_Member]] = {}
    for module in model.modules() if runs_custom_operations() else ():
        if isinstance(module, parametrize.ParametrizationList) and len(module) == 1:
            norm, weight = module[0], module.original
            # Only of a matrix: that of a convolution has no matrix, and a user's subclass may do anything.
            if type(norm) is SpectralNorm and norm.training and _can_be_grouped(norm, weight):
                key = weight.device, weight.dtype, norm.n_power_iterations, norm.eps
                groups.setdefault(key, []).append(_Member(norm, weight))
    for (device, _, n_iterations, eps), members in groups.items():
        with no_autocast(device.type):
            _iterate(members, n_iterations=n_iterations, eps=eps)


def _can_be_grouped(norm: SpectralNorm, weight: Tensor) -> bool:
    # FullyShardedDataParallel leaves a part of the weight, of another shape or class, until its module is called.
    whole = type(weight) is nn.Parameter and weight.ndim > 1 and weight.numel() == len(norm._u) * len(norm._v)
    versioned = not weight.is_inference()
    return whole and versioned and weight.dtype in (torch.float32, torch.float64) and norm._u.dtype == weight.dtype


@torch.no_grad()
def _iterate(members: Sequence[_Member], *, n_iterations: int, eps: float) -> None:
    """Iterate as :func:`torch_sagan.functional.power_iteration` does, store u and v, and prepare the division.

    The weights, with their u and v, are on one device and of one dtype.
    """
    matrices = [member.matrix() for member in members]  # (h, w)
    shape = len(members), max(size for matrix in matrices for size in matrix.shape)
    buffers = []
    for member in members:
        buffers += [member.norm._u, member.in_dimensions(member.norm._v, range(member.weight.ndim))]

    def vectors(us: Tensor, vs: Tensor) -> list[Tensor]:
        """The vectors of all weights, in the order of `buffers`, as parts of the rows of two matrices."""
        parts = []
        for u, v, (h, w), member in zip(us, vs, [matrix.shape for matrix in matrices], members, strict=True):
            parts += [u[:h], member.in_dimensions(v[:w], member.order())]
        return parts

    us, vs = matrices[0].new_empty(2, *shape)
    torch._foreach_copy_(vectors(us, vs), buffers)
    for _ in range(n_iterations):
        u_products, v_products = matrices[0].new_zeros(2, *shape)
        for matrix, u, v in zip(matrices, us, v_products, strict=True):
            torch.mv(matrix.mT, u[: len(matrix)], out=v[: matrix.shape[1]])
        vs, _, _ = unit(v_products, otherwise=vs, eps=eps)
        for matrix, u, v in zip(matrices, u_products, vs, strict=True):
            torch.mv(matrix, v[: matrix.shape[1]], out=u[: len(matrix)])
        us, sigmas, nonzero = unit(u_products, otherwise=us, eps=eps)
    torch._foreach_copy_(buffers, vectors(us, vs))
    nonzero = nonzero & (sigmas < math.inf)
    divisors = torch.where(nonzero, sigmas, 1.0).view(-1)
    parts = vectors(us * nonzero, vs)
    for member, u, v, divisor in zip(members, parts[::2], parts[1::2], divisors, strict=True):
        member.norm._prepared = member.weight, member.weight._version, (u, v, divisor)
