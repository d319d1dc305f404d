"""The page of a run: all its numbers and images in one file, also for unfinished runs."""

from __future__ import annotations

import base64
import itertools
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

import report
from chromium import FOUND, chromium
from report import chart, charts, curves, page, read_log, spread, ticks, varies
from training.flags import Config
from training.output.image_io import save_grid


def line(step: int, **more: object) -> str:
    values = {"step": step, "images": 4 * step, "loss_d": 1.0 + step, "loss_g": 2.0, "images_per_second": 9.5}
    return json.dumps(values | {"gamma": {"G.attention.8": 0.1, "D.attention.8": -0.2}} | more) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "first <run>"
    run.mkdir()
    (run / "log.jsonl").write_text(line(10) + line(20, scores={"swd": 31.0}) + line(30) + '{"step": 40, "ima')
    for step in (20, 30):
        for kind in ("samples", "attention"):
            Image.new("RGB", (8, 8), (step, 0, 0)).save(run / f"{kind}-{step:06d}.png")
        (run / f"attention-{step:06d}.html").write_text("an explorer")
    config = Config(data="my <faces>", steps=30, lr_g=3e-4, cache=False, out="runs/first")
    (run / "config.json").write_text(json.dumps(asdict(config)))
    return run


class Outline(HTMLParser):
    """Tags that are open, the images' sources, the links, and the text of each kind of element."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.links: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attributes)["src"] or "")
        if tag == "a":
            self.links.append(dict(attributes)["href"] or "")
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None: ...

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        self.texts.append((self.open[-1] if self.open else "", data))


def read(html: str) -> Outline:
    outline = Outline()
    outline.feed(html)
    assert outline.open == []
    return outline


def test_the_page_contains_curves_and_images_and_needs_nothing_else(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "summary.html")
    html = (folder / "summary.html").read_text()
    outline = read(html)
    images = [folder / f"{kind}-{step:06d}.png" for kind in ("samples", "attention") for step in (30, 20)]
    embedded = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in outline.images]
    assert embedded == [path.read_bytes() for path in images]
    assert not re.search(r"src=\"(?!data:)|<script|url\(", html)
    assert outline.links == ["attention-000030.html"]
    for text in ("first <run>", "step 30, 120 images", "D 31", "G 2", "step 20"):
        assert text in outline.text, text


def test_the_settings_are_on_top(folder: Path) -> None:
    html = page(folder)
    outline = read(html)
    assert html.index("<h2>settings") < html.index("<h2>curves") < html.index("<h2>samples")
    names = [text for tag, text in outline.texts if tag == "dt"]
    values = [text for tag, text in outline.texts if tag == "dd"]
    changed = {"--data": "my <faces>", "--cache": "no", "--steps": "30", "--lr-g": "0.0003"}  # in the order of Config
    top = dict(zip(names[:4], values[:4], strict=True))
    assert top == changed
    listed = dict(zip(names[4:], values[4:], strict=True))
    assert set(listed) == {"--" + name.replace("_", "-") for name in asdict(Config()) if name != "out"}
    assert listed | changed == listed
    assert (listed["--batch-size"], listed["--cache-dir"], listed["--tensorboard"]) == ("64", "–", "yes")


@pytest.mark.parametrize("content", ["", "[1]", '{"steps": 3'])
def test_settings_that_cannot_be_read(content: str, folder: Path) -> None:
    (folder / "config.json").write_text(content)
    assert "No config.json yet." in read(page(folder)).text


def test_the_link_leads_to_the_explorer_from_wherever_the_page_is(folder: Path, tmp_path: Path) -> None:
    for out, link in (
        (tmp_path / "page.html", "first%20%3Crun%3E/attention-000030.html"),
        (tmp_path / "pages" / "x.html", "../first%20%3Crun%3E/attention-000030.html"),
    ):
        out.parent.mkdir(exist_ok=True)
        assert report.main([str(folder), "--out", str(out)]) == 0
        assert read(out.read_text()).links == [link]
    for explorer in folder.glob("*.html"):
        explorer.unlink()
    assert read(page(folder)).links == []


def test_what_never_changes_is_a_sentence_and_no_chart(folder: Path) -> None:
    """Losses vary; gammas and speed do not, and there is one score."""
    outline = read(html := page(folder))
    assert html.count("<svg") == 1
    assert [text for tag, text in outline.texts if tag == "h3"] == ["losses"]
    told = "The same at every step: D.attention.8 -0.2, G.attention.8 0.1, images_per_second 9.5, swd 31."
    assert told in outline.text
    (folder / "log.jsonl").write_text(line(10, lr_g=1e-3) + line(20, lr_g=1e-4, loss_d=11.0))
    outline = read(page(folder))
    assert [text for tag, text in outline.texts if tag == "h3"] == ["lr g"]
    assert "D 11, D.attention.8 -0.2, G 2" in outline.text


def test_axes_are_labeled(folder: Path) -> None:
    (folder / "log.jsonl").write_text(line(10, scores={"swd": 3}) + line(20, scores={"swd": 2}, images_per_second=8))
    drawn = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page(folder))]
    labels = [[text.text for text in svg.iter("text")] for svg in drawn]
    assert [texts[:2] for texts in labels] == [["loss", "step"], ["images per second", "step"], ["swd", "step"]]
    for svg in drawn:
        for text in svg.iter("text"):
            assert 0 < float(text.get("x")) < report.WIDTH
            assert 11 < float(text.get("y")) < report.HEIGHT


def test_on_a_phone_nothing_is_wider_than_the_screen_and_images_are_not_resampled_by_pixels(
    folder: Path, tmp_path: Path
) -> None:
    if FOUND is None:
        pytest.skip("no Chromium: none of chromium, chromium-browser, google-chrome is on the path")
    for kind, width in (("samples", 1042), ("attention", 972)):  # of 64 pixels: 8 tiles of 128, 5 of 192
        for step in (20, 30):
            Image.new("RGB", (width, width)).save(folder / f"{kind}-{step:06d}.png")
    (tmp_path / "page.html").write_text(page(folder))
    with chromium() as tab:
        for width in (390, 1280):
            tab.size(width, 900, touch=width == 390)
            tab.open((tmp_path / "page.html").as_uri())
            assert tab.run("document.documentElement.scrollWidth") == tab.run("document.documentElement.clientWidth")
            assert tab.run("innerWidth") == width  # without a viewport it would be 980 on a phone
            shown = tab.run("[...document.images].map((i) => [i.width, i.height, getComputedStyle(i).imageRendering])")
            assert {rendering for *_, rendering in shown} == {"auto"}
            assert all(width == height for width, height, _ in shown)
            if width == 1280:
                assert [w for w, *_ in shown[::2]] == [1042, 972]  # the last ones as they are
            letters = tab.run(
                "(([svg]) => 12 * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width)"
                "(document.getElementsByTagName('svg'))"
            )
            assert letters > 10  # pixels: readable
            assert tab.complaints() == []


def test_what_is_not_a_line_of_the_log_is_left_out(folder: Path) -> None:
    with open(folder / "log.jsonl", "ab") as file:
        file.write(b"\nnull\n[1]\n\xff\xfe\n" + line(10**20).encode())
    assert [entry["step"] for entry in read_log(folder / "log.jsonl")] == [10, 20, 30]


def test_curves_have_every_number_at_its_step() -> None:
    found = curves(json.loads(text) for text in (line(1), line(2, scores={"swd": 3}), line(5, loss_d=float("nan"))))
    assert found["loss_d"] == [(1, 2.0), (2, 3.0)]  # a loss that is no number cannot be drawn
    assert found["scores/swd"] == [(2, 3)]
    assert found["gamma/G.attention.8"] == [(1, 0.1), (2, 0.1), (5, 0.1)]
    assert not {"step", "images"} & set(found)
    shown = charts(found | {"scores/fid": [(2, 9)], "sigma_G/a": [(2, 1)], "sigma_G/b": [(2, 2)]})
    assert {title: list(lines) for title, lines in shown.items()} == {
        "losses": ["D", "G"],
        "speed": ["images_per_second"],
        "gammas of the attention layers": ["G.attention.8", "D.attention.8"],
        "scores, swd": ["swd"],
        "scores, fid": ["fid"],
        "sigma G": ["a", "b"],
    }


def test_a_chart_puts_points_where_they_belong() -> None:
    svg = ElementTree.fromstring(chart({"a": [(0, 0.0), (50, 10.0), (100, 5.0)], "b": [(100, 2.0)]}, "loss"))
    one, other = (
        [tuple(map(float, p.split(","))) for p in line.get("points").split()] for line in svg.iter("polyline")
    )
    (x0, y0), (x1, y1), (x2, y2) = one
    assert x0 < x1 < x2
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 < y2 < y0  # SVG counts downward
    assert (y0 - y2) / (y0 - y1) == pytest.approx(0.5, abs=0.01)
    assert other[0][0] == x2
    assert (y0 - other[0][1]) / (y0 - y1) == pytest.approx(0.2, abs=0.01)
    marks = {text.text: float(text.get("y")) for text in svg.iter("text") if text.get("text-anchor") == "end"}
    assert marks["10"] - 4 == pytest.approx(y1, abs=0.11)
    assert all(0 <= value <= report.HEIGHT for value in marks.values())


def test_a_score_is_drawn_beside_that_of_real_images(folder: Path) -> None:
    """A dashed line from edge to edge, at its value on the score's own scale."""
    scores = [{"classifier_distance": value, "classifier_distance_real": 2.0, "swd": 5.0 + value} for value in (10, 6)]
    (folder / "log.jsonl").write_text(line(10, scores=scores[0]) + line(20, scores=scores[1]))
    shown = charts(curves(read_log(folder / "log.jsonl")))
    assert list(shown["scores, classifier distance"]) == ["classifier_distance", "classifier_distance of real images"]
    assert list(shown["scores, swd"]) == ["swd"]
    html = page(folder)
    assert "classifier_distance of real images 2" in read(html).text
    (svg,) = (ElementTree.fromstring(svg) for svg in re.findall(r'<svg[^>]*"classifier distance".*?</svg>', html))
    (curve,) = svg.iter("polyline")
    (x0, y0), (x1, y1) = (tuple(map(float, point.split(","))) for point in curve.get("points").split())
    (dashed,) = (path.get("d") for path in svg.iter("path") if path.get("stroke-dasharray"))
    left, height, right = map(float, re.fullmatch(r"M([\d.]+) ([\d.]+)H([\d.]+)", dashed).groups())
    assert (left, right) == (x0, x1)
    assert height - y0 == pytest.approx(2 * (y1 - y0), abs=0.2)  # from 10 by 4 to 6, by 8 to 2
    # A single evaluation is no curve, and its values are told apart.
    (folder / "log.jsonl").write_text(line(10, scores={"swd": 3, "swd_real": 1}) + line(20))
    assert "swd 3, swd of real images 1." in read(page(folder)).text


