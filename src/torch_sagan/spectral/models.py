"""Spectral normalization of whole models: apply it, remove it, measure it, restart its power iteration."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torch_sagan._checks import at_least_one, one_of
from torch_sagan.spectral.convolution_norm import ConvolutionNorm
from torch_sagan.spectral.layer_map import is_pointwise, spatial_dims
from torch_sagan.spectral.legacy import LegacySpectralNorm, legacy_hooks, remove_legacy_hook
from torch_sagan.spectral.norm import SpectralNorm, as_matrix
from torch_sagan.spectral.registration import Norm, find_norm, make_norm, own_class, register
from torch_sagan.spectral.selection import Layers, select_layers
from torch_sagan.surgery.example_pass import ExampleInput, example_pass

__all__ = [
    "align_power_iteration",
    "apply_spectral_norm",
    "remove_spectral_norm",
    "reset_power_iteration",
    "spectral_norms",
]

M = TypeVar("M", bound=nn.Module)


def apply_spectral_norm(
    model: M,
    *,
    include: Layers | None = None,
    exclude: Layers | None = None,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    implementation: Literal["sagan", "torch"] = "sagan",
    of: Literal["matrix", "convolution"] = "matrix",
    example_input: ExampleInput | None = None,
) -> M:
    """Normalize the weight of every convolution (transposed too), linear layer and embedding of a model, in place.

    Subclasses of these are included; other weights (of recurrent layers, of batch norm, the input projection of
    ``nn.MultiheadAttention``) are not. Weights that are normalized already, by this library, by PyTorch's
    parametrization or by its older hook, are left alone, and a warning names them unless ``exclude`` does.

    Args:
        model: the model, or a single layer.
        include: the layers to normalize. Default: all. Either a function of the dotted name and the layer, or dotted
            names. In names, ``*``, ``?`` and ``[...]`` are wildcards (``*`` also matches dots), and a container's name
            matches everything in it. Attention that :func:`insert_self_attention` put after a module is stored in that
            module, but does not count as a part of it. A layer that has several names is matched by any of them.
        exclude: the layers to leave out, given as for ``include``.
        n_power_iterations, eps, implementation: as in :func:`spectral_norm`.
        of: ``"convolution"`` divides the weight of a convolution by the norm of its map, as :func:`spectral_norm`
            explains. Linear layers and embeddings, and convolutions whose kernel is 1 in every direction, are matrices.
        example_input: with ``of="convolution"``, what the model can be called with: a tensor, a tuple of arguments or a
            mapping of keyword arguments. One pass of it in evaluation mode shows the size of each layer's feature maps;
            buffers and random states stay as they are.

    Returns:
        The model itself.

    Raises:
        ValueError: when there is no layer to normalize, a name matches no layer (similar names are listed), or a
            weight has no shape yet, is computed by a hook, or is tied to another; for ``of="convolution"`` without an
            ``example_input``, and for a convolution that is not called in its pass, or with feature maps of several
            sizes, or that has the norm of a matrix already. The model is then unchanged.
        TypeError: when ``include`` or ``exclude`` is neither names nor a function, or for an integer weight.

    >>> from torch import nn
    >>> from torch_sagan import apply_spectral_norm, spectral_norms
    >>> model = nn.Sequential(
    ...     nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(1)
    ... )
    >>> model = apply_spectral_norm(model, exclude="4")
    >>> list(spectral_norms(model))  # the names of the normalized weights
    ['0.weight', '2.weight']
    """
    one_of(("sagan", "torch"), implementation=implementation)
    one_of(("matrix", "convolution"), of=of)
    at_least_one(n_power_iterations=n_power_iterations)
    layers = select_layers(model, include, exclude)
    done = [path for path, layer in layers.items() if find_norm(layer, "weight") is not None]
    new = {path: layer for path, layer in layers.items() if path not in done}
    _check_untied(model, new)
    if of == "convolution":
        _check_kind({path: layers[path] for path in done})
    # Made first and registered afterwards, so that an error leaves the model as it was.
    if of == "matrix" and example_input is not None:
        raise ValueError('example_input has no effect on the norm of a matrix: expected of="convolution"')
    sizes = _input_sizes(model, new, example_input) if of == "convolution" else {}
    norms = {}
    for path, layer in new.items():
        kind = of if layer in sizes else "matrix"
        try:
            norms[layer] = make_norm(
                layer, "weight", n_power_iterations, eps, None, implementation, kind, sizes.get(layer)
            )
        except (TypeError, ValueError) as error:
            if not path:
                raise
            raise type(error)(f"{path}: {error} (exclude={path!r} leaves it out)") from error
    if done:
        names = ", ".join(map(repr, done))
        message = f"spectrally normalized already, and left alone: {names} (exclude them to avoid this warning)"
        warnings.warn(message, stacklevel=2)
    for layer, norm in norms.items():
        register(layer, "weight", norm)
    return model


def _check_kind(normalized: dict[str, nn.Module]) -> None:
    """Raise for convolutions that have another norm than the convolution's."""
    others = [
        path
        for path, layer in normalized.items()
        if spatial_dims(layer)
        and not is_pointwise(layer)
        and not isinstance(find_norm(layer, "weight"), ConvolutionNorm)
    ]
    if others:
        raise ValueError(
            f"{', '.join(map(repr, others[:5]))}{' …' if len(others) > 5 else ''}: normalized by the norm of a matrix "
            "already; call remove_spectral_norm first, build the model without, or exclude them"
        )


