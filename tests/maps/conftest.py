"""A browser for the explorer's page."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from chromium import FOUND, Page, chromium


@pytest.fixture(scope="package")
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
