"""Write a run of the trainer as one page: its settings, curves of its log, and its images over time.

    python examples/report.py runs/faces          # writes runs/faces/summary.html

The page is one file without scripts, with curves as SVG and images inside it, so that it can be sent or archived. It
links to the attention explorer, if the run has written one, which stays a file of its own. The script also works while
the run continues, with the files that exist.
"""

from __future__ import annotations

import training.threads  # noqa: F401  before torch  # isort: skip

import base64
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from evaluation.evaluator import REAL
from training.flags import Config
from training.output.image_io import row_names
from training.runs.atomic_files import write_text
from training.script import Parser, fail, flag, given_path, script

Item = TypeVar("Item")
Points = list[tuple[float, float]]  # (step, value)

TITLES = {"loss": "losses", "gamma": "gammas of the attention layers", "images_per_second": "speed"}
UNITS = {"losses": "loss", "gammas of the attention layers": "gamma", "speed": "images per second"}
OF_REAL_IMAGES = " of real images"  # ends the name of a line that is as good as a score gets
COLORS = ("#3b78c8", "#d0603f", "#3f9a62", "#9468bd", "#b98a1f", "#4aa3a8", "#c4588f", "#808080")
WIDTH, HEIGHT = 400, 230  # of a chart; nearly the width of a phone, so that its numbers stay legible
LEFT, RIGHT, ABOVE, BELOW = 58, 20, 26, 40  # margins around its curves
PLAIN = (str, bool, int, float)  # the types of settings
MOST = 12  # at most so many images of a kind: first, last, and evenly spaced ones between
MOST_NESTED = 3  # levels of tables in a line of the log, of which the trainer's has one
MOST_STEPS = 2**53  # up to this number integers are exact as floats
LARGEST = 1e300  # the largest value that is drawn: sums and differences of such values are finite

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 1.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; } dl { margin: 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; } h3 { font-size: 1rem; margin: .5rem 0 0; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 210px), 1fr)); gap: .2rem 1.5rem; }
dl div { display: flex; justify-content: space-between; gap: 1rem; border-bottom: 1px solid #8884; }
dt { white-space: nowrap; } dd { margin: 0; font-weight: 600; text-align: right; overflow-wrap: anywhere; }
summary { margin: .5rem 0; cursor: pointer; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 1rem 1.5rem; }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr)); gap: 1rem; }
.images > :first-child { grid-column: 1 / -1; }
figure { margin: 0; } figcaption { font-size: .85rem; } .key { margin-right: 1em; display: inline-block; }
svg { display: block; width: 100%; height: auto; } svg text { font-size: 12px; fill: currentColor; }
img { display: block; max-width: 100%; height: auto; }
"""


# ------------------------------------------------------------------------------------------------------------ reading


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, oldest first, without invalid ones, such as a line that was cut off by a kill."""
    lines = []
    for text in path.read_bytes().splitlines() if path.is_file() else []:  # reading a FIFO would wait for its writer
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int) and abs(line["step"]) < MOST_STEPS:
            lines.append(line)
    return lines


def curves(lines: Iterable[Mapping[str, Any]]) -> dict[str, Points]:
    """Every number of the log by its name; nested ones are called `gamma/G.attention.16`."""
    found: dict[str, Points] = {}

    def add(step: int, values: Mapping[str, Any], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, Mapping):
                if prefix.count("/") < MOST_NESTED:
                    add(step, value, f"{prefix}{name}/")
            elif isinstance(value, (int, float)) and abs(value) < LARGEST:  # nan is not
                found.setdefault(prefix + name, []).append((step, value))

    for line in lines:
        add(line["step"], {name: value for name, value in line.items() if name not in ("step", "images")}, "")
    return found


def charts(found: Mapping[str, Points]) -> dict[str, dict[str, Points]]:
    """Curves that share a chart, under its title. Each score has a scale, and so a chart, of its own, with that of real
    images."""
    grouped: dict[str, dict[str, Points]] = {}
    for name, points in found.items():
        table, _, entry = name.rpartition("/")
        if name.startswith("loss_"):
            kind, short = "loss", name.removeprefix("loss_").upper()
        elif table and table != "scores":
            kind, short = table, entry
        elif table and (score := name.removesuffix(REAL)) != name and score in found:
            kind, short = score, entry.removesuffix(REAL) + OF_REAL_IMAGES
        else:
            kind, short = name, entry
        grouped.setdefault(TITLES.get(kind, kind.replace("_", " ").replace("/", ", ")), {})[short] = points
    return grouped


