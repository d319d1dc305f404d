"""Attention for models that exist: put it in, take it out, see where it looks."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from torch_sagan.attention import AttentionRecord, SelfAttention2d
from torch_sagan.inserted import MARK, NAME

__all__ = ["insert_self_attention", "record_attention", "remove_self_attention"]

M = TypeVar("M", bound=nn.Module)


def insert_self_attention(
    model: M,
    after: str | Iterable[str],
    *,
    example_input: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
    attention: Callable[[int], nn.Module] = SelfAttention2d,
) -> M:
    """Put a new attention layer behind one or several modules of a model, in place.

    The layer becomes the child ``inserted_attention`` of the module that it follows, and everything that calls this
    module receives the layer's output. No name or class in the model changes: its own state-dict keys stay, and a
    checkpoint from before the insertion still loads, with ``strict=True`` too (the layer then keeps its weights).
    A new :class:`SelfAttention2d` is the identity, so the model's outputs stay the same until it is trained.

    The layer stays when modules are converted afterwards, as by ``SyncBatchNorm.convert_sync_batchnorm``. A conversion
    that drops it is an error: where the module is replaced, or else when the converted module is called. Behind a
    ``Sequential`` the layer is the last of its children, so that its ``len`` grows by one.

    Do it before the optimiser is made, which else does not know the new parameters, and before ``torch.compile`` or
    ``DistributedDataParallel``. A module that is used in several places has one layer, which attends in each of them.

    Args:
        model: any module.
        after: dotted path of a submodule, as ``model.named_modules()`` gives it, or several. The submodule has to
            return a feature map (B, C, H, W): a convolution, a norm, an activation, a block, a ``Sequential``.
        example_input: what the model can be called with, a tensor, a tuple of arguments or a mapping of keyword
            arguments. One pass of it in evaluation mode shows the channels of each place; buffers and the random state
            stay as they are. Needed where the module does not know its channels, as an activation or a block does not.
        attention: ``attention(channels) -> Module``, called once for each path. The result takes the device, dtype
            and mode of its place.

    Returns:
        The model itself.

    Raises:
        ValueError: for a path that does not exist (the message lists the nearest ones) or is named twice, a place that
            has an inserted layer already, channels that are not known without ``example_input``, and a place that
            returns no feature map (the message says what it returns), returns several with different channels, or is
            not reached; for a model that is compiled or wrapped in ``DistributedDataParallel``. The model is then as it
            was.
        TypeError: when ``after`` holds something else than paths, ``example_input`` is neither a tensor nor a tuple nor
            a mapping, or ``attention`` is no function or returns no module.

    >>> model = nn.Sequential(
    ...     nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(64, 1, 4)
    ... )
    >>> x = torch.randn(2, 3, 32, 32)
    >>> before = model(x)
    >>> model = insert_self_attention(model, after="1", example_input=x)
    >>> torch.equal(model(x), before)
    True
    >>> [name for name, module in model.named_modules() if isinstance(module, SelfAttention2d)]
    ['1.inserted_attention']
    """
    # Compiled graphs do not look for new modules and hooks.
    if any("_orig_mod" in module._modules or module._compiled_call_impl is not None for module in model.modules()):
        raise ValueError(f"{type(model).__name__} is compiled, and would not run the new layers: insert before that")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("DistributedDataParallel would not synchronise the new parameters: insert before you wrap")
    if isinstance(attention, nn.Module) or not callable(attention):  # a layer can be called too, but not with channels
        raise TypeError(f"attention takes channels and returns a module, got {type(attention).__name__}")
    if not (example_input is None or isinstance(example_input, (Tensor, tuple, Mapping))):
        raise TypeError(
            "example_input takes a tensor, a tuple of arguments or a mapping of keyword arguments, got "
            f"{type(example_input).__name__}"
        )
    targets = _find(model, after)
    channels = (
        {path: _known_channels(path, module) for path, module in targets.items()}
        if example_input is None
        else _channels_of_a_pass(model, targets, example_input)
    )
    layers = {}
    for path, module in targets.items():
        layer = attention(channels[path])
        if not isinstance(layer, nn.Module):
            raise TypeError(f"attention must return a module, got {type(layer).__name__}")
        like = next((p for part in (module, model) for p in part.parameters() if p.is_floating_point()), None)
        # Not the tensor itself, which in a lazy module is none yet.
        layers[path] = (layer if like is None else layer.to(like.device, like.dtype)).train(module.training)

    for path, module in targets.items():  # nothing fails from here on
        layers[path].register_load_state_dict_pre_hook(_keep_own_weights)
        setattr(layers[path], MARK, True)
        module.add_module(NAME, layers[path])  # and _accompany sees to it that the module calls the layer
    return model


def remove_self_attention(model: M) -> M:
    """Undo :func:`insert_self_attention` everywhere in a model. Layers that it was built with stay.

    Returns:
        The model itself, with the keys and the function that it had without the layers.

    Raises:
        ValueError: when nothing was inserted.
    """
    found = False
    for module in list(model.modules()):
        if NAME in module._modules and _inserted_layer(module) is not None:
            delattr(module, NAME)
            found = True
        for handle, hook in list(module._forward_hooks.items()):
            if hook is _attend:  # also where a conversion has dropped the layer
                del module._forward_hooks[handle]
                found = True
    if not found:
        raise ValueError(f"{type(model).__name__} has no inserted attention")
    return model


@contextmanager
def record_attention(model: nn.Module) -> Iterator[dict[str, list[AttentionRecord]]]:
    """Record the map of every :class:`SelfAttention2d` that runs inside of the ``with`` block.

    The model is called as always. Its outputs differ by rounding at most, because the layers now hold their maps, which
    takes memory in proportion to N·M. Compiled models run uncompiled inside (with torch 2.5 they are not recorded).
    Afterwards nothing is left in the model.

    Args:
        model: any module, with layers that it was built with or that were inserted; it may be one itself (path ``""``).

    Yields:
        A dictionary from the layer's dotted path to a list of records, one for each call, oldest first. A layer that
        did not run has an empty list.

    Raises:
        ValueError: when the model has no such layer.

    >>> model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), SelfAttention2d.official(16))
    >>> with record_attention(model) as records:
    ...     y = model(torch.randn(2, 3, 8, 12))
    >>> record = records["1"][0]
    >>> record.attention.shape, record.query_size, record.key_size
    (torch.Size([2, 96, 24]), (8, 12), (4, 6))
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, SelfAttention2d)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no SelfAttention2d to record")
    records: dict[str, list[AttentionRecord]] = {path: [] for path in layers}
    asked: dict[str, bool] = {}

    def ask(path: str, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        asked[path] = kwargs.get("return_attention", False)
        return args, kwargs | {"return_attention": True}

    def keep(path: str, layer: SelfAttention2d, args: Any, output: tuple[Tensor, Tensor]) -> Any:
        y, attention = output
        height, width = y.shape[2:]
        key_size = (height // layer.pool, width // layer.pool)
        gamma = layer.gamma.detach().clone()  # which training goes on to change
        records[path].append(AttentionRecord(attention.detach(), (height, width), key_size, gamma))
        return output if asked[path] else y

    handles = []
    for path, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(partial(ask, path), with_kwargs=True))
        # In front of the hooks that are there: those shall see what they always see.
        handles.append(layer.register_forward_hook(partial(keep, path), prepend=True))
    try:
        # A compiled graph would run without hooks that it was not compiled with.
        with torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else nullcontext():
            yield records
    finally:
        for handle in handles:
            handle.remove()


def _attend(module: nn.Module, args: Any, output: Tensor) -> Any:
    # A function of the module that is called, which holds no layer itself: copies of the model have their own.
    layer = _inserted_layer(module)
    if layer is None:
        raise RuntimeError(
            f"{type(module).__name__} has lost the attention that was inserted after it, to a conversion that does not "
            "keep children: convert first and insert then (remove_self_attention removes what is left of it)"
        )
    return layer(output)


def _accompany(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Whenever any module gets a child: whoever gets an inserted layer calls it, and nobody drops one unnoticed.

    Conversions make a new module and give it the old one's children, but not its hooks.
    """
    if name == NAME and hasattr(module, MARK):
        runs_children = type(parent).forward is nn.Sequential.forward  # the last one last
        if not runs_children and _attend not in parent._forward_hooks.values():
            parent.register_forward_hook(_attend)
        return
    drops = name in parent._modules and _inserted_layer(parent._modules[name]) is not None
    if drops and not (module is not None and any(hasattr(part, MARK) for part in module.modules())):
        raise RuntimeError(
            f"{name!r} of {type(parent).__name__} has inserted attention, which its replacement "
            f"({type(module).__name__}) has not: remove_self_attention first, and insert it again afterwards"
        )


# For every module of the process, since PyTorch does not tell which of them a conversion will make.
register_module_module_registration_hook(_accompany)


def _inserted_layer(module: nn.Module | None) -> nn.Module | None:
    layer = getattr(module, NAME, None)
    return layer if hasattr(layer, MARK) else None


def _keep_own_weights(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a checkpoint without any of the layer's keys, from before the insertion, load strictly."""
    if not any(key.startswith(prefix) for key in state_dict):
        state_dict.update(layer.state_dict(prefix=prefix))


def _find(model: nn.Module, after: object) -> dict[str, nn.Module]:
    paths = list(after) if isinstance(after, Iterable) and not isinstance(after, str) else [after]
    if not paths:
        raise ValueError("after names no module")
    # Modules that are used in several places have as many paths.
    modules = {path: module for path, module in model.named_modules(remove_duplicate=False) if path}
    targets: dict[str, nn.Module] = {}
    for path in paths:
        if not isinstance(path, str):
            raise TypeError(f"after takes dotted paths, got {type(path).__name__}")
        if path not in modules:
            ending = [name for name in modules if path and name.endswith(f".{path}")]
            nearest = ending[:5] or difflib.get_close_matches(path, modules, n=5, cutoff=0.3)
            raise ValueError(
                f"{type(model).__name__} has no module {path!r}; the nearest are {', '.join(map(repr, nearest))}"
                if nearest
                else f"{type(model).__name__} has no module {path!r}; model.named_modules() lists what it has"
            )
        module = modules[path]
        if _inserted_layer(module) is not None:
            raise ValueError(f"{path!r} has an inserted attention layer already")
        if module in targets.values():
            raise ValueError(f"{path!r} names a module that is named already")
        if isinstance(module, nn.Sequential) and type(module).forward is not nn.Sequential.forward:
            raise ValueError(
                f"{path!r} is a Sequential with a forward of its own, which may run its children in any way: name the "
                "module inside of it"
            )
        if hasattr(module, NAME):
            raise ValueError(f"{path!r} has an attribute {NAME!r} of its own")
        targets[path] = module
    return targets


# Modules that pass channels on as they come.
TRANSPARENT = (
    nn.Identity, nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ReLU6, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Hardswish, nn.Softplus, nn.Dropout, nn.Dropout2d, nn.Upsample, nn.MaxPool2d,
    nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d,
    nn.InstanceNorm2d,  # which accepts more channels or fewer than it was told
)  # fmt: skip


def _channels(module: nn.Module) -> int | None:
    """The channels of what a module returns, as far as the module itself tells."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        return module.out_channels
    if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        return module.num_features or None  # 0 in a lazy one that has not run
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, SelfAttention2d):
        return module.channels
    if isinstance(module, nn.Sequential):
        telling = (child for child in reversed(module) if not isinstance(child, TRANSPARENT))
        last = next(telling, None)
        return None if last is None else _channels(last)
    return None


def _known_channels(path: str, module: nn.Module) -> int:
    channels = _channels(module)
    if channels is None:
        raise ValueError(
            f"{path!r} ({type(module).__name__}) does not tell how many channels it returns: give example_input, what "
            "the model can be called with"
        )
    return channels


def _channels_of_a_pass(
    model: nn.Module, targets: Mapping[str, nn.Module], example_input: Tensor | tuple[Any, ...] | Mapping[str, Any]
) -> dict[str, int]:
    returned: dict[str, list[Any]] = {path: [] for path in targets}

    def note(path: str, module: nn.Module, args: Any, output: Any) -> None:
        returned[path].append(output.shape if isinstance(output, Tensor) else output)

    handles = [module.register_forward_hook(partial(note, path)) for path, module in targets.items()]
    try:
        with _undisturbed(model):
            if isinstance(example_input, Mapping):
                model(**example_input)
            else:
                model(*(example_input if isinstance(example_input, tuple) else (example_input,)))
    finally:
        for handle in handles:
            handle.remove()

    channels = {}
    for path, outputs in returned.items():
        if not outputs:
            inside = ", though it may call what is inside" if any(targets[path].children()) else ""
            raise ValueError(f"{path!r} is not reached: the model does not call it with this example_input{inside}")
        for output in outputs:
            if not isinstance(output, torch.Size) or len(output) != 4:
                raise ValueError(f"{path!r} returns {_describe(output)}, expected a feature map (B, C, H, W)")
        found = {output[1] for output in outputs}
        if len(found) > 1:
            raise ValueError(
                f"{path!r} runs {len(outputs)} times, with {sorted(found)} channels: one layer cannot serve them all"
            )
        channels[path] = found.pop()
    return channels


def _describe(output: Any) -> str:
    if isinstance(output, torch.Size):
        return f"a tensor {tuple(output)}"
    if isinstance(output, (tuple, list)):
        return f"a {type(output).__name__} of {len(output)}"
    return f"a {type(output).__name__}"


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """A pass inside leaves modes, buffers and random states as they were."""
    training = [module for module in model.modules() if module.training]
    # Evaluation mode spares the buffers of norms; whatever else a model does to its own is undone.
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    contents = [(buffer, buffer.clone()) for buffer in model.buffers()]
    tensors = (*model.parameters(), *model.buffers())
    gpus = sorted({tensor.device.index for tensor in tensors if tensor.device.type == "cuda"})
    try:
        with torch.no_grad(), torch.random.fork_rng(gpus):
            model.eval()
            yield
    finally:
        with torch.no_grad():
            for buffer, content in contents:
                buffer.copy_(content)
        for module, own in buffers:
            module._buffers.update(own)
        for module in training:
            module.training = True
