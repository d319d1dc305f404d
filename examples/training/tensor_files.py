"""Files that `torch.save` has written, read without executing what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SAFE = "2.6"  # before, a file can make `weights_only=True` execute it all the same: CVE-2025-32434


def refuse_unsafe_torch() -> None:
    """SystemExit, with one line, where the installed PyTorch cannot read files safely."""
    if torch.__version__ < SAFE:
        raise SystemExit(
            f"torch {torch.__version__} can be made to execute a checkpoint that it reads (CVE-2025-32434): the "
            f"examples need {SAFE} or newer"
        )


def read(path: Path) -> Any:
    """The tensors and plain values in a file, on the CPU. Whatever a damaged or foreign file makes the reader raise."""
    refuse_unsafe_torch()
    return torch.load(path, map_location="cpu", weights_only=True)
