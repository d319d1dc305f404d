"""Train a SAGAN on handwritten digits, as the TensorFlow tutorial does with MNIST, and test whether it draws the
requested digits.

    python examples/train_digits.py                              # scikit-learn's digits, nothing to download
    python examples/train_digits.py --data mnist --steps 20000   # downloaded, or a folder with MNIST's own files
    python examples/train_digits.py --classes none               # without classes

It is train_celeba.py with the settings of recipes/digits.txt, and takes all of its flags: images of 28 pixels and one
channel, one attention layer on 128 channels at 7×7 in each network, whose projections are 4×4 convolutions. The
test follows: a classifier that has learnt from real digits alone classifies 1000 generated ones.
"""

from __future__ import annotations

import training.threads  # noqa: F401  before torch  # isort: skip

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

import train_celeba
from evaluation.class_agreement import ClassAgreement, kernel_classifier
from training.data.mnist import is_mnist
from training.data.public_sets import LIKE_MNIST
from training.data.sources import ArrayDataset, open_data
from training.flags import Config, default_out
from training.output.model_card import open_generator
from training.script import fail, read_arguments, script

RECIPE = Path(__file__).parent / "recipes" / "digits.txt"
SAMPLES = 1000  # that the classifier sees


@torch.no_grad()
def ask(run: Path) -> None:
    """Print how often a classifier sees the digit that was requested in the samples of a run."""
    generator, _ = open_generator(run)
    settings = json.loads((run / "config.json").read_text(encoding="utf-8"))
    data = open_data(settings["data"], size=settings["image_size"], classes="own")
    assert isinstance(data, ArrayDataset)
    assert data.labels is not None
    classifier = ClassAgreement(kernel_classifier(), data.images, data.labels.numbers)
    print(f"classifier  {100 * classifier.accuracy:.1f} % right on real digits that it did not learn from")

    rng, classes = torch.Generator().manual_seed(0), len(data.labels.classes)
    z = torch.randn(SAMPLES, generator.z_dim, generator=rng)  # (1000, z_dim)
    requested = torch.arange(SAMPLES) % classes  # (1000,)
    labels = [None] * SAMPLES if generator.num_classes is None else requested.split(100)
    images = torch.cat([generator(*inputs) for inputs in zip(z.split(100), labels, strict=False)])
    pixels = (images * 127.5 + 127.5).round().byte().numpy()  # (1000, 1, 28, 28)
    if generator.num_classes is None:
        seen = Counter(classifier.classify(pixels).tolist())
        print(f"predictions for {SAMPLES} samples: " + ", ".join(f"{i}: {seen[i]}" for i in range(classes)))
    else:
        agreement = 100 * classifier(pixels, requested.numpy())
        print(f"agreement with the requested class: {agreement:.1f} % of {SAMPLES} samples")


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = [f"@{RECIPE}", *(sys.argv[1:] if arguments is None else arguments)]
    args = read_arguments(Config, arguments, "Train a SAGAN on handwritten digits; the settings are train_celeba.py's.")
    if args["data"] not in ("digits", *LIKE_MNIST) and not is_mnist(Path(args["data"])):
        fail(f"--data {args['data']} is neither {', '.join(LIKE_MNIST)}, 'digits' nor a folder with MNIST's files")
    status = train_celeba.main(arguments)
    if status == 0 and not args["dry_run"] and int(os.environ.get("RANK", "0")) == 0:
        resumed = train_celeba.folder_to_resume(args["resume"], args)
        ask(Path(args.get("out") or resumed or default_out(args["data"])))
    return status


if __name__ == "__main__":
    script(main)
