"""What the explorer's page shows and does in Chromium: pixels of its canvas, pointer, touch, keys and links."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from chromium import Page
from explorer_page import CLOSE, YELLOW, covered, expected, peaked, ramp, shown
from torch_sagan import (
    AttentionRecord,
    explore_attention,
)

# --- what it shows ---------------------------------------------------------------------------------------------------


CASES = {
    "square": ((8, 8), (8, 8), (64, 64), 3),
    "pooled": ((8, 8), (4, 4), (64, 64), 3),
    "odd, pooled, wide": ((7, 17), (3, 8), (28, 68), 1),
    "high": ((9, 4), (9, 4), (36, 16), 1),
}


@pytest.fixture(
    params=[
        pytest.param(case, id=name, marks=[] if name in ("pooled", "odd, pooled, wide") else pytest.mark.exhaustive)
        for name, case in CASES.items()
    ]
)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Tensor, AttentionRecord, str]:
    """Two black images with two layers; the second image and the second layer are those to look at."""
    queries, keys, size, channels = request.param
    n_queries, n_keys = math.prod(queries), math.prod(keys)
    record = AttentionRecord(peaked(2, n_queries, n_keys), queries, keys)
    other = AttentionRecord(peaked(2, n_queries, n_keys), queries, keys)
    path = tmp_path / "page.html"
    explore_attention(-torch.ones(2, channels, *size), {"other": [other], "this": [record]}).save(path)
    return record.attention[1], record, path.as_uri() + "#image=1&layer=1&opacity=1&"


def test_a_link_shows_the_row_of_its_query(page: Page, case: tuple[Tensor, AttentionRecord, str]) -> None:
    weights, record, address = case
    rows, columns = record.query_size
    for row, column in ((0, 0), (rows - 1, columns - 1), (rows // 2, 1)):
        page.open(f"{address}query={row},{column}&mode=from")
        wanted = expected(weights[row * columns + column].view(record.key_size), weights.shape[1])
        torch.testing.assert_close(shown(page, *record.key_size, covered(record)), wanted, **CLOSE)
    if covered(record) != (1, 1):
        assert (shown(page, *record.query_size)[-1] - 0.1).abs().max() < 2 / 255  # no key there: the gray of black


def test_a_link_shows_the_column_of_its_key(page: Page, case: tuple[Tensor, AttentionRecord, str]) -> None:
    weights, record, address = case
    pool = record.query_size[0] // record.key_size[0]
    for row, column in ((0, 0), (pool * record.key_size[0] - 1, 1), (pool, pool * record.key_size[1] - 1)):
        page.open(f"{address}query={row},{column}&mode=to")
        key = row // pool * record.key_size[1] + column // pool
        wanted = expected(weights[:, key].view(record.query_size), weights.shape[1])
        # Rows have scales of their own: a byte of a sharply peaked row is coarser than the column's colors.
        torch.testing.assert_close(shown(page, *record.query_size), wanted, rtol=0, atol=10 / 255)


def test_a_sequence_is_a_strip(page: Page, tmp_path: Path) -> None:
    record = AttentionRecord(peaked(1, 13, 6), (13,), (6,))
    explore_attention(-torch.ones(1, 1, 16, 52), [record]).save(tmp_path / "page.html")
    page.open((tmp_path / "page.html").as_uri() + "#opacity=1&query=0,4&mode=from")
    wanted = expected(record.attention[0, 4].view(1, 6), 6)
    torch.testing.assert_close(shown(page, 1, 6, (1, 12 / 13)), wanted, **CLOSE)
    assert (shown(page, 1, 13)[0, -1] - 0.1).abs().max() < 2 / 255  # pooling has left it without a key


def test_a_position_without_a_key(page: Page, tmp_path: Path) -> None:
    record = AttentionRecord(peaked(1, 25, 4), (5, 5), (2, 2))
    explore_attention(-torch.ones(1, 1, 20, 20), [record]).save(tmp_path / "page.html")
    page.open((tmp_path / "page.html").as_uri() + "#query=4,0&mode=to")
    assert "has no key: pooling dropped it" in page.run("document.getElementById('description').textContent")
    assert (shown(page, 5, 5) - 0.1).abs().max() < 2 / 255


@pytest.mark.parametrize("mode", ["entropy", "distance"])
def test_maps_of_entropy_and_distance(page: Page, case: tuple[Tensor, AttentionRecord, str], mode: str) -> None:
    weights, record, address = case
    extent = [query * cover for query, cover in zip(record.query_size, covered(record), strict=True)]
    values = []
    for n, row in enumerate(weights.tolist()):
        position = (n // record.query_size[1] + 0.5, n % record.query_size[1] + 0.5)
        keys = itertools.product(*(range(size) for size in record.key_size))
        spots = [
            [(k + 0.5) * e / size for k, e, size in zip(key, extent, record.key_size, strict=True)] for key in keys
        ]
        distance = sum(w * math.dist(position, spot) for w, spot in zip(row, spots, strict=True))
        values.append(distance if mode == "distance" else -sum(w * math.log2(w) for w in row))
    page.open(f"{address}query=0,0&mode={mode}")
    lowest, highest = min(values), max(values)
    levels = (torch.tensor(values).view(record.query_size) - lowest) / (highest - lowest)
    torch.testing.assert_close(shown(page, *record.query_size), ramp(levels), rtol=0, atol=3 / 255)
    low, high = (float(page.run(f"document.getElementById('{end}').textContent")) for end in ("low", "high"))
    assert (low, high) == (pytest.approx(lowest, rel=6e-3), pytest.approx(highest, rel=6e-3))  # three digits


def test_opacity_mixes_the_map_with_the_image(page: Page, tmp_path: Path) -> None:
    explore_attention(torch.ones(1, 1, 32, 32), [torch.eye(16).unsqueeze(0)]).save(tmp_path / "page.html")
    for opacity in (0.0, 0.5, 1.0):
        page.open((tmp_path / "page.html").as_uri() + f"#query=2,1&opacity={opacity}")
        pixel = shown(page, 4, 4)[2, 1]
        torch.testing.assert_close(pixel, 0.65 + opacity * (YELLOW - 0.65), rtol=0, atol=2 / 255)


# --- what it does ----------------------------------------------------------------------------------------------------


def position(page: Page, canvas: str, row: float, column: float) -> tuple[float, float]:
    """Where on the screen a fraction of a canvas is."""
    x, y, width, height = page.run(
        f"(() => {{ const b = document.getElementById('{canvas}').getBoundingClientRect();"
        "return [b.x, b.y, b.width, b.height]; })()"
    )
    return x + column * width, y + row * height


def query_in_address(page: Page) -> dict[str, str]:
    """The view as the address has it, once it has been written."""
    address = page.run("new Promise((done) => setTimeout(() => done(location.hash), 400))")
    return dict(pair.split("=") for pair in address.lstrip("#").split("&"))


@pytest.fixture
def example(tmp_path: Path) -> tuple[Tensor, str]:
    attention = peaked(2, 64, 64)
    images = -torch.ones(2, 3, 64, 64)
    path = tmp_path / "page.html"
    explore_attention(images, {"a": [AttentionRecord(attention, (8, 8), (8, 8), torch.tensor([-0.125]))],
                               "b": [AttentionRecord(peaked(2, 16, 16), (4, 4), (4, 4))]}).save(path)  # fmt: skip
    return attention, path.as_uri() + "#opacity=1&query=0,0"


@pytest.mark.parametrize("canvas", ["image", "map"])
def test_the_map_follows_the_pointer(page: Page, example: tuple[Tensor, str], canvas: str) -> None:
    attention, address = example
    page.open(address)
    for row, column in ((0, 7), (5, 2), (7, 7)):
        page.mouse("mouseMoved", *position(page, canvas, (row + 0.5) / 8, (column + 0.5) / 8))
        page.next_frame()
        wanted = expected(attention[0, row * 8 + column].view(8, 8), 64)
        torch.testing.assert_close(shown(page, 8, 8), wanted, **CLOSE)
    assert query_in_address(page) == {"image": "0", "layer": "0", "query": "7,7", "mode": "from", "opacity": "1"}


def test_the_map_follows_in_the_frame_of_the_event(page: Page, example: tuple[Tensor, str]) -> None:
    """A callback that is scheduled behind the event, for the same frame, sees the new map."""
    page.open(example[1])
    same = page.run(
        """new Promise((done) => {
          const canvas = document.getElementById("map"), before = canvas.toDataURL();
          const box = canvas.getBoundingClientRect();
          const at = { clientX: box.x + box.width / 2, clientY: box.y + box.height / 2 };
          canvas.dispatchEvent(new PointerEvent("pointermove", at));
          requestAnimationFrame(() => done(canvas.toDataURL() === before));
        })"""
    )
    assert same is False


def test_keys_move_pin_and_release(page: Page, example: tuple[Tensor, str]) -> None:
    attention, address = example
    page.open(address)
    page.run("document.getElementById('view').focus()")
    for key in (
        "ArrowUp",
        "ArrowDown",
        "ArrowDown",
        "ArrowRight",
        "Enter",
        "ArrowLeft",
        "ArrowLeft",
        " ",
        "ArrowRight",
    ):
        page.press(key)
    torch.testing.assert_close(shown(page, 8, 8), expected(attention[0, 17].view(8, 8), 64), **CLOSE)
    assert query_in_address(page)["pins"] == "2,1;2,0"
    said = page.run("document.getElementById('spoken').textContent")
    peak = int(attention[0, 17].argmax())
    assert said.startswith(f"Row 2, column 1 of 8×8 attends most to row {peak // 8}, column {peak % 8}, with weight ")
    page.press("Enter")  # on the first pin again
    assert query_in_address(page)["pins"] == "2,0"
    page.press("Escape")
    assert "pins" not in query_in_address(page)


def test_clicks_pin_and_release(page: Page, example: tuple[Tensor, str]) -> None:
    page.open(example[1])
    for row, column in ((1, 1), (4, 6), (1, 1), (6, 3)):
        page.click(*position(page, "map", (row + 0.5) / 8, (column + 0.5) / 8))
    assert query_in_address(page)["pins"] == "4,6;6,3"
    borders = page.run("[...document.querySelectorAll('#pins canvas')].map((tile) => tile.style.borderColor)")
    assert len(borders) == 2
    assert len(set(borders)) == 2
    page.run("document.querySelector('#pins button').click()")
    assert query_in_address(page)["pins"] == "6,3"


def test_a_drag_across_moves_and_a_tap_pins(page: Page, example: tuple[Tensor, str]) -> None:
    attention, address = example
    page.size(390, 844, touch=True)
    page.open(address)
    page.touch("touchStart", position(page, "map", 3.5 / 8, 0.1))
    for column in (4, 6):
        page.touch("touchMove", position(page, "map", 3.5 / 8, (column + 0.5) / 8))
        page.next_frame()
        wanted = expected(attention[0, 3 * 8 + column].view(8, 8), 64)
        torch.testing.assert_close(shown(page, 8, 8), wanted, **CLOSE)
    page.touch("touchEnd")
    assert "pins" not in query_in_address(page)
    page.touch("touchStart", position(page, "map", 0.8, 0.2))
    page.touch("touchEnd")
    assert query_in_address(page)["pins"] == "6,1"
    assert page.run("document.documentElement.scrollWidth") == 390  # nothing is wider than the phone


def test_a_swipe_scrolls_the_page_and_leaves_the_position(page: Page, example: tuple[Tensor, str]) -> None:
    page.size(390, 700, touch=True)
    page.open(example[1])
    x, y = position(page, "map", 0.6, 0.6)
    assert y < 650
    page.touch("touchStart", (x, y))
    for moved in range(20, 201, 20):
        page.touch("touchMove", (x, y - moved))
        page.next_frame()
    page.touch("touchEnd")
    assert query_in_address(page) == {"image": "0", "layer": "0", "query": "0,0", "mode": "from", "opacity": "1"}
    assert page.run("scrollY") > 100


def test_controls_choose_image_layer_mode_and_opacity(page: Page, example: tuple[Tensor, str]) -> None:
    page.open(example[1])
    page.run("document.querySelectorAll('#images button')[1].click()")
    for name, value in (("layer", "1"), ("mode", "to"), ("opacity", "0.5")):
        page.run(
            f"""(() => {{ const control = document.getElementById("{name}"); control.value = "{value}";
            for (const kind of ["input", "change"]) control.dispatchEvent(new Event(kind)); }})()"""
        )
    assert query_in_address(page) == {"image": "1", "layer": "1", "query": "0,0", "mode": "to", "opacity": "0.5"}
    assert page.run("document.getElementById('layer').options[0].text") == "a (8×8, gamma -0.125)"
    assert page.run("document.querySelectorAll('#images button')[1].getAttribute('aria-pressed')") == "true"


def test_a_position_stays_when_the_layer_changes(page: Page, example: tuple[Tensor, str]) -> None:
    page.open(example[1].replace("query=0,0", "query=7,5"))
    positions = []
    for layer in ("1", "0"):
        page.run(f"document.getElementById('layer').value = '{layer}'")
        page.run("document.getElementById('layer').onchange({ target: document.getElementById('layer') })")
        positions.append(query_in_address(page)["query"])
    assert positions == ["3,2", "7,5"]


@pytest.mark.parametrize(
    "fragment", ["", "#image=9&layer=-1&query=8,0&mode=x&opacity=2&pins=1;2,x", "#%%", "#image=&query="]
)
def test_links_that_do_not_fit_are_passed_over(page: Page, example: tuple[Tensor, str], fragment: str) -> None:
    page.open(example[1].split("#")[0] + fragment)
    view = query_in_address(page)
    assert (view["image"], view["layer"], view["query"], view["mode"]) == ("0", "0", "4,4", "from")
    assert not page.complaints()


def test_nothing_is_asked_from_outside_and_nothing_complains(page: Page, example: tuple[Tensor, str]) -> None:
    page.open(example[1])
    for canvas, mode in itertools.product(("image", "map"), ("from", "to", "entropy", "distance")):
        page.run(f"document.getElementById('mode').value = '{mode}'")
        page.run("document.getElementById('mode').onchange({ target: document.getElementById('mode') })")
        page.click(*position(page, canvas, 0.4, 0.6))
    query_in_address(page)
    assert page.requests() == [example[1].split("#")[0]]
    assert page.complaints() == []


def test_names_cannot_end_the_script(page: Page, tmp_path: Path) -> None:
    name = '</script><img src=x onerror="document.title = 1"><!-- & \u2028 "γ"'
    record = AttentionRecord(peaked(1, 4, 4), (2, 2), (2, 2))
    explore_attention(torch.zeros(1, 1, 8, 8), {name: [record]}).save(tmp_path / "page.html")
    page.open((tmp_path / "page.html").as_uri())
    assert page.run("document.getElementById('layer').options[0].textContent").startswith(name)
    assert page.run("document.images.length") == 0
    assert page.complaints() == []


def test_a_notebook_shows_it_in_a_frame(page: Page, tmp_path: Path) -> None:
    """With quotes in its names, in a frame that neither sees the notebook nor is seen by it."""
    record = AttentionRecord(peaked(1, 4, 4), (2, 2), (2, 2))
    explorer = explore_attention(torch.zeros(1, 1, 8, 8), {'a"b&amp;': [record]})
    host = tmp_path / "notebook.html"
    host.write_text(f"<!DOCTYPE html><meta charset=utf-8><p>Out</p>{explorer._repr_html_()}", encoding="utf-8")
    page.open(host.as_uri())
    (frame,) = page.send("Page.getFrameTree")["frameTree"]["childFrames"]
    world = page.send("Page.createIsolatedWorld", frameId=frame["frame"]["id"])["executionContextId"]
    for expression, value in (
        ("document.getElementById('layer').options[0].text", 'a"b&amp; (2×2)'),
        ("document.getElementById('description').textContent.split(' attends')[0]", "Row 1, column 1 of 2×2"),
        ("origin", "null"),
    ):
        answer = page.send("Runtime.evaluate", expression=expression, contextId=world, returnByValue=True)
        assert answer["result"]["value"] == value
    page.run("new Promise((done) => setTimeout(done, 400))")  # until the address would be written
    assert page.complaints() == []


@pytest.mark.parametrize("dark", [False, True], ids=["light system", "dark system"])
def test_a_page_around_it_chooses_its_colors(page: Page, tmp_path: Path, dark: bool) -> None:
    """By a message; without one, and for any other theme, they are the system's. Other windows have no say."""
    explore_attention(torch.zeros(1, 1, 8, 8), [peaked(1, 4, 4)]).save(tmp_path / "page.html")
    host = tmp_path / "host.html"
    host.write_text('<!DOCTYPE html><iframe src="page.html"></iframe>', encoding="utf-8")
    page.size(1280, 900, dark=dark)
    page.open(host.as_uri())
    (frame,) = page.send("Page.getFrameTree")["frameTree"]["childFrames"]
    world = page.send("Page.createIsolatedWorld", frameId=frame["frame"]["id"])["executionContextId"]

    def background() -> str:
        page.run("new Promise((done) => setTimeout(done, 100))")
        expression = "getComputedStyle(document.body).backgroundColor"
        answer = page.send("Runtime.evaluate", expression=expression, contextId=world, returnByValue=True)
        return answer["result"]["value"]

    light, black = "rgb(255, 255, 255)", "rgb(23, 23, 27)"
    system = black if dark else light
    assert background() == system
    for message, wanted in (("{ theme: 'dark' }", black), ("{ theme: 'light' }", light), ("{ theme: 'auto' }", system),
                            ("null", system), ("{ theme: 'url(x)' }", system)):  # fmt: skip
        page.run(f"frames[0].postMessage({message}, '*')")
        assert background() == wanted, message
    page.run("frames[0].postMessage({ theme: 'dark' }, '*')")
    page.send("Runtime.evaluate", expression="postMessage({ theme: 'light' }, '*')", contextId=world)
    assert background() == black
    assert page.complaints() == []
