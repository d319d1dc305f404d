"""Write checkpoints and keep the last few; find the newest one that can be read; keep earlier runs apart."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import torch_sagan
from training.runs.atomic_files import write
from training.runs.folder import CHECKPOINT, EXPLORER, FILES, IMAGE, NUMBERED
from training.runs.memory import out_of_memory
from training.runs.tensor_files import read

# What a checkpoint contains: state dicts and plain values, under the names that they have in `TrainingState`.
CONTENTS = {
    "generator": dict, "generator_optimizer": dict, "generator_scheduler": dict,
    "discriminator": dict, "discriminator_optimizer": dict, "discriminator_scheduler": dict,
    "average": dict,
    "step": int, "images": int, "losses": torch.Tensor, "best": dict, "scores": dict,
    "config": dict, "classes": dict, "versions": dict,
}  # fmt: skip


# Writing.


def save(state: dict[str, Any], path: Path) -> None:
    """Write one checkpoint. With infinite numbers it is none to go on from: the run ends, and older ones stay."""
    if broken := not_finite(state):
        raise SystemExit(
            f"cannot save {path}: the training is no longer finite: infinities or NaN in {broken}. The last checkpoint "
            "is older; lower learning rates may help"
        )
    write(path, lambda file: torch.save(state, file))


def save_and_rotate(state: dict[str, Any], out: Path, *, keep_last: int, keep_every: int) -> Path:
    """Write `checkpoint-<step>.pt`, point the link `checkpoint.pt` to it, and only then delete old checkpoints."""
    path = out / f"checkpoint-{state['step']:06d}.pt"
    save(state, path)
    with suppress(OSError):  # some disks have no links; --resume also takes the folder
        link = out / "checkpoint.pt.new"
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
        os.replace(link, out / "checkpoint.pt")
    for step, old in _numbered(out, CHECKPOINT)[:-keep_last]:
        if not (keep_every and step % keep_every == 0):
            with suppress(OSError):  # on shares of Windows, while a script reads it: the next save tries again
                old.unlink()
    return path


def archive_previous_run(out: Path, settings: dict[str, Any], *, after: int | None = None) -> Path | None:
    """Move the files of an earlier run into a new folder; with `after`, only those of later steps.

    What the run with these settings will make again is not kept: images that are newer than all checkpoints, and all
    of a run with the same settings that ended before its first checkpoint. Returns the new folder, or None if nothing
    was moved.
    """
    for unfinished in out.glob("*.new"):
        if FILES.fullmatch(unfinished.stem) and not unfinished.is_dir():
            unfinished.unlink()
    everything = sorted(path for path in out.iterdir() if FILES.fullmatch(path.name) or path.name == "tensorboard")
    later = {name: [path for step, path in _numbered(out, name) if step > (after or 0)] for name in NUMBERED}
    drawn = later[IMAGE] + later[EXPLORER]
    if after is not None:
        moved = later[CHECKPOINT] + (drawn if later[CHECKPOINT] else [])
        if moved:
            with suppress(SystemExit):  # if it is missing or cannot be read
                moved += [out / "best.pt"] if load(out / "best.pt")["step"] > after else []
    else:
        again = not any(path.suffix == ".pt" for path in everything) and _settings(out) == settings
        moved = [] if again else everything
    if not moved:
        for path in drawn:
            path.unlink()
        return None
    earlier = next(path for i in range(1, 10**6) if not (path := out / f"earlier-{i}").exists())
    earlier.mkdir()
    for path in moved:
        path.rename(earlier / path.name)
    return earlier


def _settings(out: Path) -> Any:
    with suppress(OSError, ValueError):
        return json.loads((out / "config.json").read_text(encoding="utf-8"))


# Reading.


def versions() -> dict[str, str]:
    """The versions that a checkpoint is made with."""
    torchs, ours = str(torch.__version__), torch_sagan.__version__
    return {"python": platform.python_version(), "torch": torchs, "torch_sagan": ours}


def load(path: Path) -> dict[str, Any]:
    """The state in a checkpoint file, or the newest that can be read in the folder of a run."""
    if path.is_dir():
        state = newest(path)
        if state is None:
            raise SystemExit(f"cannot resume from {path}: no checkpoint in this folder")
        return state
    if not path.exists():
        raise SystemExit(f"cannot resume from {path}: no such file")
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # torch.load does not verify the checksums that torch.save writes
                raise ValueError("damaged")
        state = read(path)
        foreign = [name for name, kind in CONTENTS.items() if not isinstance(state.get(name), kind)]
    except Exception as error:  # whatever a damaged or foreign file makes the reader raise
        if out_of_memory(error):  # the one before needs as much
            raise
        raise SystemExit(f"cannot resume from {path}: it cannot be read as a checkpoint") from None
    if foreign:
        raise SystemExit(f"cannot resume from {path}: it is not a checkpoint of this trainer ({', '.join(foreign)})")
    if broken := not_finite(state):  # as older versions saved it: Adam never moves a weight with an infinite moment
        raise SystemExit(f"cannot resume from {path}: infinities or NaN in {broken}")
    return dict(state)


def not_finite(tree: Any, path: str = "") -> str:
    """The path of the first tensor with an infinity or a NaN; empty if there is none."""
    if isinstance(tree, torch.Tensor):
        return "" if tree.isfinite().all() else path
    branches = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return next((found for name, branch in branches if (found := not_finite(branch, f"{path}.{name}".lstrip(".")))), "")


def newest(out: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or None without any; unreadable ones are reported."""
    found = checkpoints(out)
    for path in found:
        try:
            return load(path)
        except SystemExit as unreadable:
            print(f"{unreadable}; trying the one before", file=sys.stderr, flush=True)
    if found:
        raise SystemExit(f"cannot resume from {out}: none of its {len(found)} checkpoints can be read")
    return None


def checkpoints(out: Path) -> list[Path]:
    """The numbered checkpoints in a run's folder, the newest first."""
    return [path for _, path in reversed(_numbered(out, CHECKPOINT))]


def _numbered(out: Path, name: re.Pattern[str]) -> list[tuple[int, Path]]:
    """The steps and paths of the files in a folder whose names match, oldest first."""
    matches = ((name.fullmatch(path.name), path) for path in out.iterdir() if path.is_file())
    return sorted((int(match[1]), path) for match, path in matches if match)
