"""Attention for existing models: put it in, take it out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import nn

from torch_sagan._checks import nearest_names
from torch_sagan.attention.layer import SelfAttention, SelfAttention1d, expected_shape
from torch_sagan.surgery.example_pass import ExampleInput, outputs_of_a_pass
from torch_sagan.surgery.feature_maps import LAYERS, FeatureMap, check_certain, declared, feature_maps
from torch_sagan.surgery.inserted_layer import NAME, attach, detach, inserted_layer, prepare

__all__ = ["insert_self_attention", "remove_self_attention"]

M = TypeVar("M", bound=nn.Module)


def insert_self_attention(
    model: M,
    after: str | Iterable[str],
    *,
    example_input: ExampleInput | None = None,
    attention: Callable[[int], nn.Module] | None = None,
) -> M:
    """Put a new attention layer after one or several modules of a model, in place.

    The layer becomes the child ``inserted_attention`` of the module that it follows, and everything that calls this
    module receives the layer's output; what calls its ``forward`` directly does not. No name or class in the model
    changes: its own state-dict keys stay. A checkpoint from before the insertion still loads, with ``strict=True`` too,
    and makes the layer new again. A new attention layer is the identity, so the model's outputs stay the same
    until it is trained.

    The layer stays when modules are converted afterwards, as by ``SyncBatchNorm.convert_sync_batchnorm``. Where a
    conversion has lost it, the next pass raises an error. After a ``Sequential`` the layer is the last of its children,
    so its ``len`` grows by one.

    Insert before you create the optimizer, which otherwise does not know the new parameters, and before
    ``torch.compile`` or ``DistributedDataParallel``. A module that a model uses several times has one layer, which runs
    each time.

    The layer has the dimension of the feature map: (B, C, L), (B, C, H, W) or (B, C, D, H, W). Three dimensions may
    also be (B, N, C), as in transformers. They are taken as (B, C, L) after modules of PyTorch that return nothing else
    (``Conv1d``, ``BatchNorm1d``, ``MaxPool1d``, ``GroupNorm`` and the like), and after any other module whose output
    has the shape of the last of these, if C and L differ. Elsewhere ``attention=SelfAttention1d`` says so.

    Args:
        model: any module.
        after: dotted path of a submodule, as ``model.named_modules()`` gives it, or several. The submodule has to
            return a feature map: a convolution, a norm, an activation, a block, a ``Sequential``.
        example_input: what the model can be called with, a tensor, a tuple of arguments or a mapping of keyword
            arguments. One pass of it in evaluation mode shows what each module returns; buffers stay as they are, and
            so do the random states of PyTorch, NumPy and Python. It is needed where a module does not declare its
            channels. Convolutions and norms do, and so does a ``Sequential`` that ends in one of them, with or without
            activations after it.
        attention: ``attention(channels) -> Module``, called once for each path. Default: the :class:`SelfAttention1d`,
            :class:`SelfAttention2d` or :class:`SelfAttention3d` that fits. The result takes the mode of the module that
            it follows, and the device and dtype of the feature map that the example gives; without an example, or under
            autocast, those of the module's parameters, or else of the model's.

    Returns:
        The model itself.

    Raises:
        ValueError: for a path that does not exist (the message lists the nearest ones) or is named twice; for a module
            that has an inserted layer already, or whose channels or dimension are not known without ``example_input``;
            for one that the model does not call with this example, or that returns no feature map (the message says
            what it returns) or several of different dimensions, channels, dtypes or devices; for an ``attention`` of
            another dimension; for a ``Sequential`` that has a ``forward`` of its own; for a model that is compiled or
            wrapped for parallel training. The model is then as it was.
        TypeError: when ``after`` contains anything but paths, ``example_input`` is neither a tensor nor a tuple nor
            a mapping, or ``attention`` is not a function or does not return a module.

    >>> import torch
    >>> from torch import nn
    >>> from torch_sagan import SelfAttention2d, insert_self_attention
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
    check_insertable(model)
    # A layer can be called too, but not with channels.
    if attention is not None and (isinstance(attention, nn.Module) or not callable(attention)):
        raise TypeError(f"attention takes channels and returns a module, got {type(attention).__name__}")
    targets = _find(model, after)
    maps = {} if example_input is None else _maps_of_a_pass(model, targets, example_input)
    layers = {}
    for path, module in targets.items():
        map = maps.get(path)
        channels, dims = declared(path, module, model) if map is None else (map.channels, len(map.size))
        layer = _new_layer(path, attention, channels, dims)
        if map is not None and not (attention and isinstance(layer, SelfAttention1d)):
            check_certain(path, map)
        prepare(layer)
        layers[path] = layer.to(*_device_and_dtype(model, module, map)).train(module.training)
    for path, module in targets.items():  # nothing fails from here on
        attach(model, module, layers[path])
    return model


