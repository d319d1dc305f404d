"""What the files in a run's folder are called, how to tell such a folder, and what is beside it."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

# The names of the files that a run writes into its folder, besides the folder `tensorboard`. Files with other names are
# not the trainer's and are never touched.
CHECKPOINT = re.compile(r"checkpoint-(\d{6,})\.pt")
IMAGE = re.compile(r"(?:samples|attention)-(\d{6,})\.png")
EXPLORER = re.compile(r"attention-(\d{6,})\.html")
NUMBERED = (CHECKPOINT, IMAGE, EXPLORER)
FILES = re.compile(
    "|".join(name.pattern for name in NUMBERED) + r"|checkpoint\.pt|best\.pt|log\.jsonl|config\.json|reals\.png"
)


def shared_cache(run: Path) -> Path:
    """The folder for what runs share, beside the folder of a run."""
    return run.parent / "cache"


def holds_a_run(names: Collection[str]) -> bool:
    """Whether these are the names of what is in the folder of a run, of the trainer or of minimal.py.

    Also of a run that has just begun, or was moved into `earlier-1`. The images in the folder and below it are no data.
    """
    beside_settings = {"log.jsonl", "reals.png", "run.lock"}
    return (
        ("config.json" in names and not beside_settings.isdisjoint(names))
        or ("checkpoint.pt" in names and any(IMAGE.fullmatch(name) for name in names))
        or any(CHECKPOINT.fullmatch(name) for name in names)
    )
