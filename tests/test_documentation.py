"""What the README and the guides show runs: their Python blocks, one after the other, as a reader would paste them."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))]


def can_run(block: str) -> bool:
    """Whether what a block needs beside torch is installed."""
    if "torch.onnx" in block and torch.__version__ < "2.7":  # whose exporter does not know all of these operators
        return False
    needed = {"torch.onnx": "onnxscript", "onnxruntime": "onnxruntime", "safetensors": "safetensors"}
    return all(find_spec(package) for word, package in needed.items() if word in block)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's exporter uses what torch has deprecated
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, object] = {"__name__": "page"}
    for block in BLOCK.finditer(text):
        # As many empty lines as stand above the block, so that a traceback names the page's own line.
        lines_above = "\n" * text[: block.start(1)].count("\n")
        if can_run(block.group(1)):
            exec(compile(lines_above + block.group(1), str(page), "exec"), namespace)


def test_the_readme_and_the_guides_have_code() -> None:
    assert {"README.md", "quickstart.md", "existing-models.md", "training.md"} <= {page.name for page in WITH_CODE}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_fence_is_closed(page: Path) -> None:
    assert page.read_text(encoding="utf-8").count("```") % 2 == 0
