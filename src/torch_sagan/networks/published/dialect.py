"""How a framework names the layers of the residual networks, and the network that its weights need.

All of them have the paper's network. What differs are names, widths, the number of blocks, where attention is, and how
scales and shifts of classes are stored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from torch_sagan.networks.discriminator import SAGANDiscriminator
from torch_sagan.networks.generator import SAGANGenerator

__all__ = ["HOOK", "Dialect", "Kind", "Network", "State"]

State = Mapping[str, Tensor]
Kind = Literal["generator", "discriminator"]
Network = SAGANGenerator | SAGANDiscriminator

# A normalized weight under PyTorch's older hook, ours -> theirs.
HOOK = {"parametrizations.weight.original": "weight_orig", "parametrizations.weight.0._": "weight_"}

SMALLEST = 4  # pixels of the first map of every published generator, and of the last one of most discriminators


@dataclass(frozen=True)
class Dialect:
    """Names of one framework.

    Attributes:
        framework: its name.
        marks: network -> a pattern that one of its keys matches.
        outside: network -> our prefixes -> theirs, of layers that are not in their stack of blocks.
        place: the prefix of a block or attention in their stack, to be formatted with its number there.
        parts: our parts of a name -> theirs, replaced one after the other.
        attention: what follows the place in the names of attention alone.
        attention_place: where attention has the number of the block that it follows, its prefix.
        classes_last: tables of classes are (C, num_classes).
        norm_eps: what its networks add to the variance in batch norms.
        shortcut_after_relu: its discriminators' ReLU works in place.
        optional: our names end so where the framework has no entry.
    """

    framework: str
    marks: Mapping[Kind, str]
    outside: Mapping[Kind, Mapping[str, str]]
    place: str
    parts: Mapping[str, str]
    attention: str
    attention_place: str | None = None
    classes_last: bool = False
    norm_eps: float = 1e-4
    shortcut_after_relu: bool = False
    optional: tuple[str, ...] = ()

    # Ours -> theirs.

    def names(self, network: Network) -> dict[str, str]:
        """Each key of our network -> the framework's."""
        prefixes = self._prefixes(network)
        names = {}
        for ours in network.state_dict():
            prefix = next((prefix for prefix in prefixes if ours.startswith(prefix)), "")
            names[ours] = prefixes.get(prefix, "") + self.translated(ours.removeprefix(prefix))
        return names

    def translated(self, part: str) -> str:
        """Our part of a name -> theirs."""
        for ours, theirs in self.parts.items():
            part = part.replace(ours, theirs)
        return part

    def _prefixes(self, network: Network) -> dict[str, str]:
        kind: Kind = "generator" if isinstance(network, SAGANGenerator) else "discriminator"
        prefixes = dict(self.outside[kind])
        number, attended = 0, 0
        for index, size in enumerate(network.sizes):
            if not any(name.startswith(f"blocks.{index}.") for name in prefixes):
                prefixes[f"blocks.{index}."] = self.place.format(number)
                number += 1
            if str(size) not in network.attention or size == attended:
                continue
            attended = size  # the next block may have the same size, but no attention
            if self.attention_place is not None:
                prefixes[f"attention.{size}."] = self.attention_place.format(number - 1)
            else:
                prefixes[f"attention.{size}."] = self.place.format(number)
                number += 1
        if kind == "discriminator":
            prefixes["to_logit."] = self.place.format(number)
        return prefixes

    # Theirs -> the arguments of our network.

    def kind(self, state: State) -> Kind | None:
        """Which network of this framework has such keys."""
        found = [kind for kind, mark in self.marks.items() if any(re.fullmatch(mark, key) for key in state)]
        return found[0] if found else None

    def arguments(self, kind: Kind, state: State) -> dict[str, Any]:
        """The arguments of :class:`SAGANGenerator` or :class:`SAGANDiscriminator` that the weights need.

        Raises:
            KeyError: where a weight that tells one of them is missing.
        """
        stack, after = self._stack(state)
        return (self._of_generator if kind == "generator" else self._of_discriminator)(state, stack, after)

    def _stack(self, state: State) -> tuple[list[str], list[int]]:
        """The prefixes of their blocks in order, and how many of them come before each attention."""
        pattern = re.compile(re.escape(self.place).replace(r"\{\}", r"(\d+)"))
        numbers = sorted({int(match[1]) for key in state if (match := pattern.match(key))})
        blocks: list[str] = []
        after: list[int] = []
        for number in numbers:
            place = self.place.format(number)
            if not _below(state, place + self.attention):
                blocks.append(place)
                if self.attention_place is None or not _below(state, self.attention_place.format(number)):
                    continue
            after.append(len(blocks))
        return blocks, after

    def _weight(self, state: State, layer: str) -> Tensor:
        return state[name] if (name := f"{layer}weight_orig") in state else state[f"{layer}weight"]

    def _normalized(self, state: State, prefix: str, layer: str) -> bool:
        return prefix + self.translated(f"{layer}.parametrizations.weight.0._u") in state

    def _of_generator(self, state: State, stack: list[str], after: list[int]) -> dict[str, Any]:
        outside = self.outside["generator"]
        convolutions = [self._weight(state, place + self.translated("conv1.")) for place in stack]
        if not convolutions:
            raise KeyError(self.place.format(0) + self.translated("conv1.weight"))
        latent = self._weight(state, outside["blocks.0.linear."])  # (widths[0] · size², z_dim)
        widths = [convolutions[0].shape[1], *(weight.shape[0] for weight in convolutions)]
        size = math.isqrt(latent.shape[0] // widths[0])
        table = self._weight_of_table(state, stack[0])
        normalized = self._normalized(state, stack[0], "conv1")
        return {
            "image_size": size * 2 ** len(stack),
            "z_dim": latent.shape[1],
            "widths": widths,
            "image_channels": self._weight(state, outside["to_image.2."]).shape[0],
            "num_classes": None if table is None else table.shape[1 if self.classes_last else 0],
            "architecture": "resnet",
            "attention_resolutions": [size * 2**blocks for blocks in after],
            "normalize_classes": self._normalized(state, stack[0], "norm1.scale"),
        } | ({} if normalized else {"spectral_norm": None})

    def _weight_of_table(self, state: State, place: str) -> Tensor | None:
        layer = place + self.translated("norm1.scale.")
        return self._weight(state, layer) if _below(state, layer) else None

    def _of_discriminator(self, state: State, stack: list[str], after: list[int]) -> dict[str, Any]:
        outside = self.outside["discriminator"]
        first = [theirs for ours, theirs in outside.items() if ours == "blocks.0."]
        places = [*first, *stack]
        widths = [self._weight(state, place + self.translated("conv1.")).shape[0] for place in places]
        shortcuts = [bool(_below(state, place + self.translated("shortcut."))) for place in places[:-1]]
        halvings = sum(shortcuts)
        smallest = SMALLEST if all(shortcuts) else 2 * SMALLEST
        image = self._weight(state, places[0] + self.translated("conv1."))
        embedding = outside["to_logit.projection.embedding."]
        classes = self._weight(state, embedding).shape[0] if _below(state, embedding) else None
        size = smallest * 2**halvings
        return {
            "image_size": size,
            "widths": widths,
            "downsampling_blocks": halvings,
            "image_channels": image.shape[1],
            "num_classes": classes,
            "architecture": "resnet",
            "attention_resolutions": [size // 2 ** min(blocks + len(first), halvings) for blocks in after],
        } | ({} if self._normalized(state, places[0], "conv1") else {"spectral_norm": None})

    def eps(self, arguments: Mapping[str, Any]) -> float:
        """What batch norms add to the variance in the network of these arguments. No file tells it."""
        return self.norm_eps

    # Values.

    def values(self, state: State, names: dict[str, str]) -> dict[str, Tensor]:
        """The entries of our network, under our keys, of those of their keys that there are."""
        values = {ours: state[theirs] for ours, theirs in names.items() if theirs in state}
        for ours, value in values.items():
            table = re.search(r"\.norm[12]\.(gamma|beta|(scale|shift)\.parametrizations\.weight\.original)$", ours)
            if table and self.classes_last and value.ndim == 2:
                value = value.mT
            if table and table[1] == "gamma":
                value = 1 + value
            values[ours] = value
        return values


def _below(state: State, prefix: str) -> bool:
    return any(key.startswith(prefix) for key in state)
