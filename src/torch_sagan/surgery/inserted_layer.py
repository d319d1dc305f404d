"""A layer that was inserted after a module: what tells it from the model's own, runs it, and makes it new again.

It is a child of its host, the module that it follows, so copies, wrappers and conversions carry it along. Nothing
outside the model knows of it.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

__all__ = ["MARK", "NAME", "attach", "detach", "inserted_layer", "prepare"]

NAME = "inserted_attention"  # of the layer among the children of its host
MARK = "_is_inserted_attention"  # an attribute of the layer, since models may have children of that name themselves


def inserted_layer(module: nn.Module) -> nn.Module | None:
    """The layer that was inserted after this module, with what it has been wrapped in since; or None."""
    # Its registry tells. Attributes do not: a wrapper may answer with those of the module that it wraps.
    if NAME not in module._modules:
        return None
    layer = part = module._modules[NAME]
    while part is not None and getattr(part, MARK, None) is not True:
        inside = part._modules
        part = next(iter(inside.values())) if len(inside) == 1 and NAME not in inside else None
    return None if part is None else layer


def prepare(layer: nn.Module) -> None:
    """Mark a layer that is to be inserted, and keep its values, for checkpoints from before the insertion."""
    setattr(layer, MARK, True)
    values = {name: value for name, value in layer.state_dict().items() if isinstance(value, Tensor)}
    if not any(is_lazy(value) or value.is_meta for value in values.values()):
        layer.register_load_state_dict_pre_hook(partial(_complete, copy.deepcopy(values)))


def attach(model: nn.Module, host: nn.Module, layer: nn.Module) -> None:
    """Insert a prepared layer after a module of the model."""
    host.add_module(NAME, layer)
    _run(host)
    modules = dict(model.named_modules(remove_duplicate=False))
    for names in [path.split(".") for path, module in modules.items() if module is host]:
        for depth in range(len(names)):
            around, rest = modules[".".join(names[:depth])], ".".join(names[depth:])
            keeper = partial(_keep, rest, type(host).__name__)
            if not any(_is_ours(hook) and hook.args == keeper.args for hook in around._forward_pre_hooks.values()):
                around.register_forward_pre_hook(keeper)


def detach(model: nn.Module) -> bool:
    """Remove every inserted layer, and what is left of those that were lost. Returns whether there was any."""
    found = False
    for module in list(model.modules()):
        if inserted_layer(module) is not None:
            del module._modules[NAME]
            found = True
        # PyTorch lists a module's hooks nowhere else, and handles are lost where a conversion copies the hooks alone.
        for hooks in module._forward_hooks, module._forward_pre_hooks:
            for handle in [handle for handle, hook in hooks.items() if _is_ours(hook)]:
                del hooks[handle]
                found = True
    return found


def _is_ours(hook: Any) -> bool:
    return hook is _attend or getattr(hook, "func", None) is _keep


def _run(host: nn.Module) -> None:
    """Let a host call its layer, once. A ``Sequential`` does so anyway: the layer is the last of its children."""
    hooks: dict[Any, Any] = host._forward_hooks
    if type(host).forward is not nn.Sequential.forward and NAME not in hooks and _attend not in hooks.values():
        hooks.setdefault(NAME, _attend)  # one name: the replicas of DataParallel share their hooks and run in threads


def _attend(host: nn.Module, args: Any, output: Tensor) -> Any:
    """The forward hook of a host. It looks the layer up in the module that is called, so that copies call their own."""
    layer = inserted_layer(host)
    if layer is None:
        raise RuntimeError(_lost(type(host).__name__))
    return layer(output)


def _keep(path: str, kind: str, module: nn.Module, args: Any) -> None:
    """The forward pre-hook of each module around a host, which has the class name ``kind`` and is at ``path`` there.

    Conversions such as ``SyncBatchNorm.convert_sync_batchnorm`` make a new host and give it the old one's children, but
    not its hooks; others lose the children too.
    """
    host = module
    for name in path.split("."):
        child = host._modules.get(name)
        if child is None:
            return
        host = child
    hosts = [host]
    if inserted_layer(host) is None:  # it is wrapped, or not attended any more
        hosts = [part for part in host.modules() if inserted_layer(part) is not None]
    for part in hosts:
        _run(part)
    # From a host of the same class remove_self_attention may have taken the layer.
    if not hosts and "." not in path and kind not in [base.__name__ for base in type(host).__mro__]:
        raise RuntimeError(f"{path!r} of {type(module).__name__}: {_lost(type(host).__name__, kind)}")


def _lost(host: str, kind: str = "") -> str:
    replaced = f", which has taken the place of a {kind}," if kind else ""
    return (
        f"{host}{replaced} has lost the attention that was inserted after it, to a conversion that does not keep "
        "children: convert first and insert then (remove_self_attention removes what is left of it)"
    )


@torch.no_grad()
def _complete(values: dict[str, Tensor], layer: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """The hook by which a checkpoint from before the insertion makes the layer new.

    Not with the weights that it has: they may be trained, or be uninitialized memory, as after ``to_empty``. A state
    dict that lacks other keys too is no such checkpoint, and leaves the layer alone.
    """
    missing_keys = rest[2]
    if missing_keys or any(key.startswith(prefix) for key in state_dict):
        return
    new = copy.deepcopy(layer)
    if any(tensor.is_meta for tensor in (*new.parameters(), *new.buffers())):
        new.to_empty(device="cpu")
    for name, buffer in new.named_buffers():
        if "parametrizations" in name and name not in values and buffer.is_floating_point():
            buffer.fill_(1.0)  # power iterations start from it, when the weight is set below
    state, modules = new.state_dict(keep_vars=True), dict(new.named_modules())
    for name, value in values.items():
        path, _, weight = name.rpartition(".")
        if name in state:
            state[name].copy_(value)
        elif path in modules and parametrize.is_parametrized(modules[path], weight):  # since the insertion
            setattr(modules[path], weight, value)
        else:
            return  # another conversion: the keys are reported as missing
    state_dict.update({prefix + name: value for name, value in new.state_dict().items() if f"{NAME}." not in name})
