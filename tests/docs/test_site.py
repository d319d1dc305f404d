"""The built site: every link leads somewhere, nothing comes from another host, and every page can be read."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import chromium

pytest.importorskip("sphinx")

ROOT = Path(__file__).parents[2]
BASE = "https://torch-sagan.github.io/torch-sagan/"

# Building the site takes half a minute, and looking at all of its pages as long again.
pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]


class Html(HTMLParser):
    """The parts of a page that the tests use."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []  # what the browser asks for by itself
        self.headings: list[int] = []
        self.alternatives: list[str | None] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.anchors.update(filter(None, [given.get("id")]))
        if tag == "a" and given.get("href"):
            self.links.append(given["href"] or "")
        if tag in ("img", "script", "iframe", "source", "video") and given.get("src"):
            self.loads.append(given["src"] or "")
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "shortcut icon", "preload"):
            self.loads.append(given["href"] or "")
        if tag == "img":
            self.alternatives.append(given.get("alt"))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Html]:
    """Every page by its path, except the sources of modules and the explorer, which has tests of its own."""
    names = (path.relative_to(site).as_posix() for path in sorted(site.rglob("*.html")))
    return {name: Html(site / name) for name in names if not name.startswith(("_modules/", "_static/", "explorer"))}


def test_links_and_anchors_lead_somewhere(site: Path, pages: dict[str, Html]) -> None:
    anchors = {(site / name).resolve(): page.anchors for name, page in pages.items()}
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or name == "404.html":  # its links start elsewhere
                continue
            target = (site / name).resolve()
            if parts.path:
                target = (site / name).parent.joinpath(unquote(parts.path)).resolve()
            assert target.is_file(), f"{name} links to {link}"
            if parts.fragment and target in anchors:
                assert unquote(parts.fragment) in anchors[target], f"{name} links to {link}"


def test_links_to_the_site_itself_lead_somewhere(site: Path) -> None:
    """Absolute links to the site, from the README and other files outside it."""
    for path in (ROOT / "README.md", ROOT / "CITATION.cff", ROOT / "pyproject.toml", ROOT / "CHANGELOG.md"):
        for address in re.findall(rf"{re.escape(BASE)}[\w./#-]*", path.read_text(encoding="utf-8")):
            file, _, anchor = address.removeprefix(BASE).partition("#")
            target = site / (file or "index.html")
            assert target.is_file(), f"{path.name} links to {address}"
            assert not anchor or anchor in Html(target).anchors, f"{path.name} links to {address}"


def test_links_to_files_of_the_repository(pages: dict[str, Html]) -> None:
    """To view or edit a page's text, and elsewhere. Pages generated from docstrings have no file to link to."""
    files = 0
    for name, page in pages.items():
        for link in page.links:
            match = re.fullmatch(r"https://github\.com/torch-sagan/torch-sagan/(?:blob|edit)/main/([^?#]+).*", link)
            if match:
                files += 1
                path = ROOT / match[1]
                assert path.is_file(), f"{name} links to {link}"
                assert not re.fullmatch(r"torch_sagan\..+\.rst", path.name), f"{name} links to {link}"
    assert files > len(list((ROOT / "docs").glob("*.md")))


def test_signatures_are_readable(site: Path) -> None:
    def text(name: str) -> str:
        return re.sub("<.*?>", "", (site / "api" / f"torch_sagan.{name}.html").read_text(encoding="utf-8"))

    assert "apply_spectral_norm(model: Module," in re.sub(r"\s+", " ", text("apply_spectral_norm")).replace("( ", "(")
    assert "AbstractContextManager[dict[str, list[AttentionRecord]]]" in text("record_attention")
    assert "Callable[..., Tensor]" in text("gradient_penalty")


def test_no_paragraph_became_a_list(site: Path, pages: dict[str, Html]) -> None:
    """As one that begins with "C." would."""
    for name in pages:
        assert not re.search(r'class="(upper|lower)(alpha|roman)', (site / name).read_text(encoding="utf-8")), name


def test_nothing_comes_from_another_host(site: Path, pages: dict[str, Html]) -> None:
    for name, page in pages.items():
        assert not [address for address in page.loads if urlsplit(address).netloc], name
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", text), style.name


def test_headings_are_in_order(pages: dict[str, Html]) -> None:
    for name, page in pages.items():
        if name == "search.html":  # a script fills it
            continue
        assert page.headings[:1] == [1], name
        assert page.headings.count(1) == 1, name
        steps = [after - before for before, after in zip(page.headings, page.headings[1:], strict=False)]
        assert max(steps, default=0) <= 1, f"{name} skips a level of headings"


def test_figures_have_alternative_texts(pages: dict[str, Html]) -> None:
    for name, page in pages.items():
        assert all(page.alternatives), name


def test_the_landing_page_is_light(site: Path, pages: dict[str, Html]) -> None:
    """Less than 1.5 MB with all that it loads, except what the explorer shows."""
    loads = {urlsplit(address).path for address in pages["index.html"].loads if "explorer" not in address}
    size = sum((site / unquote(path)).stat().st_size for path in loads) + (site / "index.html").stat().st_size
    assert size < 1_500_000


def test_the_site_map_names_every_page(site: Path, pages: dict[str, Html]) -> None:
    listed = set(re.findall(rf"<loc>{re.escape(BASE)}(.+?)</loc>", (site / "sitemap.xml").read_text(encoding="utf-8")))
    made_by_sphinx = {"genindex.html", "py-modindex.html", "search.html"}
    assert listed == set(pages) - {"404.html"} - made_by_sphinx


