"""The tests of `make gpu`, and the device that they run on. What each file proves:

| file | what it proves |
| --- | --- |
| `test_kernel.py` | attention equals its equation in float64, once and twice differentiated, for each class of shapes, dtype and size of logits; the memory-efficient kernel computes it; the attention matrix is not stored |
| `test_layer.py` | `SelfAttention2d` in each memory format and precision, compiled, checkpointed, in a CUDA graph, in a penalty |
| `test_networks.py` | spectral norm in float32 whatever the precision around it; classes in a CUDA graph and out of range |
| `test_trainer.py` | a run starts under each name of a device, with each way to train; it resumes, also on another device; a step waits for nothing; several processes over NCCL |

Without a GPU the tests run on the CPU, through the branches that are CUDA's: `emulated_kernels` computes the kernel,
`emulated_cuda` the graphs and the trainer's device. Tests for which that proves nothing are skipped.
"""  # noqa: E501  rows of a table

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from emulated_cuda import emulate_cuda, emulate_graphs
from emulated_kernels import emulate
from numerics import HAS_GPU

if torch.__version__ < "2.6":  # the trainer needs it
    collect_ignore = ["test_trainer.py"]


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.gpu)
    if HAS_GPU:  # drivers and compilers warn of what depends on the machine; pytest lists it at the end
        item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The GPU, or the CPU with attention and graphs as on a GPU. float32 is float32: no TF32 in convolutions."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if HAS_GPU:
        return torch.device("cuda")
    emulate(monkeypatch)
    emulate_graphs(monkeypatch)
    return torch.device("cpu")


class AutocastOnTheCPU(torch.autocast):
    """Whichever device it is for: the tensors are on the CPU."""

    def __init__(self, device_type: str, *arguments: Any, **more: Any) -> None:
        super().__init__("cpu", *arguments, **more)


@pytest.fixture
def machine(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine on which `--device cuda` means `device`."""
    if not HAS_GPU:
        monkeypatch.setattr(torch, "autocast", AutocastOnTheCPU)
        with emulate_cuda(monkeypatch):
            yield
        return
    benchmark, precision = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    yield
    torch.backends.cudnn.benchmark = benchmark
    torch.set_float32_matmul_precision(precision)


if HAS_GPU:

    @pytest.fixture(autouse=True)
    def _at_most_two_gibibytes() -> None:
        """The limit of the other tests is not for CUDA's libraries, which are in memory from their first use on."""
