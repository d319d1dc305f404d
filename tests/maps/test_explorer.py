"""``explore_attention``: what the page contains, and what it shows and does in Chromium."""

from __future__ import annotations

import base64
import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chromium import FOUND, Page, chromium
from networks.cyclegan import Generator
from torch_sagan import (
    AttentionRecord,
    SAGANGenerator,
    SelfAttention2d,
    explore_attention,
    insert_self_attention,
    record_attention,
)

VIOLET, ORANGE, YELLOW = torch.tensor([[0.45, 0.08, 0.43], [0.95, 0.45, 0.15], [0.99, 1.0, 0.75]])


def peaked(*shape: int) -> Tensor:
    return torch.randn(*shape).mul(2).softmax(2)


def contents(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def decoded(content: str, n_queries: int, n_keys: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Largest weights, entropies and distances (N,), and weights (N, M) of one stored map."""
    stored = torch.frombuffer(bytearray(base64.b64decode(content)), dtype=torch.uint8)
    peak, entropy, distance = stored[: 12 * n_queries].view(torch.float32).view(3, n_queries)
    shares = (stored[12 * n_queries :].view(n_queries, n_keys).float() / 255) ** 2
    return peak, entropy, distance, peak[:, None] * shares


# --- what the page holds ---------------------------------------------------------------------------------------------


def test_the_page_holds_the_weights() -> None:
    attention = peaked(2, 12, 6)
    attention[0, 0] = torch.tensor([1.0, 0, 0, 0, 0, 0])
    record = AttentionRecord(attention, (3, 4), (2, 3), torch.tensor([-0.25]))
    data = contents(explore_attention(torch.rand(2, 3, 24, 32) * 2 - 1, {"body.3": [record]}).page)
    assert data["size"] == [24, 32]
    (layer,) = data["layers"]
    assert (layer["name"], layer["gamma"], layer["queries"], layer["keys"]) == ("body.3", -0.25, [3, 4], [2, 3])
    for content, weights in zip(layer["maps"], attention, strict=True):
        peak, entropy, distance, stored = decoded(content, 12, 6)
        torch.testing.assert_close(peak, weights.amax(1), rtol=0, atol=0)
        # A byte is half a step of 1 / 255 off at most, and the square doubles that.
        assert ((stored - weights).abs() <= peak[:, None] / 255 * 1.01).all()
        for n, row in enumerate(weights.tolist()):
            assert entropy[n] == pytest.approx(sum(-w * math.log2(w) for w in row if w > 0), abs=1e-5)
            middles = [((k // 3 + 0.5) * 3 / 2, (k % 3 + 0.5) * 4 / 3) for k in range(6)]
            expected = sum(w * math.dist((n // 4 + 0.5, n % 4 + 0.5), at) for w, at in zip(row, middles, strict=True))
            assert distance[n] == pytest.approx(expected, abs=1e-5)


def test_distances_of_pooled_keys_are_to_where_they_were_pooled() -> None:
    """Five by five positions and two by two keys: those lie on the first four rows and columns."""
    attention = torch.eye(4)[torch.arange(25) % 4].unsqueeze(0)
    (layer,) = contents(
        explore_attention(torch.zeros(1, 1, 10, 10), [AttentionRecord(attention, (5, 5), (2, 2))]).page
    )["layers"]
    _, _, distance, _ = decoded(layer["maps"][0], 25, 4)
    for n in range(25):
        key = n % 4
        expected = math.dist((n // 5 + 0.5, n % 5 + 0.5), (2 * (key // 2) + 1, 2 * (key % 2) + 1))
        assert distance[n] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_page_holds_the_images(channels: int) -> None:
    images = torch.rand(2, channels, 4, 6) * 2.2 - 1.1  # a little outside of [-1, 1]
    data = contents(explore_attention(images, [peaked(2, 6, 6)]).page)
    for content, image in zip(data["images"], images, strict=True):
        stored = torch.tensor(list(base64.b64decode(content))).view(4, 6, 3).permute(2, 0, 1)
        expected = ((image + 1) / 2).clamp(0, 1).mul(255).expand(3, 4, 6)
        assert (stored - expected).abs().max() <= 0.501  # rounded


def test_sizes_are_derived_from_the_images() -> None:
    data = contents(explore_attention(torch.zeros(1, 3, 16, 64), [peaked(1, 16, 4), peaked(1, 64, 64)]).page)
    assert [(layer["queries"], layer["keys"]) for layer in data["layers"]] == [([2, 8], [1, 4]), ([4, 16], [4, 16])]


def test_every_call_of_a_layer_is_listed() -> None:
    layer = SelfAttention2d(4)
    model = nn.ModuleDict({"used": layer, "idle": SelfAttention2d(4)})
    with record_attention(model) as records:
        for gamma in (0.5, -0.5):
            nn.init.constant_(layer.gamma, gamma)
            layer(torch.randn(1, 4, 3, 3))
    data = contents(explore_attention(torch.zeros(1, 3, 9, 9), records).page)
    assert [(one["name"], one["gamma"]) for one in data["layers"]] == [("used, call 0", 0.5), ("used, call 1", -0.5)]


def test_sixteen_images_of_a_large_layer_are_under_24_megabytes() -> None:
    page = explore_attention(torch.zeros(16, 3, 64, 64), [torch.full((16, 1024, 1024), 1 / 1024)]).page
    assert len(page.encode()) < 24_000_000


def test_the_limit_and_the_way_out() -> None:
    images, maps = torch.zeros(4, 3, 32, 32), [peaked(4, 256, 256), peaked(4, 64, 64)]
    with pytest.raises(ValueError, match=r"give at most 2 of 4 images, fewer layers, or a larger max_bytes") as raised:
        explore_attention(images, maps, max_bytes=250_000)
    assert len(explore_attention(images[:2], [one[:2] for one in maps], max_bytes=250_000).page) <= 250_000
    said = int(re.findall(r"take ([\d,]+) bytes", str(raised.value))[0].replace(",", ""))
    size = len(explore_attention(images, maps, max_bytes=said).page.encode())
    assert said - 100 < size <= said  # commas and quotes between the parts are counted generously
    with pytest.raises(ValueError, match=r"give at most 0 of 4 images"):
        explore_attention(images, maps, max_bytes=1000)


def test_saving_replaces_the_whole_file_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    explorer = explore_attention(torch.zeros(1, 1, 8, 8), [peaked(1, 4, 4)])
    path = tmp_path / "page.html"
    path.write_text("before")
    explorer.save(str(path))
    assert path.read_text(encoding="utf-8") == explorer.page
    path.write_text("before")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        explorer.save(path)
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("images", "records", "message"),
    [
        (torch.zeros(1, 2, 8, 8), [peaked(1, 4, 4)], r"\(B, 3, H, W\).*1, 2, 8, 8"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [peaked(1, 4, 4)], r"floating point.*uint8"),
        (torch.zeros(0, 3, 8, 8), [torch.ones(0, 4, 4)], r"0 images and 1 attention map"),
        (torch.zeros(1, 3, 8, 8), [], r"1 images and 0 attention maps"),
        (torch.zeros(1, 3, 8, 8), {"idle": []}, r"1 images and 0 attention maps"),
        (torch.zeros(2, 3, 8, 8), {"a.b": [AttentionRecord(peaked(1, 4, 4), (2, 2), (2, 2))]}, r"a.b.*B = 2.*\(1, 4"),
        (torch.zeros(1, 3, 8, 8), [torch.ones(4, 4)], r"attention 0: expected.*\(4, 4\)"),
        (torch.zeros(1, 3, 8, 8), ["map"], r"attention 0: expected.*a str"),
        (torch.zeros(1, 3, 8, 8), [torch.full((1, 4, 4), math.nan)], r"attention 0.*finite"),
        (torch.zeros(1, 3, 8, 8), [torch.full((1, 4, 4), math.inf)], r"attention 0.*finite"),
        (torch.zeros(1, 3, 8, 8), [-peaked(1, 4, 4)], r"attention 0.*not negative"),
        (
            torch.zeros(1, 3, 8, 8),
            {"a": [AttentionRecord(peaked(1, 4, 4), (2, 2), (2, 2), torch.tensor([math.nan]))]},
            r"a: gamma must be finite, got nan",
        ),
        (torch.zeros(1, 3, 8, 8), [peaked(1, 5, 4)], r"5 positions are not a map"),
        (torch.zeros(1, 3, 8, 8), [AttentionRecord(peaked(1, 4, 4), (3, 2), (2, 2))], r"4 positions.*3×2"),
    ],
)
def test_errors(images: Tensor, records: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explore_attention(images, records)


@pytest.mark.parametrize("records", [peaked(1, 4, 4), AttentionRecord(peaked(1, 4, 4), (2, 2), (2, 2))])
def test_one_map_alone_is_not_a_list(records: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a list of attention maps.*got a (Tensor|AttentionRecord)"):
        explore_attention(torch.zeros(1, 3, 8, 8), records)


# --- what it shows ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    if FOUND is None:
        pytest.skip("no Chromium: none of chromium, chromium-browser, google-chrome is on the path")
    with chromium() as page:
        yield page


@pytest.fixture
def page(browser: Page) -> Page:
    browser.size(1280, 900)
    browser.mouse("mouseMoved", 1, 1)
    return browser


def shown(page: Page, rows: int, columns: int, covers: tuple[float, float] = (1, 1)) -> Tensor:
    """(rows, columns, 3) in [0, 1]: the middles of as many cells of the map's canvas, or of the covered part of it."""
    values = page.run(
        f"""(() => {{
          const canvas = document.getElementById("map"), [rows, columns] = [{rows}, {columns}];
          const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
          const middle = (i, n, size) => Math.floor((i + 0.5) / n * size);
          return Array.from({{ length: rows * columns }}, (_, i) => {{
            const y = middle(Math.floor(i / columns), rows, canvas.height * {covers[0]});
            const x = middle(i % columns, columns, canvas.width * {covers[1]});
            return [...pixels.slice(4 * (y * canvas.width + x), 4 * (y * canvas.width + x) + 3)];
          }});
        }})()"""
    )
    return torch.tensor(values, dtype=torch.float32).view(rows, columns, 3) / 255


def ramp(levels: Tensor) -> Tensor:
    low, high = (2 * levels).clamp(max=1), (2 * levels - 1).clamp(min=0)
    return VIOLET + low[..., None] * (ORANGE - VIOLET) + high[..., None] * (YELLOW - ORANGE)


def expected(weights: Tensor, n_keys: int, gray: float = 0.1) -> Tensor:
    """(h, w, 3) at full opacity over a plain image."""
    levels = (weights / max(float(weights.max()) / 2, 4 / n_keys)).clamp(max=1)
    return gray + levels[..., None] * (ramp(levels) - gray)


# Of a level, a byte loses at most 2 / 255, where the weight is that of the full level; colour ramp and opacity together
# change at most 1.5 times as fast as the level. Canvas and table round to bytes, half of one each.
CLOSE = {"rtol": 0, "atol": 5 / 255}

CASES = {
    "square": ((8, 8), (8, 8), (64, 64), 3),
    "pooled": ((8, 8), (4, 4), (64, 64), 3),
    "odd, pooled, wide": ((7, 17), (3, 8), (28, 68), 1),
    "high": ((9, 4), (9, 4), (36, 16), 1),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Tensor, AttentionRecord, str]:
    """Two black images with two layers; the second image and the second layer are those to look at."""
    queries, keys, size, channels = request.param
    n_queries, n_keys = math.prod(queries), math.prod(keys)
    record = AttentionRecord(peaked(2, n_queries, n_keys), queries, keys)
    other = AttentionRecord(peaked(2, n_queries, n_keys), queries, keys)
    path = tmp_path / "page.html"
    explore_attention(-torch.ones(2, channels, *size), {"other": [other], "this": [record]}).save(path)
    return record.attention[1], record, path.as_uri() + "#image=1&layer=1&opacity=1&"


def covered(record: AttentionRecord) -> tuple[float, float]:
    pool = record.query_size[0] // record.key_size[0]
    height, width = (key * pool / query for key, query in zip(record.key_size, record.query_size, strict=True))
    return height, width


def test_a_link_shows_the_row_of_its_query(page: Page, case: tuple[Tensor, AttentionRecord, str]) -> None:
    weights, record, address = case
    rows, columns = record.query_size
    for row, column in ((0, 0), (rows - 1, columns - 1), (rows // 2, 1)):
        page.open(f"{address}query={row},{column}&mode=from")
        wanted = expected(weights[row * columns + column].view(record.key_size), weights.shape[1])
        torch.testing.assert_close(shown(page, *record.key_size, covered(record)), wanted, **CLOSE)
    if covered(record) != (1, 1):
        assert (shown(page, *record.query_size)[-1] - 0.1).abs().max() < 2 / 255  # no key there: the grey of black


def test_a_link_shows_the_column_of_its_key(page: Page, case: tuple[Tensor, AttentionRecord, str]) -> None:
    weights, record, address = case
    pool = record.query_size[0] // record.key_size[0]
    for row, column in ((0, 0), (pool * record.key_size[0] - 1, 1), (pool, pool * record.key_size[1] - 1)):
        page.open(f"{address}query={row},{column}&mode=to")
        key = row // pool * record.key_size[1] + column // pool
        wanted = expected(weights[:, key].view(record.query_size), weights.shape[1])
        # Rows have scales of their own: a byte of a sharply peaked row is coarser than the column's colors.
        torch.testing.assert_close(shown(page, *record.query_size), wanted, rtol=0, atol=10 / 255)


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


def test_touch_moves_and_a_tap_pins(page: Page, example: tuple[Tensor, str]) -> None:
    attention, address = example
    page.size(390, 844, touch=True)
    page.open(address)
    page.touch("touchStart", position(page, "map", 0.3, 0.3))
    for row, column in ((3, 4), (6, 5)):
        page.touch("touchMove", position(page, "map", (row + 0.5) / 8, (column + 0.5) / 8))
        page.next_frame()
        wanted = expected(attention[0, row * 8 + column].view(8, 8), 64)
        torch.testing.assert_close(shown(page, 8, 8), wanted, **CLOSE)
    page.touch("touchEnd")
    assert "pins" not in query_in_address(page)
    page.touch("touchStart", position(page, "map", 0.8, 0.2))
    page.touch("touchEnd")
    assert query_in_address(page)["pins"] == "6,1"
    assert page.run("document.documentElement.scrollWidth") == 390  # nothing is wider than the phone


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


def official_with_sharp_maps(channels: int) -> nn.Module:
    layer = SelfAttention2d.official(channels)
    with torch.no_grad():
        layer.query.weight.mul_(5)
    return layer


def inserted_twice() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """An image-to-image network as in a CycleGAN, with layers put in, on images that are not square."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(),
                          nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Tanh())  # fmt: skip
    x = torch.randn(2, 3, 20, 28)
    return insert_self_attention(model, ["1", "3"], example_input=x, attention=official_with_sharp_maps), (x,)


def cyclegan(layers: list[str], *shape: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The examples' CycleGAN generator, which knows nothing of attention, with layers put in."""
    x = torch.randn(shape)
    return insert_self_attention(Generator(), layers, example_input=x, attention=official_with_sharp_maps), (x,)


NETWORKS = {
    "cyclegan": lambda: cyclegan(["model.9", "model.12", "model.15"], 2, 3, 32, 32),
    "cyclegan, one wide image, one layer": lambda: cyclegan(["model.12"], 1, 3, 24, 40),
    "dcgan": lambda: (SAGANGenerator(32, base_channels=4, attention=official_with_sharp_maps), (torch.randn(2, 128),)),
    "resnet": lambda: (
        SAGANGenerator(32, base_channels=4, architecture="resnet", num_classes=3, attention=official_with_sharp_maps),
        (torch.randn(2, 128), torch.tensor([0, 2])),
    ),
    "inserted": inserted_twice,
}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())
def test_networks(page: Page, tmp_path: Path, network: Any) -> None:
    model, inputs = network()
    with record_attention(model.eval()) as records, torch.no_grad():
        images = model(*inputs)
    explore_attention(images, records).save(tmp_path / "page.html")
    image = len(images) - 1
    gray = 0.1 + 0.55 * ((images[image] + 1) / 2 * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)  # (H, W)
    zoom = round(640 / max(images.shape[2:]))
    for i, (name, (record,)) in enumerate(records.items()):
        row, column = record.query_size[0] - 1, 2
        page.open((tmp_path / "page.html").as_uri() + f"#image={image}&layer={i}&query={row},{column}&opacity=1")
        assert page.run(f"document.getElementById('layer').options[{i}].text").startswith(f"{name} (")
        weights = record.attention[image, row * record.query_size[1] + column].view(record.key_size)
        cover = covered(record)
        middles = [
            [int((k + 0.5) / n * size * zoom * part) // zoom for k in range(n)]
            for n, size, part in zip(record.key_size, images.shape[2:], cover, strict=True)
        ]
        under = gray[middles[0]][:, middles[1]][..., None]
        wanted = expected(weights, weights.numel(), under)
        ring = [
            (at + 0.5) / n * size
            for at, n, size in zip((row, column), record.query_size, images.shape[2:], strict=True)
        ]
        clear = torch.cdist(torch.cartesian_prod(*map(torch.tensor, middles)).float(), torch.tensor([ring])) > 1.5
        clear = clear.view(record.key_size)  # of the mark
        assert clear.float().mean() > 0.8
        torch.testing.assert_close(shown(page, *record.key_size, cover)[clear], wanted[clear], **CLOSE)
    assert page.run("document.getElementById('images').hidden") is (len(images) == 1)
    assert page.run("document.getElementById('layer').options.length") == len(records)
    assert page.complaints() == []