def test_a_link_to_any_page_shows_a_card(site: Path, pages: dict[str, Html]) -> None:
    for name in set(pages) - {"404.html", "genindex.html", "py-modindex.html", "search.html"}:
        text = (site / name).read_text(encoding="utf-8")
        (card,) = re.findall(rf'property="og:image" content="{re.escape(BASE)}(.+?)"', text)
        assert (site / card).is_file()
        (description,) = re.findall(r'name="description" content="(.*?)"', text)
        assert len(description) > 20, f"{name} does not begin with a sentence"


def test_formulas_need_no_script(site: Path) -> None:
    text = (site / "api" / "torch_sagan.SelfAttention2d.html").read_text(encoding="utf-8")
    assert "<math" in text
    assert not re.search(r"<script[^>]*mathjax", text, re.IGNORECASE)


CUT_OFF = """[...document.querySelectorAll('pre')].filter((e) => e.scrollWidth > e.clientWidth)
    .map((e) => e.innerText.split('\\n').reduce((a, b) => a.length > b.length ? a : b))"""


def test_no_code_is_cut_off_on_a_screen(site: Path, pages: dict[str, Html], browser: chromium.Page) -> None:
    browser.size(1280, 1000)
    cut = {}
    for name in pages:
        browser.open((site / name).as_uri())
        cut[name] = browser.run(CUT_OFF)
    assert not {name: lines for name, lines in cut.items() if lines}


def test_pages_fit_a_phone(site: Path, pages: dict[str, Html], browser: chromium.Page) -> None:
    """Tables and code scroll by themselves; the page does not. No page makes a network request or writes an error."""
    browser.size(390, 844, touch=True)
    for name in set(pages) - {"404.html"}:  # whose addresses start from the published site's root
        browser.open((site / name).as_uri())
        assert browser.run("document.documentElement.scrollWidth") <= 390, name
        assert not [address for address in browser.requests() if not address.startswith(("file:", "data:"))], name
        assert browser.complaints() == [], name


def test_the_theme_switch_reaches_the_explorer(site: Path, browser: chromium.Page) -> None:
    browser.size(1280, 900)
    browser.open((site / "index.html").as_uri())
    browser.run("document.querySelector('iframe.explorer').scrollIntoView()")  # it loads when it is near
    (frame,) = browser.send("Page.getFrameTree")["frameTree"]["childFrames"]
    backgrounds = []
    for _ in range(4):
        browser.run("new Promise((done) => setTimeout(done, 500))")
        world = browser.send("Page.createIsolatedWorld", frameId=frame["frame"]["id"])["executionContextId"]
        expression = "getComputedStyle(document.body).backgroundColor"
        answer = browser.send("Runtime.evaluate", expression=expression, contextId=world, returnByValue=True)
        theme = browser.run("document.body.dataset.theme")
        backgrounds.append((theme, answer["result"]["value"]))
        browser.run("document.querySelector('.theme-toggle').click()")
    dark, light = "rgb(23, 23, 27)", "rgb(255, 255, 255)"
    assert sorted(set(backgrounds)) == [("auto", light), ("dark", dark), ("light", light)]


# Words of code in cells that lie on several lines; of CamelCase each part is one.
BROKEN = """[...document.querySelectorAll('td code')].flatMap((code) => {
  const walker = document.createTreeWalker(code, NodeFilter.SHOW_TEXT), broken = [];
  while (walker.nextNode()) {
    for (const { 0: word, index } of walker.currentNode.data.matchAll(/[A-Z]*[a-z0-9]+|[A-Z]+/g)) {
      const range = document.createRange();
      range.setStart(walker.currentNode, index);
      range.setEnd(walker.currentNode, index + word.length);
      if (new Set([...range.getClientRects()].map(({ top }) => Math.round(top))).size > 1) broken.push(word);
    }
  }
  return broken;
})"""


def test_code_in_tables_does_not_break_inside_words(site: Path, pages: dict[str, Html], browser: chromium.Page) -> None:
    broken = {}
    for width in (390, 1280):
        browser.size(width, 844)
        for name in set(pages) - {"404.html"}:
            if "<td>" in (site / name).read_text(encoding="utf-8"):
                browser.open((site / name).as_uri())
                broken[name, width] = browser.run(BROKEN)
    assert len(broken) > 20
    assert not {where: words for where, words in broken.items() if words}


def test_the_notebook_is_shown_with_what_its_cells_show(site: Path, browser: chromium.Page) -> None:
    browser.size(1280, 900)
    browser.open((site / "attention.html").as_uri())
    text = browser.run("document.querySelector('article').textContent")
    card = json.loads((ROOT / "docs" / "models" / "faces.json").read_text(encoding="utf-8"))
    assert f"'image_size': {card['generator']['image_size']}" in text  # the card, the value of a cell
    assert "the model itself:" in text  # the table of insertion points, which a cell prints
    size = browser.run("(({ naturalWidth: w, naturalHeight: h }) => [w, h])(document.querySelector('img.output'))")
    assert size == [8 * 128, 128]
    frames = browser.run("[...document.querySelectorAll('iframe.explorer')].map((frame) => frame.getAttribute('src'))")
    assert len(frames) == 2
    assert frames[0].endswith("#image=6&layer=0&query=16,19")
    for frame in frames:
        assert "What the position attends to" in (site / frame.partition("#")[0]).read_text(encoding="utf-8")
    colab = "https://colab.research.google.com/github/torch-sagan/torch-sagan/blob/main/docs/attention.ipynb"
    assert browser.run(f"document.querySelector('a[href=\"{colab}\"]') !== null")
    download = browser.run("document.querySelector('article a.download').getAttribute('href')")
    assert (site / download).read_bytes() == (ROOT / "docs" / "attention.ipynb").read_bytes()