def test_two_values_of_one_step_are_drawn() -> None:
    ElementTree.fromstring(chart({"a": [(5, 1.0), (5, 2.0)]}, "a"))


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0], False), ([0.0, 0.0], False), ([0.0, 1e-16], False), ([3.0, 3.0 + 1e-12], False), ([3.0, 3.0001], True),
     ([1e9, -1e-9], True), ([2.0, 1.0, 2.0], True)],
)  # fmt: skip
def test_what_varies(values: Sequence[float], expected: Any) -> None:
    points = list(enumerate(values))
    assert varies(points) is expected
    if expected:
        ElementTree.fromstring(chart({"a": points}, "a"))


ABSURD = [math.nan, math.inf, 1e308, -1e308, 10**400, 9e299, -9e299, 5e-324, 1e-310, 1.0, 1 + 2**-52, 1e16, 1e16 + 2]


@pytest.mark.parametrize("values", [*itertools.combinations(ABSURD, 1), *itertools.combinations(ABSURD, 2)])
def test_absurd_numbers_are_drawn_or_left_out(values: Sequence[float], tmp_path: Path) -> None:
    text = "".join(line(step, loss_d=value) for step, value in zip((2**53 - 1, 0), values, strict=False))
    (tmp_path / "log.jsonl").write_text(text)
    html = page(tmp_path)
    assert read(html).open == []
    drawn = map(ElementTree.fromstring, re.findall(r"<svg.*?</svg>", html))
    for curve in (curve for svg in drawn for curve in svg.iter("polyline")):
        for point in curve.get("points").split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= report.WIDTH
            assert 0 <= y <= report.HEIGHT


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (-0.1, 0.42, [0, 0.2, 0.4]), (989, 1011, [990, 995, 1000, 1005, 1010])],
)
def test_ticks_are_round(low: float, high: float, expected: Any) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_first_and_last_of_many_images() -> None:
    assert spread(range(5), 12) == [0, 1, 2, 3, 4]
    chosen = spread(range(100), 12)
    assert (len(chosen), chosen[0], chosen[-1]) == (12, 0, 99)
    assert {b - a for a, b in pairwise(chosen)} == {9}


