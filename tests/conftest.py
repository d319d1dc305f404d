"""Shared by all tests: a seed, a memory limit, Hypothesis' settings, the arrays of other implementations."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import training.threads  # noqa: F401  before torch  # isort: skip

if sys.platform != "win32":
    import resource

import hypothesis
import numpy as np
import pytest
import torch
from torch import Tensor

from emulated_kernels import kernels  # noqa: F401  a fixture

# The examples that read checkpoints refuse a torch that cannot do so safely.
if torch.__version__ < "2.6":
    collect_ignore = ["benchmarks", "examples", "maps/test_explorer_of_networks.py"]

# The same examples in every run, and fresh ones in the night.
hypothesis.settings.register_profile("sagan", deadline=None, max_examples=15, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=300, derandomize=False, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "sagan"))

WITH_SCRIPTS = tuple(str(Path(__file__).parent / name) + os.sep for name in ("benchmarks", "docs", "examples"))


def pytest_itemcollected(item: pytest.Item) -> None:
    if str(item.path).startswith(WITH_SCRIPTS):
        item.add_marker(pytest.mark.examples)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _at_most_two_gibibytes() -> Iterator[None]:
    """The test that raises the peak of the process by more fails. Processes that it starts are not counted."""
    before = peak_memory()
    yield
    used = peak_memory() - before
    assert used <= 2 * 2**30, f"the test took {used / 2**30:.1f} GiB, expected at most 2"


def peak_memory() -> int:
    """The most bytes that this process has had in memory; 0 on Windows, where Python has no function for it."""
    if sys.platform == "win32":
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux KiB


@pytest.fixture(scope="session")
def arrays() -> Mapping[str, Tensor]:
    """The arrays that ``data/README.md`` describes."""
    with np.load(Path(__file__).parent / "data" / "reference.npz") as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored.files}
