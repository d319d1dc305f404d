"""A word on runs that would take days on a CPU, said once, while there is still time to choose another recipe."""

from __future__ import annotations

import sys
import time

import torch
from tqdm import tqdm

LONG = 24 * 3600  # seconds to the end of a run from which it is called long
SETTLE = 10  # seconds of training after which its speed is known well enough


class LongRun:
    """Looks at the speed of a run that is at `step`, as soon as it is known."""

    def __init__(self, device: torch.device, step: int, steps: int, batch_size: int) -> None:
        self.steps, self.batch_size = steps, batch_size
        self.due = device.type == "cpu"
        self.first, self.start = step + 1, 0.0  # the first step allocates, and is slower than all others

    def advance(self, step: int) -> None:
        """Count a step; say how long the run will take if that is more than a day."""
        if not self.due:
            return
        now = time.perf_counter()
        if step <= self.first:
            self.start = now
        elif now - self.start >= SETTLE:
            self.due = False
            pace = (now - self.start) / (step - self.first)  # seconds for a step
            if (left := pace * (self.steps - step)) >= LONG:
                tqdm.write(
                    f"at {self.batch_size / pace:.3g} images/s on this CPU step {self.steps} is {left / LONG:.0f} days "
                    "away; @examples/recipes/images-cpu.txt trains on a folder or zip in minutes",
                    file=sys.stderr,
                )
