"""Classes of images: from the folders that they are in, or from CelebA's table of attributes.

A label is the number of a class, its index in `Labels.classes`. This file defines the meaning of the trainer's
`--classes` and of `generate.py --labels`; it reads no images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

UNLABELED = -1
ATTRIBUTE_FILE = "list_attr_celeba.txt"


class Labels(NamedTuple):
    """The class of every image of a data set."""

    classes: tuple[str, ...]
    numbers: NDArray[np.int64]  # (N,) from 0 to len(classes) - 1, or UNLABELED

    def counts(self) -> dict[str, int]:
        """How many images each class has."""
        counted = np.bincount(self.numbers[self.numbers >= 0], minlength=len(self.classes))
        return dict(zip(self.classes, counted.tolist(), strict=True))

    def only(self, kept: Sequence[int]) -> Labels:
        """The labels of these images alone, in this order."""
        return Labels(self.classes, self.numbers[np.asarray(kept, dtype=np.int64)])


def check_classes(labels: Labels, source: str) -> None:
    """Raise a ValueError unless there are two classes or more, each with an image."""
    if len(labels.classes) < 2:
        found = ", ".join(labels.classes) or "none"
        raise ValueError(
            f"{source}: expected two classes or more, found {found} (--classes none trains without classes)"
        )
    if empty := [name for name, count in labels.counts().items() if count == 0]:
        raise ValueError(f"{source}: no image has the class {', '.join(empty)}")


def from_folders(paths: Iterable[str]) -> Labels:
    """One class for each first folder of the paths (relative, with slashes); images beside the folders have none.

    Folders that all paths share are skipped: archives often contain one folder with everything in it.
    """
    folded = [PurePosixPath(path).parts[:-1] for path in paths]
    while len({parts[:1] for parts in folded}) == 1 and all(len(parts) > 1 for parts in folded):
        folded = [parts[1:] for parts in folded]
    folders = [parts[0] if parts else None for parts in folded]
    classes = tuple(sorted({folder for folder in folders if folder is not None}))
    number = {name: i for i, name in enumerate(classes)}
    return Labels(classes, np.array([UNLABELED if f is None else number[f] for f in folders], dtype=np.int64))


def from_attributes(paths: Iterable[str], table: Mapping[str, Sequence[bool]], attributes: Sequence[str]) -> Labels:
    """2^k classes from k attributes; `table` maps a file name to one bool for each of them.

    The class `not-Smiling+Male` has the second of `Smiling,Male` and not the first. Images without a row have no class.
    """
    combinations = list(product((False, True), repeat=len(attributes)))
    number = {combination: i for i, combination in enumerate(combinations)}
    classes = tuple(
        "+".join(name if has else f"not-{name}" for name, has in zip(attributes, combination, strict=True))
        for combination in combinations
    )
    rows = (table.get(PurePosixPath(path).name) for path in paths)
    return Labels(classes, np.array([UNLABELED if row is None else number[tuple(row)] for row in rows], dtype=np.int64))


def read_attributes(path: Path, attributes: Sequence[str]) -> dict[str, tuple[bool, ...]]:
    """CelebA's `list_attr_celeba.txt`: the number of images, the attributes' names, then a row of 1 and -1 for each
    image.

    Raises:
        ValueError: for a file of another form, and for attributes that it does not have.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file") from None
    names = lines[1].split() if len(lines) > 1 else []
    if not (lines and lines[0].strip().isdecimal() and names):
        raise ValueError(f"{path}: expected CelebA's attributes: a line with the number of images, a line with names")
    if unknown := [name for name in attributes if name not in names]:
        raise ValueError(f"{path} has no attribute {', '.join(unknown)}; it has {', '.join(names)}")
    if len(set(attributes)) < len(attributes):
        raise ValueError(f"{','.join(attributes)}: an attribute is named twice")
    columns = [names.index(name) for name in attributes]
    table = {}
    for number, line in enumerate(lines[2:], start=3):
        file, *values = line.split() or [""]
        if len(values) != len(names) or not set(values) <= {"1", "-1"}:
            raise ValueError(f"{path}, line {number}: expected a file's name and {len(names)} times 1 or -1")
        table[file] = tuple(values[column] == "1" for column in columns)
    if len(table) != int(lines[0]):
        raise ValueError(f"{path} states {int(lines[0])} images and has {len(table)}")
    return table


def find_attributes(data: Path) -> Path:
    """CelebA's table in a folder of images, or beside that folder or archive, as it is downloaded.

    Raises:
        ValueError: when it is in none of these folders.
    """
    candidates = [data / ATTRIBUTE_FILE, data.parent / ATTRIBUTE_FILE, data.parent / "Anno" / ATTRIBUTE_FILE]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise ValueError(f"no {ATTRIBUTE_FILE} in {data} or beside it: give its path with --attributes")
    return found


def parse_labels(text: str, classes: Sequence[str], num_classes: int) -> list[int]:
    """The numbers of classes such as `smiling,3`: names (in any case) and numbers, separated by commas.

    Raises:
        ValueError: for what is neither.
    """
    names = {name.lower(): number for number, name in enumerate(classes)}
    numbers = []
    for part in (part.strip() for part in text.split(",")):
        # A class may be called 3: names have precedence over numbers.
        number = names.get(part.lower(), int(part) if part.isdecimal() else UNLABELED)
        if not 0 <= number < num_classes:
            known = f"{', '.join(classes)}; or " if classes else ""
            raise ValueError(f"expected classes ({known}numbers from 0 to {num_classes - 1}), got {part!r}")
        numbers.append(number)
    return numbers