@torch.no_grad()
def remove_spectral_norm(model: M, name: str | None = None) -> M:
    """Remove spectral normalization from a layer or a whole model, and leave the normalized weights.

    Each weight becomes a plain parameter again, the same object that an optimizer holds already, with exactly the value
    that evaluation mode used. It covers :func:`spectral_norm` (either implementation) and PyTorch's older hook.

    Args:
        model: a layer or a model.
        name: only weights of this name. Default: all.

    Returns:
        The model itself.

    Raises:
        ValueError: when nothing is spectrally normalized, or a weight carries other parametrizations as well (removing
            one of several is not possible in PyTorch). The model is then as it was.
    """
    found = [weight for weight in _normalized_weights(model) if name in (None, weight.name)]
    if not found:
        what = "weight" if name is None else repr(name)
        raise ValueError(f"{type(model).__name__} has no spectrally normalized {what}")
    for weight in found:
        if not isinstance(weight.norm, LegacySpectralNorm) and (n := len(weight.parametrizations())) > 1:
            raise ValueError(
                f"{weight.path!r} has {n} parametrizations, expected one: "
                "torch.nn.utils.parametrize.remove_parametrizations removes them all"
            )
    for weight in found:
        _, normalized = weight.values()
        if isinstance(weight.norm, LegacySpectralNorm):
            remove_legacy_hook(weight.module, weight.name)
        else:
            own_class(weight.module)
            parametrize.remove_parametrizations(weight.module, weight.name, leave_parametrized=False)
        getattr(weight.module, weight.name).copy_(normalized)
    return model


@torch.no_grad()
def reset_power_iteration(model: nn.Module) -> None:
    """Draw new u and v for every normalized weight of a model and warm them up on the current weights.

    Call it after the raw weights of a layer or a model have been changed without going through the parametrization, for
    example by ``nn.init.orthogonal_(module.parametrizations.weight.original)``. It covers every implementation.
    """
    for weight in _normalized_weights(model):
        raw, _ = weight.values()
        if raw.ndim > 1:
            if isinstance(weight.norm, ConvolutionNorm):
                convolution = ConvolutionNorm(raw, weight.norm.layer, eps=weight.norm.eps)
                weight.norm._rivals.copy_(convolution._rivals)
                fresh: SpectralNorm = convolution
            else:
                fresh = SpectralNorm(raw, dim=weight.norm.dim, eps=weight.norm.eps)
            u, v = weight.vectors()
            u.copy_(fresh._u)
            v.copy_(fresh._v)


@torch.no_grad()
def spectral_norms(model: nn.Module) -> dict[str, float]:
    r"""The largest singular value of every weight after its normalization, exactly.

    Values near 1 say that the power iteration keeps up with training. Nothing in the model changes, not even for a
    moment: another thread may train it. In float64, the square root of the largest eigenvalue of :math:`W W^\top` or
    :math:`W^\top W`, the smaller of the two, has the digits of a singular value decomposition in a tenth of its time.

    Args:
        model: a layer or a model.

    Under ``of="convolution"`` it is the norm of the convolution, iterated in float64 as in :func:`operator_norms`.

    Returns:
        A dictionary from each weight's dotted name to its largest singular value, NaN for a weight that holds
        infinities or NaN. Every implementation is covered.
    """
    norms = {}
    for weight in _normalized_weights(model):
        _, value = weight.values()
        norms[weight.path] = math.nan  # the decomposition would not converge, and its error would not name the weight
        if not value.isfinite().all():
            continue
        if isinstance(weight.norm, ConvolutionNorm):
            norms[weight.path] = _exact(weight.norm, value)[0] if value.any() else 0.0
        else:
            matrix, scale = _scaled_matrix(value, weight.norm.dim)
            norms[weight.path] = scale * float(torch.linalg.eigvalsh(matrix @ matrix.mH)[-1].sqrt())  # they ascend
    return norms


@torch.no_grad()
def align_power_iteration(model: nn.Module) -> None:
    """Set u and v of every normalized weight of a model to its first singular vectors, whatever they were before.

    They come from an eigendecomposition in float64. An iteration might need hundreds of steps where the first two
    singular values are close, and would never escape a u that is orthogonal to the first singular vector. Those of a
    convolution come from Lanczos iterations, always from the same start.

    Raises:
        ValueError: for a weight that holds infinities or NaN. Nothing is changed then.
    """
    found = [(weight, weight.values()[0]) for weight in _normalized_weights(model)]
    for weight, raw in found:
        if not raw.isfinite().all():
            raise ValueError(f"{weight.path!r} holds infinities or NaN, which have no singular vectors")
    for weight, raw in found:
        if raw.ndim > 1 and raw.any():  # a zero weight keeps its vectors
            u, v = weight.vectors()
            if isinstance(weight.norm, ConvolutionNorm):
                for buffer, exact in zip((u, v), _exact(weight.norm, raw)[1:], strict=True):
                    buffer.copy_(exact)
                continue
            matrix, _ = _scaled_matrix(raw.cpu(), weight.norm.dim)  # some devices have no float64
            # The first eigenvector of matrix @ matrix.mH is u, or v where the matrix was transposed.
            first, second = (u, v) if len(matrix) == len(u) else (v, u)
            vector = torch.linalg.eigh(matrix @ matrix.mH).eigenvectors[:, -1]
            first.copy_(vector)
            second.copy_(torch.nn.functional.normalize(matrix.mH @ vector, dim=0))