def varies(points: Points) -> bool:
    """Whether a curve differs visibly from a horizontal line."""
    low, high = min(value for _, value in points), max(value for _, value in points)
    return high - low > 1e-9 * max(abs(low), abs(high), 1e-6)


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of the items: the first, the last, and evenly spaced ones between."""
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


def chart(lines: Mapping[str, Points], unit: str) -> str:
    """Curves over steps as SVG; at least one of them varies."""
    points = [point for line in lines.values() for point in line]
    first, last = min(step for step, _ in points), max(step for step, _ in points)
    last = max(last, first + 1)  # a single step gets some width, too
    low, high = min(value for _, value in points), max(value for _, value in points)
    margin = 0.05 * (high - low)
    low, high = low - margin, high + margin

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BELOW - (value - low) / (high - low) * (HEIGHT - BELOW - ABOVE)

    parts = [f'<text x="{LEFT}" y="14">{escape(unit)}</text>']
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">step</text>')
    for value in ticks(low, high):
        parts.append(f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}" stroke="currentColor" opacity=".15"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for step in ticks(first, last, 4):
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 23}" text-anchor="middle">{step:.6g}</text>')
    for i, (name, points) in enumerate(lines.items()):
        color = COLORS[i % len(COLORS)]
        if name.endswith(OF_REAL_IMAGES):  # the same at every step, so a line from edge to edge
            across = f"M{LEFT} {y(points[-1][1]):.1f}H{WIDTH - RIGHT}"
            parts.append(f'<path d="{across}" stroke="{color}" stroke-width="1.6" stroke-dasharray="6 4"/>')
            continue
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        if len(points) <= 20:  # makes few points, or a single one, visible
            parts += [f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="2.5" fill="{color}"/>' for s, v in points]
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(unit)}">{"".join(parts)}</svg>'


def figure(title: str, lines: Mapping[str, Points]) -> str:
    """A chart with its title, and the last value of each curve."""
    keys = " ".join(
        f'<span class="key"><span style="color:{COLORS[i % len(COLORS)]}">■</span> '
        f"{escape(name)} {points[-1][1]:.4g}</span>"
        for i, (name, points) in enumerate(lines.items())
    )
    drawn = chart(lines, UNITS.get(title, title.removeprefix("scores, ")))
    return f"<figure><h3>{escape(title)}</h3>{drawn}<figcaption>{keys}</figcaption></figure>"


def image(path: Path) -> str:
    """A PNG inside the page, never larger than it is: enlarged or shrunk pixel by pixel, its grid would lose lines."""
    content = base64.b64encode(path.read_bytes()).decode()
    step = path.stem.rpartition("-")[2]
    caption = f"step {int(step):,}" if step.isdecimal() else path.stem
    if rows := row_names(path):
        caption += f"; rows: {', '.join(rows)}"
    shown = f'<img src="data:image/png;base64,{content}" alt="{escape(path.name)}">'
    return f"<figure>{shown}<figcaption>{escape(caption)}</figcaption></figure>"


def settings(path: Path) -> str:
    """The settings of a run: the data and all that differ from the default; the others unfold on a click."""
    try:
        config = json.loads(path.read_bytes() if path.is_file() else "null")
        given = {name: value if isinstance(value, PLAIN) else "…" for name, value in config.items() if name != "out"}
    except (OSError, ValueError, AttributeError, RecursionError):  # missing, or cut off by a kill
        return "<p>No config.json yet.</p>"
    defaults = asdict(Config())
    changed = {name: value for name, value in given.items() if name == "data" or value != defaults.get(name)}

    def listed(values: Mapping[str, Any]) -> str:
        shown = {True: "yes", False: "no", "": "–"}
        return "".join(
            f"<div><dt>{escape(flag(name))}</dt>"
            f"<dd>{escape(str(shown.get(value, value) if isinstance(value, (bool, str)) else value))}</dd></div>"
            for name, value in values.items()
        )

    return f"<dl>{listed(changed)}</dl><details><summary>All settings</summary><dl>{listed(given)}</dl></details>"


def page(folder: Path, beside: Path | None = None) -> str:
    """The page of a run's folder, HTML, for a file in the folder `beside`, or else in the run's own.

    Raises:
        ValueError: where the folder holds neither a log nor images.
    """
    lines = read_log(folder / "log.jsonl")
    samples, overlays = (
        sorted((path for path in folder.glob(f"{kind}-*.png") if path.is_file()), reverse=True)
        for kind in ("samples", "attention")
    )
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
    parts.append("<h2>settings</h2>" + settings(folder / "config.json"))

    found = charts(curves(lines))
    drawn = {title: group for title, group in found.items() if any(map(varies, group.values()))}
    constant = {curve: points for title in found.keys() - drawn.keys() for curve, points in found[title].items()}
    parts.append("<h2>curves</h2>" if found else "<p>No line in the log yet.</p>")
    parts.append(f'<div class="charts">{"".join(figure(title, group) for title, group in drawn.items())}</div>')
    if constant:
        values = ", ".join(f"{escape(curve)} {points[-1][1]:.4g}" for curve, points in sorted(constant.items()))
        parts.append(f"<p>The same at every step: {values}.</p>")

    link = ""
    if pages := sorted(folder.glob("attention-*.html")):
        address = quote(Path(os.path.relpath(pages[-1], beside or folder)).as_posix())
        link = f'<p><a href="{address}">Explore what every position attends to</a></p>'
    for title, above, paths in (("samples", "", samples), ("what the last attention layer attends to", link, overlays)):
        shown = "".join(image(path) for path in spread(paths, MOST))
        parts.append(
            f"<h2>{title}</h2>{above}" + (f'<div class="images">{shown}</div>' if shown else "<p>None yet.</p>")
        )
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{STYLE}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{"".join(parts)}\n</body></html>\n'


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description="Write a run of the trainer as one page: settings, curves, images.")
    parser.add_argument("folder", type=given_path, help="the run's folder, which was the trainer's --out")
    parser.add_argument("--out", type=given_path, help="the page (default: summary.html in that folder)")
    given = parser.parse_args(arguments)
    out = given.out or given.folder / "summary.html"
    try:
        content = page(given.folder, out.parent)
    except (ValueError, OSError) as error:
        fail(error)
    write_text(out, content)  # in which a name need not be UTF-8
    print(out)
    return 0


if __name__ == "__main__":
    script(main)
