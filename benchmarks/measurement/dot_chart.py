"""A chart of several arms and scores as SVG: a dot for each run, the median, and a line for real images."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

INK, DOT, REAL = "#777777", "#4c72b0", "#c2542f"  # all show on white and on black
WIDTH, LEFT, RIGHT, ROW, ABOVE, BELOW, KEY = 390, 92, 20, 26, 30, 30, 28  # a phone's width


class Panel(NamedTuple):
    """One score: its heading, the values of each arm's runs, that of real images, and how values are written."""

    heading: str
    runs: Mapping[str, Sequence[float]]
    real: float
    form: str


def dot_chart(panels: Sequence[Panel]) -> str:
    """One panel below the other, with the arms as rows."""
    parts = [
        f'<circle cx="{LEFT}" cy="12" r="5" fill="{DOT}" opacity=".7"/><text x="{LEFT + 12}" y="17">a run</text>',
        f'<path d="M{LEFT + 80} 4v16" stroke="{INK}" stroke-width="3"/><text x="{LEFT + 90}" y="17">median</text>',
        f'<path d="M{LEFT + 170} 4v16" stroke="{REAL}" stroke-width="2" stroke-dasharray="4 3"/>',
        f'<text x="{LEFT + 180}" y="17">real images</text>',
    ]
    top = KEY
    for panel in panels:
        parts += _panel(panel, top)
        top += _height(panel)
    size = f'width="{WIDTH}" height="{top}" viewBox="0 0 {WIDTH} {top}"'
    style = f'font-family="system-ui, sans-serif" font-size="13" fill="{INK}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"


def _height(panel: Panel) -> int:
    return ABOVE + ROW * len(panel.runs) + BELOW


def _panel(panel: Panel, top: int) -> list[str]:
    values = [panel.real, *(value for values in panel.runs.values() for value in values)]
    if not all(map(math.isfinite, values)):
        raise ValueError(f"expected finite values of {panel.heading}, got {values}")
    low, high = min(values), max(values)
    width = (high - low) or 1.0

    def x(value: float) -> float:
        return LEFT + 8 + (value - low) / width * (WIDTH - LEFT - RIGHT - 16)

    bottom = top + ABOVE + ROW * len(panel.runs)
    parts = [f'<text x="{LEFT}" y="{top + 20}" font-weight="600">{escape(panel.heading)}</text>']
    for value in (low, low + width / 2, high):
        parts.append(f'<path d="M{x(value):.1f} {bottom}v4" stroke="{INK}"/>')
        place = f'x="{x(value):.1f}" y="{bottom + 18}" text-anchor="middle" font-size="12"'
        parts.append(f"<text {place}>{value:{panel.form}}</text>")
    line = f"M{x(panel.real):.1f} {top + ABOVE}V{bottom}"
    parts.append(f'<path d="{line}" stroke="{REAL}" stroke-width="2" stroke-dasharray="4 3"/>')
    for row, (arm, runs) in enumerate(panel.runs.items()):
        y = top + ABOVE + ROW * (row + 0.5)
        name = escape(arm)
        parts.append(f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="{INK}" opacity=".3"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 5}" text-anchor="end">{name}</text>')
        for value in runs:
            dot = f'<circle cx="{x(value):.1f}" cy="{y}" r="5" fill="{DOT}" opacity=".7">'
            parts.append(f"{dot}<title>{name}: {value:{panel.form}}</title></circle>")
        median = x(statistics.median(runs))
        parts.append(f'<path d="M{median:.1f} {y - 9}v18" stroke="{INK}" stroke-width="3"/>')
    return parts
