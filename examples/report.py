"""A run of the trainer on one page: curves of its log, and its images over time.

    python examples/report.py runs/faces          # writes runs/faces/summary.html

The page is one file without scripts: curves are SVG and images are inside it, so it can be sent or kept as it is. It
works while the run goes on, with whatever is there.
"""

from __future__ import annotations

import training.threads  # noqa: F401  before torch  # isort: skip

import base64
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from training.checkpointing import write
from training.command_line import Parser, script

Item = TypeVar("Item")
Points = list[tuple[float, float]]  # (step, value)

TITLES = {"loss": "losses", "gamma": "gammas of the attention layers", "images_per_second": "images per second"}
COLOURS = ("#3b6fb6", "#c8553d", "#3f8f5b", "#8a5fb0", "#b98a1f", "#4aa3a8", "#b84f86", "#6b6b6b")
WIDTH, HEIGHT = 560, 240  # of a chart, pixels
LEFT, RIGHT, ABOVE, BELOW = 58, 24, 10, 24  # what surrounds its curves
MOST = 12  # images of a kind: first, last, and evenly many between
MOST_STEPS = 2**53  # up to here a float is exact
LARGEST = 1e300  # of the values that are drawn: sums and differences of such values are finite

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 540px), 1fr)); gap: 0 1.5rem; }
figure { margin: 0; }
figcaption { font-size: .85rem; } .key { margin-right: 1em; white-space: nowrap; }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: currentColor; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 1rem; }
img { width: 100%; image-rendering: pixelated; }
"""


# ------------------------------------------------------------------------------------------------------------ reading


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, oldest first. What is not a line of a log is left out, such as one that a kill cut off."""
    lines = []
    for text in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int) and abs(line["step"]) < MOST_STEPS:
            lines.append(line)
    return lines


def curves(lines: Iterable[Mapping[str, Any]]) -> dict[str, Points]:
    """Every number of the log by its name, `gamma/G.attention.16` where it stands in a table of its own."""
    found: dict[str, Points] = {}

    def add(step: int, values: Mapping[str, Any], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, Mapping):
                add(step, value, f"{prefix}{name}/")
            elif isinstance(value, (int, float)) and abs(value) < LARGEST:  # nan is not
                found.setdefault(prefix + name, []).append((step, value))

    for line in lines:
        add(line["step"], {name: value for name, value in line.items() if name not in ("step", "images")}, "")
    return found


def charts(found: Mapping[str, Points]) -> dict[str, dict[str, Points]]:
    """Curves that share a chart, under its title. Each score has a scale, and so a chart, of its own."""
    grouped: dict[str, dict[str, Points]] = {}
    for name, points in found.items():
        table, _, entry = name.rpartition("/")
        if name.startswith("loss_"):
            kind, short = "loss", name.removeprefix("loss_").upper()
        elif table and table != "scores":
            kind, short = table, entry
        else:
            kind, short = name, entry
        grouped.setdefault(TITLES.get(kind, kind.replace("_", " ").replace("/", ", ")), {})[short] = points
    return grouped


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of the items: first and last, and evenly many between."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


# ------------------------------------------------------------------------------------------------------------ drawing


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from low to high, about so many: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart(lines: Mapping[str, Points]) -> str:
    """Curves over steps as SVG."""
    points = [point for line in lines.values() for point in line]
    first, last = min(step for step, _ in points), max(step for step, _ in points)
    last = max(last, first + 1)  # a single step gets room
    low, high = min(value for _, value in points), max(value for _, value in points)
    flat = high - low <= 1e-9 * max(abs(low), abs(high), 1e-6)  # to the eye; then rounding would move its ticks
    margin = 0.05 * max(abs(high), 2e-5) if flat else 0.05 * (high - low)
    low, high = low - margin, high + margin

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BELOW - (value - low) / (high - low) * (HEIGHT - BELOW - ABOVE)

    parts = []
    for value in ticks(low, high):
        parts.append(f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}" stroke="currentColor" opacity=".15"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for step in ticks(first, last):
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{step:.6g}</text>')
    for i, points in enumerate(lines.values()):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        if len(points) <= 20:  # few points are seen better, a single one at all
            parts += [f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="2.5" fill="{colour}"/>' for s, v in points]
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def figure(title: str, lines: Mapping[str, Points]) -> str:
    """A chart with its title, and the last value of each curve."""
    keys = " ".join(
        f'<span class="key"><span style="color:{COLOURS[i % len(COLOURS)]}">■</span> '
        f"{escape(name)} {points[-1][1]:.4g}</span>"
        for i, (name, points) in enumerate(lines.items())
    )
    return f"<figure><h2>{escape(title)}</h2>{chart(lines)}<figcaption>{keys}</figcaption></figure>"


def picture(path: Path) -> str:
    """A PNG inside the page."""
    content = base64.b64encode(path.read_bytes()).decode()
    step = path.stem.rpartition("-")[2]
    caption = f"step {int(step):,}" if step.isdecimal() else path.stem
    image = f'<img src="data:image/png;base64,{content}" alt="{escape(path.name)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def page(folder: Path) -> str:
    """The page of a run's folder, HTML.

    Raises:
        ValueError: where the folder holds neither a log nor images.
    """
    lines = read_log(folder / "log.jsonl")
    samples, overlays = (sorted(folder.glob(f"{kind}-*.png")) for kind in ("samples", "attention"))
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not (lines or samples or overlays):
        raise ValueError(f"{folder}: neither a log.jsonl nor images of a run of the trainer")
    name = escape(folder.resolve().name)
    parts = [f"<h1>{name}</h1>"]
    if lines:
        last = lines[-1]
        seen = f", {last['images']:,} images" if isinstance(last.get("images"), int) else ""
        parts.append(f"<p>at step {last['step']:,}{seen}</p>")
    drawn = "".join(figure(title, group) for title, group in charts(curves(lines)).items())
    parts.append(f'<div class="charts">{drawn}</div>' if drawn else "<p>No line in the log yet.</p>")
    for title, pictures in (("samples", samples), ("what the last attention layer attends to", overlays)):
        shown = "".join(picture(path) for path in spread(pictures, MOST))
        parts.append(f"<h2>{title}</h2>" + (f'<div class="pictures">{shown}</div>' if shown else "<p>None yet.</p>"))
    head = f'<meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{"".join(parts)}\n</body></html>\n'


def fail(message: object) -> NoReturn:
    """End with one line on stderr and a non-zero status."""
    raise SystemExit("report.py: " + " ".join(str(message).split()))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("report.py", description="Write a run of the trainer as one page: curves and images.")
    parser.add_argument("folder", type=Path, help="the run's folder, what was --out of the trainer")
    parser.add_argument("--out", type=Path, help="the page (default: summary.html in that folder)")
    given = parser.parse_args(arguments)
    out = given.out or given.folder / "summary.html"
    try:
        content = page(given.folder).encode(errors="backslashreplace")  # a name need not be UTF-8
    except (ValueError, OSError) as error:
        fail(error)
    write(out, lambda file: file.write(content))
    print(out)
    return 0


if __name__ == "__main__":
    script(main)
