"""Other implementations' weights into ours."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torch_sagan.attention import SelfAttention2d
from torch_sagan.discriminator import SAGANDiscriminator
from torch_sagan.generator import SAGANGenerator

__all__ = ["convert_legacy_spectral_norm", "load_reference_state_dict"]

# Theirs -> ours, within a normalised layer, a weight under PyTorch's hook, an attention layer and a batch norm.
NORMALIZED = {
    "bias": "bias",
    "weight_bar": "parametrizations.weight.original",
    "weight_u": "parametrizations.weight.0._u",
    "weight_v": "parametrizations.weight.0._v",
}
LEGACY = {"_orig": "original", "_u": "0._u", "_v": "0._v"}
ATTENTION = {"query_conv": "query", "key_conv": "key", "value_conv": "value"}
OFFICIAL_ATTENTION = {"theta": "query", "phi": "key", "g": "value", "o": "out"}
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

# BigGAN-PyTorch's own spectral norm keeps a row vector u for each weight and the last sigma, and iterates on v = W u.
BIGGAN_BUFFERS = (".u0", ".sv0")
DERIVED = "v, derived from u0"


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

    BigGAN-PyTorch's block may come with the buffers of its spectral norm (``theta.u0``, ``theta.sv0``, ...). Where our
    projections are spectrally normalised too (:func:`apply_spectral_norm`), u is taken from them and v follows from it;
    where they are not, the weights are divided by the sigma that u gives, so that the output is the same.

    Args:
        model: one of the models above. Nothing is loaded unless everything fits.
        state_dict: the other implementation's weights.

    Raises:
        TypeError: for a model of another kind.
        ValueError: when keys are missing, unexpected or of another shape; the message names them.

    >>> import torch
    >>> attention = SelfAttention2d(64)
    >>> load_reference_state_dict(attention, torch.load("attention.pt"))  # doctest: +SKIP
    """
    if state_dict and all(key.startswith("module.") for key in state_dict):
        state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    if isinstance(model, SelfAttention2d) and any(key.endswith(BIGGAN_BUFFERS) for key in state_dict):
        state_dict = _with_biggan_buffers_resolved(model, state_dict)
    targets, names = model.state_dict(keep_vars=True), _names(model)
    problems = {
        "missing": [key for key in names if key not in state_dict and not key.endswith(DERIVED)],
        "unexpected": [key for key in state_dict if key not in names],
        "without a place in this model": [key for key, name in names.items() if name not in targets],
        "of another shape": [
            f"{key} {tuple(state_dict[key].shape)} instead of {tuple(targets[name].shape)}"
            for key, name in names.items()
            if key in state_dict and name in targets and not _same_shape(state_dict[key], targets[name])
        ],
        "in this model without a source": sorted(set(targets) - set(names.values())),
    }
    found = [f"{what}: {', '.join(keys)}" for what, keys in problems.items() if keys]
    if found:
        raise ValueError(f"the state dict does not fit {type(model).__name__}: {'; '.join(found)}")
    with torch.no_grad():
        for key, name in names.items():
            targets[name].copy_(state_dict[key].view_as(targets[name]))


def convert_legacy_spectral_norm(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename what the older :func:`torch.nn.utils.spectral_norm` saves to the keys of :func:`spectral_norm`.

    =================  =======================================
    its key            key here
    =================  =======================================
    ``X.weight_orig``  ``X.parametrizations.weight.original``
    ``X.weight_u``     ``X.parametrizations.weight.0._u``
    ``X.weight_v``     ``X.parametrizations.weight.0._v``
    =================  =======================================

    So for any module path X, with a ``module.`` before it or none, and for weights of any name. All other entries and
    their order stay. The outputs in evaluation are the same.

    Args:
        state_dict: the state dict of a model, or of its wrapper; it is left as it is.

    Returns:
        A new state dict with the same tensors.

    Raises:
        ValueError: when there is a ``weight_u`` and no ``weight_v``, as in the first form that PyTorch saved.
        TypeError: when it is no state dict, but a model or a file's name.

    >>> from torch.nn.utils import spectral_norm as legacy
    >>> sorted(convert_legacy_spectral_norm(legacy(nn.Linear(2, 2, bias=False)).state_dict()))
    ['parametrizations.weight.0._u', 'parametrizations.weight.0._v', 'parametrizations.weight.original']
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"expected a state dict, got {type(state_dict).__name__}")
    names = [key.removesuffix("_orig") for key in state_dict if key.endswith("_orig")]
    names = [name for name in names if f"{name}_u" in state_dict]  # pruning has keys in _orig too
    without_v = [f"{name}_v" for name in names if f"{name}_v" not in state_dict]
    if without_v:
        raise ValueError(
            f"missing: {', '.join(without_v)}. PyTorch derives it when such a state dict is loaded into a model with "
            "torch.nn.utils.spectral_norm: do so, and convert that model's state dict"
        )
    renamed: dict[str, str] = {}
    for name in names:
        path, dot, weight = name.rpartition(".")
        prefix = f"{path}{dot}parametrizations.{weight}"
        renamed |= {f"{name}{theirs}": f"{prefix}.{ours}" for theirs, ours in LEGACY.items()}
    converted = copy.copy(state_dict)  # with the versions of the modules, which PyTorch keeps in an attribute
    converted.clear()
    converted.update({renamed.get(key, key): value for key, value in state_dict.items()})
    return converted


