"""Norms of single convolutions, from below and from above, against a decomposition of the unrolled map."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from torch_sagan import operator_norms
from torch_sagan.spectral.convolution_bounds import norm_of_matrix

# Twenty convolutions: the layer, and the size of its feature maps.
CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "3×3": (nn.Conv2d(3, 5, 3, padding=1), (9, 8)),
    "no padding": (nn.Conv2d(4, 3, 3), (8, 7)),
    "wide padding": (nn.Conv2d(2, 3, 3, padding=4), (5, 6)),
    "even kernel": (nn.Conv2d(3, 3, (4, 2), padding=(2, 1)), (7, 9)),
    "stride 2": (nn.Conv2d(3, 6, 4, 2, 1), (8, 10)),
    "stride 2, odd": (nn.Conv2d(3, 6, 3, 2, 1), (9, 7)),
    "stride 3, 2": (nn.Conv2d(3, 6, 5, (3, 2), 2), (11, 8)),
    "stride larger than kernel": (nn.Conv2d(3, 4, 2, 3), (10, 9)),
    "dilated": (nn.Conv2d(3, 4, 3, padding=2, dilation=2), (9, 8)),
    "dilated, strided": (nn.Conv2d(3, 4, 3, 2, padding=3, dilation=(3, 2)), (10, 9)),
    "groups": (nn.Conv2d(6, 4, 3, padding=1, groups=2), (7, 8)),
    "depthwise, strided": (nn.Conv2d(5, 10, 3, 2, padding=1, groups=5), (7, 8)),
    "1-D": (nn.Conv1d(4, 5, 5, 2, 2), (21,)),
    "3-D": (nn.Conv3d(2, 3, 3, (1, 2, 1), padding=1), (4, 5, 6)),
    "whole map": (nn.Conv2d(6, 1, 4), (4, 4)),
    "transposed": (nn.ConvTranspose2d(5, 3, 4, 2, 1), (5, 6)),
    "transposed, output padding": (nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2), (5, 4)),
    "transposed, dilated": (nn.ConvTranspose2d(3, 4, 3, 2, 2, output_padding=(0, 2), dilation=3), (6, 5)),
    "transposed 1-D": (nn.ConvTranspose1d(3, 4, 5, 3), (9,)),
    "transposed 3-D": (nn.ConvTranspose3d(3, 2, 2, 2), (3, 4, 3)),
    # PyTorch pads before these.
    "circular": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (6, 8)),
    "circular, strided": (nn.Conv2d(3, 4, 4, 2, padding=1, padding_mode="circular"), (6, 8)),
    "circular, odd, strided": (nn.Conv2d(3, 4, 3, 2, padding=2, padding_mode="circular"), (7, 5)),
    "circular, small": (nn.Conv2d(3, 4, 5, padding=2, padding_mode="circular"), (2, 3)),
    "reflected": (nn.Conv2d(3, 4, 5, padding=2, padding_mode="reflect"), (6, 7)),
    "replicated": (nn.Conv2d(3, 4, 5, padding=2, padding_mode="replicate"), (6, 7)),
    "same": (nn.Conv2d(3, 4, (4, 3), padding="same", dilation=(1, 2)), (7, 8)),
}

# Above the dense norm by at most so much, where that is more than a quarter.
LOOSE = {
    "wide padding": 1.3, "dilated, strided": 1.5, "3-D": 1.5, "whole map": 4.0, "reflected": 2.0, "replicated": 3.0,
    "circular, odd, strided": 2.1,
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")  # of PyTorch


def dense_norm(layer: nn.Module, size: tuple[int, ...]) -> float:
    """The largest singular value of the matrix that has the image of each unit vector as a row."""
    inputs = layer.in_channels * math.prod(size)
    images = layer(torch.eye(inputs, dtype=torch.float64).view(inputs, layer.in_channels, *size))
    offset = layer(torch.zeros(1, layer.in_channels, *size, dtype=torch.float64))
    return float(torch.linalg.svdvals((images - offset).flatten(1).detach())[0])


def measured(kind: str, mean: float = 0.0, **settings: int) -> tuple[float, float, float]:
    """The norm from below, from above, and by the decomposition."""
    layer, size = CONVOLUTIONS[kind]
    layer.double()
    with torch.no_grad():
        layer.weight.normal_(mean)
    (row,) = operator_norms(layer, torch.zeros(1, layer.in_channels, *size, dtype=torch.float64), **settings).layers
    assert row.layer == type(layer).__name__
    assert row.input_shape == (layer.in_channels, *size)
    return row.lower, row.upper, dense_norm(layer, size)


@pytest.mark.parametrize(
    ("kind", "mean"),
    [
        *((kind, 0.0) for kind in CONVOLUTIONS),
        *(
            pytest.param(kind, 1.0, marks=[] if kind in ("3×3", "stride 2", "circular") else pytest.mark.exhaustive)
            for kind in CONVOLUTIONS
        ),
    ],
)
def test_against_the_unrolled_operator(kind: str, mean: float) -> None:
    """Without the matrix: Lanczos iterations and the torus. A mean puts the norm at the lowest frequency."""
    lower, upper, exact = measured(kind, mean, dense_up_to=1)
    assert lower == pytest.approx(exact, rel=1e-4)
    assert lower <= exact * (1 + 1e-12)
    assert upper >= exact
    # On maps so small most kernels reach over an edge. Copies of padding count as if all were at the worst place, and
    # the torus has positions that the map lacks.
    assert upper <= LOOSE.get(kind, 1.25) * exact


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_small_maps_are_exact(kind: str) -> None:
    _, upper, exact = measured(kind)
    assert exact <= upper
    if kind != "transposed, dilated":  # its adjoint has more outputs than the map has inputs
        assert upper == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(
    ("kind", "most"),
    [("circular", 1e-8), ("circular, strided", 1e-8)],
)
def test_the_torus_is_exact_where_the_map_is_one(kind: str, most: float) -> None:
    _, upper, exact = measured(kind, dense_up_to=1)
    assert upper == pytest.approx(exact, rel=most)


@pytest.mark.parametrize("size", [8, 16, 32])
def test_the_gap_closes_as_maps_grow(size: int) -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1).double()
    (row,) = operator_norms(layer, torch.zeros(1, 4, size, size, dtype=torch.float64), dense_up_to=1).layers
    # An edge costs a share of about 1 / size² of the norm, since its singular vectors are long waves.
    assert 0 <= row.upper / row.lower - 1 < 8 / size**2 + 1e-6


def test_a_weight_of_any_size() -> None:
    layer = nn.Conv2d(3, 4, 3, padding=1).double()
    exact = dense_norm(layer, (8, 8))
    for scale in (1e-200, 1e200):
        scaled = nn.Conv2d(3, 4, 3, padding=1).double()
        scaled.weight = nn.Parameter(layer.weight.detach() * scale)
        (row,) = operator_norms(scaled, torch.zeros(1, 3, 8, 8, dtype=torch.float64), dense_up_to=1).layers
        assert row.lower / scale == pytest.approx(exact, rel=1e-6)
        assert exact <= row.upper / scale <= 1.1 * exact


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (7, 3)])
def test_the_norm_of_a_matrix(shape: tuple[int, int]) -> None:
    matrix: Tensor = torch.randn(shape, dtype=torch.float64)
    assert norm_of_matrix(matrix) == pytest.approx(float(torch.linalg.svdvals(matrix)[0]), rel=1e-12)
    assert norm_of_matrix(torch.zeros(shape, dtype=torch.float64)) == 0
    assert norm_of_matrix(1e200 * matrix) == pytest.approx(1e200 * norm_of_matrix(matrix), rel=1e-12)
