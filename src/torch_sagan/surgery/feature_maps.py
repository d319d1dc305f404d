"""The feature maps that modules return: of how many dimensions they are, and what tells them from other tensors.

Four dimensions are taken as (B, C, H, W), and five as (B, C, D, H, W). Three may be (B, C, L), but also (B, N, C), as
in transformers. They count as (B, C, L) where a module returns them that PyTorch defines so, such as ``Conv1d``,
``BatchNorm1d`` or ``GroupNorm``; and where another one, such as an activation or a block, returns the shape of the last
of these, unless C and L are equal. All others are in doubt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_sagan._torch import BatchNorm, is_autocast
from torch_sagan.attention.layer import (
    SelfAttention,
    SelfAttention1d,
    SelfAttention2d,
    SelfAttention3d,
    expected_shape,
)

__all__ = ["LAYERS", "FeatureMap", "check_certain", "declared", "described", "feature_maps", "has_channels_second"]

LAYERS: dict[int, type[SelfAttention]] = {1: SelfAttention1d, 2: SelfAttention2d, 3: SelfAttention3d}


def _of_each_dimension(*kinds: str) -> tuple[type[nn.Module], ...]:
    return tuple(getattr(nn, f"{kind}{dims}d") for kind in kinds for dims in LAYERS)


CONVOLUTIONS = _of_each_dimension("Conv", "ConvTranspose")

# Modules that return (B, C, …) with any number of spatial dimensions.
CHANNELS_SECOND = (nn.GroupNorm, nn.SyncBatchNorm, nn.Upsample)

# Modules that return as many channels as they receive.
KEEP_CHANNELS: tuple[type[nn.Module], ...] = (
    nn.Identity, nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ReLU6, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Hardswish, nn.Softplus, nn.Dropout, nn.Upsample,
    # The num_features of an instance norm need not be the number of channels.
    *_of_each_dimension("Dropout", "MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool", "ZeroPad",
                        "ReflectionPad", "ReplicationPad", "InstanceNorm"),
)  # fmt: skip


class FeatureMap(NamedTuple):
    """A tensor (B, C, …) that a module returned, without its content.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor.
        device: of the tensor.
        autocast: whether autocast was on then.
        certain: False for three dimensions that may be (B, N, C) as well.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    autocast: bool
    certain: bool

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def size(self) -> torch.Size:
        """That of the positions, as (H, W)."""
        return self.shape[2:]


def described(module: nn.Module, output: Any, sequence: torch.Size | None) -> FeatureMap | str:
    """What a module returned: a feature map, or the description of anything else.

    Args:
        module: the module.
        output: what it returned.
        sequence: the shape that a module of :func:`has_channels_second` last returned in this pass.
    """
    if not isinstance(output, Tensor):
        return f"a {type(output).__name__}" + (f" of {len(output)}" if isinstance(output, (tuple, list)) else "")
    shape, dims = output.shape, output.ndim - 2
    if _spatial_dims(module) == dims + 1:
        return f"a tensor {tuple(shape)} without a batch"
    if dims not in LAYERS:
        return f"a tensor {tuple(shape)}"
    certain = dims > 1 or has_channels_second(module) or (shape == sequence and shape[1] != shape[2])
    return FeatureMap(shape, output.dtype, output.device, is_autocast(output.device.type), certain)


def has_channels_second(module: nn.Module) -> bool:
    """Whether three dimensions that the module returns are (B, C, L)."""
    return _spatial_dims(module) == 1 or isinstance(module, CHANNELS_SECOND)


def _spatial_dims(module: nn.Module) -> int | None:
    """The dimensions of the positions that a module works on, by the name of its class in PyTorch: 2 of ``Conv2d``."""
    if isinstance(module, SelfAttention):
        return module.spatial_dims
    kinds = [kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn.")]
    return next((int(name[-2]) for name in kinds if name.endswith(("1d", "2d", "3d"))), None)


def feature_maps(path: str, outputs: Sequence[FeatureMap | str]) -> list[FeatureMap]:
    """All outputs of a module, if one layer can serve them."""
    maps = [output for output in outputs if isinstance(output, FeatureMap)]
    for output in outputs:
        if isinstance(output, str):
            shapes = [expected_shape("C", dims) for dims in LAYERS]
            raise ValueError(
                f"{path!r} returns {output}, expected a feature map {', '.join(shapes[:2])} or {shapes[2]}"
            )
    autocast = any(map.autocast for map in maps)  # then dtypes may differ, and a layer takes them all
    kinds = {
        f"{expected_shape(map.channels, len(map.size))} on {map.device}" + ("" if autocast else f" in {map.dtype}")
        for map in maps
    }
    if len(kinds) > 1:
        listed = " and ".join(sorted(kinds))
        raise ValueError(f"{path!r} runs {len(maps)} times, with {listed}: one layer cannot serve them all")
    return maps


def check_certain(path: str, map: FeatureMap) -> None:
    """Refuse three dimensions that may be (B, N, C) as well."""
    if not map.certain:
        raise ValueError(
            f"{path!r} returns a tensor {tuple(map.shape)}, which may be (B, N, C): if it is (B, C, L), insert with "
            "attention=SelfAttention1d"
        )


def declared(path: str, module: nn.Module, model: nn.Module) -> tuple[int, int | None]:
    """The channels and the spatial dimensions that a module says it returns, so that the usual layers need no example.

    The dimensions are those of its class; or else the only ones that modules inside of it have, or the model's modules.
    They are None where even these do not tell.
    """
    last = module
    while isinstance(last, nn.Sequential) and len(last):
        last = next((child for child in reversed(last) if not isinstance(child, KEEP_CHANNELS)), nn.Identity())
    channels: Any = None
    if isinstance(last, CONVOLUTIONS):
        channels = last.out_channels
    elif isinstance(last, BatchNorm):
        channels = last.num_features
    elif isinstance(last, nn.GroupNorm):
        channels = last.num_channels
    elif isinstance(last, SelfAttention):
        channels = last.channels
    if not channels:  # 0 in a lazy module that has not run
        raise ValueError(
            f"{path!r} ({type(module).__name__}) does not declare how many channels it returns: give an "
            "example_input that the model can be called with"
        )
    for modules in ([last], module.modules(), model.modules()):
        dims = {dims for each in modules if (dims := _spatial_dims(each)) is not None}
        if len(dims) == 1:
            return channels, dims.pop()
    return channels, None
