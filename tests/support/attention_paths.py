"""Query, key and value for tests of attention, and the paths that compute it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torch_sagan.attention import cuda, tiles

TILE = 16  # what `small_tiles` sets, so that small maps straddle the borders of tiles

# The second runs on the CPU by the kernels of emulated_kernels.
paths = pytest.mark.parametrize("attention", [tiles.tiled_attention, cuda.fused_attention], ids=["tiled", "fused"])


def inputs(
    batch: int = 2,
    d: int = 3,
    e: int = 5,
    n: int = 40,
    m: int = 23,
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    shapes = [(batch, d, n), (batch, d, m), (batch, e, m)]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    tensors[0] *= scale
    return [t.to(dtype).requires_grad_() for t in tensors]


def packed(tensors: list[Tensor], gap: int) -> list[Tensor]:
    """The same values as slices of one channels-last map, such as one convolution gives, from `gap` on."""
    widths = [tensor.shape[1] for tensor in tensors]
    whole = tensors[0].new_full((len(tensors[0]), tensors[0].shape[2], gap + sum(widths)), 9.0)
    slices = whole[..., gap:].split(widths, dim=2)
    for part, tensor in zip(slices, tensors, strict=True):
        part.copy_(tensor.mT)
    return [part.mT for part in slices]


def stacked(tensors: list[Tensor]) -> list[Tensor]:
    """The same values in one storage, each contiguous."""
    return [part.mT for part in torch.stack([tensor.mT for tensor in tensors])]
