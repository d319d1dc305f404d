"""Classes of images: from the folders that they are in, or from CelebA's table of attributes.

A label is the number of a class, its index in `Labels.classes`. This file defines the meaning of the trainer's
`--classes` and of `generate.py --labels`; it reads no images.
"""

from __future__ import annotations

import csv
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

UNLABELED = -1
ATTRIBUTE_FILES = ("list_attr_celeba.txt", "list_attr_celeba.csv")
LISTED = 20  # at most so many classes in an error


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
    A row for 000001.jpg is also that of 000001.png, since CelebA has one table for both.
    """
    combinations = list(product((False, True), repeat=len(attributes)))
    number = {combination: i for i, combination in enumerate(combinations)}
    classes = tuple(
        "+".join(name if has else f"not-{name}" for name, has in zip(attributes, combination, strict=True))
        for combination in combinations
    )
    stems = {PurePosixPath(name).stem: row for name, row in table.items()}
    files = (PurePosixPath(path) for path in paths)
    rows = (table.get(file.name, stems.get(file.stem)) for file in files)
    return Labels(classes, np.array([UNLABELED if row is None else number[tuple(row)] for row in rows], dtype=np.int64))


def read_attributes(path: Path, attributes: Sequence[str]) -> dict[str, tuple[bool, ...]]:
    """The table in a file, as `parse_attributes` reads it."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    return parse_attributes(content, str(path), attributes)


def parse_attributes(content: bytes, source: str, attributes: Sequence[str]) -> dict[str, tuple[bool, ...]]:
    """CelebA's table, in both forms that it is distributed in: a row of 1 and -1 for each image.

    `list_attr_celeba.txt` begins with the number of images and a line with the attributes' names, in columns separated
    by spaces. Kaggle's `list_attr_celeba.csv` begins with a line of names, `image_id` the first, separated by commas.

    Raises:
        ValueError: for a file of another form, and for attributes that it does not have.
    """
    try:
        # Editors may have added a byte order mark, other ends of lines, and blank lines at the end.
        lines = content.decode("utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{source}: not a text file in UTF-8") from None
    separator = "," if lines and "," in lines[0] else None  # None: spaces, as many as there are
    stated = int(lines[0]) if lines and lines[0].strip().isdecimal() else None
    header = 0 if separator else 1
    names = [name.strip() for name in lines[header].split(separator)][1 - header :] if len(lines) > header else []
    if (separator is None and stated is None) or not any(names):
        raise ValueError(
            f"{source}: expected CelebA's attributes: a line with the number of images and a line with names, or one "
            "line with names separated by commas"
        )
    if unknown := [name for name in attributes if name not in names]:
        raise ValueError(f"{source} has no attribute {', '.join(unknown)}; it has {', '.join(names)}")
    if len(set(attributes)) < len(attributes):
        raise ValueError(f"{','.join(attributes)}: an attribute is named twice")
    columns = [names.index(name) for name in attributes]
    table: dict[str, tuple[bool, ...]] = {}
    for number, line in enumerate(lines[header + 1 :], start=header + 2):
        file, *values = [value.strip() for value in line.split(separator)] or [""]
        if len(values) != len(names) or not set(values) <= {"1", "-1"}:
            raise ValueError(f"{source}, line {number}: expected a file's name and {len(names)} times 1 or -1")
        file = unicodedata.normalize("NFC", file)
        if file in table:
            raise ValueError(f"{source}, line {number}: {file} is listed twice")
        table[file] = tuple(values[column] == "1" for column in columns)
    if stated is not None and len(table) != stated:
        raise ValueError(f"{source} states {stated} images and has {len(table)}")
    return table


def find_attributes(data: Path) -> Path:
    """CelebA's table in a folder of images, or up to two folders above that folder or archive, as it is downloaded:
    beside it, or in `Anno` beside `Img`.

    Raises:
        ValueError: when it is in none of these folders.
    """
    data = Path(os.path.abspath(data))
    folders = [data, data.parent, data.parent / "Anno", data.parent.parent, data.parent.parent / "Anno"]
    found = next((path for folder in folders for name in ATTRIBUTE_FILES if (path := folder / name).is_file()), None)
    if found is None:
        named = " or ".join(ATTRIBUTE_FILES)
        raise ValueError(f"no {named} in {data}, beside it or in Anno above it: give its path with --attributes")
    return found


def parse_labels(text: str, classes: Sequence[str], num_classes: int) -> list[int]:
    """The numbers of classes such as `smiling,3`: names and numbers, separated by commas.

    A name with a comma in it is given on its own, or quoted as in a CSV file: `"Doe, John",cat`. What is exactly a
    class's name is that class, also if it looks like a number; else a number, else a name in another case.

    Raises:
        ValueError: for what is neither, and for what could be two classes.
    """
    try:
        (parts,) = csv.reader([text], skipinitialspace=True, strict=True)
        numbers = [_number(part, classes, num_classes) for part in parts or [""]]
    except (ValueError, csv.Error) as error:
        if text in classes:
            return [classes.index(text)]
        raise ValueError(str(error)) from None
    if len(parts) > 1 and text in classes:
        raise ValueError(f"{len(parts)} classes, or one of this name: give numbers, or quote the name as in a CSV file")
    return numbers


def _number(part: str, classes: Sequence[str], num_classes: int) -> int:
    """The number of the class that is named."""
    for name in (part, part.strip()):
        if name in classes:
            return classes.index(name)
    if name.isdecimal() and len(name) < 10 and int(name) < num_classes:
        return int(name)
    similar = [known for known in classes if known.casefold() == name.casefold()]
    if len(similar) > 1:
        raise ValueError(f"{name!r} could be {' or '.join(similar)}")
    if not similar:
        known = "".join(f"{known}, " for known in classes[:LISTED]) + ("…, " if len(classes) > LISTED else "")
        known = f"{known[:-2]}; or " if known else ""
        raise ValueError(f"expected classes ({known}numbers from 0 to {num_classes - 1}), got {part!r}")
    return classes.index(similar[0])
