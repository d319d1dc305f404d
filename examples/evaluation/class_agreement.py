"""How often a conditional generator draws the class that was requested, according to a classifier of real images.

The classifier learns from four fifths of the real images and is tested on the last fifth: its accuracy there limits
what the agreement can show. It uses plain pixels, which is enough for digits and for procedural faces. Large images are
reduced first: with 12288 numbers each, linear discriminant analysis would take minutes and gigabytes.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from training.data.dataset import ImageSet
from training.data.sources import ArrayDataset

READ = 10_000  # at most so many real images: more would take minutes
LARGE = 32  # pixels; images of this size or more are halved until they are smaller


# scikit-learn is imported where a classifier is made: it takes a second, and most runs need none.


class Classifier(Protocol):
    """A classifier of scikit-learn."""

    def fit(self, x: NDArray[np.float32], y: NDArray[np.int64], /) -> Classifier: ...
    def predict(self, x: NDArray[np.float32], /) -> NDArray[np.int64]: ...


def linear_classifier() -> Classifier:
    """For procedural faces: the hair's colour is a linear function of the pixels."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    return LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")


def kernel_classifier() -> Classifier:
    """For handwritten digits."""
    from sklearn.svm import SVC

    return SVC(C=10)


CLASSIFIERS = {"faces": linear_classifier, "digits": kernel_classifier}


class ClassAgreement:
    """A classifier of real images, uint8 (N, C, H, W), with classes (N,); `accuracy` is that on images held out."""

    def __init__(self, classifier: Classifier, images: NDArray[np.uint8], classes: NDArray[np.int64]) -> None:
        order = np.random.default_rng(0).permutation(len(images))[:READ]
        held_out, learned = np.split(order, [len(order) // 5])
        self.classifier = classifier.fit(_pixels(images[learned]), classes[learned])
        self.accuracy = self(images[held_out], classes[held_out])

    def __call__(self, images: NDArray[np.uint8], requested: NDArray[np.int64]) -> float:
        """The fraction of images, uint8 (N, C, H, W), that the classifier assigns to the requested class (N,)."""
        return float((self.classify(images) == requested).mean())

    def classify(self, images: NDArray[np.uint8]) -> NDArray[np.int64]:
        """The predicted classes (N,) of images, uint8 (N, C, H, W)."""
        return self.classifier.predict(_pixels(images))


def _pixels(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Images (N, C, S, S) as rows of numbers (N, C · s · s) in [-1, 1]; s = S, or less than `LARGE`."""
    pixels: NDArray[Any] = images
    while (size := pixels.shape[-1]) >= LARGE:
        squares = pixels.reshape(*pixels.shape[:2], size // 2, 2, size // 2, 2)
        pixels = squares.mean((3, 5), dtype=np.float32)  # (N, C, S / 2, S / 2)
    return pixels.reshape(len(pixels), -1).astype(np.float32) / 127.5 - 1


def class_agreement(name: str, data: ImageSet) -> ClassAgreement | None:
    """A classifier for the built-in data set of this name, or None for other data, where pixels are not enough."""
    kind = name.partition(":")[0]  # faces:200 is faces, too
    if kind not in CLASSIFIERS or data.labels is None or not isinstance(data, ArrayDataset):
        return None
    return ClassAgreement(CLASSIFIERS[kind](), data.images, data.labels.numbers)
