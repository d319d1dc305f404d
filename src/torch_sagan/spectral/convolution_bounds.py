"""The norm of one convolution as a map between feature maps: measured from below, bounded from above."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_sagan.spectral.singular_value import largest_singular_value, start

__all__ = ["Convolution", "Padding", "norm_of_matrix"]

# Of the arithmetic in float64: what is added to a bound, so that rounding cannot put it below the norm.
ROUNDING = 1e-10
LARGEST_MATRIX = 2**24  # entries, 128 MiB


class Padding(NamedTuple):
    """What happens to a feature map before the convolution: arguments of :func:`torch.nn.functional.pad`."""

    mode: str
    amounts: tuple[int, ...]  # left and right of the last dimension first


class Convolution(NamedTuple):
    """A convolution without its bias, on feature maps of one size: a linear map.

    Attributes:
        weight: in float64; (out, in / groups, …), and (in, out / groups, …) where it is transposed.
        shape: of a feature map, (C, …) without the batch.
        stride, padding, dilation, transposed, output_padding, groups: as :func:`torch.convolution` takes them.
        before: a padding before it; unless that is with zeros, ``padding`` is 0.
    """

    weight: Tensor
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
    before: Padding | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The image of feature maps (B, C, …) of the size."""
        if self.before is not None:
            x = F.pad(x, self.before.amounts, self.before.mode)
        return torch.convolution(
            x, self.weight, None, self.stride, self.padding, self.dilation, self.transposed, self.output_padding,
            self.groups,
        )  # fmt: skip

    def lower(self, tolerance: float) -> float:
        """The norm from below: that of the image of a unit vector."""
        scale = float(self.weight.abs().max())
        if not scale:
            return 0.0
        scaled = self._replace(weight=self.weight / scale)  # so that no square overflows or vanishes
        with torch.enable_grad():
            x = torch.zeros(1, *self.shape, dtype=torch.float64, device=self.weight.device, requires_grad=True)
            y = scaled(x)

        def adjoint(gradient: Tensor) -> Tensor:
            return torch.autograd.grad(y, x, gradient, retain_graph=True)[0]

        first = start((1, *self.shape), self.weight.device)
        with torch.no_grad():
            return scale * float(largest_singular_value(scaled.__call__, adjoint, first, tolerance=tolerance)[0])

    def upper(self, dense_up_to: int) -> float:
        """The norm, or a bound that is never below it: of the matrix, if one of its sides has at most so many entries,
        else of the convolution on a torus."""
        norms = [
            norm_of_matrix(each._matrix())
            for each in (self, self._adjoint())
            if each and math.prod(each.shape) <= dense_up_to and self._entries() <= LARGEST_MATRIX
        ]
        return (norms[0] if norms else self._on_a_torus()) * (1 + ROUNDING)

    def _out_shape(self) -> tuple[int, ...]:
        on_meta = self._replace(weight=self.weight.to("meta"))
        return tuple(on_meta(torch.empty(1, *self.shape, dtype=torch.float64, device="meta")).shape[1:])

    def _entries(self) -> int:
        return math.prod(self.shape) * math.prod(self._out_shape())

    def _matrix(self) -> Tensor:
        """(inputs, outputs): the images of the unit vectors."""
        inputs = math.prod(self.shape)
        eye = torch.eye(inputs, dtype=torch.float64, device=self.weight.device)
        return self(eye.view(inputs, *self.shape)).flatten(1)

    def _adjoint(self) -> Convolution | None:
        """The adjoint, or a map of which it is a part; None with a padding before."""
        if self.before:
            return None
        sizes = zip(
            self.shape[1:], self._out_shape()[1:], self.weight.shape[2:], self.stride, self.padding, self.dilation,
            strict=True,
        )  # fmt: skip
        rest = [0 if self.transposed else n - (m - 1) * s + 2 * p - d * (k - 1) - 1 for n, m, k, s, p, d in sizes]
        return self._replace(shape=self._out_shape(), transposed=not self.transposed, output_padding=tuple(rest))

    def _on_a_torus(self) -> float:
        r"""A bound of the norm, from convolutions without edges.

        **Zeros.** Put the feature map onto a torus, on which all other positions are zero. If the torus is at least as
        large as the map with the padding of its wider side, no kernel that reaches over an edge meets the map from the
        other side, so the circular convolution has the values of this one at its positions, and others elsewhere. The
        padded convolution is that one between an inclusion and a selection, whose norms are 1. So is a strided one, if
        the stride divides the torus: its positions are then among those of the strided circular convolution.

        **Circular padding** is that of a torus as large as the map. If the stride does not divide it, the positions
        are a selection from all of them, and each that occurs m times contributes :math:`\sqrt m`.

        **Other paddings** repeat values: their norm is the root of the largest number of copies. The convolution of the
        padded map has no padding.

        **Transposed.** The norm of the adjoint, which is a convolution from the outputs to the inputs.

        **The strided circular convolution** is block diagonal in the Fourier basis. With the stride s, frequencies that
        differ by a multiple of T / s become one, so a block is the transfer matrices of s frequencies side by side,
        divided by the root of s: the norm is the largest of those of the blocks, exactly.
        """
        sizes = self._out_shape()[1:] if self.transposed else self.shape[1:]
        dims = len(sizes)
        amounts = (*self.before.amounts, *[0] * (2 * dims))[: 2 * dims] if self.before else (0,) * (2 * dims)
        mode = self.before.mode if self.before else "constant"
        factor, torus, strides = 1.0, [], []
        for i, n in enumerate(sizes):
            s, reach = self.stride[i], self.dilation[i] * (self.weight.shape[2 + i] - 1)
            left, right = (amounts[2 * (dims - 1 - i) + side] + self.padding[i] for side in (0, 1))
            if mode == "circular":
                count = (n + left + right - reach - 1) // s + 1
                if n % s or count > n // s:
                    copies = torch.bincount(torch.arange(count) * s % n)
                    factor, s = factor * math.sqrt(int(copies.max())), 1
                torus.append(n)
            else:
                if mode != "constant":
                    positions = F.pad(torch.arange(float(n)).view(1, 1, n), (left, right), mode)
                    factor *= math.sqrt(int(torch.bincount(positions.flatten().int()).max()))
                    n, left, right = n + left + right, 0, 0
                # The second so that positions of a padding that is wider than the kernel stay apart.
                least = max(n + max(left, right), n + left + right - reach)
                torus.append(-(-least // s) * s)
            strides.append(s)
        return factor * _norm_on_torus(self._kernel(), torus, strides, self.dilation)

    def _kernel(self) -> Tensor:
        """(groups, out / groups, in / groups, …) of this or, if it is transposed, of the adjoint."""
        return self.weight.unflatten(0, (self.groups, -1))


def norm_of_matrix(matrix: Tensor) -> float:
    """The largest singular value of a matrix in float64."""
    scale = float(matrix.abs().max()) if matrix.numel() else 0.0
    if not scale:
        return 0.0
    return scale * float(_largest_eigenvalues(matrix / scale).sqrt())


def _largest_eigenvalues(matrices: Tensor) -> Tensor:
    """The largest eigenvalue of M M* among matrices (…, h, w)."""
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mH
    return torch.linalg.eigvalsh(wide @ wide.mH)[..., -1].amax().clamp(min=0)


def _norm_on_torus(kernel: Tensor, torus: list[int], strides: list[int], dilations: tuple[int, ...]) -> float:
    """The norm of the circular convolution with a kernel (groups, out, in, …), on every stride-th position."""
    scale = float(kernel.abs().max())
    if not scale:
        return 0.0
    kernel = (kernel / scale).to(torch.complex128)
    waves = []  # (k, T) for each dimension
    for size, width, dilation in zip(torus, kernel.shape[3:], dilations, strict=True):
        places = torch.arange(width, device=kernel.device)[:, None] * dilation
        phases = (places * torch.arange(size, device=kernel.device) % size).double() * (-2 * math.pi / size)
        waves.append(torch.polar(torch.ones_like(phases), phases))
    aliases = math.prod(strides)
    period, largest = torus[0] // strides[0], 0.0
    for frequency in range(period // 2 + 1):  # the kernel is real: the others are conjugates
        transfer = torch.tensordot(kernel, waves[0][:, frequency::period], ([3], [0]))  # (g, out, in, …, s)
        for wave in waves[1:]:
            transfer = torch.tensordot(transfer, wave, ([3], [0]))  # (g, out, in, …, s, T)
        for i, stride in enumerate(strides[1:]):
            transfer = transfer.unflatten(4 + 2 * i, (stride, -1))  # frequencies T / s apart in one dimension
        periods = [5 + 2 * i for i in range(len(strides) - 1)]
        columns = [2, 3, *(i - 1 for i in periods)]
        blocks = transfer.permute(0, *periods, 1, *columns).flatten(len(periods) + 2)  # (g, …, out, in · aliases)
        largest = max(largest, float(_largest_eigenvalues(blocks)))
    return scale * math.sqrt(largest / aliases)
