"""Time and memory of a training pass against the size of the feature map, as SVG: two panels, one below the other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

INK = "#8a8a8a"  # shows on white and on black, as the colors below
WIDTH, LEFT, RIGHT, PANEL, ABOVE, BELOW, KEY = 390, 52, 14, 170, 26, 44, 64  # a phone's width


class Line(NamedTuple):
    """What is drawn of a row: the entry's first word, its name in the key, and its color."""

    name: str
    label: str
    color: str


LINES = (
    Line("plain", "plain equation", "#c2703d"),
    Line("padded", "PyTorch's SDPA, padded", INK),
    Line("ours", "SelfAttention2d", "#5b8fd0"),
)
PANELS = {"ms": "time in ms", "MiB": "extra peak memory in MiB"}
LEAST = {"ms": 0.0, "MiB": 1.0}  # less than a mebibyte is the noise of the process


def growth_chart(rows: Sequence[Mapping[str, Any]]) -> str:
    """Both axes are logarithmic. Of the rows, those of one image with 64 channels are drawn."""
    rows = [row for row in rows if row["B"] == 1 and row["C"] == 64]
    parts = []
    for i, line in enumerate(LINES):
        y = 14 + 20 * i
        parts.append(f'<path d="M{LEFT} {y - 4}h18" stroke="{line.color}" stroke-width="2"/>')
        parts.append(f'<circle cx="{LEFT + 9}" cy="{y - 4}" r="3.5" fill="{line.color}"/>')
        parts.append(f'<text x="{LEFT + 24}" y="{y}">{line.label}</text>')
    top = KEY
    for unit, title in PANELS.items():
        measured = [row for row in rows if all(f"{line.name} {unit}" in row for line in LINES)]
        if measured:
            parts += _panel(measured, unit, title, top)
            top += ABOVE + PANEL + BELOW
    size = f'width="{WIDTH}" height="{top}" viewBox="0 0 {WIDTH} {top}"'
    style = f'font-family="system-ui, sans-serif" font-size="13" fill="{INK}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"


def _panel(rows: Sequence[Mapping[str, Any]], unit: str, title: str, top: int) -> list[str]:
    values = {line: [max(float(row[f"{line.name} {unit}"]), LEAST[unit]) for row in rows] for line in LINES}
    every = [value for of_line in values.values() for value in of_line]
    low, high = math.floor(math.log10(min(every))), math.ceil(math.log10(max(every)))
    sides = [math.isqrt(row["N"]) for row in rows]
    bottom = top + ABOVE + PANEL

    def x(side: int) -> float:
        share = math.log(side / sides[0]) / math.log(sides[-1] / sides[0])
        return LEFT + 14 + share * (WIDTH - LEFT - RIGHT - 28)

    def y(value: float) -> float:
        return bottom - (math.log10(value) - low) / max(high - low, 1) * PANEL

    parts = [f'<text x="{LEFT}" y="{top + 17}" font-weight="600">{title}</text>']
    for power in range(low, high + 1):
        parts.append(f'<path d="M{LEFT} {y(10**power):.1f}H{WIDTH - RIGHT}" stroke="{INK}" opacity=".3"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(10**power) + 4:.1f}" text-anchor="end">{10**power:g}</text>')
    for side in sides:
        parts.append(f'<path d="M{x(side):.1f} {bottom - PANEL}V{bottom}" stroke="{INK}" opacity=".3"/>')
        turned = f"rotate(-35 {x(side):.1f} {bottom + 14})"
        place = f'x="{x(side):.1f}" y="{bottom + 14}" text-anchor="end" font-size="12" transform="{turned}"'
        parts.append(f"<text {place}>{side}×{side}</text>")
    for line, of_line in values.items():
        points = [(x(side), y(value)) for side, value in zip(sides, of_line, strict=True)]
        path = "L".join(f"{across:.1f} {down:.1f}" for across, down in points)
        parts.append(f'<path d="M{path}" stroke="{line.color}" stroke-width="2" fill="none"/>')
        for (across, down), side, value in zip(points, sides, of_line, strict=True):
            dot = f'<circle cx="{across:.1f}" cy="{down:.1f}" r="3.5" fill="{line.color}">'
            parts.append(f"{dot}<title>{line.label}, {side}×{side}: {value:.3g} {unit}</title></circle>")
    return parts