def test_images_say_what_their_rows_are(folder: Path) -> None:
    save_grid(folder / "samples-000030.png", torch.zeros(4, 3, 8, 8), columns=2, rows=["cat <3", "猫"])
    text = read(page(folder)).text
    assert "step 30; rows: cat <3, 猫" in text
    assert "step 20" in text


@pytest.mark.parametrize("deep", ["[" * 100_000, '{"a":' * 900 + "1" + "}" * 900])
def test_nesting_ends_nothing(deep: str, folder: Path) -> None:
    """What is nested deeper than any run's numbers is left out, and the page has all else."""
    with open(folder / "log.jsonl", "a") as file:
        file.write(f'\n{{"step": 50, "loss_d": 3, "deep": {deep}}}\n{deep}\n')
    (folder / "config.json").write_text(f'{{"steps": 30, "deep": {deep}}}')
    assert report.main([str(folder)]) == 0
    text = (folder / "summary.html").read_text(encoding="utf-8")
    assert "losses" in read(text).text
    assert len(text) < 50_000


def test_what_is_no_file_is_left_out(folder: Path) -> None:
    """Whoever reads a FIFO waits for its writer, who may never come."""
    for name in ("log.jsonl", "config.json", "samples-000020.png"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    assert report.main([str(folder)]) == 0
    text = read((folder / "summary.html").read_text()).text
    assert "No line in the log yet." in text
    assert "No config.json yet." in text


def test_the_page_replaces_no_device(folder: Path) -> None:
    (folder / "summary.html").symlink_to("/dev/null")
    with pytest.raises(SystemExit, match=r"cannot save .*summary\.html: .*found a character device"):
        report.main([str(folder)])


@pytest.mark.parametrize(
    ("removed", "text"), [("*.png", "None yet."), ("log.jsonl", "No line in the log yet."), ("attention*", "None yet.")]
)
def test_partial_runs(removed: str, text: str, folder: Path) -> None:
    for path in folder.glob(removed):
        path.unlink()
    assert text in read(page(folder)).text


def test_errors_are_one_line(tmp_path: Path) -> None:
    for name, message in (("nowhere", "no such folder"), (".", "neither a log.jsonl nor images")):
        with pytest.raises(SystemExit, match=message) as error:
            report.main([str(tmp_path / name)])
        assert "\n" not in str(error.value)
    with pytest.raises(SystemExit, match=r"^report\.py: .*required: folder"):
        report.main([])
    assert not list(tmp_path.iterdir())
