"""Train a SAGAN on handwritten digits, as the TensorFlow tutorial does with MNIST, and test whether it draws the
requested classes.

    python examples/train_digits.py                              # scikit-learn's digits, nothing to download
    python examples/train_digits.py --data mnist --steps 20000   # downloaded, or a folder with MNIST's own files
    python examples/train_digits.py --classes none               # without classes

It is train_celeba.py with the settings of recipes/digits.txt, and takes all of its flags: images of 28 pixels and one
channel, one attention layer on 128 channels at 7×7 in each network, whose projections are 4×4 convolutions. The
test follows: a classifier that has learned from real images alone classifies 1000 generated ones.
"""

from __future__ import annotations

import training.threads  # noqa: F401  before torch  # isort: skip

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import train_celeba
from evaluation.classifier_cache import open_classifier
from training.data.mnist import is_mnist
from training.data.public_sets import LIKE_MNIST
from training.data.sources import open_data, open_held_out
from training.flags import Config, default_out
from training.output.model_card import open_generator
from training.runs.folder import shared_cache
from training.script import fail, read_arguments, script

RECIPE = Path(__file__).parent / "recipes" / "digits.txt"
SAMPLES = 1000  # that the classifier sees


@torch.no_grad()
def ask(run: Path) -> None:
    """Print how often a classifier sees the class that was requested in the samples of a run."""
    generator, _ = open_generator(run)
    settings = json.loads((run / "config.json").read_text(encoding="utf-8"))
    real = {"size": settings["image_size"], "classes": "own", "channels": settings["channels"]}
    data, held_out = open_data(settings["data"], **real), open_held_out(settings["data"], **real)
    assert data.labels is not None
    cache = Path(settings["cache_dir"] or shared_cache(run)) if settings["cache"] else None
    classifier = open_classifier(data, held_out, cache)
    print(f"classifier {classifier.about}")

    rng, classes = torch.Generator().manual_seed(0), len(data.labels.classes)
    z = torch.randn(SAMPLES, generator.z_dim, generator=rng)  # (1000, z_dim)
    requested = torch.arange(SAMPLES) % classes  # (1000,)
    labels = [None] * SAMPLES if generator.num_classes is None else requested.split(100)
    images = torch.cat([generator(*inputs) for inputs in zip(z.split(100), labels, strict=False)])
    seen = classifier((images * 127.5 + 127.5).round().byte()).classes  # (1000,)
    if generator.num_classes is None:
        counts = seen.bincount(minlength=classes).tolist()
        listed = ", ".join(f"{name}: {count}" for name, count in zip(data.labels.classes, counts, strict=True))
        print(f"predictions for {SAMPLES} samples: {listed}")
    else:
        agreement = 100 * (seen == requested).double().mean().item()
        print(f"agreement with the requested class: {agreement:.1f} % of {SAMPLES} samples")


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = [f"@{RECIPE}", *(sys.argv[1:] if arguments is None else arguments)]
    args = read_arguments(Config, arguments, "Train a SAGAN on handwritten digits; the settings are train_celeba.py's.")
    if args["data"] not in ("digits", *LIKE_MNIST) and not is_mnist(Path(args["data"])):
        known = ", ".join(("digits", *LIKE_MNIST))
        fail(f"--data {args['data']}: expected {known} or a folder with MNIST's files")
    status = train_celeba.main(arguments)
    if status == 0 and not args["dry_run"] and int(os.environ.get("RANK", "0")) == 0:
        resumed = train_celeba.folder_to_resume(args["resume"], args)
        ask(Path(args.get("out") or resumed or default_out(args["data"])))
    return status


if __name__ == "__main__":
    script(main)
