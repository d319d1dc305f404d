"""Rows of results as a table on the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def print_rows(rows: Sequence[dict[str, Any]], *, header: bool = True) -> None:
    """Print rows below their column names, with three digits of each number."""

    def cell(value: object) -> str:
        return (
            f"{value:.{max(0, 2 - int(math.log10(max(abs(value), 1))))}f}" if isinstance(value, float) else str(value)
        )

    columns = list(rows[0])
    widths = [max(len(name), *(len(cell(row.get(name, ""))) for row in rows)) for name in columns]
    if header:
        print("  ".join(name.rjust(width) for name, width in zip(columns, widths, strict=True)))
    for row in rows:
        print(
            "  ".join(cell(row.get(name, "")).rjust(width) for name, width in zip(columns, widths, strict=True)),
            flush=True,
        )
