"""The memory that one pass of an attention layer takes, in a process of its own or by CUDA's allocator."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from measurement.passes import attention_layer, feature_map, forward_backward
from measurement.stopwatch import Run


def can_measure_memory(device: torch.device) -> bool:
    return device.type == "cuda" or sys.platform == "linux"


def peak_memory(
    kind: str,
    shape: tuple[int, int, int],
    device: torch.device,
    make: Callable[[nn.Module, Tensor, Tensor], Run] = forward_backward,
) -> float:
    """MiB by which one pass of an attention layer of this kind raises the peak of its device's memory.

    The shape is B, C and the size of a square feature map, or of a cube for the kind "volume".
    """
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
    layer = attention_layer(kind, channels, device)
    spatial_dims, few = (3, 12) if kind == "volume" else (2, 40)
    small = feature_map(1, channels, few, device, spatial_dims)
    make(layer, small, torch.ones_like(small))()  # libraries allocate buffers at first use
    x = feature_map(batch, channels, size, device, spatial_dims)
    run = make(layer, x, torch.ones_like(x))
    if device.type == "cuda":
        return allocated_by(run)
    return raised_by(run)


def raised_by(run: Run) -> float:
    """MiB by which a run raises the peak of this process, on Linux."""
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
