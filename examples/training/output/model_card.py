"""Save and load a generator on its own: weights as safetensors, and beside them a JSON card that describes them.

    save(weights, card, Path("faces.safetensors"))              # writes faces.safetensors and faces.json
    generator, card = load(Path("faces.safetensors"))           # a SAGANGenerator in evaluation mode
    weights, card = from_checkpoint(Path("runs/faces"))         # the same two from the trainer's checkpoint

The card's entry `generator` holds the arguments of `build_generator` in architectures.py (apart from `mnist` they are
those of `SAGANGenerator`), `classes` the names of the classes with their numbers of images; `weights` the name and
SHA-256 of the file that it describes; the rest is information. Neither file can execute code, and both
are written completely or not at all.
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
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

import torch_sagan
from torch_sagan import SAGANGenerator
from training.architectures import build_generator
from training.average import recalibrated
from training.output.published import published_generator
from training.runs import checkpointing
from training.runs.tensor_files import read

Card = dict[str, Any]
Weights = Mapping[str, Tensor]

SUFFIX = ".safetensors"


def save(weights: Weights, card: Card, path: Path) -> None:
    """Write the weights to `path`, which ends in .safetensors, and the card beside them.

    Raises:
        ValueError: for another suffix, and for weights that do not fit the network that the card describes.
    """
    if path.suffix != SUFFIX:
        raise ValueError(f"{path}: the name has to end in {SUFFIX}")
    build(weights, card)
    content = tensor_bytes({name: tensor.contiguous() for name, tensor in weights.items()})
    card = card | {"weights": {"file": path.name, "sha256": hashlib.sha256(content).hexdigest()}}
    text = json.dumps(card, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpointing.write(path, lambda file: file.write(content))
    checkpointing.write(path.with_suffix(".json"), lambda file: file.write(text.encode()))


def load(path: Path) -> tuple[SAGANGenerator, Card]:
    """The generator of `path`, in evaluation mode, and its card.

    Raises:
        ValueError: if one of the two files is missing or damaged, or does not belong to the other.
    """
    beside = path.with_suffix(".json")
    for file in (path, beside):
        if not file.is_file():
            raise ValueError(f"{file}: no such file (a generator is a {SUFFIX} and a .json of the same name)")
    content = path.read_bytes()
    try:
        card = json.loads(beside.read_text(encoding="utf-8"))
        digest = card["weights"]["sha256"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{beside}: it cannot be read as the card of a generator") from None
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"{path}: damaged, or not the file that {beside.name} describes")
    try:
        weights = read_tensors(content)
    except SafetensorError as error:
        raise ValueError(f"{path}: it cannot be read as safetensors ({error})") from None
    return build(weights, card), card


def build(weights: Weights, card: Card) -> SAGANGenerator:
    """The network that the card describes, with these weights, in evaluation mode."""
    arguments = card.get("generator")
    try:
        generator = build_generator(**arguments)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
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
    return (model.parent if checkpointing.FILES.fullmatch(model.name) else Path("runs")) / "generated"


def open_generator(path: Path, *, average: bool = True) -> tuple[SAGANGenerator, Card]:
    """The generator in a .safetensors file, in a checkpoint of the trainer, in the newest checkpoint of a folder, or in
    a file that mmgeneration has published.

    The average of a checkpoint is recalibrated, as the trainer draws and scores it.
    """
    if path.suffix == SUFFIX:
        return load(path)
    file, state = _read(path)
    if isinstance(state, Mapping) and "state_dict" in state:
        try:
            generator, arguments = published_generator(state["state_dict"], average=average)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        return generator, {"generator": arguments, "averaged": average, "classes": {}, "source": file.name}
    weights, card = _trained(file, state, average=average)
    generator = build(weights, card)
    return (recalibrated(generator) if average else generator), card


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
        "base_channels": config["base_channels"],
        "image_channels": image_channels(weights),
        "num_classes": len(classes) or None,
        # The setting may be auto, so read them from the weights.
        "attention_resolutions": sorted({int(name.split(".")[1]) for name in weights if name.startswith("attention.")}),
    }
