"""The benchmark of derivatives: each contender computes the same, and what does not fit is left out."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.utils._pytree import tree_leaves

import benchmark
from measurement import derivatives
from measurement.derivatives import CONTENDERS, PASSES, fits, points
from measurement.stopwatch import Stopwatch

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")  # which forward mode itself uses

CPU = torch.device("cpu")


@pytest.mark.parametrize("derivative", PASSES)
def test_contenders_compute_the_same(derivative: str) -> None:
    x = points(40, CPU)
    expected, *others = (tree_leaves(PASSES[derivative](attention, x)()) for attention in CONTENDERS.values())
    assert len(expected) == {"gradient": 3, "gradient penalty": 3, "jvp": 2, "Hessian-vector product": 6}[derivative]
    for results in others:
        for result, other in zip(results, expected, strict=True):
            # float32, sums of some thousand products
            torch.testing.assert_close(result, other, rtol=1e-4, atol=1e-4 * float(other.detach().abs().max()))


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(benchmark, "DERIVATIVE_SIZES", [16, 24])
    monkeypatch.setattr(benchmark, "fits", lambda n, device: n == 16)
    monkeypatch.setattr(benchmark, "peak", lambda contender, derivative, n, device: float(len(contender)))
    rows = benchmark.derivatives(Stopwatch(CPU, 0.0, at_least=1))
    assert [(row["N"], row["derivative"]) for row in rows] == [(n, name) for n in (16, 24) for name in PASSES]
    for row in rows:
        assert ("plain/ours" in row) == (row["N"] == 16)
        assert row["ours ms"] > 0
        assert row.get("ours MiB", 4.0) == 4.0  # which only some systems can measure
    assert "Hessian-vector product" in capsys.readouterr().out


def test_what_does_not_fit_is_not_tried() -> None:
    assert fits(64, CPU)
    assert not fits(10**6, CPU)


@pytest.mark.exhaustive  # a fresh process, since an old one may have had more memory
@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux counts")
def test_memory() -> None:
    matrix = 1500**2 * 4 / 2**20
    assert derivatives.peak("plain", "gradient", 1500, CPU) > matrix
