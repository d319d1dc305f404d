"""A generator on its own: one file with its card in it, read back as it was, whatever happens while it is written."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import generate
from generators import ANIMALS, checkpoint, shaken
from tiny_runs import leave_out_images, resume, train
from torch_sagan import SAGANGenerator, spectral_norms
from training.average import recalibrated
from training.output import model_card

DEMO = Path(__file__).parents[4] / "docs" / "models" / "faces.safetensors"


def grid(model: Path, out: Path, *arguments: str) -> bytes:
    assert generate.main([str(model), "--grid", "--columns", "2", "--out", str(out), *arguments]) == 0
    return (out / "grid.png").read_bytes()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"image_channels": 1, "attention_resolutions": []},
        {"num_classes": 3, "architecture": "resnet", "attention_resolutions": [8]},
    ],
)
def test_export_and_back(arguments: dict[str, Any], tmp_path: Path) -> None:
    generator, alone = shaken(**arguments), tmp_path / "alone.safetensors"
    path = checkpoint(tmp_path / "checkpoint.pt", generator, architecture=str(arguments.get("architecture", "dcgan")))
    before = grid(path, tmp_path / "before", "--export", str(alone))
    rebuilt, card = model_card.load(alone)
    assert not rebuilt.training
    for name, tensor in recalibrated(generator, list(card["classes"].values())).state_dict().items():
        torch.testing.assert_close(rebuilt.state_dict()[name], tensor, rtol=0, atol=0)
    assert rebuilt.num_classes == generator.num_classes
    assert (card["steps"], card["images"], card["data"], card["averaged"]) == (12, 48, "faces", True)
    assert card["classes"] == (ANIMALS if generator.num_classes else {})
    assert card["crop"] == "auto"
    assert card["scores"] == {"swd": 12.3457}  # of the trainer's last evaluation
    assert set(card["versions"]) == {"torch_sagan", "torch"}
    copy = json.loads(alone.with_suffix(".json").read_text(encoding="utf-8"))
    assert {name: value for name, value in copy.items() if name != "weights"} == card
    alone.with_suffix(".json").unlink()  # nothing depends on the copy
    assert grid(alone, tmp_path / "after") == before


WIDTHS = [
    "--architecture", "resnet", "--g-widths", "6,5,4", "--d-widths", "3,5,6", "--d-downsampling-blocks", "1",
    "--normalize-classes", "--norm-eps", "1e-4",
]  # fmt: skip


@pytest.mark.parametrize("options", [[], ["--conditioning", "latent", "--upsampling", "nearest"], WIDTHS])
def test_the_trainers_own_checkpoint(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_images(monkeypatch)
    trained, alone = tmp_path / "run", tmp_path / "digits.safetensors"
    assert train(trained, "--classes", "own", "--steps", "1", "--lr-g", "0.01", "--eval-every", "0", *options) == 0
    assert resume(trained, "--steps", "2") == 0
    before = grid(trained, tmp_path / "before", "--labels", "7,3", "--export", str(alone))
    generator, card = model_card.load(alone)
    assert generator.conditioning == ("latent" if "latent" in options else "batch_norm")
    assert generator.arguments["norm_eps"] == (1e-4 if "--norm-eps" in options else 1e-5)
    assert generator.arguments["widths"] == ([6, 5, 4] if "--g-widths" in options else [8, 4])
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    for name, tensor in generator.named_parameters():
        assert torch.equal(tensor, state["average"][name])
    # The average's own, rounded to float32; two steps at a rate of 0.01 have left the trainer's u and v behind.
    assert all(norm == pytest.approx(1, abs=1e-5) for norm in spectral_norms(generator).values())
    plain = model_card.build(state["average"], card)
    assert any(norm > 1.001 for norm in spectral_norms(plain).values())
    assert card["generator"]["image_channels"] == 1
    assert (card["data"], card["steps"]) == ("digits", 2)
    assert list(card["classes"]) == [str(digit) for digit in range(10)]
    assert sum(card["classes"].values()) == 1797
    assert grid(alone, tmp_path / "after", "--labels", "7,3") == before


def test_the_newest_checkpoint_of_a_folder(tmp_path: Path) -> None:
    for step in (90, 100, 1000):
        checkpoint(tmp_path / f"checkpoint-{step:06d}.pt", shaken(image_channels=1 if step == 1000 else 3))
    _, card = model_card.from_checkpoint(tmp_path)
    assert card["generator"]["image_channels"] == 1


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path: Path) -> tuple[model_card.Weights, model_card.Card, Path]:
    """Weights with their card, written to a file."""
    weights, card = model_card.from_checkpoint(checkpoint(tmp_path / "run" / "checkpoint.pt", shaken()))
    model_card.save(weights, card, tmp_path / "alone.safetensors")
    return weights, card, tmp_path / "alone.safetensors"


def test_lack_of_memory_does_not_go_back_to_an_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        checkpoint(tmp_path / f"checkpoint-00000{step}.pt", shaken())
    monkeypatch.setattr(torch, "load", lambda *_, **__: torch.empty(10**15))
    with pytest.raises(SystemExit, match=r"checkpoint-000002\.pt: can't allocate memory: you tried to allocate"):
        generate.main([str(tmp_path), "--out", str(tmp_path / "images")])
    assert "trying the one before" not in capsys.readouterr().err


@pytest.mark.parametrize("moment", range(5))
def test_an_export_over_an_export_is_the_old_one_or_the_new_one(
    moment: int, exported: tuple[model_card.Weights, model_card.Card, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends before any of the calls that change the folder, or after all of them."""
    weights, card, path = exported
    calls = 0

    def killing(function: Any) -> Any:
        def called(*arguments: Any, **more: Any) -> Any:
            nonlocal calls
            if calls == moment:
                raise KeyboardInterrupt
            calls += 1
            return function(*arguments, **more)

        return called

    for name in ("replace", "fsync"):
        monkeypatch.setattr(os, name, killing(getattr(os, name)))
    ended = False
    try:
        model_card.save({name: tensor + 1 for name, tensor in weights.items()}, card | {"steps": 99}, path)
    except KeyboardInterrupt:
        ended = True
    monkeypatch.undo()
    assert ended
    generator, found = model_card.load(path)
    change = 1 if found["steps"] == 99 else 0
    assert torch.equal(generator.to_image.bias, weights["to_image.bias"] + change)
    assert change == (moment > 1)  # the file is forced onto the disk, replaced, and then it is the new one


