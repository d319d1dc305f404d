"""The chart of growing feature maps: values at their places on logarithmic axes; that of the docs from its numbers."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import benchmark
from measurement.growth_chart import LINES, PANEL, growth_chart

SVG = "{http://www.w3.org/2000/svg}"
IMAGES = Path(__file__).parents[2] / "docs" / "images"


def row(side: int, ms: float, mib: float | None, **other: int) -> dict[str, Any]:
    measured = {f"{line.name} ms": ms * (i + 1) for i, line in enumerate(LINES)}
    if mib is not None:
        measured |= {f"{line.name} MiB": mib for line in LINES}
    return {"B": 1, "C": 64, "N": side * side} | measured | other


def dots(svg: str, unit: str) -> dict[str, tuple[float, float]]:
    """By what they say of themselves, their places."""
    found = {}
    for circle in ElementTree.fromstring(svg).iter(f"{SVG}circle"):
        title = circle.find(f"{SVG}title")
        if title is not None and str(title.text).endswith(unit):
            found[str(title.text)] = (float(circle.attrib["cx"]), float(circle.attrib["cy"]))
    return found


def test_values_are_at_their_places() -> None:
    svg = growth_chart([row(8, 2, 0.25), row(16, 20, 10), row(64, 200, 1000), row(32, 7, 7, B=4), row(64, 7, 7, C=16)])
    times = dots(svg, " ms")
    assert len(times) == 9  # other batches and widths are other questions
    (x8, y2), (x16, y20), (x64, y200) = (
        times[f"plain equation, {n}×{n}: {2 * 10**i} ms"] for i, n in enumerate((8, 16, 64))
    )
    assert math.isclose((x16 - x8) * 2, x64 - x16, abs_tol=0.2)  # one doubling, and two
    assert math.isclose(y2 - y20, PANEL / 3, abs_tol=0.2)  # 1 to 1000 ms: a factor of ten is a third of the panel
    assert math.isclose(y20 - y200, PANEL / 3, abs_tol=0.2)
    memory = dots(svg, " MiB")
    assert {name.partition(": ")[2] for name in memory} == {"1 MiB", "10 MiB", "1e+03 MiB"}  # what is less is noise
    ticks = [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert ticks.count("1000") == 2
    assert ticks.count("64×64") == 2


def test_nothing_is_outside_of_the_picture() -> None:
    svg = growth_chart([row(8, 0.02, 1), row(128, 90_000, 16_000)])
    width, height = map(float, re.findall(r'viewBox="0 0 (\d+) (\d+)"', svg)[0])
    for x, y in (*dots(svg, " ms").values(), *dots(svg, " MiB").values()):
        assert 0 < x < width
        assert 0 < y < height


def test_without_memory_there_is_one_panel() -> None:
    """Where memory cannot be measured."""
    svg = growth_chart([row(8, 2, None), row(16, 20, None)])
    assert "time in ms" in svg
    assert "memory" not in svg


def test_the_chart_of_the_docs_is_drawn_from_its_numbers(tmp_path: Path) -> None:
    recorded = IMAGES / "attention-growth.json"
    (tmp_path / "copy.json").write_text(recorded.read_text(encoding="utf-8"), encoding="utf-8")
    benchmark.main(["--draw", str(tmp_path / "copy.json")])
    drawn = (tmp_path / "copy.svg").read_text(encoding="utf-8")
    assert drawn == recorded.with_suffix(".svg").read_text(encoding="utf-8")
