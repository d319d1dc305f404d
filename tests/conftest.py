"""Shared by all tests: a seed, a memory limit, Hypothesis' settings, the arrays of other implementations."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

# The examples are scripts, not a package: they import one another by their bare names.
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import training.threads  # noqa: F401  before torch  # isort: skip

if sys.platform != "win32":
    import resource

import hypothesis
import numpy as np
import pytest
import torch
from emulated_kernels import kernels  # noqa: F401  a fixture
from torch import Tensor

# The examples that read checkpoints refuse a torch that cannot do so safely.
if torch.__version__ < "2.6":
    collect_ignore = [
        "test_benchmark.py",
        "test_checkpointing.py",
        "test_conditional_training.py",
        "test_trainer_on_cuda.py",
        "test_cuda_graph.py",
        "test_distributed.py",
        "test_evaluator.py",
        "test_examples.py",
        "test_explorer.py",
        "test_generate.py",
        "test_image_cache.py",
        "test_image_folder.py",
        "test_logging.py",
        "test_minimal.py",
        "test_prefetch.py",
        "test_published.py",
        "test_recipes.py",
        "test_run_lock.py",
        "test_train_celeba.py",
        "test_train_digits.py",
    ]

hypothesis.settings.register_profile("sagan", deadline=None, max_examples=25, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("sagan")


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
