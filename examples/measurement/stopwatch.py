"""The time of a run, beside the times of the runs that it is compared with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Run = Callable[[], object]


class Stopwatch:
    """Medians of interleaved repeats, in seconds."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device = device
        self.seconds = seconds

    def __call__(self, **runs: Run) -> dict[str, float]:
        """Run in turns until the time is over, but at least five times, after one turn that is not measured."""
        times: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            run()
        begin = time.perf_counter()
        while min(map(len, times.values())) < 5 or time.perf_counter() - begin < self.seconds:
            for name, run in runs.items():
                self._synchronize()
                start = time.perf_counter()
                run()
                self._synchronize()
                times[name].append(time.perf_counter() - start)
        return {name: statistics.median(values) for name, values in times.items()}

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
