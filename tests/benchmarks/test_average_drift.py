"""How far an average has drifted from its buffers: a line before recalibration, and one after it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import average_drift
from generators import checkpoint, shaken


def test_the_drift_of_an_average(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of buffers that belong to other weights: sigma and the gap to batch statistics, before and after."""
    average = shaken()
    with torch.no_grad():
        for parameter in average.parameters():
            if parameter.ndim == 4:
                parameter.add_(parameter.std() * torch.randn_like(parameter))
    path = checkpoint(tmp_path / "checkpoint.pt", shaken(), average)
    average_drift.main([str(path)])
    before, after = capsys.readouterr().out.splitlines()
    assert before.startswith("before  sigma ")
    assert after.startswith("after   sigma 1.0000 to 1.0000, gap ")
    assert float(after.split()[-1]) < 0.3 * float(before.split()[-1])  # what is left is the chance of a batch
