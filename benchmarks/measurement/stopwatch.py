"""The time of a run, beside the times of the runs that it is compared with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Run = Callable[[], object]

# Turns that are not measured. On CUDA the first ones choose algorithms, and a graphed training step records its fourth.
WARM_UP = {"cpu": 1, "cuda": 5}
CALLS = 20  # calls in a CUDA graph, among which the time to start it and to wait for it, some 10 µs, is divided


class Replay:
    """A run as a CUDA graph of `CALLS` calls: the time of its kernels, without that of launching them."""

    def __init__(self, run: Run) -> None:
        self.run = run  # whose tensors the graph reads
        stream, before = torch.cuda.Stream(), torch.cuda.current_stream()  # the default stream allows no capture
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            for _ in range(3):  # as PyTorch's documentation of graphs asks for
                run()
        before.wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            for _ in range(CALLS):
                run()

    def __call__(self) -> None:
        self.graph.replay()


def on_device(run: Run, device: torch.device) -> Run:
    """A run of which the stopwatch takes the time on the device alone: on CUDA its replay."""
    return Replay(run) if device.type == "cuda" else run


class Stopwatch:
    """Medians of interleaved repeats, in seconds."""

    def __init__(self, device: torch.device, seconds: float, at_least: int = 5) -> None:
        self.device, self.seconds, self.at_least = device, seconds, at_least

    def __call__(self, **runs: Run) -> dict[str, float]:
        """Run in turns until the time is over, but at least so often, after turns that are not measured."""
        times: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            for _ in range(WARM_UP[self.device.type]):
                run()
        begin = time.perf_counter()
        while min(map(len, times.values())) < self.at_least or time.perf_counter() - begin < self.seconds:
            for name, run in runs.items():
                self._synchronize()
                start = time.perf_counter()
                run()
                self._synchronize()
                times[name].append((time.perf_counter() - start) / (CALLS if isinstance(run, Replay) else 1))
        return {name: statistics.median(values) for name, values in times.items()}

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
