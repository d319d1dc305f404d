"""The spectral norm of one weight of a module: register it, of whichever kind, and find it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from torch_sagan._checks import at_least_one, one_of
from torch_sagan._torch import TorchSpectralNorm
from torch_sagan.spectral.convolution_norm import ConvolutionNorm
from torch_sagan.spectral.layer_map import LayerMap, is_pointwise, spatial_dims
from torch_sagan.spectral.legacy import LegacySpectralNorm, drop_load_hook, legacy_hooks
from torch_sagan.spectral.norm import SpectralNorm, check_weight
from torch_sagan.spectral.selection import TRANSPOSED_CONVOLUTIONS

__all__ = ["Norm", "find_norm", "make_norm", "own_class", "register", "spectral_norm"]

M = TypeVar("M", bound=nn.Module)

# A weight may be normalized by our parametrization, by PyTorch's, or by its older hook.
Norm: TypeAlias = SpectralNorm | TorchSpectralNorm | LegacySpectralNorm


def spectral_norm(
    module: M,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    implementation: Literal["sagan", "torch"] = "sagan",
    of: Literal["matrix", "convolution"] = "matrix",
    input_size: int | Sequence[int] | None = None,
) -> M:
    r"""Normalize one weight of a module in place, by its spectral norm: :math:`W / \sigma(W)`.

    It takes the arguments of :func:`torch.nn.utils.parametrizations.spectral_norm`, and two of its own. With
    ``of="convolution"`` sigma is the norm of the convolution as a map between feature maps,
    :math:`\max_x \lVert W * x \rVert / \lVert x \rVert`, with its stride, padding, dilation and groups. That of the
    unfolded kernel, the default, can be smaller by a factor of up to the square root of the number of its positions.

    Args:
        module: the layer.
        name: the parameter to normalize.
        n_power_iterations, eps: as in :class:`SpectralNorm`.
        dim: the dimension of the outputs. Default: 1 for transposed convolutions, else 0.
        implementation: ``"sagan"`` for :class:`SpectralNorm`, ``"torch"`` for PyTorch's own.
        of: ``"matrix"`` for the unfolded weight, ``"convolution"`` for the map that the layer is.
        input_size: with ``of="convolution"``, the size (H, W) of the layer's feature maps, or one number for every
            dimension. Larger maps can have a norm that is slightly larger, smaller ones have none that is larger where
            padding is with zeros.

    Returns:
        The module itself.

    Raises:
        ValueError: when the module has no such parameter; when the parameter has no shape yet, is computed by a hook,
            or is normalized already (by any implementation); for an unknown implementation, a ``dim`` that the weight
            does not have, or fewer than one iteration; for ``of="convolution"`` without an ``input_size`` that the
            layer can take, with another implementation, or for anything else than the weight of a convolution.
        TypeError: for an integer weight, and for a complex one with ``of="convolution"``.

    >>> import torch
    >>> from torch_sagan import spectral_norm
    >>> layer = spectral_norm(torch.nn.Conv2d(3, 64, 3))
    >>> layer.weight.shape
    torch.Size([64, 3, 3, 3])
    >>> layer = spectral_norm(torch.nn.Conv2d(3, 64, 3), of="convolution", input_size=16)
    """
    norm = make_norm(module, name, n_power_iterations, eps, dim, implementation, of, input_size)
    register(module, name, norm)
    return module


def make_norm(
    module: nn.Module,
    name: str,
    n_power_iterations: int,
    eps: float,
    dim: int | None,
    implementation: str,
    of: str = "matrix",
    input_size: int | Sequence[int] | None = None,
) -> nn.Module:
    """The parametrization for one weight, not registered yet. Raises what :func:`spectral_norm` raises."""
    one_of(("sagan", "torch"), implementation=implementation)
    one_of(("matrix", "convolution"), of=of)
    if of == "matrix" and input_size is not None:
        raise ValueError(f'input_size={input_size} has no effect on the norm of a matrix: expected of="convolution"')
    at_least_one(n_power_iterations=n_power_iterations)
    kind = type(module).__name__
    if find_norm(module, name) is not None:
        raise ValueError(f"{name!r} of {kind} is spectrally normalized already")
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        whole = "; apply_spectral_norm takes whole models" if any(module.children()) else ""
        raise ValueError(f"{kind} has no parameter named {name!r}{whole}")
    if is_lazy(weight):
        raise ValueError(f"{name!r} of {kind} has no shape yet: run one forward pass first")
    own = {*dict(module.named_parameters(recurse=False)), *dict(module.named_buffers(recurse=False))}
    if not (name in own or parametrize.is_parametrized(module, name)):
        raise ValueError(f"{name!r} of {kind} is not a parameter: a hook or another module computes it")
    if dim is None:
        dim = 1 if isinstance(module, TRANSPOSED_CONVOLUTIONS) else 0
    if implementation == "torch":
        check_weight(weight, dim)
        if of == "convolution":
            raise ValueError('implementation="torch" has the norm of a matrix alone, got of="convolution"')
        return TorchSpectralNorm(weight, n_power_iterations, dim, eps)
    if of == "convolution":
        check_weight(weight, dim)
        layer = LayerMap(module, weight, _feature_map_size(module, name, input_size))
        if not is_pointwise(module):
            return ConvolutionNorm(weight, layer, n_power_iterations=n_power_iterations, dim=dim, eps=eps)
    return SpectralNorm(weight, n_power_iterations=n_power_iterations, dim=dim, eps=eps)


def _feature_map_size(module: nn.Module, name: str, input_size: int | Sequence[int] | None) -> tuple[int, ...]:
    dims = spatial_dims(module)
    if dims is None or name != "weight":
        what = f"{name!r} of {type(module).__name__}"
        raise ValueError(f'of="convolution" is for the weight of a convolution, got {what}: of="matrix" has its norm')
    sizes = (input_size,) * dims if isinstance(input_size, int) else tuple(input_size or ())
    if len(sizes) != dims or min(sizes) < 1:
        raise ValueError(
            f'of="convolution" needs the size of the feature maps, input_size, {dims} numbers of at least 1, got '
            f"{input_size}"
        )
    return sizes


def register(module: nn.Module, name: str, norm: nn.Module) -> None:
    """Register what :func:`make_norm` made."""
    drop_load_hook(module, name)
    own_class(module)
    parametrize.register_parametrization(module, name, norm)


def own_class(module: nn.Module) -> None:
    """Give a parametrized module a class that no other has.

    PyTorch keeps the property ``weight`` in the class that it makes for a parametrized module. A deep copy has the same
    class, so removing the parametrization of one would remove the weight of the other.
    """
    if parametrize.is_parametrized(module):
        kind = type(module)
        content = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
        module.__class__ = type(kind.__name__, kind.__bases__, content)


def find_norm(module: nn.Module, name: str) -> Norm | None:
    """The spectral norm of this weight, of whichever implementation, or None."""
    if parametrize.is_parametrized(module, name):
        chain = module.parametrizations[name]  # type: ignore[index]
        return next((part for part in chain if isinstance(part, SpectralNorm | TorchSpectralNorm)), None)
    return legacy_hooks(module).get(name)
