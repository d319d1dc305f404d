"""Attention layers of other implementations, alone: their names, and their spectral norm."""

from __future__ import annotations

from torch import Tensor, nn

from torch_sagan.attention.layer import SelfAttention2d
from torch_sagan.networks.published import reference
from torch_sagan.networks.published.biggan import VECTORS, settled
from torch_sagan.networks.published.dialect import HOOK, State

__all__ = ["names", "resolve_buffers"]

_PROJECTIONS = ("query", "key", "value", "out")
# Of a layer with an output projection, as the paper's released code has it: framework -> its projections.
_OFFICIAL = {
    "BigGAN-PyTorch": (("theta.", "phi.", "g.", "o."), VECTORS, "gamma"),
    "mmgeneration": (("theta.conv.", "phi.conv.", "g.conv.", "o.conv."), HOOK, "gamma"),
    "PyTorch-StudioGAN": (("conv1x1_theta.", "conv1x1_phi.", "conv1x1_g.", "conv1x1_attn."), HOOK, "sigma"),
}


def _framework(state: State) -> str:
    for framework, (projections, _, _) in _OFFICIAL.items():
        if {f"{projections[0]}weight", f"{projections[0]}weight_orig"} & state.keys():
            return framework
    return "BigGAN-PyTorch"


def names(layer: SelfAttention2d, state: State) -> dict[str, str]:
    """Each key of our layer -> that of the implementation that the state dict is from."""
    if isinstance(layer.out, nn.Identity):
        parts = reference.PARTS
    else:
        projections, vectors, gamma = _OFFICIAL[_framework(state)]
        parts = {f"{ours}.": theirs for ours, theirs in zip(_PROJECTIONS, projections, strict=True)}
        parts |= {"gamma": gamma, **vectors}
    names = {}
    for ours in layer.state_dict():
        theirs = ours
        for part, replacement in parts.items():
            theirs = theirs.replace(part, replacement)
        names[ours] = theirs
    return names


def resolve_buffers(layer: SelfAttention2d, state: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Vectors of a spectral norm into u and v, or, where our projection is plain, into its weight.

    Entries that no key of ours stands for are removed from ``state``.
    """
    projections, _, _ = _OFFICIAL[_framework(state)]
    for ours, theirs in zip(_PROJECTIONS, projections, strict=True):
        normalized = hasattr(getattr(layer, ours), "parametrizations")
        weight = state.get(f"{theirs}weight_orig", state.get(f"{theirs}weight"))
        if normalized or f"{theirs}u0" in state:
            state.pop(f"{theirs}sv0", None)  # the last sigma, which follows from u0
        vectors = None if weight is None or weight.ndim != 4 else _vectors(state, theirs, weight)
        if weight is None or vectors is None:
            continue  # what is missing, or of another shape, is reported by its own name
        u, v = vectors
        if normalized:
            values[f"{ours}.parametrizations.weight.0._u"], values[f"{ours}.parametrizations.weight.0._v"] = u, v
        else:
            values[f"{ours}.weight"] = weight / (u @ (weight.flatten(1) @ v))
            for key in ("u0", "weight_u", "weight_v", "weight_orig"):
                state.pop(f"{theirs}{key}", None)
            state[f"{theirs}weight"] = weight


def _vectors(state: State, layer: str, weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """u (h,) and v (w,) of a layer's weight."""
    start, u, v = (state.get(f"{layer}{key}") for key in ("u0", "weight_u", "weight_v"))
    if start is not None and start.numel() == len(weight):
        return settled(weight, start)
    return None if u is None or v is None else (u, v)
