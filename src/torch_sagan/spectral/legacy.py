"""PyTorch's older spectral norm, a hook that runs before each forward pass: find it, remove it, convert its files."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.utils import remove_spectral_norm
from torch.nn.utils.spectral_norm import SpectralNorm as LegacySpectralNorm
from torch.nn.utils.spectral_norm import SpectralNormLoadStateDictPreHook

__all__ = ["LegacySpectralNorm", "convert_legacy_spectral_norm", "drop_load_hook", "legacy_hooks", "remove_legacy_hook"]

# The older hook -> the parametrization, within the name of a weight.
SUFFIXES = {"_orig": "original", "_u": "0._u", "_v": "0._v"}


def legacy_hooks(module: nn.Module) -> dict[str, LegacySpectralNorm]:
    """The hooks of this module, by the names of the weights that they normalize."""
    # PyTorch has no public way to list hooks; its own remove_spectral_norm reads this dictionary too.
    hooks = module._forward_pre_hooks.values()
    return {hook.name: hook for hook in hooks if isinstance(hook, LegacySpectralNorm)}


def remove_legacy_hook(module: nn.Module, name: str) -> None:
    """Leave the weight without the norm, in the parameter that an optimizer knows."""
    original = module.get_parameter(f"{name}_orig")
    remove_spectral_norm(module, name)
    drop_load_hook(module, name)
    # PyTorch makes a new parameter, which an optimizer would not know, and which would be trainable in any case.
    module.register_parameter(name, original)


def drop_load_hook(module: nn.Module, name: str) -> None:
    """Drop what PyTorch's ``remove_spectral_norm`` overlooks, the hook that asks state dicts for ``weight_orig``."""
    hooks = module._load_state_dict_pre_hooks
    for key, wrapper in list(hooks.items()):
        hook = getattr(wrapper, "hook", wrapper)
        if isinstance(hook, SpectralNormLoadStateDictPreHook) and hook.fn.name == name:
            del hooks[key]


def convert_legacy_spectral_norm(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename what the older :func:`torch.nn.utils.spectral_norm` saves to the keys of :func:`spectral_norm`.

    =================  =======================================
    older key          key here
    =================  =======================================
    ``X.weight_orig``  ``X.parametrizations.weight.original``
    ``X.weight_u``     ``X.parametrizations.weight.0._u``
    ``X.weight_v``     ``X.parametrizations.weight.0._v``
    =================  =======================================

    X is any module path, with or without a leading ``module.``, and the weight may have any name. All other entries and
    their order stay. The outputs in evaluation are the same.

    Args:
        state_dict: the state dict of a model, or of its wrapper; it is left as it is.

    Returns:
        A new state dict with the same tensors.

    Raises:
        ValueError: when there is a ``weight_u`` and no ``weight_v``, as in the first form that PyTorch saved.
        TypeError: when it is not a state dict but, for example, a model, the name of a file or a whole checkpoint.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"expected a state dict, got {type(state_dict).__name__}")
    entries: Mapping[str, object] = state_dict
    inner = [key for key, value in entries.items() if isinstance(value, Mapping) and not key.endswith("_extra_state")]
    if inner:
        raise TypeError(f"expected a state dict, got a mapping that has some: give its entry {inner[0]!r}")
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
        renamed |= {f"{name}{theirs}": f"{prefix}.{ours}" for theirs, ours in SUFFIXES.items()}
    converted = copy.copy(state_dict)  # with the versions of the modules, which PyTorch keeps in an attribute
    converted.clear()
    converted.update({renamed.get(key, key): value for key, value in state_dict.items()})
    return converted
