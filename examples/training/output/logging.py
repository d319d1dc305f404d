"""The reports of a run: `log.jsonl` with a JSON object per line, TensorBoard's event files, and a progress bar."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from training.runs.atomic_files import force_to_disk, write
from training.runs.distributed import Ranks
from training.script import fail

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """The log of a run that is at `step`; an interrupted run's lines of later steps are dropped."""

    def __init__(self, out: Path, step: int, steps: int, batch_size: int, tensorboard: bool) -> None:
        self.path, self.batch_size = out / "log.jsonl", batch_size
        lines = self.path.read_bytes().splitlines() if step and self.path.exists() else []
        known = b"".join(line + b"\n" for line in lines if _step(line) <= step)
        write(self.path, lambda file: file.write(known))
        self.tensorboard = _open_tensorboard(out / "tensorboard", step) if tensorboard else None
        self.bar = tqdm(
            total=steps * batch_size, initial=step * batch_size, unit="img", unit_scale=True, dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10,
        )  # fmt: skip

    def advance(self) -> None:
        """Count one step."""
        self.bar.update(self.batch_size)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line, and its numbers to TensorBoard. The line is on the disk before a checkpoint of its step is."""
        with open(self.path, "ab") as file:
            file.write(json.dumps({"step": step, **values}).encode() + b"\n")
            file.flush()
            force_to_disk(file.fileno(), self.path.parent)
        self.bar.set_postfix_str("D {loss_d:.3f} G {loss_g:.3f}".format(**values), refresh=False)
        self.scalars(step, values)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Write numbers to TensorBoard alone."""
        if self.tensorboard:
            for name, value in _flat(values):
                self.tensorboard.add_scalar(name, value, step)
            self.tensorboard.flush()

    def images(self, step: int, files: Mapping[str, Path]) -> None:
        """Add image files to TensorBoard."""
        if self.tensorboard:
            for name, file in files.items():
                with Image.open(file) as image:
                    self.tensorboard.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
            self.tensorboard.flush()

    def close(self) -> None:
        """End the progress bar and the event file."""
        self.bar.close()
        if self.tensorboard:
            with suppress(OSError):  # everything is flushed, or flush has raised this error already
                self.tensorboard.close()


def _step(line: bytes) -> float:
    """The step of a line; infinity if it is not the trainer's, or was cut off when the run was killed."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, OverflowError):
        return math.inf


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def _open_tensorboard(folder: Path, step: int) -> SummaryWriter | None:
    try:
        from torch.utils.tensorboard import SummaryWriter  # imported here, because it is optional
    except ImportError:
        print("without TensorBoard: pip install tensorboard, or give --no-tensorboard", file=sys.stderr)
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


@contextmanager
def one_report() -> Iterator[None]:
    """Do not print errors of TensorBoard's thread, since `flush` raises them as well."""
    before = threading.excepthook

    def report(error: threading.ExceptHookArgs) -> None:
        if type(error.thread).__module__ != "tensorboard.summary.writer.event_file_writer":
            before(error)

    threading.excepthook = report
    try:
        yield
    finally:
        threading.excepthook = before


class Means:
    """The mean losses since they were last read. They stay on the device until then.

    `losses` (n, 2) are those read, averaged over processes. A checkpoint between two lines of the log contains them, so
    that the next line is the mean over all steps since the last line, also after a resume.
    """

    def __init__(self, networks: Mapping[str, nn.Module], ranks: Ranks) -> None:
        self.networks, self.ranks = networks, ranks
        self.losses = torch.empty(0, 2)
        self.on_device: list[Tensor] = []
        self.seen = "nothing"
        self.restart()

    def restart(self) -> None:
        """Start the clock again, so that saving and drawing do not count as training."""
        self.since, self.steps = time.monotonic(), 0

    def add(self, losses: Tensor) -> None:
        """Losses (2,), of D and of G, of one step."""
        self.on_device.append(losses)
        self.steps += 1

    def check(self, step: int) -> Tensor:
        """The mean losses (2,) since the last reading. If they are not finite, the run ends here, before a save."""
        if self.on_device:
            self.losses = torch.cat([self.losses, self.ranks.mean(torch.stack(self.on_device)).cpu()])
            self.on_device.clear()
        means = self.losses.mean(0)
        loss_d, loss_g = means.tolist()
        seen, sound = f"loss of D {loss_d:g}, of G {loss_g:g}", math.isfinite(loss_d) and math.isfinite(loss_g)
        for name, network in self.networks.items():
            finite = torch.stack([weight.isfinite().all() for weight in network.parameters()]).tolist()
            if not all(finite):
                seen, sound = f"{seen}, {finite.count(False)} of {name}'s {len(finite)} weight tensors", False
        if not sound:
            fail(
                f"step {step}: the training is no longer finite: {seen}. Previously: {self.seen}. The last checkpoint "
                "is older; lower learning rates may help"
            )
        self.seen = f"step {step}, {seen}"
        return means

    def read(self, step: int, batch_size: int) -> dict[str, float]:
        """The numbers of a log line; the next means start here."""
        loss_d, loss_g = self.check(step).tolist()
        rate = self.steps * batch_size / (time.monotonic() - self.since)
        self.losses = torch.empty(0, 2)
        self.restart()
        return {"loss_d": loss_d, "loss_g": loss_g, "images_per_second": round(rate, 1)}
