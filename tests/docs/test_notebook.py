"""The notebook runs from its first cell to its last, on the generator that ships with the documentation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from torch_sagan import AttentionExplorer
from training.output.model_card import load

pytest.importorskip("sphinx")
notebook_page = pytest.importorskip("notebook_page")

DOCS = Path(__file__).parents[2] / "docs"
NOTEBOOK = json.loads((DOCS / "attention.ipynb").read_text(encoding="utf-8"))


def test_the_notebook_runs() -> None:
    """Cell after cell, as Jupyter does, and as its page of the site does."""
    with notebook_page.beside_the_models(DOCS / "models"):
        results = list(notebook_page.run(NOTEBOOK["cells"]))
        assert Path("attention.html").stat().st_size > 10_000
    assert [cell for cell, _, _ in results] == NOTEBOOK["cells"]
    explorers = [value for _, _, value in results if isinstance(value, AttentionExplorer)]
    assert len(explorers) == 2
    assert all("<iframe" in explorer._repr_html_() for explorer in explorers)
    assert any("ConvTranspose2d" in printed for _, printed, _ in results)  # the table of insertion points


def test_a_cell_is_worth_its_last_line(tmp_path: Path) -> None:
    cells = [
        {"cell_type": "code", "id": "a", "metadata": {}, "source": ["x = 3\n", "print('said')\n", "{'x': x}"]},
        {"cell_type": "code", "id": "b", "metadata": {}, "source": ["y = x + 1"]},
        {"cell_type": "code", "id": "c", "metadata": {}, "source": ["%pip install y"]},
        {"cell_type": "markdown", "id": "d", "metadata": {}, "source": ["y"]},
        {"cell_type": "code", "id": "e", "metadata": {}, "source": ["y"]},
    ]
    results = [(printed, value) for _, printed, value in notebook_page.run(cells)]
    assert results == [("said\n", {"x": 3}), ("", None), ("", None), ("", None), ("", 4)]


def test_what_is_shown_has_an_alternative_text() -> None:
    """Pictures and explorers: the cell names what they show."""
    with notebook_page.beside_the_models(DOCS / "models"):
        for cell, _, value in notebook_page.run(NOTEBOOK["cells"]):
            if value is not None and not isinstance(value, dict):
                assert len(cell["metadata"]["alt"]) > 10, cell["id"]


def test_the_notebook_has_no_stored_outputs() -> None:
    """They would be out of date one day, and fill the history."""
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in NOTEBOOK["cells"])


@pytest.mark.skipif(torch.__version__ < "2.6", reason="the examples refuse to read files with it")
@pytest.mark.parametrize("file", sorted((DOCS / "models").glob("*.safetensors")), ids=lambda file: file.stem)
def test_the_generators_that_ship_are_what_their_cards_say(file: Path) -> None:
    generator, card = load(file)
    assert file.stem in (card["data"], "clothes")
    for layer in generator.attention.values():
        assert abs(layer.gamma.item()) > 0.05  # it has learned to attend
