"""Save and load a generator of the trainer on its own: one safetensors file, with a card that describes its weights.

    save(weights, card, Path("faces.safetensors"))              # writes it, and a copy of the card as faces.json
    generator, card = open_generator(Path("faces.safetensors"))  # a SAGANGenerator in evaluation mode
    weights, card = from_checkpoint(Path("runs/faces"))         # the two from the trainer's checkpoint

The file is that of `torch_sagan.save_generator`. The card's entry `generator` holds the arguments of `build_generator`
in architectures.py (apart from `mnist` they are those of `SAGANGenerator`), `classes` the names of the classes with
their numbers of images. The copy is for people and other programs; its `weights` are the file's name and SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torch_sagan
from torch_sagan import SAGANGenerator, load_generator, load_published, save_generator
from training.architectures import build_generator
from training.average import recalibrated
from training.runs import checkpointing
from training.runs.atomic_files import write_json
from training.runs.folder import FILES
from training.runs.memory import out_of_memory
from training.runs.tensor_files import read
from training.script import widths

Card = dict[str, Any]
Weights = Mapping[str, Tensor]

SUFFIX = ".safetensors"


def save(weights: Weights, card: Card, path: Path) -> None:
    """Write the weights and the card to `path`, which ends in .safetensors, and then the card's copy beside it.

    Raises:
        ValueError: for another suffix, for weights that do not fit the network that the card describes, and where the
            copy would replace a file that is no card.
    """
    copy = path.with_suffix(".json")
    if copy.exists() and not _is_card(copy):
        raise ValueError(f"{copy}: expected nothing or the card of a generator there, which it would replace")
    card = {name: value for name, value in card.items() if name != "weights"}
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_generator(path, build(weights, card), card=card, build=build_generator)
    except OSError as error:
        raise SystemExit(f"cannot save {path}: {error}") from None
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    write_json(copy, card | {"weights": {"file": path.name, "sha256": sha256}})


def _is_card(path: Path) -> bool:
    try:
        return path.is_file() and "generator" in json.loads(path.read_bytes())
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def load(path: Path) -> tuple[SAGANGenerator, Card]:
    """The generator of `path`, in evaluation mode, and its card.

    Raises:
        ValueError: if the file is missing or damaged, or has no card.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    generator = load_generator(path, build=build_generator)
    return generator, generator.card


def build(weights: Weights, card: Card) -> SAGANGenerator:
    """The network that the card describes, with these weights, in evaluation mode."""
    try:
        arguments, classes = card["generator"], card.get("classes", {})
        if not isinstance(classes, Mapping) or len(classes) not in (0, arguments.get("num_classes")):
            raise ValueError("its classes are not as many as the generator's")
        generator = build_generator(**arguments)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"the card does not describe a generator: {error}") from None
    try:
        generator.load_state_dict(weights)
    except RuntimeError:
        raise ValueError(f"the weights do not fit a generator of {arguments}") from None
    return generator.eval()


def from_checkpoint(path: Path, *, average: bool = True) -> tuple[Weights, Card]:
    """The averaged or the current generator of a checkpoint of the trainer, or of the newest one in its run's folder.

    Raises:
        ValueError: if it is not a checkpoint of the trainer.
    """
    return _trained(*_read(path), average=average)


def _read(path: Path) -> tuple[Path, Any]:
    """A file and what it holds; of a run's folder the newest checkpoint that can be read, as `--resume` takes it."""
    if not path.is_dir():
        return path, _content(path)
    files = checkpointing.checkpoints(path) or [file for file in [path / "checkpoint.pt"] if file.exists()]
    if not files:
        raise ValueError(f"{path}: no checkpoint in this folder")
    for file in files[:-1]:
        try:
            return file, _content(file)
        except ValueError as unreadable:
            print(f"{unreadable}; trying the one before", file=sys.stderr, flush=True)
    return files[-1], _content(files[-1])


def _content(file: Path) -> Any:
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    try:
        return read(file)
    except Exception as error:  # whatever a damaged or foreign file makes the reader raise
        if short := out_of_memory(error):
            raise OSError(f"{file}: {short}") from None
        found = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        reason = f", because it holds a {found[1]} (see docs/pretrained.md)" if found else ""
        raise ValueError(f"{file}: it cannot be read as a checkpoint{reason}") from None


def _trained(file: Path, state: Any, *, average: bool) -> tuple[Weights, Card]:
    try:
        config, weights = state["config"], state["average" if average else "generator"]
        card = {
            "generator": _arguments(config, weights, state["classes"]),
            "averaged": average,
            "data": Path(config["data"]).name,  # without the folders above it, which may be private
            "crop": config["crop"],
            "mirror": config.get("mirror", True),
            "classes": dict(state["classes"]),
            "steps": state["step"],
            "images": state["images"],
            "scores": {name: round(score, 4) for name, score in state["scores"].items()},
            "versions": {"torch_sagan": torch_sagan.__version__, "torch": torch.__version__},
        }
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ValueError(f"{file}: it is not a checkpoint of this trainer") from None
    return weights, card


def output_folder(model: Path) -> Path:
    """The folder `generated` in that of the run, or in `runs` for a generator that is not in the folder of a run."""
    if model.is_dir():
        return model / "generated"
    return (model.parent if FILES.fullmatch(model.name) else Path("runs")) / "generated"


def open_generator(path: Path, *, average: bool = True) -> tuple[SAGANGenerator, Card]:
    """The generator in a .safetensors file, in a checkpoint of the trainer, in the newest checkpoint of a folder, or in
    a file that `torch_sagan.load_published` reads.

    The average of a checkpoint is recalibrated, as the trainer draws and scores it.
    """
    if path.suffix == SUFFIX:
        return load(path)
    file, state = _read(path)
    if isinstance(state, Mapping) and "config" not in state:
        try:
            generator = load_published(file, averaged=average)
        except ValueError as error:
            reason = str(error).removeprefix(f"{file}: ")
            raise ValueError(
                f"{file}: it is not a checkpoint of this trainer, and as a published file: {reason}"
            ) from None
        return generator, {"generator": generator.arguments, "classes": {}, **generator.card}
    weights, card = _trained(file, state, average=average)
    generator = build(weights, card)
    return (recalibrated(generator, list(card["classes"].values())) if average else generator), card


def image_channels(weights: Weights) -> int:
    """The channels of a generator's images: the length of its last bias."""
    *_, bias = (tensor for name, tensor in weights.items() if name.startswith("to_image.") and name.endswith(".bias"))
    return len(bias)


def _arguments(config: Mapping[str, Any], weights: Weights, classes: Mapping[str, int]) -> dict[str, Any]:
    """The arguments that build a generator with these weights."""
    return {
        "architecture": config["architecture"],
        "image_size": config["image_size"],
        "z_dim": config["z_dim"],
        **widths("g_widths", config.get("g_widths", "auto"), config["base_channels"]),
        "image_channels": image_channels(weights),
        "num_classes": len(classes) or None,
        "conditioning": config.get("conditioning", "batch_norm") if classes else "batch_norm",
        "upsampling": None if (upsampling := config.get("upsampling", "auto")) == "auto" else upsampling,
        "normalize_classes": config.get("normalize_classes", False),
        "norm_eps": config.get("norm_eps", 1e-5),
        # The setting may be auto, so read them from the weights.
        "attention_resolutions": sorted({int(name.split(".")[1]) for name in weights if name.startswith("attention.")}),
    }
