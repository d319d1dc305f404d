"""What the README shows runs: its Python blocks, one after the other, as a reader would paste them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = README.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert blocks
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        # As many empty lines as stand above the block, so that a traceback names the README's own line.
        lines_above = "\n" * text[: block.start(1)].count("\n")
        exec(compile(lines_above + block.group(1), str(README), "exec"), namespace)


def test_every_fence_is_closed() -> None:
    assert README.read_text(encoding="utf-8").count("```") % 2 == 0
