"""Checks of arguments that several rooms make."""

from __future__ import annotations

__all__ = ["at_least_one"]


def at_least_one(**sizes: int) -> None:
    """Raise a ValueError that names the first of the given sizes that is below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
