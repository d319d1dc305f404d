"""The largest singular value of a map that is known by its products, against a singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torch_sagan.spectral.singular_value import largest_singular_value, start


def found(matrix: Tensor, v: Tensor | None = None, **settings: float) -> tuple[Tensor, Tensor]:
    v = start((matrix.shape[1],), matrix.device) if v is None else v
    return largest_singular_value(lambda x: matrix @ x, lambda y: matrix.mT @ y, v, **{"tolerance": 1e-8} | settings)


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), rank=st.integers(1, 40))
def test_of_any_matrix(rows: int, columns: int, rank: int) -> None:
    """Also of low rank, whose products soon span a space that grows no more."""
    matrix = torch.randn(rows, rank, dtype=torch.float64) @ torch.randn(rank, columns, dtype=torch.float64)
    sigma, v = found(matrix)
    assert float(sigma) == pytest.approx(float(torch.linalg.svdvals(matrix)[0]), rel=1e-8)
    assert float(v.norm()) == pytest.approx(1)
    assert float((matrix @ v).norm()) == pytest.approx(float(sigma), rel=1e-10)


def test_of_values_as_dense_as_a_convolutions() -> None:
    """Their distances at the upper end are a hundred-thousandth; as many products of power iteration do far less."""
    values = 1 - torch.linspace(0, 1, 300, dtype=torch.float64).square() * 0.9
    matrix, products = torch.linalg.qr(torch.randn(300, 300, dtype=torch.float64))[0] * values, 0

    def apply(x: Tensor) -> Tensor:
        nonlocal products
        products += 1
        return matrix @ x

    v = start((300,), matrix.device)
    sigma, _ = largest_singular_value(apply, lambda y: matrix.mT @ y, v, tolerance=1e-7)
    assert 1 - 1e-5 < float(sigma) < 1 + 1e-12
    assert products < 500
    for _ in range(products):
        v = torch.nn.functional.normalize(matrix.mT @ (matrix @ v), dim=0)
    assert 1 - float((matrix @ v).norm()) > 10 * (1 - float(sigma))


def test_it_ends_at_the_tolerance_or_after_so_many_restarts() -> None:
    matrix = torch.diag(1 - torch.linspace(0, 1, 400, dtype=torch.float64).square() * 0.5)
    cases = {"tolerance": 1e-10, "restarts": 1}, {"tolerance": 1e-3}, {"tolerance": 1e-10}
    once, coarse, exact = (1 - float(found(matrix, **settings)[0]) for settings in cases)
    assert 0 <= exact < 1e-7 < coarse <= once < 0.1


def test_the_start_is_always_the_same_and_no_number_is_drawn() -> None:
    state = torch.get_rng_state()
    assert torch.equal(start((3, 4), torch.device("cpu")), start((3, 4), torch.device("cpu")))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_map_of_zero() -> None:
    sigma, v = found(torch.zeros(3, 4, dtype=torch.float64))
    assert float(sigma) == 0
    assert float(v.norm()) == pytest.approx(1)
