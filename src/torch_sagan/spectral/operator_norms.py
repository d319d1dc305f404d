"""The norms of all linear maps of a model as it is called, and a bound of the model from them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_sagan._checks import at_least_one
from torch_sagan.spectral.lipschitz import DataFlow, LinearCall
from torch_sagan.surgery.example_pass import ExampleInput, example_pass

__all__ = ["OperatorNorm", "OperatorNorms", "operator_norms"]


class OperatorNorm(NamedTuple):
    """The norm of one linear map, as :func:`operator_norms` finds it.

    Attributes:
        path: of the module that calls it.
        layer: the class of that module.
        input_shape: of the feature map, without the batch.
        lower: the norm of the image of a unit vector. The true norm is not below it.
        upper: a bound that is certain. The true norm is not above it.
    """

    path: str
    layer: str
    input_shape: tuple[int, ...]
    lower: float
    upper: float


class OperatorNorms(NamedTuple):
    """What :func:`operator_norms` returns; ``print`` shows it as a table.

    Attributes:
        layers: the linear maps, in the order in which they are called.
        bound: a Lipschitz constant of the whole model for inputs of this shape; infinity if there is none.
        unbounded: what has no bound, and why.
    """

    layers: tuple[OperatorNorm, ...]
    bound: float
    unbounded: tuple[str, ...]

    def __str__(self) -> str:
        rows = [["layer", "", "input", "norm at least", "at most"]]
        rows += [
            [each.path, each.layer, "×".join(map(str, each.input_shape)), f"{each.lower:.4f}", f"{each.upper:.4f}"]
            for each in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        lines += [f"no bound: {reason}" for reason in self.unbounded]
        bound = f"{self.bound:.4g}" if self.bound < math.inf else "unknown"
        return "\n".join([line.rstrip() for line in lines] + [f"Lipschitz constant of the model: at most {bound}"])


@torch.inference_mode(False)  # in which PyTorch shows layers as they are written, and not as what they compute
@torch.no_grad()
def operator_norms(
    model: nn.Module, example_input: ExampleInput, *, tolerance: float = 1e-7, dense_up_to: int = 1024
) -> OperatorNorms:
    r"""Measure the linear maps of a model as it is called: :math:`\max_x \lVert A x \rVert / \lVert x \rVert` of each.

    A spectral norm of the unfolded kernel says little about a convolution, which uses a weight in many positions. Here
    a convolution counts with its stride, padding (of every mode), dilation and groups, at the size of its feature maps;
    so do transposed ones. What counts is what is called: a ``forward`` of your own that computes a kernel, or a padding
    in front, is part of the map. Weights are those of evaluation mode.

    ``lower`` is found by Lanczos iterations in float64, ``upper`` from the convolution on a torus, on which it is block
    diagonal, or for small maps and linear layers from the matrix, where both agree.

    The bound of the model follows the data: constants multiply along chains, and add up where branches meet. It knows
    activations, evaluated batch norms, pooling, sums, means, concatenations, products with constants, and attention
    with ``similarity="l2"``. Whatever else the input goes through is named in ``unbounded``. A bound holds for inputs
    of the shape of the example, a batch taken as one vector, in exact arithmetic, and in evaluation mode. What leaves
    PyTorch, as by ``tolist``, is not seen.

    Modes, buffers, hooks and random states are afterwards as they were.

    Args:
        model: any module.
        example_input: what it can be called with: a tensor, a tuple of arguments or a mapping of keyword arguments. A
            batch of one is enough.
        tolerance: the iteration for ``lower`` ends when 24 products with the map and its adjoint raise it by at most so
            much of it.
        dense_up_to: maps with at most so many inputs or outputs are made matrices.

    Returns:
        The norms of the layers, the bound, and what is unbounded.

    Raises:
        ValueError: for a tolerance that is not positive, a ``dense_up_to`` below 1, or a weight that is not finite.
        TypeError: when ``example_input`` is neither a tensor nor a tuple or mapping of arguments, or for a convolution
            with complex weights.

    Source: torus: Sedghi et al., *The Singular Values of Convolutional Layers*, arXiv:1805.10408. Attention: Kim et
    al., arXiv:2006.04710.

    >>> import torch
    >>> from torch import nn
    >>> from torch_sagan import operator_norms, spectral_norm
    >>> layer = spectral_norm(nn.Conv2d(16, 16, 3, padding=1), of="convolution", input_size=12)
    >>> found = operator_norms(layer, torch.randn(1, 16, 12, 12))
    >>> abs(found.layers[0].lower - 1) < 1e-3
    True
    """
    at_least_one(dense_up_to=dense_up_to)
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    with DataFlow(model, dense_up_to) as flow:
        output = example_pass(model, example_input)
    bound = flow.bound(output)
    layers: dict[tuple[Any, ...], OperatorNorm] = {}
    for call in flow.calls:
        key = call.path, call.input_shape, call.upper
        if key not in layers:
            layers[key] = OperatorNorm(call.path, call.layer, call.input_shape, _lower(call, tolerance), call.upper)
    return OperatorNorms(tuple(layers.values()), bound, tuple(flow.reasons))


def _lower(call: LinearCall, tolerance: float) -> float:
    return call.upper if isinstance(call.map, Tensor) else call.map.lower(tolerance)
