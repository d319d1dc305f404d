"""Rows of results as a table on the terminal, and as a chart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.runs.atomic_files import write


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


def draw_growth(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and memory of a training pass against the size of the feature map, on logarithmic axes."""
    from matplotlib import pyplot as plt

    rows = [row for row in rows if row["B"] == 1 and row["C"] == 64]
    sizes = [math.isqrt(row["N"]) for row in rows]
    gray = "#8a8a8a"  # readable on white and on black
    style = {"svg.fonttype": "none", "legend.frameon": False, "text.color": gray, "axes.edgecolor": gray}
    style |= {"axes.labelcolor": gray, "xtick.color": gray, "ytick.color": gray}
    lines = {  # name: label, color
        "plain": ("plain equation", "#c2703d"),
        "padded": ("PyTorch's SDPA, padded", gray),
        "ours": ("SelfAttention2d", "#5b8fd0"),
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        for axis, unit, title in zip(axes, ("ms", "MiB"), ("time in ms", "extra peak memory in MiB"), strict=True):
            for name, (label, color) in lines.items():
                # Less than a mebibyte is the noise of the process.
                values = [max(row[f"{name} {unit}"], 1.0 if unit == "MiB" else 0.0) for row in rows]
                axis.loglog(sizes, values, "o-", label=label, color=color)
            axis.set_xticks(
                sizes, [f"{size}×{size}" for size in sizes], rotation=45, ha="right", rotation_mode="anchor"
            )
            axis.set_xticks([], minor=True)
            axis.set(title=title)
            axis.grid(alpha=0.3)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(lines))
        kind = path.suffix.removeprefix(".") or "svg"
        write(path, lambda file: figure.savefig(file, format=kind, dpi=110, transparent=True))
