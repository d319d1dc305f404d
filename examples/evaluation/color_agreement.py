"""Whether distant parts of generated faces have the same color, as those of procedural_faces.py have.

A procedural face has two eyes of one color, two earrings, two cheeks, and a shirt of the headband's color, and
nothing near one part shows the color of the other. A classifier of a small window around each part (linear
discriminant analysis) is fitted to real faces, whose colors are known. For each pair of parts, on a set of generated
faces:

    disagreement = fraction of faces whose two parts are classified as different colors
    chance       = the same for parts of two different faces of the set: Σ over colors of p_one (1 − p_other)
    relative     = disagreement / chance: 0 if all pairs agree, 1 if the two parts are independent

The last number is the fair one: a generator that draws all eyes in one color never disagrees, but not by chance
either. (Hair and brows share a color too, but the fringe comes down to the brows, so they are not far apart.)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from training.data import procedural_faces as faces

Images = NDArray[np.uint8]  # (n, 3, size, size)
FIRST_REAL = 1_000_000  # number of the first face for the classifiers, far from those that generators are trained on


class Pair(NamedTuple):
    """Two windows that show one trait's color: their centers and half their side, in the faces' coordinates."""

    name: str
    trait: str
    palette: tuple[tuple[int, int, int], ...]
    here: tuple[float, float]
    there: tuple[float, float]
    reach: float
    mirrored: bool  # the other part is the mirror image of this one, so one classifier serves both


PAIRS = (
    Pair("eyes", "eyes", faces.EYES, (-0.255, 0.04), (0.255, 0.04), 0.22, mirrored=True),
    Pair("earrings", "earrings", faces.EARRINGS, (-0.59, 0.36), (0.59, 0.36), 0.22, mirrored=True),
    Pair("cheeks", "cheeks", faces.CHEEKS, (-0.34, 0.28), (0.34, 0.28), 0.22, mirrored=True),
    Pair("band and shirt", "band", faces.BANDS, (0.0, -0.64), (0.0, 0.9), 0.16, mirrored=False),
)


class Reading(NamedTuple):
    """How often the two parts of a pair differ in a set of faces, and how often they would by chance."""

    disagreement: float
    chance: float

    @property
    def relative(self) -> float:
        """Disagreement / chance, or 1 in a set with a single color, which shows no agreement."""
        return self.disagreement / self.chance if self.chance > 0 else 1.0


class ColorClassifiers:
    """Classify the colors of faces of `size` × `size` pixels; fitted to `count` real faces."""

    def __init__(self, size: int, *, count: int = 2000, seed: int = 0) -> None:
        people = faces.traits(count, seed=seed, first=FIRST_REAL)
        images = faces.render(people, size)
        self.readers: dict[str, tuple[LinearDiscriminantAnalysis, LinearDiscriminantAnalysis]] = {}
        for pair in PAIRS:
            colors = np.array(pair.palette, np.float32)
            truth = np.abs(getattr(people, pair.trait)[:, None] - colors).sum(2).argmin(1)  # (n,)
            here, there = windows(images, pair)
            if pair.mirrored:
                reader = _fit(np.concatenate([here, there]), np.concatenate([truth, truth]))
                self.readers[pair.name] = reader, reader
            else:
                self.readers[pair.name] = _fit(here, truth), _fit(there, truth)

    def colors(self, images: Images, pair: Pair) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The indices (n,) in the palette of the colors of the one part and of the other."""
        reader, other_reader = self.readers[pair.name]
        here, there = windows(images, pair)
        return reader.predict(here), other_reader.predict(there)

    def __call__(self, images: Images) -> dict[str, Reading]:
        """The disagreement of each pair in a set of faces."""
        readings = {}
        for pair in PAIRS:
            one, other = self.colors(images, pair)
            shares = [np.bincount(read, minlength=len(pair.palette)) / len(read) for read in (one, other)]
            readings[pair.name] = Reading(float((one != other).mean()), float(1 - shares[0] @ shares[1]))
        return readings


def windows(images: Images, pair: Pair) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The pixels (n, 3 · h · w) of the two windows, in [-1, 1]."""
    size = images.shape[-1]
    side = max(2, round(pair.reach * size))

    def window(images: Images, center: tuple[float, float]) -> NDArray[np.float32]:
        left, top = (min(max(round((at + 1) / 2 * size - side / 2), 0), size - side) for at in center)
        pixels = images[:, :, top : top + side, left : left + side].astype(np.float32) / 127.5 - 1
        return pixels.reshape(len(pixels), -1)

    if pair.mirrored:
        return window(images, pair.here), window(images[..., ::-1], pair.here)
    return window(images, pair.here), window(images, pair.there)


def _fit(pixels: NDArray[np.float32], truth: NDArray[np.int64]) -> LinearDiscriminantAnalysis:
    return LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(pixels, truth)