def remove_self_attention(model: M) -> M:
    """Undo :func:`insert_self_attention` everywhere in a model. Layers that it was built with stay.

    Args:
        model: any module, changed in place.

    Returns:
        The model itself, with the keys and the function that it had without the layers.

    Raises:
        ValueError: when nothing was inserted.
    """
    if not detach(model):
        raise ValueError(f"{type(model).__name__} has no inserted attention")
    return model


def _find(model: nn.Module, after: object) -> dict[str, nn.Module]:
    paths = list(after) if isinstance(after, Iterable) and not isinstance(after, str) else [after]
    if not paths:
        raise ValueError("after names no module")
    # A module that is used several times has several paths.
    modules = {path: module for path, module in model.named_modules(remove_duplicate=False) if path}
    targets: dict[str, nn.Module] = {}
    for path in paths:
        if not isinstance(path, str):
            raise TypeError(f"after takes dotted paths, got {type(path).__name__}")
        if path not in modules:
            nearest = nearest_names(path, modules, cutoff=0.3)
            hint = f"the nearest are {nearest}" if nearest else "model.named_modules() lists what it has"
            raise ValueError(f"{type(model).__name__} has no module {path!r}; {hint}")
        module = modules[path]
        if module in targets.values():
            raise ValueError(f"{path!r} names a module that is named already")
        check_target(path, module)
        targets[path] = module
    return targets


def check_insertable(model: nn.Module) -> None:
    """Refuse a model that would not run or not train a layer inserted now."""
    # torch.compile leaves one of these: a wrapper around the original, or the compiled call of the module itself.
    if any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules()):
        raise ValueError(f"{type(model).__name__} is compiled, and would not run the new layers: insert before that")
    kinds = _kinds(model)
    if "DataParallel" in kinds:
        raise ValueError("the model is wrapped in DataParallel: insert into its .module")
    for wrapper in kinds & {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}:
        raise ValueError(f"the model is wrapped ({wrapper}): insert before you wrap it")


def check_target(path: str, module: nn.Module) -> None:
    """Refuse a module after which no layer can be inserted, whatever it returns."""
    if inserted_layer(module) is not None:
        raise ValueError(f"{path!r} has an inserted attention layer already")
    # Some libraries give the instance a forward. It may call the old one, or anything else.
    own_forward = type(module).forward is not nn.Sequential.forward or "forward" in vars(module)
    if isinstance(module, nn.Sequential) and own_forward:
        raise ValueError(
            f"{path!r} is a Sequential with a forward of its own, which may run its children in any way: name the "
            "module inside it"
        )
    if "ActivationWrapper" in _kinds(module):
        raise ValueError(
            f"{path!r} is a {type(module).__name__}, which renames state-dict keys: name the module inside it"
        )
    if hasattr(module, NAME):
        raise ValueError(f"{path!r} has an attribute {NAME!r} already, its own or that of a module that it wraps")


def _kinds(module: nn.Module) -> set[str]:
    """The names of its classes: importing some of these classes takes long, and not every PyTorch has them."""
    return {kind.__name__ for kind in type(module).__mro__}


def _new_layer(path: str, attention: Callable[[int], nn.Module] | None, channels: int, dims: int | None) -> nn.Module:
    """The layer for a module that returns so many channels, and a feature map of this dimension where it is known."""
    if attention is None:
        if dims is None:
            raise ValueError(
                f"{path!r} does not declare the dimension of its feature map: give an example_input that the model "
                "can be called with, or an attention such as SelfAttention2d"
            )
        attention = LAYERS[dims]
    with torch.device("cpu"):  # for values to begin with, also where everything is made on the meta device
        layer = attention(channels)
    if not isinstance(layer, nn.Module):
        raise TypeError(f"attention must return a module, got {type(layer).__name__}")
    if isinstance(layer, SelfAttention) and dims not in (None, layer.spatial_dims):
        raise ValueError(
            f"{path!r} returns a feature map {expected_shape('C', dims)}, but attention makes a "
            f"{type(layer).__name__}, which expects {expected_shape('C', layer.spatial_dims)}"
        )
    return layer


def _maps_of_a_pass(
    model: nn.Module, targets: Mapping[str, nn.Module], example_input: ExampleInput
) -> dict[str, FeatureMap]:
    with torch.no_grad():
        outputs = outputs_of_a_pass(model, targets, example_input)
    for path, module in targets.items():
        if path not in outputs:
            inside = ", but perhaps the modules inside it" if any(module.children()) else ""
            raise ValueError(f"{path!r} is not reached: with this example_input the model does not call it{inside}")
    # Of several maps one that is in doubt.
    return {path: min(feature_maps(path, outputs[path]), key=lambda map: map.certain) for path in targets}


def _device_and_dtype(
    model: nn.Module, host: nn.Module, map: FeatureMap | None
) -> tuple[torch.device | None, torch.dtype | None]:
    """What a new layer is moved to; None where nothing tells."""
    like = next((p for part in (host, model) for p in part.parameters() if p.is_floating_point()), None)
    device = map.device if map else like.device if like is not None else None
    if map and map.dtype.is_floating_point and not map.autocast:
        return device, map.dtype
    return device, like.dtype if like is not None else None
