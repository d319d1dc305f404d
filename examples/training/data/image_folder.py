"""Images of a folder or a zip archive, at any depth: decoded, cropped and resized.

A file that is not an image, or that cannot be read without guessing, is left out and reported with the reason.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from training.data.cropping import kept, squared
from training.data.dataset import ImageSet, Pixels, Problems, SourceLost, digest
from training.data.decoding import SUFFIXES, is_gray, upright_rgb, upright_size, without_warnings
from training.data.files import PASSING, Archive, Folder, reason
from training.data.labels import UNLABELED, Labels
from training.runs.memory import out_of_memory

Labeling = Callable[[list[str]], Labels]  # paths within a folder, with slashes -> their classes
NO_CLASS = "no class"  # the reason for leaving out an image without a class
TRIES = 64  # images that are drawn to replace one, before all of its class are gone through
NAMED = 10  # files that are named for each reason
SAMPLE = 64  # images whose headers are looked at


class Replacements:
    """The images that are tried in the place of an unreadable one: others of its class, in an order of its own, since
    unreadable files are often neighbors."""

    def __init__(self, labels: Labels | None, unreadable: NDArray[np.bool_]) -> None:
        self.labels, self.unreadable = labels, unreadable  # (N,) what is known to be unreadable is not tried
        self._members: dict[int, NDArray[np.int64]] = {}

    def __call__(self, number: int) -> Iterator[int]:
        members, rng = self._like(number), np.random.default_rng(number)
        yield from self._left(members[rng.integers(len(members), size=TRIES)])
        yield from self._left(rng.permutation(members))  # takes long where there are many, and is hardly ever needed

    def _left(self, tried: NDArray[np.int64]) -> Iterator[int]:
        return (other for other in tried[~self.unreadable[tried]].tolist() if not self.unreadable[other])

    def _like(self, number: int) -> NDArray[np.int64]:
        if self.labels is None:
            return self._members.setdefault(UNLABELED, np.arange(len(self.unreadable)))
        label = int(self.labels.numbers[number])
        if label not in self._members:
            self._members[label] = (self.labels.numbers == label).nonzero()[0]
        return self._members[label]


class ImageFolder(ImageSet):
    """The images below a folder or in a zip archive, cropped and resized. `others` are the files left out, each with
    the reason, and `skipped` says what was not looked at.

    An image that turns out to be unreadable is replaced by another one of its class, always the same, so that a batch
    has its size and its labels. `crop` is the side of the center square that is kept, in pixels, 0 for the largest;
    None takes 160 pixels of images of CelebA's size and the largest square of all others. PAD crops nothing: it repeats
    the edges of an image to make it square. With `labeling`, images without a class are left out. `channels` is 3, or
    1 for gray values.
    """

    def __init__(
        self,
        root: Path,
        size: int,
        crop: int | None = None,
        labeling: Labeling | None = None,
        *,
        channels: int = 3,
    ) -> None:
        self.root, self.size, self.crop, self.channels = root.resolve(), size, crop, channels
        self.source = Folder(self.root) if self.root.is_dir() else Archive(self.root)
        found: list[tuple[str, str]] = []
        self.others: Problems = {}
        for path, stamp, problem in sorted(self.source.files()):
            if PurePosixPath(path).suffix.lower() in SUFFIXES and not problem:
                found.append((path, stamp))
            else:
                self.others[path] = problem or "not an image"
        # All images, of which those with a class are used: a cache of all serves runs with and without classes.
        self.all_paths, self.all_stamps = [path for path, _ in found], [stamp for _, stamp in found]
        self.kept: NDArray[np.int64] = np.arange(len(found))  # the numbers among all images of those that are used
        if labeling:
            self._label(labeling)
        self.paths = [self.all_paths[i] for i in self.kept]
        self.unreadable = {}
        self._bad = np.zeros(len(self.paths), bool)  # the same by their numbers
        self._replacements = Replacements(self.labels, self._bad)
        self._instead: dict[int, int] = {}  # from the number of each unreadable image to that of its replacement

    @property
    def skipped(self) -> str:
        """What was not looked at, in one line."""
        return str(self.source.skipped)

    def __len__(self) -> int:
        return len(self.paths)

    def pixels(self, numbers: Sequence[int]) -> tuple[Pixels, Problems]:
        """These images; an unreadable one is replaced by another of its class."""
        images = self.empty(len(numbers))
        found: Problems = {}
        for target, number in zip(images, numbers, strict=True):
            self._fill(target, number, found)
        return images, found

    def rows(self, numbers: Sequence[int]) -> tuple[Pixels, Problems]:
        """The images of these numbers among all of the folder, those without a class too; zeros if damaged.

        For what is kept: where the system cannot read a file that may be good, this is a SourceLost.
        """
        images = self.empty(len(numbers))
        found: Problems = {}
        for target, number in zip(images, numbers, strict=True):
            if problem := self._decode_into(target, self.all_paths[number], passing=False):
                found[self.all_paths[number]] = problem
        return images, found

    def empty(self, count: int) -> Pixels:
        """Black images."""
        return np.zeros((count, self.channels, self.size, self.size), np.uint8)

    def _fill(self, target: Pixels, number: int, found: Problems) -> None:
        """Fill (C, size, size) with an image, or with one that replaces it; `found` gets what cannot be read."""
        if not self._bad[number] and (problem := self._decode_into(target, self.paths[number])):
            self._note(number, problem, found)
        if not self._bad[number]:
            return
        found[self.paths[number]] = self.unreadable[self.paths[number]]
        known = [self._instead[number]] if number in self._instead else []
        for other in chain(known, self._replacements(number)):
            if problem := self._decode_into(target, self.paths[other]):
                self._note(other, problem, found)
            else:
                self._instead[number] = other
                return
        raise ValueError(self.nothing_readable(number))

    def _note(self, number: int, problem: str, found: Problems) -> None:
        self._bad[number] = True
        self.unreadable[self.paths[number]] = found[self.paths[number]] = problem

    def nothing_readable(self, number: int) -> str:
        """The message where neither this image nor any other of its class can be read."""
        count, kind, path = len(self), "", self.paths[number]
        if self.labels:
            name = self.labels.classes[self.labels.numbers[number]]
            count, kind = self.labels.counts()[name], f" of the class {name}"
        why = self.unreadable.get(path) or self._decode_into(self.empty(1)[0], path)
        return f"none of the {count} images{kind} can be read, for example {path}: {why}"

    def _decode_into(self, target: Pixels, path: str, *, passing: bool = True) -> str:
        """Fill (C, size, size) with an image. Returns why that is not possible, or "".

        Without `passing`, what may pass is no such reason but an error. Lack of memory never is one: it says nothing
        of the file.
        """
        try:
            with without_warnings():
                self._decode(target, path)
        except Exception as error:  # damaged files raise errors of many types
            self.source.check()
            if out_of_memory(error):
                raise SourceLost(f"{path}: no memory to decode it (remove it if it is too large)") from None
            if not passing and isinstance(error, OSError) and error.errno in PASSING:
                raise SourceLost(f"{path}: {reason(error)} (--no-cache goes on without such an image)") from None
            return "not in a format that can be read" if isinstance(error, UnidentifiedImageError) else reason(error)
        return ""

    def _decode(self, target: Pixels, path: str) -> None:
        with Image.open(self.source.open(path)) as file:
            image = upright_rgb(file)
        if self.channels == 1:
            image = image.convert("L")
        target[:] = squared(image, self.size, self.crop).transpose(2, 0, 1)

    def _label(self, labeling: Labeling) -> None:
        # Composed, as everywhere but on a Mac's older disks: the same name is then the same class.
        names = [unicodedata.normalize("NFC", self.source.name(path)) for path in self.all_paths]
        labels = labeling(names)
        used = labels.numbers != UNLABELED
        self.kept = used.nonzero()[0]
        self.others |= {self.all_paths[i]: NO_CLASS for i in (~used).nonzero()[0]}
        self.labels = labels.only(self.kept.tolist())

    def counts(self) -> dict[str, int]:
        if self.labels is None:
            return {}
        known = [path not in self.unreadable for path in self.paths] if self.unreadable else slice(None)
        return self.labels._replace(numbers=self.labels.numbers[known]).counts()

    def marks(self) -> dict[str, str]:
        stamps = [self.all_stamps[i].rsplit(" ", 2) for i in self.kept]
        what = ("names", "sizes", "times" if isinstance(self.source, Folder) else "checksums")
        columns = zip(*stamps, strict=True)
        return {
            f"{kind} of files": digest(
                unicodedata.normalize("NFC", text).encode("utf-8", "surrogateescape") for text in column
            )
            for kind, column in zip(what, columns, strict=True)
        }

    def crops(self) -> str:
        """The crop and the sizes of the images, from the headers of all of them, or of a sample in a large folder."""
        crops: Counter[str] = Counter()
        for width, height, _ in self._headers():
            crops[f"{kept(width, height, self.crop)} of {width}x{height}"] += 1
        if len(crops) == 1:
            (text,) = crops
        else:
            text = ", ".join(f"{what} ({count})" for what, count in crops.most_common(3))
            if others := crops.total() - sum(count for _, count in crops.most_common(3)):
                text += f", other sizes ({others})"
        looked_at = len(self._sample())
        return text if looked_at == len(self) else f"{text}, in a sample of {looked_at}"

    def gray(self) -> bool:
        """Whether no image stores colors, as far as the same headers tell."""
        return all(gray for *_, gray in self._headers())

    def _sample(self) -> list[str]:
        return self.paths[:: -(-len(self) // SAMPLE)]

    def _headers(self) -> Iterator[tuple[int, int, bool]]:
        """Width and height of decoded images, and whether they are gray."""
        for path in self._sample():
            try:
                with without_warnings(), Image.open(self.source.open(path)) as file:
                    found = (*upright_size(file), is_gray(file))
            except Exception:  # as in `_decode_into`, whose caller reports it
                continue
            yield found


def left_out(others: Problems) -> Iterator[str]:
    """A line for each file; of many with the same reason, the first few and how many more there are."""
    reasons: dict[str, list[str]] = {}
    for path, why in others.items():
        reasons.setdefault(why, []).append(path)
    for why, paths in reasons.items():
        yield from (f"{why}, left out: {path}" for path in paths[:NAMED])
        if len(paths) > NAMED:
            yield f"{why}, left out: {len(paths) - NAMED} more"
