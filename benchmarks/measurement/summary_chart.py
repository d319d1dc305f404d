"""The chart of a summary that a run wrote, beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training.runs.atomic_files import write_text
from training.script import fail


def draw(summary: Path, chart: Callable[[Any], str]) -> int:
    """Write the SVG that `chart` makes of a summary, and print its path."""
    path = summary.with_suffix(".svg")
    try:
        text = chart(json.loads(summary.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        fail(f"{summary}: it cannot be read as a summary ({error!r})")
    write_text(path, text)
    print(path)
    return 0
