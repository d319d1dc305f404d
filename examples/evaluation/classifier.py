"""A small convolutional classifier of real images: what their classes are, and features that scores compare.

    classifier = train(data, held_out)     # a minute or two of one core for 60,000 images of 28 pixels
    features, classes = classifier(images)                 # (N, 64) and (N,)

It learns once from the real images, at most `READ` of them, and is tested on images that it has not learned from: on
those that the data set keeps for that, or else on a fifth. What it does not need for telling the classes apart, such as
an exact background, its features may leave out: a distance in them does not see everything.

The same data and seed give the same bits, whatever the number of threads. (Another processor may round differently.)
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from training.data.dataset import Batch, ImageSet, Indices

VERSION = 2  # increase it when `train` returns another classifier for the same data
FEATURES = 64
VARIANCE = 1000.0  # in all, of the features of real images
READ = 60_000  # at most so many images are learned from
TESTED = 10_000  # at most so many that were not learned from
BATCH = 128
LEARNING_RATE = 3e-3
EPOCHS = 4  # of many images; of few ones so many that there are `STEPS` steps
STEPS = 150
TRUNK = 28  # pixels of the feature maps behind the stem, about


class Classified(NamedTuple):
    """What the classifier sees in images."""

    features: Tensor  # (N, 64), scaled
    classes: Tensor  # (N,), the most likely ones


class Network(nn.Module):
    """Images (B, C, S, S) in [-1, 1] -> features (B, 64), not negative, and logits (B, K)."""

    def __init__(self, size: int, channels: int, classes: int) -> None:
        super().__init__()
        self.shape = (channels, size, size)
        stride = 2 ** max(0, round(math.log2(size / TRUNK)))  # 1 up to 39 pixels, 2 up to 79, 4 up to 158 …
        pool = nn.MaxPool2d(2)
        self.trunk = nn.Sequential(
            nn.Conv2d(channels, 16, 2 * stride + 1, stride, stride), pool, nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), pool,
            nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), pool,
            nn.Flatten(),
        )  # fmt: skip
        side = ((size - 1) // stride + 1) // 8
        self.to_features = nn.Linear(64 * side**2, FEATURES)
        self.to_logits = nn.Linear(FEATURES, classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # half of the time

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.to_features(self.trunk(images)).relu()  # (B, 64)
        return features, self.to_logits(features)  # (B, 64), (B, K)


class Classifier:
    """A trained network with what is known of it.

    Attributes:
        scale: a number that features are multiplied by: over real images they then have the total variance `VARIANCE`,
            which is also the distance of a generator that always draws the mean.
        accuracy: the share of images that it has not learned from whose class it sees; NaN where there are none.
        tested: how many these were.
        recalls: that share in each class, NaN where there was no image of the class.
    """

    def __init__(self, network: Network, scale: float, accuracy: float, tested: int, recalls: list[float]) -> None:
        self.network, self.scale = network.eval(), scale
        self.accuracy, self.tested, self.recalls = accuracy, tested, recalls

    @property
    def about(self) -> str:
        """How good it is, in one line."""
        if not self.tested:
            return "not tested: there are too few real images"
        return f"{100 * self.accuracy:.1f} % right on {self.tested} real images that it did not learn from"

    def to(self, device: torch.device | str) -> Classifier:
        """The same one, on a device."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Classified:
        """Features and classes, on the CPU, of uint8 images (N, C, S, S)."""
        if images.dtype != torch.uint8 or images.shape[1:] != self.network.shape:
            expected = ", ".join(map(str, self.network.shape))
            raise ValueError(f"expected uint8 images (N, {expected}), got {images.dtype} {tuple(images.shape)}")
        device = next(self.network.parameters()).device
        seen = [self.network(_normalized(part.to(device))) for part in images.split(BATCH)]
        features, logits = (torch.cat(column).float().cpu() for column in zip(*seen, strict=True))
        return Classified(self.scale * features, logits.argmax(1))


