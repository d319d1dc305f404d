"""What every test shares: a fixed seed, Hypothesis' settings, and the stored arrays of other implementations."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from torch import Tensor

# The examples are scripts, not a package: they import one another by their bare names.
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

hypothesis.settings.register_profile("sagan", deadline=None, max_examples=25, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("sagan")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def arrays() -> Mapping[str, Tensor]:
    """The arrays that ``data/README.md`` describes."""
    with np.load(Path(__file__).parent / "data" / "reference.npz") as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored.files}
