"""Exported programs with spectral norm: saved, and loaded by a fresh process that knows nothing of this library."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from torch_sagan import SAGANDiscriminator, SAGANGenerator, spectral_norm

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolution": (lambda: spectral_norm(nn.Conv2d(3, 4, 3)), (2, 3, 6, 6)),
    "vector": (lambda: spectral_norm(nn.Linear(3, 4), "bias"), (2, 3)),
    "generator": (lambda: SAGANGenerator(16, base_channels=4), (2, 128)),
    "discriminator": (lambda: SAGANDiscriminator(16, base_channels=4, architecture="resnet"), (2, 3, 16, 16)),
}

LOAD = """
import sys, torch
for name in sys.argv[2:]:
    x, expected = torch.load(f"{sys.argv[1]}/{name}.pt", weights_only=True)
    actual = torch.export.load(f"{sys.argv[1]}/{name}.pt2").module()(x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
assert not any(name.startswith("torch_sagan") for name in sys.modules)
print("loaded", len(sys.argv) - 2)
"""


@pytest.mark.exhaustive
@pytest.mark.slow  # the exporter takes seconds
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the strict exporter does that
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # and uses this
@pytest.mark.parametrize("strict", [False, True])
def test_loaded_in_a_fresh_process(strict: bool, tmp_path: Path) -> None:
    for kind, (make, shape) in MODELS.items():
        model, x = make().eval(), torch.randn(shape)
        torch.export.save(torch.export.export(model, (x,), strict=strict), tmp_path / f"{kind}.pt2")
        torch.save((x, model(x).detach()), tmp_path / f"{kind}.pt")
    command = [sys.executable, "-c", LOAD, str(tmp_path), *MODELS]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == f"loaded {len(MODELS)}", result.stderr