def test_a_class_whose_folder_is_not_utf_8(tmp_path: Path) -> None:
    classes = {b"caf\xe9".decode(errors="surrogateescape"): 1, "猫": 2, "dog": 3}
    model = checkpoint(tmp_path / "checkpoint.pt", shaken(num_classes=3), classes=classes)
    weights, card = model_card.from_checkpoint(model)
    model_card.save(weights, card, tmp_path / "alone.safetensors")
    _, found = model_card.load(tmp_path / "alone.safetensors")
    assert found["classes"] == classes
    copy = (tmp_path / "alone.json").read_text(encoding="utf-8")
    assert "猫" in copy  # legible
    assert json.loads(copy)["classes"] == classes


def test_a_file_that_is_no_card_is_not_replaced(
    exported: tuple[model_card.Weights, model_card.Card, Path], tmp_path: Path
) -> None:
    """Such as a run's config.json by --export runs/faces/config.safetensors."""
    weights, card, _ = exported
    (tmp_path / "config.json").write_text('{"steps": 3}')
    with pytest.raises(ValueError, match=r"config\.json: expected nothing or the card of a generator there"):
        model_card.save(weights, card, tmp_path / "config.safetensors")
    assert (tmp_path / "config.json").read_text() == '{"steps": 3}'
    assert not (tmp_path / "config.safetensors").exists()


# --- reading ---------------------------------------------------------------------------------------------------------


def test_the_demo_of_the_documentation() -> None:
    generator, card = model_card.load(DEMO)
    assert isinstance(generator, SAGANGenerator)
    copy = json.loads(DEMO.with_suffix(".json").read_text(encoding="utf-8"))
    assert copy.pop("weights") == {"file": DEMO.name, "sha256": hashlib.sha256(DEMO.read_bytes()).hexdigest()}
    assert card == copy


def test_other_programs_read_both_files(exported: tuple[model_card.Weights, model_card.Card, Path]) -> None:
    """As docs/evaluation.md tells them to."""
    _, _, path = exported
    card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    generator = SAGANGenerator(**{k: v for k, v in card["generator"].items() if k != "architecture"})
    generator.load_state_dict(load_file(path))
    assert torch.equal(generator.to_image.bias, model_card.load(path)[0].to_image.bias)


def test_every_damaged_byte_is_seen(exported: tuple[model_card.Weights, model_card.Card, Path]) -> None:
    """In the data each, and wherever the file ends too early."""
    _, _, path = exported
    content = path.read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    for place in (8 + header, (8 + header + len(content)) // 2, len(content) - 1):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"alone\.safetensors: damaged, its weights are not those"):
            model_card.load(path)
    for length in (0, 7, 20, 8 + header, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"alone\.safetensors: it cannot be read as safetensors"):
            model_card.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generator": {"colour": 1}}, r"its card does not describe a generator: .*colour"),
        ({"generator": {"base_channels": 8}}, r"the weights do not fit a generator of"),
        ({"generator": None}, r"its card does not describe a generator"),
        ({"generator": [1]}, r"its card does not describe a generator"),
        ({"classes": 5}, r"its card does not describe a generator: classes: expected"),
        ({"classes": {"cat": 1}}, r"its card does not describe a generator: classes: expected"),
    ],
)
def test_a_card_of_another_network(
    change: dict[str, Any], message: str, exported: tuple[model_card.Weights, model_card.Card, Path]
) -> None:
    weights, card, path = exported
    (name,) = change
    changed = card[name] | change[name] if isinstance(change[name], dict) else change[name]
    metadata = {"card": json.dumps(card | {name: changed})}
    content = path.read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    metadata["sha256"] = hashlib.sha256(content[8 + header :]).hexdigest()
    save_file(dict(weights), path, metadata)
    with pytest.raises(ValueError, match=message):
        model_card.load(path)
