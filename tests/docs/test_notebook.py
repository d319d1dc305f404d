"""The notebook runs from its first cell to its last, on the generator that ships with the documentation."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from torch_sagan import AttentionExplorer
from training.output.model_card import load

DOCS = Path(__file__).parents[2] / "docs"
NOTEBOOK = json.loads((DOCS / "attention.ipynb").read_text(encoding="utf-8"))


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Cell after cell, as Jupyter does: what the last line of a cell is worth is what it shows."""
    pytest.importorskip("safetensors")
    for file in (DOCS / "models").iterdir():  # as the notebook's download would leave them
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "notebook"}
    shown = []
    for cell in NOTEBOOK["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or source.startswith("%pip"):
            continue
        body = ast.parse(source).body
        last = body.pop() if isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), cell["id"], "exec"), namespace)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), cell["id"], "eval"), namespace))
    explorers = [value for value in shown if isinstance(value, AttentionExplorer)]
    assert len(explorers) == 2
    assert all("<iframe" in explorer._repr_html_() for explorer in explorers)
    assert (tmp_path / "attention.html").stat().st_size > 10_000
    assert "ConvTranspose2d" in capsys.readouterr().out  # the table of insertion points


def test_the_notebook_has_no_stored_outputs() -> None:
    """They would be out of date one day, and fill the history."""
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in NOTEBOOK["cells"])


@pytest.mark.skipif(torch.__version__ < "2.6", reason="the examples refuse to read files with it")
def test_the_generator_that_ships_is_what_its_card_says() -> None:
    generator, card = load(DOCS / "models" / "faces.safetensors")
    assert card["data"] == "faces"
    assert abs(generator.get_submodule("attention.16").gamma.item()) > 0.05  # it has learned to attend
