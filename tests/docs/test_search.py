"""The site's search, as a visitor uses it: what is typed into its field finds the page that answers it first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest

import chromium
from served_site import served

pytest.importorskip("sphinx")

# The built site in a browser, as in test_site.py.
pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]

QUERIES = {
    "faq": "faq.html",
    "64x64": "faq.html",
    "64×64": "faq.html",
    "32×32": "faq.html",
    "oom": "faq.html",
    "out of memory": "faq.html",
    "sigmoid": "faq.html",
    "mode collapse": "faq.html",
    "pix2pix": "faq.html",
    "checkerboard": "faq.html",
    "DataParallel": "faq.html",
    "pretrained": "faq.html",
    "colab": "attention.html",
    "notebook": "attention.html",
    "attention map": "visualize.html",
    "resume": "resuming.html",
    "CycleGAN": "cyclegan.html",
    "DCGAN": "dcgan.html",
    "FID": "evaluation.html",
    "onnx": "ecosystem.html",
    "export": "ecosystem.html",
    "gradient penalty": "second-derivatives.html",
    "double backward": "second-derivatives.html",
    "spectral normalization": "spectral-norm.html",
    "spectral norm": "spectral-norm.html",
    "SelfAttention2d": "api/torch_sagan.SelfAttention2d.html",
}

# Addresses in the order of the page, once the search says that it has finished.
FOUND = """new Promise((done) => {
  const look = () => {
    const finished = document.querySelector("#search-results .search-summary")?.textContent;
    if (!finished) return setTimeout(look, 20);
    done([...document.querySelectorAll("#search-results li > a")].map((link) => link.getAttribute("href")));
  };
  look();
})"""


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with served(site) as address:
        yield address


def found(browser: chromium.Page, address: str, query: str) -> list[str]:
    """What a query finds, at the address that the search field leads to."""
    browser.open(f"{address}search.html?{urlencode({'q': query})}")
    return browser.run(FOUND)


@pytest.mark.parametrize("query", QUERIES)
def test_the_page_that_answers_is_first(browser: chromium.Page, address: str, query: str) -> None:
    links = found(browser, address, query)
    assert links, "nothing was found"
    assert links[0].partition("#")[0] == QUERIES[query], links[:5]


def test_the_changelog_is_last(browser: chromium.Page, address: str) -> None:
    links = found(browser, address, "attention")
    assert len(links) > 20
    assert {link.partition("#")[0] for link in links[-2:]} <= {"changelog.html", "design.html"}


def test_what_is_not_there_is_not_found(browser: chromium.Page, address: str) -> None:
    assert found(browser, address, "xylophone") == []
