"""The generators of the start page: exported files compute what PyTorch does, and the page shows what they compute."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import chromium
from explorer_page import expected
from served_site import served
from torch_sagan import SAGANGenerator, remove_spectral_norm
from training.latents import slerp
from training.output.model_card import load

pytest.importorskip("sphinx")
browser_generators = pytest.importorskip("browser_generators")

MODELS = sorted((Path(__file__).parents[2] / "docs" / "models").glob("*.safetensors"))

# Exports, and the built site in a browser.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.exhaustive,
    pytest.mark.skipif(torch.__version__ < "2.7", reason="its exporter does not know all operators"),
]

# Of pixels in [-1, 1] and of weights: float32 sums in another order, five layers deep. Errors seen are below 2e-6.
CLOSE = {"rtol": 0, "atol": 2e-5}


def label_of(generator: SAGANGenerator, label: int) -> Tensor | None:
    return None if generator.num_classes is None else torch.tensor([label])


@torch.no_grad()
def drawn(generator: SAGANGenerator, z: Tensor, label: int) -> tuple[Tensor, list[Tensor]]:
    """(3 or 1, S, S) and the maps (N, M), by PyTorch."""
    images, maps = generator(z[None], label_of(generator, label), return_attention=True)
    return images[0], [attention[0] for attention in maps]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.stem)
def test_an_exported_generator_computes_what_pytorch_does(model: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    generator, _ = load(model)
    browser_generators.export(remove_spectral_norm(load(model)[0]), tmp_path / "generator.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["generator.onnx"]  # no weights beside it
    assert (tmp_path / "generator.onnx").stat().st_size < 2_500_000
    session = onnxruntime.InferenceSession(tmp_path / "generator.onnx")
    names = [entry.name for entry in session.get_inputs()]
    for seed, label in ((0, 0), (1, 5)):
        z = torch.randn(generator.z_dim, generator=torch.Generator().manual_seed(seed))
        given = {names[0]: z[None].numpy(), **{name: torch.tensor([label]).numpy() for name in names[1:]}}
        image, *maps = map(torch.from_numpy, session.run(None, given))
        wanted, wanted_maps = drawn(generator, z, label)
        assert wanted.std() > 0.1
        torch.testing.assert_close(image[0], wanted, **CLOSE)
        assert len(maps) == len(wanted_maps)
        for attention, wanted_map in zip(maps, wanted_maps, strict=True):
            torch.testing.assert_close(attention[0], wanted_map, **CLOSE)


def test_a_build_without_npm_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(browser_generators.Unavailable, match="npm is not installed"):
        browser_generators.runtime(tmp_path / "cache")


def test_a_site_without_npm_is_built(tmp_path: Path) -> None:
    (tmp_path / "conf.py").write_text("extensions = ['browser_generators']\n")
    (tmp_path / "index.rst").write_text("Title\n=====\n\n.. draw::\n")
    environment = os.environ | {"PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", str(tmp_path), str(tmp_path / "html")]
    subprocess.run(command, env=environment, check=True)
    text = (tmp_path / "html" / "index.html").read_text(encoding="utf-8")
    assert "This build of the pages has no generator to run: npm is not installed." in text
    assert "draw.mjs" not in text


def test_another_package_than_the_pinned_one_is_not_taken(tmp_path: Path) -> None:
    archive = tmp_path / f"onnxruntime-web-{browser_generators.VERSION}.tgz"
    archive.write_bytes(b"something else")
    with pytest.raises(browser_generators.Unavailable, match=r"another checksum than expected, sha512-\S+==$"):
        browser_generators.runtime(tmp_path)
    assert not archive.exists()  # the next build fetches it


# --- in the browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    if not (site / "models" / "generators.json").exists():
        pytest.skip("this build has no generators: no npm, or no network")
    with served(site) as address:
        yield address


def eventually(page: chromium.Page, expression: str) -> None:
    deadline = time.monotonic() + chromium.TIMEOUT
    while not page.run(expression):
        assert time.monotonic() < deadline, f"{expression} did not become true: {said(page)!r}"
        time.sleep(0.05)


def said(page: chromium.Page) -> str:
    return page.run("document.querySelector('#draw [role=status], #draw .draw-said').textContent")


SCREENS = [(1280, False), (1280, True), (390, False), (390, True)]


@pytest.fixture(params=SCREENS, ids=lambda screen: f"{screen[0]} px, {'dark' if screen[1] else 'light'}")
def page(request: pytest.FixtureRequest, browser: chromium.Page, address: str) -> chromium.Page:
    """The start page with its generator loaded."""
    width, dark = request.param
    browser.size(width, 900, dark=dark, touch=width < 600)
    browser.open(f"{address}index.html")
    return loaded(browser)


def loaded(page: chromium.Page) -> chromium.Page:
    page.run("document.querySelector('#draw button').click()")
    eventually(page, "document.querySelector('#draw .draw-said')?.textContent.startsWith('Row')")
    return page


# The canvas in its own pixels: the middle of each of the image's, in [0, 1].
PIXELS = """(() => {
  const canvas = document.querySelector("#draw [name=%s]"), size = %d, zoom = canvas.width / size;
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  return Array.from({ length: size * size }, (_, i) => {
    const y = Math.floor((Math.floor(i / size) + 0.5) * zoom), x = Math.floor((i %% size + 0.5) * zoom);
    return [...pixels.slice(4 * (y * canvas.width + x), 4 * (y * canvas.width + x) + 3)];
  });
})()"""


def canvas(page: chromium.Page, name: str, size: int) -> Tensor:
    """(3, size, size)"""
    values = page.run(PIXELS % (name, size))
    return torch.tensor(values, dtype=torch.float32).view(size, size, 3).permute(2, 0, 1) / 255


# A generator of numbers that is easily repeated here.
SEEDED = "let state = 1; Math.random = () => (state = (state * 16807) % 2147483647) / 2147483647;"


def latents(count: int, length: int) -> list[Tensor]:
    """What the page draws once its random numbers are those of SEEDED."""
    state = 1

    def random() -> float:
        nonlocal state
        state = state * 16807 % 2147483647
        return state / 2147483647

    return [
        torch.tensor(
            [
                math.sqrt(-2 * math.log(1 - radius)) * math.cos(2 * math.pi * angle)
                for radius, angle in ((random(), random()) for _ in range(length))
            ]
        )
        for _ in range(count)
    ]


def near_ring(size: int, row: float, column: float) -> Tensor:
    """(size, size): whether a ring may cover the pixel."""
    distance = torch.hypot(*torch.meshgrid(torch.arange(size) - row, torch.arange(size) - column, indexing="ij"))
    return distance < size / 16


def shows(page: chromium.Page, image: Tensor, at: tuple[float, float] | None) -> Callable[[], None]:
    size = image.shape[-1]
    wanted = (image.expand(3, -1, -1) + 1) / 2
    seen = torch.ones(size, size, dtype=torch.bool) if at is None else ~near_ring(size, *(size * share for share in at))
    torch.testing.assert_close(canvas(page, "image", size)[:, seen], wanted[:, seen], rtol=0, atol=1.5 / 255)


def change(page: chromium.Page, control: str, value: str) -> None:
    page.run(
        f"""(() => {{ const control = document.querySelector("#draw {control}"); control.value = "{value}";
        for (const kind of ["input", "change"]) control.dispatchEvent(new Event(kind)); }})()"""
    )


def settled(page: chromium.Page, action: Callable[[], object]) -> None:
    """Act, and wait until the image has become another one."""
    data = "document.querySelector('#draw [name=image]').toDataURL()"
    page.run(f"window.before = {data}")
    action()
    eventually(page, f"window.before !== {data}")
    page.run("new Promise((done) => setTimeout(done, 300))")  # what was wanted meanwhile has been drawn, too


def test_nothing_is_loaded_before_the_click(browser: chromium.Page, address: str) -> None:
    browser.open(f"{address}index.html")
    browser.run("new Promise((done) => setTimeout(done, 500))")
    assert not [url for url in browser.requests() if "onnx" in url or "draw.mjs" in url or "/models/" in url]


def test_the_page_draws_and_attends_as_pytorch_does(page: chromium.Page, address: str) -> None:
    generator, _ = load(MODELS[[model.stem for model in MODELS].index("faces")])
    page.run(SEEDED)
    settled(page, lambda: page.run("document.querySelector('#draw [name=both]').click()"))
    start, end = latents(2, generator.z_dim)
    image, (attention,) = drawn(generator, start, 0)
    row, column = 16, 11  # the left eye, of 32×32 positions
    at = ((row + 0.5) / 32, (column + 0.5) / 32)
    shows(page, image, at)
    weights = attention[row * 32 + column].view(16, 16)  # of the keys, which are pooled
    peak = int(weights.argmax())
    assert said(page).startswith(
        f"Row {row}, column {column} of 32×32 attends most to row {peak // 16}, column {peak % 16}, with weight "
    )
    luma = torch.tensor([0.299, 0.587, 0.114]) @ ((image.flatten(1) + 1) / 2)
    gray = (0.1 + 0.55 * luma).view(64, 64)
    level = (weights / max(float(weights.max()) / 2, 4 / 256)).clamp(max=1)
    level = level.repeat_interleave(4, 0).repeat_interleave(4, 1)
    full = expected(weights, 256, gray=0.0)  # level · color
    full = full.permute(2, 0, 1).repeat_interleave(4, 1).repeat_interleave(4, 2)
    wanted = gray * (1 - 0.9 * level) + 0.9 * full
    seen = ~near_ring(64, *(64 * share for share in at))
    torch.testing.assert_close(canvas(page, "map", 64)[:, seen], wanted[:, seen], rtol=0, atol=4 / 255)

    settled(page, lambda: change(page, "[type=range]", "0.3"))
    image, _ = drawn(generator, slerp(start, end, torch.tensor([0.3]))[0], 0)
    shows(page, image, at)
    assert all(url.startswith((address, "data:", "blob:")) for url in page.requests())
    readback = "Canvas2D: Multiple readback operations"  # of this test
    assert [complaint for complaint in page.complaints() if readback not in str(complaint)] == []
    assert page.run("document.documentElement.scrollWidth") <= page.run("window.innerWidth")


def test_the_map_follows_pointer_and_keys(browser: chromium.Page, address: str) -> None:
    browser.size(1280, 900)
    browser.open(f"{address}index.html")
    loaded(browser)
    browser.run("document.querySelector('#draw').scrollIntoView({ behavior: 'instant' })")
    x, y, side = browser.run(
        "(() => { const b = document.querySelector('#draw [name=map]').getBoundingClientRect();"
        " return [b.x, b.y, b.width]; })()"
    )
    browser.mouse("mouseMoved", x + (11.5 / 32) * side, y + (2.5 / 32) * side)
    assert said(browser).startswith("Row 2, column 11 of 32×32")
    browser.run("document.querySelector('#draw .draw-view').focus()")
    browser.press("ArrowDown")
    browser.press("ArrowLeft")
    assert said(browser).startswith("Row 3, column 10 of 32×32")


def test_a_swipe_scrolls_and_a_tap_chooses(browser: chromium.Page, address: str) -> None:
    browser.size(390, 844, touch=True)
    browser.open(f"{address}index.html")
    loaded(browser)
    browser.run("document.querySelector('#draw').scrollIntoView({ behavior: 'instant', block: 'center' })")
    place = (
        "(() => { const b = document.querySelector('#draw [name=map]').getBoundingClientRect();"
        " return [b.x, b.y, b.width, scrollY]; })()"
    )
    x, y, side, scrolled = browser.run(place)
    before = said(browser)
    browser.touch("touchStart", (x + side / 4, y + side / 4))
    for moved in range(20, 201, 20):
        browser.touch("touchMove", (x + side / 4, y + side / 4 - moved))
        browser.next_frame()
    browser.touch("touchEnd")
    browser.run("new Promise((done) => setTimeout(done, 500))")
    assert browser.run("scrollY") > scrolled + 100
    assert said(browser) == before
    x, y, side, _ = browser.run(place)
    browser.touch("touchStart", (x + side * 4.5 / 32, y + side * 12.5 / 32))
    browser.touch("touchEnd")
    browser.next_frame()
    assert said(browser).startswith("Row 12, column 4 of 32×32")


@pytest.mark.skipif(len(MODELS) < 2, reason="only one generator ships")
def test_a_class_can_be_chosen(browser: chromium.Page, address: str) -> None:
    generator, card = load(MODELS[[model.stem for model in MODELS].index("clothes")])
    browser.size(390, 844, touch=True)
    browser.open(f"{address}index.html")
    loaded(browser)
    browser.run(SEEDED)
    settled(browser, lambda: change(browser, "[name=generator]", "1"))
    names = browser.run("[...document.querySelectorAll('#draw [name=label] option')].map((option) => option.text)")
    assert names == list(card["classes"])
    (start,) = latents(1, generator.z_dim)
    for label in (0, 8):
        if label:
            settled(browser, lambda: change(browser, "[name=label]", "8"))
        image, maps = drawn(generator, start, label)
        assert not maps
        shows(browser, image, None)
    assert browser.run("document.querySelector('#draw [name=map]').offsetParent") is None


def test_a_host_that_lacks_a_file_is_named(browser: chromium.Page, address: str, site: Path) -> None:
    listed = site / "models" / "generators.json"
    kept = listed.read_text(encoding="utf-8")
    listed.unlink()
    try:
        browser.open(f"{address}index.html")
        browser.run("document.querySelector('#draw button').click()")
        eventually(browser, "document.querySelector('#draw button').disabled === false")
        assert said(browser) == "It could not be loaded (404 for /models/generators.json)."
    finally:
        listed.write_text(kept, encoding="utf-8")
    assert json.loads(kept)["generators"]


def test_a_page_opened_as_a_file_says_what_to_do(browser: chromium.Page, site: Path) -> None:
    browser.open((site / "index.html").as_uri())
    browser.run("document.querySelector('#draw button')?.click()")
    eventually(browser, "document.querySelector('#draw [role=status]').textContent.includes('http.server')")
