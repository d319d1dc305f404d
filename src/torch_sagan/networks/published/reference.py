"""heykeetae/Self-Attention-GAN, the PyTorch reference: its two networks of 64 pixels, and their layer.

It unfolds every weight along dimension 0, transposed convolutions too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from torch_sagan.networks.published.dialect import Dialect, Kind, Network, State
from torch_sagan.spectral.registration import spectral_norm

__all__ = ["PARTS", "REFERENCE"]

PARTS = {
    "to_image.": "last.0.",
    "to_logit.conv.": "last.0.",
    ".conv.": ".0.module.",
    ".norm.": ".1.",
    "query.": "query_conv.",
    "key.": "key_conv.",
    "value.": "value_conv.",
    "parametrizations.weight.original": "weight_bar",
    "parametrizations.weight.0._": "weight_",
}


@dataclass(frozen=True)
class _Reference(Dialect):
    """Not residual, and with names of its own for the stages, so that nothing but the parts is as in the others."""

    def names(self, network: Network) -> dict[str, str]:
        prefixes = {f"blocks.{i}.": self.place.format(i + 1) for i in range(len(network.blocks))}
        prefixes |= {f"attention.{size}.": f"attn{i + 1}." for i, size in enumerate(network.attention)}
        names = {}
        for ours in network.state_dict():
            prefix = next((prefix for prefix in prefixes if ours.startswith(prefix)), "")
            # The parts reach over the end of the prefix.
            names[ours] = self.translated(prefixes.get(prefix, "") + ours.removeprefix(prefix))
        return names

    def arguments(self, kind: Kind, state: State) -> dict[str, Any]:
        weights = [state["l1.0.module.weight_bar"]]
        while (name := f"l{len(weights) + 1}.0.module.weight_bar") in state:
            weights.append(state[name])
        outputs = 1 if kind == "generator" else 0  # a transposed convolution has them second
        sizes = [4 * 2**i for i in range(len(weights))]
        # Attention follows the last two stages: in G those at the image, in D those at the logit.
        attended = sizes[-2:] if kind == "generator" else sizes[:2]
        arguments: dict[str, Any] = {
            "image_size": 4 * 2 ** len(weights),
            "widths": [weight.shape[outputs] for weight in weights],
            "attention_resolutions": attended if any(key.startswith("attn") for key in state) else (),
            "spectral_norm": partial(spectral_norm, dim=0),
        }
        if kind == "generator":
            return arguments | {"z_dim": weights[0].shape[0], "image_channels": len(state["last.0.bias"])}
        return arguments | {"image_channels": weights[0].shape[1]}

    def values(self, state: State, names: dict[str, str]) -> dict[str, Tensor]:
        return {ours: state[theirs] for ours, theirs in names.items() if theirs in state}


REFERENCE = _Reference(
    framework="the PyTorch reference",
    # A batch norm follows in G alone.
    marks={"generator": r"l1\.1\.running_mean", "discriminator": r"l1\.0\.module\..*"},
    outside={"generator": {}, "discriminator": {}},
    place="l{}.",
    parts=PARTS,
    attention="query_conv.",
    norm_eps=1e-5,
)
