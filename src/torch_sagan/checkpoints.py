"""Other implementations' weights into ours."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torch_sagan.attention import SelfAttention2d
from torch_sagan.discriminator import SAGANDiscriminator
from torch_sagan.generator import SAGANGenerator

__all__ = ["load_reference_state_dict"]

NORMALIZED_WEIGHT = {
    "weight_bar": "parametrizations.weight.original",
    "weight_u": "parametrizations.weight.0._u",
    "weight_v": "parametrizations.weight.0._v",
}
ATTENTION = {"query_conv": "query", "key_conv": "key", "value_conv": "value"}
OFFICIAL_ATTENTION = {"theta": "query", "phi": "key", "g": "value", "o": "out"}


def load_reference_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load weights of other implementations into ours, with the same outputs in evaluation.

    =====================================  ==============================================================
    model                                  state dict
    =====================================  ==============================================================
    ``SAGANGenerator(64, ...)``            the PyTorch reference's generator (heykeetae/Self-Attention-GAN)
    ``SAGANDiscriminator(64, ...)``        the PyTorch reference's discriminator
    ``SelfAttention2d(C)``                 the PyTorch reference's ``Self_Attn``
    ``SelfAttention2d.official(C)``        BigGAN-PyTorch's ``Attention``: ``theta, phi, g, o, gamma``
    =====================================  ==============================================================

    The reference normalises every weight along dimension 0, transposed convolutions too. Build the networks with
    ``spectral_norm=functools.partial(spectral_norm, dim=0)``. A ``module.`` before every key (DataParallel) is dropped.

    Args:
        model: one of the models above. Nothing is loaded unless everything fits.
        state_dict: the other implementation's weights.

    Raises:
        TypeError: for a model of another kind.
        ValueError: when keys are missing, unexpected or of another shape; the message names them.

    >>> attention = SelfAttention2d(64)
    >>> load_reference_state_dict(attention, torch.load("attention.pt"))  # doctest: +SKIP
    """
    names = _names(model)
    if state_dict and all(key.startswith("module.") for key in state_dict):
        state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    ours = model.state_dict()
    unused = sorted(ours.keys() - names.values())
    missing = sorted(names.keys() - state_dict.keys())
    unexpected = sorted(state_dict.keys() - names.keys())
    misshapen = [
        f"{key} {tuple(state_dict[key].shape)} instead of {tuple(ours[name].shape)}"
        for key, name in names.items()
        if key in state_dict and name in ours and _reshaped(state_dict[key], ours[name]) is None
    ]
    absent = sorted(name for name in names.values() if name not in ours)
    problems = [
        f"{what}: {', '.join(keys)}"
        for what, keys in [
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
            ("without a place in the model", absent),
            ("of the model, without a source", unused),
        ]
        if keys
    ]
    if problems:
        raise ValueError(f"the state dict does not fit {type(model).__name__}: " + "; ".join(problems))
    with torch.no_grad():
        for key, name in names.items():
            ours[name].copy_(state_dict[key].view_as(ours[name]))


def _reshaped(source: Tensor, target: Tensor) -> Tensor | None:
    """The source in the target's shape, where that only adds or drops dimensions of size one (a scalar gamma)."""
    if [size for size in source.shape if size > 1] != [size for size in target.shape if size > 1]:
        return None
    return source.view_as(target)


def _names(model: nn.Module) -> dict[str, str]:
    """The other implementation's key -> our key."""
    if isinstance(model, SAGANGenerator):
        return _network_names(model, "to_image", normalized_with_batch_norm=True)
    if isinstance(model, SAGANDiscriminator):
        return _network_names(model, "to_logit", normalized_with_batch_norm=False)
    if isinstance(model, SelfAttention2d):
        return _attention_names(model)
    raise TypeError(f"expected a SAGANGenerator, a SAGANDiscriminator or a SelfAttention2d, got {type(model).__name__}")


def _network_names(
    model: SAGANGenerator | SAGANDiscriminator, last: str, *, normalized_with_batch_norm: bool
) -> dict[str, str]:
    names = {}
    for i in range(len(model.blocks)):
        names[f"l{i + 1}.0.module.bias"] = f"blocks.{i}.conv.bias"
        for theirs, ours in NORMALIZED_WEIGHT.items():
            names[f"l{i + 1}.0.module.{theirs}"] = f"blocks.{i}.conv.{ours}"
        if normalized_with_batch_norm:
            for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                names[f"l{i + 1}.1.{key}"] = f"blocks.{i}.norm.{key}"
    for i, (size, layer) in enumerate(model.attention.items()):
        for theirs, ours in _attention_names(layer).items():
            names[f"attn{i + 1}.{theirs}"] = f"attention.{size}.{ours}"
    for key in ("weight", "bias"):
        names[f"last.0.{key}"] = f"{last}.{key}"
    return names


def _attention_names(layer: nn.Module) -> dict[str, str]:
    official = not isinstance(layer.out, nn.Identity)
    modules = OFFICIAL_ATTENTION if official else ATTENTION
    keys = ("weight",) if official else ("weight", "bias")
    names = {f"{theirs}.{key}": f"{ours}.{key}" for theirs, ours in modules.items() for key in keys}
    return names | {"gamma": "gamma"}