def _exact(norm: ConvolutionNorm, weight: Tensor) -> tuple[float, Tensor, Tensor]:
    return norm.singular_vectors(weight, tolerance=1e-7, restarts=100)


def _input_sizes(
    model: nn.Module, layers: dict[str, nn.Module], example_input: ExampleInput | None
) -> dict[nn.Module, tuple[int, ...]]:
    """The size of the feature maps that each convolution among the layers is called with."""
    if example_input is None:
        raise ValueError('of="convolution" needs an example_input, whose pass shows the sizes of feature maps')
    dims = {layer: n for layer in layers.values() if (n := spatial_dims(layer))}
    seen: dict[nn.Module, set[tuple[int, ...]]] = {layer: set() for layer in dims}

    def note(layer: nn.Module, args: tuple[Any, ...]) -> None:
        seen[layer].add(tuple(args[0].shape[-dims[layer] :]))

    handles = [layer.register_forward_pre_hook(note) for layer in dims]
    try:
        example_pass(model, example_input)
    finally:
        for handle in handles:
            handle.remove()
    for path, layer in layers.items():
        if layer in dims and len(seen[layer]) != 1:
            found = f"maps of {sorted(seen[layer])}" if seen[layer] else "none: it was not called"
            raise ValueError(f"{path}: expected feature maps of one size, got {found} (exclude={path!r} leaves it out)")
    return {layer: size for layer, (size,) in seen.items()}


def _scaled_matrix(weight: Tensor, dim: int) -> tuple[Tensor, float]:
    """The weight as a matrix in double precision that is at least as wide as high, and the factor by which it was
    divided, so that no square overflows or vanishes. A vector is a matrix with one column."""
    matrix = as_matrix(weight[..., None], dim).to(torch.promote_types(weight.dtype, torch.float64))  # or complex128
    scale = float(matrix.abs().max()) or 1.0
    matrix = matrix / scale
    return (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mH), scale


class _NormalizedWeight(NamedTuple):
    """A spectrally normalized weight of a model, with one interface to all implementations."""

    path: str  # from the model to the weight
    module: nn.Module
    name: str  # in the module
    norm: Norm

    def vectors(self) -> tuple[Tensor, Tensor]:
        """The buffers u and v."""
        if isinstance(self.norm, LegacySpectralNorm):
            return self.module.get_buffer(f"{self.name}_u"), self.module.get_buffer(f"{self.name}_v")
        return self.norm.get_buffer("_u"), self.norm.get_buffer("_v")

    def values(self) -> tuple[Tensor, Tensor]:
        """The weight before the norm, and what the module's forward pass uses in evaluation mode."""
        if isinstance(self.norm, LegacySpectralNorm):
            raw: Tensor = self.module.get_parameter(f"{self.name}_orig")
            return raw, self.norm.compute_weight(self.module, do_power_iteration=False)
        chain = self.parametrizations()
        names = ["original"] if chain.is_tensor else [f"original{i}" for i in range(chain.ntensors)]
        values: list[Tensor] = [getattr(chain, name) for name in names]
        for part in chain:
            if part is self.norm:
                (raw,) = values
            # A copy: in the mode of the model, which another thread may be training, it would iterate.
            values = [copy.deepcopy(part).eval()(*values)]
        return raw, values[0]

    def parametrizations(self) -> parametrize.ParametrizationList:
        chain = self.module.parametrizations[self.name]  # type: ignore[index]
        assert isinstance(chain, parametrize.ParametrizationList)
        return chain


def _normalized_weights(model: nn.Module) -> Iterator[_NormalizedWeight]:
    for path, module in model.named_modules():
        parametrized = list(module.parametrizations) if parametrize.is_parametrized(module) else []
        for name in [*parametrized, *legacy_hooks(module)]:
            norm = find_norm(module, name)
            if norm is not None:
                yield _NormalizedWeight(_dotted(path, name), module, name, norm)


def _dotted(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name  # the path of the model itself is empty


def _check_untied(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Raise when a weight to be normalized is tied to another parameter of the model."""
    names: dict[nn.Parameter, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            names.setdefault(parameter, []).append(_dotted(path, name))
    weights = {_dotted(path, "weight") for path in layers}
    for tied in names.values():
        if len(tied) > 1 and not weights.isdisjoint(tied):
            raise ValueError(
                f"{' and '.join(map(repr, tied))} are one parameter, and normalizing would untie them: leave their "
                "layers out with exclude"
            )
