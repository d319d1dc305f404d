"""Checks of arguments that several modules make."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["at_least_one", "nearest_names", "one_of"]


def at_least_one(**sizes: int | None) -> None:
    """Raise a ValueError that names the first of the given sizes that is below 1. None is allowed."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def one_of(choices: tuple[str, ...], **values: str) -> None:
    """Raise a ValueError that names the first of the given values that is not among the choices."""
    for name, value in values.items():
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def nearest_names(name: str, names: Iterable[str], *, cutoff: float = 0.0) -> str:
    """The dotted names that end in one that does not exist, or else those that resemble it, as an error lists them."""
    names = list(names)
    ending = [other for other in names if name and other.endswith(f".{name}")]
    return ", ".join(map(repr, ending[:5] or difflib.get_close_matches(name, names, n=5, cutoff=cutoff)))
