"""The classifier of a data set in a file, so that all runs with these images share one, and compare by one.

    classifier = open_classifier(data, held_out, Path("runs/cache"))     # trains it, or reads the file

The file's name holds a fingerprint of the images and the version of the code that trains. A file is written under
another name, and renamed when it is complete; one that is damaged or foreign is trained again. What is read is, bit by
bit, what was trained. Two processes that begin together both train, to the same bits.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluation import classifier as training
from evaluation.classifier import Classifier, Network, train
from training.data.dataset import ImageSet
from training.runs.atomic_files import force_to_disk
from training.runs.memory import out_of_memory
from training.runs.tensor_files import read

KNOWN = ("scale", "accuracy", "tested", "recalls")  # what a file holds beside the weights
LOOKED_AT = 64  # images whose pixels are in the fingerprint: they depend on size, crop and decoder, too


def open_classifier(
    data: ImageSet, held_out: ImageSet | None = None, cache: Path | None = None, *, seed: int = 0
) -> Classifier:
    """The classifier of these images: from its file in the folder `cache`, or trained and kept there.

    Without a folder it is trained and not kept. If the file cannot be written, a line on stderr says so.
    """
    if cache is None:
        return train(data, held_out, seed=seed)
    about = _about(data, held_out, seed)
    path = cache / f"classifier-{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]}.pt"
    if (kept := _read(path, about)) is not None:
        return kept
    if path.exists():
        print(f"damaged, trained again: {path}", file=sys.stderr, flush=True)
    trained = train(data, held_out, seed=seed)
    try:
        _write(path, trained, about)
    except (OSError, RuntimeError) as error:  # torch wraps some of what the disk says
        print(f"the classifier is not kept, cannot write {path}: {error}", file=sys.stderr, flush=True)
    return trained


def _about(data: ImageSet, held_out: ImageSet | None, seed: int) -> dict[str, Any]:
    """All that the classifier depends on, as plain values."""
    return {
        "version": training.VERSION,
        "seed": seed,
        "flip": data.flip,
        "classes": list(data.labels.classes) if data.labels else [],
        "data": _marks(data),
        "held out": None if held_out is None else _marks(held_out),
    }


def _marks(data: ImageSet) -> dict[str, Any]:
    some = np.unique(np.linspace(0, len(data) - 1, LOOKED_AT).astype(int)).tolist()
    images = data[[(number, False) for number in some]].images.numpy()
    shape = list(images.shape[1:])
    return {"fingerprint": data.fingerprint(), "shape": shape, "pixels": zlib.crc32(images.tobytes())}


def _read(path: Path, about: dict[str, Any]) -> Classifier | None:
    """The classifier in a file, or None if it holds nothing of the kind."""
    try:
        if not path.is_file():
            return None
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # torch.load does not verify the checksums that torch.save writes
                return None
        content = read(path)
        if content["about"] != about:
            return None
        channels, size, _ = about["data"]["shape"]
        network = Network(size, channels, len(about["classes"]))
        network.load_state_dict(content["network"])
        return Classifier(network, *(content[name] for name in KNOWN))
    except Exception as error:  # whatever a damaged or foreign file makes the reader raise
        if out_of_memory(error):
            raise
        return None


def _write(path: Path, classifier: Classifier, about: dict[str, Any]) -> None:
    content = {
        "about": about,
        "network": classifier.network.state_dict(),
    } | {name: getattr(classifier, name) for name in KNOWN}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}-{secrets.token_hex(4)}.part")  # of this process alone
    try:
        with open(part, "xb") as file:
            torch.save(content, file)
            file.flush()
            force_to_disk(file.fileno(), part.parent)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
