"""The memory that one pass of an attention layer takes, in a process of its own or by CUDA's allocator."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from measurement.passes import attention_layers, feature_map, forward_backward
from measurement.stopwatch import Run


def can_measure_memory(device: torch.device) -> bool:
    return device.type == "cuda" or sys.platform == "linux"


def peak_memory(
    kind: str,
    shape: tuple[int, int, int],
    device: torch.device,
    make: Callable[[nn.Module, Tensor, Tensor], Run] = forward_backward,
) -> float:
    """MiB by which one pass of an attention layer of this kind raises the peak of its device's memory."""
    if device.type == "cuda":  # whose allocator counts; another process would only start CUDA once more
        return peak_memory_here(kind, shape, device, make)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_memory_here, (kind, shape, device, make))


def peak_memory_here(
    kind: str,
    shape: tuple[int, int, int],
    device: torch.device,
    make: Callable[[nn.Module, Tensor, Tensor], Run] = forward_backward,
) -> float:
    """The same in this process, where earlier runs may have left memory to reuse."""
    batch, channels, size = shape
    layer = attention_layers(channels, device)[kind]
    small = feature_map(1, channels, 40, device)
    make(layer, small, torch.ones_like(small))()  # libraries allocate buffers at first use
    x = feature_map(batch, channels, size, device)
    run = make(layer, x, torch.ones_like(x))
    if device.type == "cuda":
        return allocated_by(run)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = peak_of_this_process()
    run()
    return peak_of_this_process() - before


def allocated_by(run: Run) -> float:
    """MiB that CUDA's allocator needs for a run, beyond what is allocated before it."""
    run()  # algorithms that are chosen by this shape, and buffers that stay
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def peak_of_this_process() -> float:
    """MiB of memory that this process has had at most, as Linux reports them."""
    status = dict(entry.split(":", 1) for entry in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 2**10
