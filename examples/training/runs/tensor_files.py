"""Read files of `torch.save` without executing code in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SAFE = "2.6"  # in older versions a file can execute code even with `weights_only=True`: CVE-2025-32434


def refuse_unsafe_torch() -> None:
    """End with one line if the installed PyTorch cannot read files safely."""
    if torch.__version__ < SAFE:
        raise SystemExit(
            f"torch {torch.__version__} can execute code in a checkpoint that it reads (CVE-2025-32434): the "
            f"examples need {SAFE} or newer"
        )


def read(path: Path) -> Any:
    """The tensors and plain values in a file, on the CPU. A damaged or foreign file can raise any error."""
    refuse_unsafe_torch()
    return torch.load(path, map_location="cpu", weights_only=True)
