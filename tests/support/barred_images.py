"""Images of classes that a classifier learns in a second: a bar at a place of its class, of another brightness each.

And short trainings on them, and whether two of them gave the same classifier.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from evaluation import classifier
from evaluation.classifier import Classifier
from training.data.labels import Labels
from training.data.sources import ArrayDataset

SIZE = 16
CLASSES = ("left", "middle", "right")


def barred(counts: tuple[int, ...], seed: int = 0, *, flip: bool = False) -> ArrayDataset:
    """So many images of each class, uint8 (N, 1, 16, 16), in random order."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    images = rng.integers(0, 60, (len(labels), 1, SIZE, SIZE))
    bright = rng.integers(90, 196, len(labels))
    tops, heights = rng.integers(0, 6, len(labels)), rng.integers(4, 11, len(labels))
    for image, label, light, top, height in zip(images, labels, bright, tops, heights, strict=True):
        image[0, top : top + height, 2 + 5 * label : 4 + 5 * label] += light
    return ArrayDataset(images.astype(np.uint8), Labels(CLASSES[: len(counts)], labels), flip=flip)


@contextmanager
def short_training(steps: int, batch: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "STEPS", steps)
        patch.setattr(classifier, "BATCH", batch)
        yield


def same(one: Classifier, other: Classifier) -> bool:
    """Bit by bit."""
    return all(torch.equal(a, b) for a, b in zip(_parts(one), _parts(other), strict=True))


def _parts(kept: Classifier) -> list[torch.Tensor]:
    numbers = [kept.scale, kept.accuracy, kept.tested, *kept.recalls]
    return [*kept.network.state_dict().values(), torch.tensor(numbers, dtype=torch.float64)]
