"""Whether places far apart agree: in a drawn face (faces.py), and in what a generator has learnt from such faces.

Each drawn face has two eyes of one colour, two earrings, two cheeks, and a shirt of the head-band's colour, and nothing
near one of the two places tells which colour it is. So a reader for each place is fitted to real faces, whose colours
are known: linear discriminant analysis of a small window. Of the two places of a generated face, the readers say the
same colour or not:

    disagreement = share of faces whose two places are read as different colours
    chance       = the same for the two places of different faces of that set: Σ over colours of p_here (1 − p_there)
    relative     = disagreement / chance: 0 where all agree, 1 where the two places know nothing of one another

The last one is the fair number, for a generator that paints all eyes in one colour never disagrees, by chance either.
(Hair and brows share a colour too, but the fringe comes down to the brows, so they are not far apart.)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from training import faces

Images = NDArray[np.uint8]  # (n, 3, size, size)
FIRST_REAL = 1_000_000  # the first of the faces that readers are fitted to, far from any that a generator is shown


class Pair(NamedTuple):
    """Two windows, centres and half the side in the faces' coordinates, that share a trait's colour."""

    name: str
    trait: str
    palette: tuple[tuple[int, int, int], ...]
    here: tuple[float, float]
    there: tuple[float, float]
    reach: float
    mirrored: bool  # the other place is the mirror image of this one, and one reader serves both


PAIRS = (
    Pair("eyes", "eyes", faces.EYES, (-0.255, 0.04), (0.255, 0.04), 0.22, mirrored=True),
    Pair("earrings", "earrings", faces.EARRINGS, (-0.59, 0.36), (0.59, 0.36), 0.22, mirrored=True),
    Pair("cheeks", "cheeks", faces.CHEEKS, (-0.34, 0.28), (0.34, 0.28), 0.22, mirrored=True),
    Pair("band and shirt", "band", faces.BANDS, (0.0, -0.64), (0.0, 0.9), 0.16, mirrored=False),
)


class Reading(NamedTuple):
    """How often the two places of a pair differ in a set of faces, and how often they would by chance."""

    disagreement: float
    chance: float

    @property
    def relative(self) -> float:
        """1 where there is nothing to disagree about: a set with one colour shows no agreement."""
        return self.disagreement / self.chance if self.chance > 0 else 1.0


class ColorClassifiers:
    """Read the colours of faces of `size` x `size` pixels, fitted to `count` real ones."""

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
        """The numbers (n,) of the colours in the palette that are read at the one place and at the other."""
        reader, other_reader = self.readers[pair.name]
        here, there = windows(images, pair)
        return reader.predict(here), other_reader.predict(there)

    def __call__(self, images: Images) -> dict[str, Reading]:
        """The reading of each pair in a set of faces."""
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
