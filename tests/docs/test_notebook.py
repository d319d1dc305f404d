"""The notebook runs from its first cell to its last, on the generator that ships with the documentation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from torch_sagan import AttentionExplorer, SAGANGenerator, save_generator
from training.output.model_card import load

pytest.importorskip("sphinx")
notebook_page = pytest.importorskip("notebook_page")

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
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


def until(cell: str) -> list[dict[str, Any]]:
    """The cells before and up to the one that is named."""
    names = [each["id"] for each in NOTEBOOK["cells"]]
    return NOTEBOOK["cells"][: names.index(cell) + 1]


@pytest.mark.parametrize("folder", ["models", "docs/models", "."])
def test_a_file_that_is_there_is_taken(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder of the notebook, in that of a clone, and where an earlier download has left it."""

    def refuse(address: str) -> None:
        raise AssertionError(f"it asks for {address}")

    monkeypatch.setattr("urllib.request.urlretrieve", refuse)
    monkeypatch.chdir(tmp_path)
    Path(folder).mkdir(parents=True, exist_ok=True)
    shutil.copy(DOCS / "models" / "faces.safetensors", folder)
    *_, (_, _, card) = notebook_page.run(until("cell-3"))
    assert isinstance(card, dict)
    assert card["data"] == "faces"


def test_elsewhere_the_file_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the repository from which Colab opens the notebook, once, and to its name only when it is whole."""
    asked = []

    def retrieve(address: str) -> tuple[str, None]:
        asked.append(address)
        part = tmp_path / "part"
        shutil.copy(ROOT / address.partition("/main/")[2], part)
        return str(part), None

    monkeypatch.setattr("urllib.request.urlretrieve", retrieve)
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    for _ in range(2):
        *_, (_, _, card) = notebook_page.run(until("cell-3"))
        assert isinstance(card, dict)
        assert card["data"] == "faces"
    assert asked == ["https://github.com/torch-sagan/torch-sagan/raw/main/docs/models/faces.safetensors"]
    assert [path.name for path in empty.iterdir()] == ["faces.safetensors"]


def test_a_generator_with_classes_is_drawn_with_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The residual one too, of another size: one class after another, and the attention of the same images."""
    generator = SAGANGenerator(
        32, num_classes=3, architecture="resnet", base_channels=4, attention_resolutions=(16,)
    ).eval()
    (tmp_path / "models").mkdir()
    save_generator(tmp_path / "models" / "faces.safetensors", generator, classes=["fair", "red", "gray"])
    monkeypatch.chdir(tmp_path)
    values = {cell["id"]: value for cell, _, value in notebook_page.run(until("cell-6"))}
    row, explorer = values["cell-4"], values["cell-6"]
    assert isinstance(row, Image.Image)
    assert row.size == (8 * 128, 128)
    assert isinstance(explorer, AttentionExplorer)

    z = torch.randn(8, generator.z_dim, generator=torch.manual_seed(0))
    with torch.no_grad():
        images = generator(z, torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]))
    expected = (images[4] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).mul(255).byte().numpy()
    # The center of an enlarged image is that of the image, but for what the resizing averages.
    shown = np.asarray(row.crop((4 * 128, 0, 5 * 128, 128)).resize((32, 32), Image.Resampling.BOX))
    assert np.abs(shown.astype(int) - expected.astype(int)).max() <= 40


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
