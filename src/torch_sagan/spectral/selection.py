"""Select layers of a model by names, wildcards or a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import TypeAlias

from torch import nn

from torch_sagan._checks import nearest_names
from torch_sagan.surgery.inserted_layer import MARK, NAME

__all__ = ["TRANSPOSED_CONVOLUTIONS", "Layers", "select_layers"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMALIZABLE = (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, nn.Linear, nn.Embedding)

Layers: TypeAlias = str | Iterable[str] | Callable[[str, nn.Module], bool]


def select_layers(model: nn.Module, include: Layers | None, exclude: Layers | None) -> dict[str, nn.Module]:
    """The convolutions, linear layers and embeddings that are included and not excluded, by the first of their names.

    Raises:
        ValueError: when the model has no such layer, a name matches none, or none is left.
        TypeError: when ``include`` or ``exclude`` is neither names nor a function.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    inserted = {path for path, module in modules.items() if hasattr(module, MARK)}
    # Layer -> each of its names, with the names of the containers around it.
    layers: dict[nn.Module, dict[str, list[str]]] = {}
    for path, module in modules.items():
        if isinstance(module, NORMALIZABLE):
            layers.setdefault(module, {})[path] = _prefixes(path, inserted)
    kind = type(model).__name__
    if not layers:
        raise ValueError(f"{kind} has no convolution, linear layer or embedding to normalize")
    included = set(layers) if include is None else _match_layers(layers, "include", include, kind)
    excluded = set() if exclude is None else _match_layers(layers, "exclude", exclude, kind)
    selected = {next(iter(names)): layer for layer, names in layers.items() if layer in included - excluded}
    if not selected:
        raise ValueError(f"include and exclude leave none of the {len(layers)} layers of {kind} to normalize")
    return selected


def _match_layers(
    layers: dict[nn.Module, dict[str, list[str]]], argument: str, wanted: object, kind: str
) -> set[nn.Module]:
    """The layers that ``include`` or ``exclude`` means."""
    if callable(wanted) and not isinstance(wanted, (type, nn.Module)):
        return {layer for layer, names in layers.items() if any(wanted(name, layer) for name in names)}
    prefixes = {layer: {prefix for each in names.values() for prefix in each} for layer, names in layers.items()}
    matched = set()
    for pattern in wanted if isinstance(wanted, Iterable) and not isinstance(wanted, str) else [wanted]:
        if not isinstance(pattern, str):
            got = type(pattern).__name__
            raise TypeError(f"{argument} takes dotted names, or a function of name and layer, got {got}")
        matching = {layer for layer, own in prefixes.items() if any(fnmatchcase(name, pattern) for name in own)}
        if not matching:
            nearest = nearest_names(pattern, sorted(set().union(*prefixes.values())))
            raise ValueError(
                f"{argument}: {pattern!r} matches no convolution, linear layer or embedding of {kind}; nearest: "
                f"{nearest}"
            )
        matched |= matching
    return matched


def _prefixes(path: str, inserted: set[str]) -> list[str]:
    """``a.b.c`` -> ``a``, ``a.b``, ``a.b.c``; without ``b`` where c is attention inserted after it."""
    prefixes = accumulate(path.split("."), "{}.{}".format)
    below = [layer for layer in inserted if f"{path}.".startswith(f"{layer}.")]
    return [prefix for prefix in prefixes if f"{prefix}.{NAME}" not in below]