def train(data: ImageSet, held_out: ImageSet | None = None, *, seed: int = 0) -> Classifier:
    """The classifier of these images, tested on `held_out`, or on a fifth of `data` that it does not learn from.

    Raises:
        ValueError: without classes, or where the two sets have different ones.
    """
    labels = data.labels
    if labels is None or len(labels.classes) < 2:
        raise ValueError("expected images of two classes or more")
    if held_out is not None and (held_out.labels is None or held_out.labels.classes != labels.classes):
        theirs = ", ".join(held_out.labels.classes) if held_out.labels else "none"
        raise ValueError(f"expected held-out images of the classes {', '.join(labels.classes)}, got {theirs}")
    order = np.random.default_rng(seed).permutation(len(data))
    fifth = len(order) // 5 if held_out is None else 0
    learned = order[fifth:][:READ]
    with _one_thread(), torch.random.fork_rng([]), torch.enable_grad():
        torch.default_generator.manual_seed(seed)
        _, channels, size, _ = data[[(0, False)]].images.shape
        network = Network(size, channels, len(labels.classes))
        _fit(network, data, learned, seed)
        classifier = Classifier(network, 1.0, math.nan, 0, [])
        tested = data if held_out is None else held_out
        numbers = order[:fifth] if held_out is None else np.random.default_rng(seed).permutation(len(tested))
        right, of_class = _count_right(classifier, tested, numbers[:TESTED], len(labels.classes))
        classifier.scale = _scale(classifier, data, learned[:TESTED])
    classifier.tested = int(of_class.sum())
    if classifier.tested:
        classifier.accuracy = right.sum().item() / classifier.tested
    classifier.recalls = (right / of_class).tolist()
    return classifier


def _fit(network: nn.Module, data: ImageSet, numbers: NDArray[np.int64], seed: int) -> None:
    batch = min(BATCH, len(numbers))
    epochs = max(EPOCHS, math.ceil(STEPS / max(1, len(numbers) // batch)))
    total = epochs * (len(numbers) // batch)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=total, pct_start=0.2)
    interval = 0.1 if sys.stderr.isatty() else 10
    with tqdm(total=total * batch, desc="classifier", unit="img", dynamic_ncols=True, mininterval=interval) as bar:
        for epoch in range(epochs):
            rng = np.random.default_rng((seed, epoch))
            order = rng.permutation(numbers)
            flips = (rng.random(len(order)) < 0.5) & data.flip
            for start in range(0, len(order) - batch + 1, batch):
                part = slice(start, start + batch)
                images, labels = data[_pairs(order[part], flips[part])]
                assert labels is not None
                _, logits = network(_normalized(images))
                loss = F.cross_entropy(logits, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update(batch)


def _pairs(numbers: NDArray[np.int64], flips: NDArray[np.bool_]) -> Indices:
    return list(zip(numbers.tolist(), flips.tolist(), strict=True))


def _batches(data: ImageSet, numbers: NDArray[np.int64]) -> Iterator[Batch]:
    for start in range(0, len(numbers), BATCH):
        part = numbers[start : start + BATCH]
        yield data[_pairs(part, np.zeros(len(part), bool))]


def _count_right(
    classifier: Classifier, data: ImageSet, numbers: NDArray[np.int64], classes: int
) -> tuple[Tensor, Tensor]:
    """How many images of each class (K,) are classified rightly, and how many there are."""
    right, of_class = torch.zeros(classes), torch.zeros(classes)
    for images, labels in _batches(data, numbers):
        assert labels is not None
        of_class += labels.bincount(minlength=classes)
        right += labels[classifier(images).classes == labels].bincount(minlength=classes)
    return right, of_class


def _scale(classifier: Classifier, data: ImageSet, numbers: NDArray[np.int64]) -> float:
    features = torch.cat([classifier(images).features for images, _ in _batches(data, numbers)]).double()
    variance = features.var(0, correction=0).sum().item()
    return math.sqrt(VARIANCE / variance) if variance > 0 else 1.0


def _normalized(images: Tensor) -> Tensor:
    return (images.float() / 127.5 - 1).to(memory_format=torch.channels_last)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums of several threads are rounded differently from those of one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
