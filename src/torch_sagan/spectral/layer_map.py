"""What a convolution layer computes from a weight and a feature map: the linear map whose norm is wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torch_sagan._torch import is_recorded
from torch_sagan.spectral.selection import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS

__all__ = ["LayerMap", "is_pointwise", "spatial_dims"]

DIMENSIONS = {kind: kind.__name__[-2] for kind in (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)}


class LayerMap:
    """A convolution layer without its bias, on feature maps of one size, as a function of its weight.

    A layer of PyTorch is one convolution. Of a layer with a ``forward`` of its own, that is called, on a layer that has
    another weight, no bias, and none of the other parameters, buffers and modules.

    Attributes:
        weight_shape: of the layer's weight.
        in_shape: (1, C, …) of a feature map.
        out_shape: (1, out, …) of its image.

    Raises:
        ValueError: for sizes that the layer cannot take, and for a ``forward`` that is no linear map of a feature map.
    """

    def __init__(self, layer: Any, weight: Tensor, input_size: Sequence[int]) -> None:
        self.kind: type[Any] = _kind(layer)
        self.settings: dict[str, Any] = {name: value for name, value in vars(layer).items() if _is_setting(name, value)}
        self.weight_shape: tuple[int, ...] = tuple(weight.shape)
        self.in_shape: tuple[int, ...] = (1, layer.in_channels, *input_size)
        self.is_plain: bool = _is_plain(layer, self.kind)
        try:
            image = self(torch.zeros(self.weight_shape, device="cpu"), torch.zeros(self.in_shape, device="cpu"))
            self.out_shape: tuple[int, ...] = tuple(image.shape)
            if math.prod(self.out_shape) == 0 or (not is_recorded() and image.any()):
                raise ValueError("it does not map zeros to zeros")
        except Exception as error:
            size = "×".join(map(str, input_size))
            raise ValueError(
                f"{self.kind.__name__} is no linear map of feature maps ({layer.in_channels}, {size}): {error}"
            ) from error

    @property
    def input_size(self) -> tuple[int, ...]:
        """H and W of a feature map."""
        return self.in_shape[2:]

    def __call__(self, weight: Tensor, x: Tensor) -> Tensor:
        """The image (1, out, …) of a feature map x (1, C, …)."""
        if self.is_plain:
            get = self.settings.__getitem__
            return torch.convolution(
                x, weight, None, get("stride"), get("padding"), get("dilation"), get("transposed"),
                get("output_padding"), get("groups"),
            )  # fmt: skip
        layer = object.__new__(self.kind)  # with the settings as attributes, and nothing else
        vars(layer).update(self.settings, weight=weight, bias=None)
        image: Tensor = self.kind.forward(layer, x)
        return image

    def adjoint(self, weight: Tensor, y: Tensor) -> Tensor:
        """The adjoint map, from (1, out, …) to (1, C, …)."""
        if not self.is_plain:
            return torch.func.vjp(lambda x: self(weight, x), y.new_zeros(len(y), *self.in_shape[1:]))[1](y)[0]
        get, size = self.settings.__getitem__, self.in_shape[2:]
        stride, padding, dilation, kernel = get("stride"), get("padding"), get("dilation"), self.weight_shape[2:]
        rest = (0,) * len(size)
        if not get("transposed"):
            # What a transposed convolution lacks in size where the stride leaves out the last rows and columns.
            least = [
                (n - 1) * s - 2 * p + d * (k - 1) + 1
                for n, s, p, d, k in zip(y.shape[2:], stride, padding, dilation, kernel, strict=True)
            ]
            rest = tuple(n - m for n, m in zip(size, least, strict=True))
        x = torch.convolution(y, weight, None, stride, padding, dilation, not get("transposed"), rest, get("groups"))
        kept: Any = (..., *map(slice, size))
        return x[kept]  # the output padding of a transposed layer may leave more


def spatial_dims(layer: nn.Module) -> int | None:
    """How many dimensions of its feature maps count positions; None if the layer is no convolution."""
    return next((int(n) for kind, n in DIMENSIONS.items() if isinstance(layer, kind)), None)


def is_pointwise(layer: Any) -> bool:
    """Whether it is a matrix product at each of the positions that its stride leaves, whose norm is the matrix's."""
    return _is_plain(layer, _kind(layer)) and set(layer.kernel_size) == {1} and layer.groups == 1


def _kind(layer: nn.Module) -> type[Any]:
    # PyTorch gives a parametrized module a class of its own.
    return type(layer).__base__ if parametrize.is_parametrized(layer) else type(layer)  # type: ignore[return-value]


def _is_setting(name: str, value: object) -> bool:
    # The padding of a padding mode is the only one that starts with an underscore.
    return name == "_reversed_padding_repeated_twice" or not (
        name.startswith("_") or isinstance(value, Tensor | nn.Module)
    )


def _is_plain(layer: Any, kind: type[Any]) -> bool:
    """Whether the layer is one call of torch.convolution."""
    for base in (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS):
        if isinstance(layer, base):
            methods = ("forward", *(["_conv_forward"] if base in CONVOLUTIONS else []))
            own = all(getattr(kind, name) is getattr(base, name) and name not in vars(layer) for name in methods)
            return own and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return False
