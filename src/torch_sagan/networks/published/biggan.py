"""ajbrock/BigGAN-PyTorch: the networks of its ``launch_SAGAN`` scripts, not BigGAN itself, which joins z and classes.

Spectral norm is in its layers: a weight, ``u0``, and ``sv0``, the last sigma. Its evaluation computes
v = uW / |uW| and sigma = v Wᵀ u' with u' = vWᵀ / |vWᵀ|.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from torch_sagan.networks.published.dialect import Dialect, State

__all__ = ["BIGGAN", "VECTORS", "settled"]

# Ours -> theirs. Both of our vectors follow from their one.
VECTORS = {
    "parametrizations.weight.original": "weight",
    "parametrizations.weight.0._u": "u0",
    "parametrizations.weight.0._v": "u0",
}


def settled(weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """u (h,) and v (w,) of a weight as its evaluation computes them from u0 (1, h)."""
    matrix = weight.flatten(1)  # (h, w)
    v = nn.functional.normalize(matrix.mT @ u.flatten(), dim=0)  # (w,)
    return nn.functional.normalize(matrix @ v, dim=0), v


@dataclass(frozen=True)
class _BigGAN(Dialect):
    def values(self, state: State, names: dict[str, str]) -> dict[str, Tensor]:
        values = super().values(state, names)
        for ours in list(values):
            if ours.endswith("parametrizations.weight.original"):
                layer = ours.removesuffix("original")
                if f"{layer}0._u" in values:
                    u, v = settled(values[ours], values[f"{layer}0._u"])
                    values[f"{layer}0._u"], values[f"{layer}0._v"] = u, v
        return values


BIGGAN = _BigGAN(
    framework="BigGAN-PyTorch",
    marks={"generator": r"output_layer\.2\.(weight|u0)", "discriminator": r"blocks\.0\.0\.conv1\.(weight|u0)"},
    outside={
        "generator": {
            "blocks.0.linear.": "linear.",
            "to_image.0.weight": "output_layer.0.gain",
            "to_image.0.running_": "output_layer.0.stored_",
            "to_image.0.": "output_layer.0.",
            "to_image.2.": "output_layer.2.",
        },
        "discriminator": {
            "to_logit.projection.linear.": "linear.",
            "to_logit.projection.embedding.": "embed.",
        },
    },
    place="blocks.{}.0.",
    attention="gamma",
    attention_place="blocks.{}.1.",
    parts={
        "norm1.gamma": "bn1.gain.weight",
        "norm1.beta": "bn1.bias.weight",
        "norm2.gamma": "bn2.gain.weight",
        "norm2.beta": "bn2.bias.weight",
        "norm1.scale.": "bn1.gain.",
        "norm1.norm.running_": "bn1.stored_",
        "norm2.norm.running_": "bn2.stored_",
        "norm1.norm.": "bn1.",
        "norm2.norm.": "bn2.",
        "shortcut.": "conv_sc.",
        "query.": "theta.",
        "key.": "phi.",
        "value.": "g.",
        "out.": "o.",
        **VECTORS,
    },
    norm_eps=1e-5,
    optional=("num_batches_tracked",),
)
