"""The built site, once for all tests that look at it, and a browser."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import chromium

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="package")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-E", "-n", "-W", "--keep-going", "-b", "html", "-d"]
    built = subprocess.run(
        [*command, str(folder / "doctrees"), str(DOCS), str(folder / "html")], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return folder / "html"


@pytest.fixture(scope="package")
def browser() -> Iterator[chromium.Page]:
    if chromium.FOUND is None:
        pytest.skip("neither Chromium nor Chrome is installed")
    with chromium.chromium() as page:
        yield page
