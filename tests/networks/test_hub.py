"""Generators in a folder as the Hugging Face Hub has it. No network: the folder stands in for a repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from torch_sagan import SAGANGenerator, load_generator

huggingface_hub = pytest.importorskip("huggingface_hub")

from torch_sagan import hub  # noqa: E402

LABELS = torch.tensor([0, 1])


def generator() -> SAGANGenerator:
    network = SAGANGenerator(16, base_channels=4, num_classes=2)
    network(torch.randn(4, 128), torch.tensor([0, 1, 0, 1]))  # running statistics, u and v
    network.card = {"classes": ["cat", "dog"]}
    return network


@torch.no_grad()
def images(network: SAGANGenerator) -> torch.Tensor:
    return network.eval()(torch.ones(2, 128), LABELS)


def test_saved_and_loaded(tmp_path: Path) -> None:
    mine = generator()
    hub.HubGenerator.of(mine).save_pretrained(tmp_path / "animals")
    loaded = hub.HubGenerator.from_pretrained(tmp_path / "animals")
    assert not loaded.training
    assert loaded.card["classes"] == ["cat", "dog"]
    assert torch.equal(images(loaded), images(mine))
    assert json.loads((tmp_path / "animals" / "config.json").read_text()) == mine.arguments
    assert "torch-sagan" in (tmp_path / "animals" / "README.md").read_text()
    # and without the mixin, from the same file
    assert torch.equal(images(load_generator(tmp_path / "animals" / "generator.safetensors")), images(mine))


def test_what_was_loaded_is_saved_again(tmp_path: Path) -> None:
    hub.HubGenerator.of(generator()).save_pretrained(tmp_path / "a")
    first = hub.HubGenerator.from_pretrained(tmp_path / "a")
    first.save_pretrained(tmp_path / "b")
    second = hub.HubGenerator.from_pretrained(tmp_path / "b")
    assert (second.card["classes"], second.arguments) == (first.card["classes"], first.arguments)
    assert torch.equal(images(second), images(first))


def test_pushed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's client is stood in for where it would send; what it is given is the folder."""
    sent: dict[str, Any] = {}

    class Api:
        def __init__(self, **_: Any) -> None:
            pass

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, *, folder_path: Path, **_: Any) -> None:
            sent.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    mine = generator()
    hub.HubGenerator.of(mine).push_to_hub("me/animals")
    assert set(sent) == {"generator.safetensors", "config.json", "README.md"}
    (tmp_path / "g.safetensors").write_bytes(sent["generator.safetensors"])
    assert torch.equal(images(load_generator(tmp_path / "g.safetensors")), images(mine))


def test_a_repository_is_downloaded_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.HubGenerator.of(generator()).save_pretrained(tmp_path)
    asked: list[tuple[str, str]] = []

    def download(repo_id: str, filename: str, **_: Any) -> str:
        asked.append((repo_id, filename))
        return str(tmp_path / filename)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(
        "huggingface_hub.hub_mixin.hf_hub_download", lambda repo_id, filename, **_: download("config", filename)
    )
    assert hub.HubGenerator.from_pretrained("me/animals").num_classes == 2
    assert ("me/animals", "generator.safetensors") in asked


def test_the_network_cannot_be_changed_on_loading(tmp_path: Path) -> None:
    hub.HubGenerator.of(generator()).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="the network is the file's: image_size cannot be another than there"):
        hub.HubGenerator.from_pretrained(tmp_path, image_size=32)
