"""What makes a module call the attention that was inserted after it, also when a conversion has made it anew.

Conversions such as ``SyncBatchNorm.convert_sync_batchnorm`` make a new module and give it the old one's children, but
not its hooks. PyTorch tells of new children process-wide only, to hooks that run whenever any module gets a child. So
this file is imported when attention is inserted, or when a model with such a layer is unpickled (the layer refers to
:func:`keep_own_weights`), and not before: a process that does neither has no such hook.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from torch_sagan.surgery.mark import MARK, NAME, inserted_layer

__all__ = ["attend", "keep_own_weights"]


def attend(module: nn.Module, args: Any, output: Tensor) -> Any:
    """The forward hook of a module after which attention was inserted."""
    # It looks the layer up in the module that is called, so that copies of a model call their own.
    layer = inserted_layer(module)
    if layer is None:
        raise RuntimeError(
            f"{type(module).__name__} has lost the attention that was inserted after it, to a conversion that does not "
            "keep children: convert first and insert then (remove_self_attention removes what is left of it)"
        )
    return layer(output)


def keep_own_weights(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a checkpoint without any of the layer's keys, from before the insertion, load strictly."""
    if not any(key.startswith(prefix) for key in state_dict):
        state_dict.update(layer.state_dict(prefix=prefix))


def _on_registration(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """When any module gets a child: let it call an inserted layer, and do not let it replace one by something else."""
    if name == NAME and hasattr(module, MARK):
        runs_children = type(parent).forward is nn.Sequential.forward  # and the layer as the last one
        if not runs_children and attend not in parent._forward_hooks.values():
            parent.register_forward_hook(attend)
        return
    # Not by getattr: this runs in every model of the process, and the __getattr__ of some is not ready at this time.
    drops = inserted_layer(parent._modules.get(name)) is not None
    if drops and not (module is not None and any(hasattr(part, MARK) for part in module.modules())):
        raise RuntimeError(
            f"{name!r} of {type(parent).__name__} has inserted attention, which its replacement "
            f"({type(module).__name__}) lacks: call remove_self_attention first, and insert it again afterwards"
        )


# For every module of the process, because the modules that a conversion will make are not known in advance.
register_module_module_registration_hook(_on_registration)