def _same_shape(source: Tensor, target: Tensor) -> bool:
    """Whether the shapes agree; a scalar and a tensor of one element do (gamma)."""
    return source.shape == target.shape or source.numel() == target.numel() == 1


def _names(model: nn.Module) -> dict[str, str]:
    """The other implementation's key -> our key."""
    if isinstance(model, SAGANGenerator):
        return _network_names(model, "to_image")
    if isinstance(model, SAGANDiscriminator):
        return _network_names(model, "to_logit.conv")
    if isinstance(model, SelfAttention2d):
        return _attention_names(model)
    raise TypeError(f"expected a SAGANGenerator, a SAGANDiscriminator or a SelfAttention2d, got {type(model).__name__}")


def _network_names(model: SAGANGenerator | SAGANDiscriminator, last: str) -> dict[str, str]:
    names: dict[str, str] = {}
    for i, block in enumerate(model.blocks):
        names |= {f"l{i + 1}.0.module.{theirs}": f"blocks.{i}.conv.{ours}" for theirs, ours in NORMALIZED.items()}
        if hasattr(block, "norm"):
            names |= {f"l{i + 1}.1.{key}": f"blocks.{i}.norm.{key}" for key in BATCH_NORM}
    for i, (size, layer) in enumerate(model.attention.items()):
        names |= {
            f"attn{i + 1}.{theirs}": f"attention.{size}.{ours}" for theirs, ours in _attention_names(layer).items()
        }
    return names | {f"last.0.{key}": f"{last}.{key}" for key in ("weight", "bias")}


def _attention_names(layer: nn.Module) -> dict[str, str]:
    if isinstance(layer.out, nn.Identity):
        names = {f"{theirs}.{key}": f"{ours}.{key}" for theirs, ours in ATTENTION.items() for key in ("weight", "bias")}
        return names | {"gamma": "gamma"}
    names = {"gamma": "gamma"}
    for theirs, ours in OFFICIAL_ATTENTION.items():
        if hasattr(layer.get_submodule(ours), "parametrizations"):
            names[f"{theirs}.weight"] = f"{ours}.{NORMALIZED['weight_bar']}"
            names[f"{theirs}.u0"], names[f"{theirs}.{DERIVED}"] = (
                f"{ours}.{NORMALIZED[key]}" for key in ("weight_u", "weight_v")
            )
        else:
            names[f"{theirs}.weight"] = f"{ours}.weight"
    return names


def _with_biggan_buffers_resolved(layer: SelfAttention2d, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``theta.weight, theta.u0, theta.sv0`` into what :func:`_attention_names` asks for.

    BigGAN-PyTorch's u0 is (1, h). Its evaluation computes v = uW / |uW| and sigma = v Wᵀ u' with u' = vWᵀ / |vWᵀ|.
    """
    resolved = {key: value for key, value in state_dict.items() if not key.endswith(BIGGAN_BUFFERS)}
    for theirs, ours in OFFICIAL_ATTENTION.items():
        weight, u = state_dict.get(f"{theirs}.weight"), state_dict.get(f"{theirs}.u0")
        if weight is None or u is None or u.numel() != len(weight):
            resolved |= {} if u is None else {f"{theirs}.u0": u}
            continue  # what is missing, or of another shape, is reported by its own name
        matrix = weight.flatten(1)  # (h, w)
        v = nn.functional.normalize(matrix.mT @ u.flatten(), dim=0)  # (w,)
        image = matrix @ v  # (h,)
        if hasattr(layer.get_submodule(ours), "parametrizations"):
            resolved[f"{theirs}.u0"], resolved[f"{theirs}.{DERIVED}"] = nn.functional.normalize(image, dim=0), v
        else:
            resolved[f"{theirs}.weight"] = weight / torch.linalg.vector_norm(image)
    return resolved
