"""Spectral normalisation: one layer, or a whole model."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import remove_spectral_norm as remove_hook
from torch.nn.utils.spectral_norm import SpectralNorm as SpectralNormHook

from torch_sagan import functional
from torch_sagan.arguments import at_least_one, one_of

__all__ = [
    "SpectralNorm",
    "align_power_iteration",
    "apply_spectral_norm",
    "remove_spectral_norm",
    "reset_power_iteration",
    "spectral_norm",
    "spectral_norms",
]

M = TypeVar("M", bound=nn.Module)

# As many iterations as PyTorch's own makes for a new layer.
WARM_UP_ITERATIONS = 15

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
INSERTED = "inserted_attention"  # as insert_self_attention calls the child of the module that the layer follows
NORMALIZABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, nn.Linear, nn.Embedding)

Layers: TypeAlias = str | Iterable[str] | Callable[[str, nn.Module], bool]


class SpectralNorm(nn.Module):
    r"""Divide a weight by its largest singular value, found by power iteration.

    .. math::
        W_{SN} = W / \sigma, \qquad \sigma = u^\top W v, \qquad
        v = \frac{W^\top u}{\lVert W^\top u \rVert},\; u = \frac{W v}{\lVert W v \rVert}

    A parametrization for :func:`torch.nn.utils.parametrize.register_parametrization`; :func:`spectral_norm` registers
    it for you. Its state-dict keys are those of PyTorch's own spectral norm, so checkpoints move both ways.

    Each use in training mode makes ``n_power_iterations`` steps; in evaluation u and v stay as they are. A new one is
    warmed up, and so is one whose weight is set (``module.weight = w``). The iteration runs in float32 for weights in
    half precision, and outside of autocast. u and v are constants to the gradient, which may be taken twice.

    Args:
        weight: the weight to be normalised. It is unfolded to a matrix (h, w) with h = ``weight.shape[dim]``.
            A vector is divided by its norm.
        n_power_iterations: steps per use in training.
        dim: the dimension of the outputs: 0, or 1 for transposed convolutions.
        eps: norms up to this one count as zero. A weight with no larger norm is returned as it is.

    Raises:
        ValueError: for a scalar weight, a ``dim`` that the weight does not have, or less than one iteration.
        TypeError: for a weight of integers.

    Source: Miyato et al., *Spectral Normalization for Generative Adversarial Networks*, arXiv:1802.05957.
    """

    _u: Tensor
    _v: Tensor

    def __init__(self, weight: Tensor, *, n_power_iterations: int = 1, dim: int = 0, eps: float = 1e-12) -> None:
        super().__init__()
        at_least_one(n_power_iterations=n_power_iterations)
        if not (weight.is_floating_point() or weight.is_complex()):
            raise TypeError(f"expected a weight of floating-point numbers, got {weight.dtype}")
        if not -weight.ndim <= dim < weight.ndim:
            raise ValueError(f"a weight of shape {tuple(weight.shape)} has no dimension {dim}")
        self.n_power_iterations = n_power_iterations
        self.dim: int = dim % weight.ndim
        self.eps = eps
        if weight.ndim > 1:
            h, w = _matrix(weight, self.dim).shape
            self.register_buffer("_u", weight.new_empty(h))
            self.register_buffer("_v", weight.new_empty(w))
            self.reset(weight)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight divided by its spectral norm, in the weight's own shape and dtype."""
        dtype = weight.dtype
        if weight.ndim == 1:
            norm = torch.linalg.vector_norm(weight)
            return weight / torch.where(norm > self.eps, norm, 1.0)
        # In half precision, or under autocast, a norm would overflow or lose the direction.
        with _no_autocast(weight.device.type):
            weight = _at_least_single(weight)
            u, v, sigma = self._iterate(weight, self.n_power_iterations if self.training else 0)
            normalized = functional.spectral_normalize(weight, u, v, sigma, dim=self.dim, eps=self.eps)
        return normalized.to(dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Take a new weight: u and v are turned towards it, so that sigma is right at once."""
        if weight.ndim > 1:
            self._warm_up(weight)
        return weight

    @torch.no_grad()
    def reset(self, weight: Tensor) -> None:
        """Draw u and v anew and warm them up on this weight, whatever they were before."""
        if weight.ndim > 1:
            self._u.normal_()
            self._v.normal_()
            self._u /= torch.linalg.vector_norm(self._u)
            self._v /= torch.linalg.vector_norm(self._v)
            self._warm_up(weight)

    def _warm_up(self, weight: Tensor) -> None:
        with _no_autocast(weight.device.type):
            self._iterate(_at_least_single(weight), WARM_UP_ITERATIONS)

    @torch.no_grad()
    def _iterate(self, weight: Tensor, n_iterations: int) -> tuple[Tensor, Tensor, Tensor]:
        """Make the iterations, keep u and v, and return them with sigma."""
        # The graph gets tensors of its own and never the buffers: those are written to by the next forward, by
        # DistributedDataParallel's broadcast and by load_state_dict, all of which may come before the backward.
        u, v = self._u.to(weight.dtype, copy=True), self._v.to(weight.dtype, copy=True)
        if self._u.dtype != weight.dtype:  # rounding to half precision has cost them their unit norm
            u, v = u / torch.linalg.vector_norm(u), v / torch.linalg.vector_norm(v)
        matrix = _matrix(weight, self.dim)  # (h, w)
        u, v, sigma = functional.power_iteration(matrix, u, v, n_iterations=n_iterations, eps=self.eps)
        if n_iterations:
            self._u.copy_(u)
            self._v.copy_(v)
        return u, v, sigma

    def extra_repr(self) -> str:
        return f"n_power_iterations={self.n_power_iterations}, dim={self.dim}, eps={self.eps}"


# PyTorch's first spectral norm is no parametrization but a hook that runs before each forward pass.
Norm: TypeAlias = SpectralNorm | parametrizations._SpectralNorm | SpectralNormHook


def spectral_norm(
    module: M,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    implementation: Literal["sagan", "torch"] = "sagan",
) -> M:
    r"""Normalise one weight of a module by its spectral norm, :math:`W / \sigma(W)`, in place.

    The same call as :func:`torch.nn.utils.parametrizations.spectral_norm`.

    Args:
        module: the layer.
        name: the parameter to normalise.
        n_power_iterations: power-iteration steps per use in training.
        eps: norms up to this one count as zero.
        dim: the dimension of the outputs. Default: 1 for transposed convolutions, else 0.
        implementation: ``"sagan"`` for :class:`SpectralNorm`, ``"torch"`` for PyTorch's own.

    Returns:
        The module itself.

    Raises:
        ValueError: when the module has no such parameter, it has no shape yet, a hook computes it, it is normalised
            already (in whichever way), or the implementation is unknown.
        TypeError: for a weight of integers.

    >>> from torch import nn
    >>> layer = spectral_norm(nn.Conv2d(3, 64, 3))
    >>> layer.weight.shape
    torch.Size([64, 3, 3, 3])
    """
    one_of(("sagan", "torch"), implementation=implementation)
    at_least_one(n_power_iterations=n_power_iterations)
    norm = _make(module, name, n_power_iterations, eps, dim, implementation)
    parametrize.register_parametrization(module, name, norm)
    return module


def remove_spectral_norm(model: M, name: str | None = None) -> M:
    """Undo spectral normalisation in a layer or a whole model: the weights of its evaluation stay, to the bit.

    Those of :func:`spectral_norm` (either implementation) and of the older :func:`torch.nn.utils.spectral_norm`. Each
    becomes a plain parameter again, the same object that an optimiser holds already.

    Args:
        model: a layer or a model.
        name: only weights of this name. Default: all.

    Returns:
        The model itself.

    Raises:
        ValueError: when nothing is spectrally normalised, or a weight carries other parametrizations as well (removing
            one of several is not possible in PyTorch). The model is then as it was.
    """
    found = [entry for entry in _normalized(model) if name in (None, entry[2])]
    if not found:
        what = "weight" if name is None else repr(name)
        raise ValueError(f"{type(model).__name__} has no spectrally normalised {what}")
    for path, module, weight_name, norm in found:
        if not isinstance(norm, SpectralNormHook) and (n := len(_chain(module, weight_name))) > 1:
            raise ValueError(
                f"{path!r} has {n} parametrizations, expected one: "
                "torch.nn.utils.parametrize.remove_parametrizations removes them all"
            )
    with _frozen(model):
        for _, module, weight_name, norm in found:
            if isinstance(norm, SpectralNormHook):
                _remove_hook(module, weight_name)
            else:
                parametrize.remove_parametrizations(module, weight_name, leave_parametrized=True)
    return model


def apply_spectral_norm(
    model: M,
    *,
    include: Layers | None = None,
    exclude: Layers | None = None,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    implementation: Literal["sagan", "torch"] = "sagan",
) -> M:
    """Normalise the weight of every convolution (transposed too), linear layer and embedding of a model, in place.

    Subclasses of these are included; other modules (recurrent ones, norms, the input projection of
    ``nn.MultiheadAttention``) are not. Weights that are normalised already, by this library, by PyTorch's
    parametrization or by its older hook, are left alone, and a warning names them unless ``exclude`` does.

    Args:
        model: the model, or a single layer.
        include: the layers to normalise. Default: all. Either dotted names, in which ``*``, ``?`` and ``[...]`` are
            wildcards (``*`` runs over dots too) and the name of a container takes everything below it; or a function
            of the dotted name and the layer. A layer that is reached by several names is taken by any of them.
            Attention that was inserted after a module is beside it, not below it.
        exclude: the layers to leave out of these, in the same way.
        n_power_iterations: as in :func:`spectral_norm`.
        eps: as in :func:`spectral_norm`.
        implementation: as in :func:`spectral_norm`.

    Returns:
        The model itself.

    Raises:
        ValueError: when there is no layer to normalise, a name takes none (the nearest are listed), or a weight has no
            shape yet, is computed by a hook, or is tied to another. The model is then as it was.
        TypeError: when ``include`` or ``exclude`` is neither names nor a function, or a weight is of integers.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(1))
    >>> model = apply_spectral_norm(model, exclude="4")
    >>> list(spectral_norms(model))
    ['0.weight', '2.weight']
    """
    one_of(("sagan", "torch"), implementation=implementation)
    at_least_one(n_power_iterations=n_power_iterations)
    layers = _select(model, include, exclude)
    done = [path for path, layer in layers.items() if _norm(layer, "weight") is not None]
    new = {path: layer for path, layer in layers.items() if path not in done}
    _check_untied(model, new)
    # Made first and registered afterwards, so that an error leaves the model as it was.
    norms = []
    for path, layer in new.items():
        try:
            norms.append(_make(layer, "weight", n_power_iterations, eps, None, implementation))
        except (TypeError, ValueError) as error:
            if not path:
                raise
            raise type(error)(f"{path}: {error} (exclude={path!r} leaves it out)") from error
    if done:
        warnings.warn(
            f"spectrally normalised already, and left alone: {', '.join(map(repr, done))} (named in exclude, they are "
            "left alone without this warning)",
            stacklevel=2,
        )
    for layer, norm in zip(new.values(), norms, strict=True):
        parametrize.register_parametrization(layer, "weight", norm)
    return model


@torch.no_grad()
def reset_power_iteration(model: nn.Module) -> None:
    """Draw u and v of every normalised weight of a model anew and warm them up on what is there now.

    Call it after the raw weights were changed behind the parametrization's back, for example by
    ``nn.init.orthogonal_(module.parametrizations.weight.original)``. It does so for every implementation.
    """
    for _, module, name, norm in _normalized(model):
        weight = _raw_weight(module, name, norm)
        if weight.ndim > 1:
            fresh = SpectralNorm(weight, dim=norm.dim, eps=norm.eps)
            u, v = _vectors(module, name, norm)
            u.copy_(fresh._u)
            v.copy_(fresh._v)


@torch.no_grad()
def spectral_norms(model: nn.Module) -> dict[str, float]:
    """The largest singular value of every normalised weight of a model, exactly (by singular value decomposition).

    Values near 1 say that the power iteration keeps up with training. u and v are not touched.

    Returns:
        A dictionary from the weight's dotted name to its spectral norm, whichever implementation it has; NaN for a
        weight that holds infinities or NaN.
    """
    values = {}
    for path, module, name, norm in _normalized(model):
        if isinstance(norm, SpectralNormHook):
            weight = norm.compute_weight(module, do_power_iteration=False)
        else:
            with _frozen(module):
                weight = getattr(module, name)
        matrix = _matrix(weight, norm.dim) if weight.ndim > 1 else weight[:, None]  # (h, w)
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float64))  # complex weights stay complex
        # The decomposition of what is not finite does not converge, and its error would not name the weight.
        values[path] = torch.linalg.matrix_norm(matrix, ord=2).item() if matrix.isfinite().all() else math.nan
    return values


@torch.no_grad()
def align_power_iteration(model: nn.Module) -> None:
    """Turn u and v of every normalised weight of a model to its first singular vectors, whatever they were before.

    They come from an eigendecomposition in float64. An iteration might need hundreds of steps where the first two
    singular values are close, and would never leave a u that is orthogonal to the first singular vector.

    Raises:
        ValueError: for a weight that holds infinities or NaN. Nothing is changed then.
    """
    found = []
    for path, module, name, norm in _normalized(model):
        weight = _raw_weight(module, name, norm)
        if not weight.isfinite().all():
            raise ValueError(f"{path!r} holds infinities or NaN, which have no singular vectors")
        if weight.ndim > 1:
            found.append((weight, norm, *_vectors(module, name, norm)))
    for weight, norm, u, v in found:
        matrix = _matrix(weight, norm.dim).cpu()  # (h, w); some devices have no float64, and some no decomposition
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float64))  # complex weights stay complex
        wide = matrix.shape[0] <= matrix.shape[1]
        (near, far), matrix = ((u, v), matrix) if wide else ((v, u), matrix.mH)  # near has the smaller dimension
        first = torch.linalg.eigh(matrix @ matrix.mH).eigenvectors[:, -1]  # eigenvalues ascend
        # One step gives the other vector, or leaves it where the weight is zero.
        new_near, new_far, _ = functional.power_iteration(matrix, first, far.to(matrix), eps=norm.eps)
        near.copy_(new_near)
        far.copy_(new_far)


def _matrix(weight: Tensor, dim: int) -> Tensor:
    """The weight unfolded to (h, w), h along ``dim``."""
    return weight.movedim(dim, 0).flatten(1)


def _at_least_single(weight: Tensor) -> Tensor:
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight


def _make(
    module: nn.Module, name: str, n_power_iterations: int, eps: float, dim: int | None, implementation: str
) -> nn.Module:
    """The parametrization for one weight, not registered yet."""
    if _norm(module, name) is not None:
        raise ValueError(f"{name!r} of {type(module).__name__} is spectrally normalised already")
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        whole = "; apply_spectral_norm takes whole models" if any(module.children()) else ""
        raise ValueError(f"{type(module).__name__} has no parameter named {name!r}{whole}")
    if is_lazy(weight):
        raise ValueError(f"{name!r} of {type(module).__name__} has no shape yet: run one forward pass first")
    if not (parametrize.is_parametrized(module, name) or name in module._parameters or name in module._buffers):
        raise ValueError(f"{name!r} of {type(module).__name__} is no parameter: a hook or another module computes it")
    if dim is None:
        dim = 1 if isinstance(module, TRANSPOSED) else 0
    if implementation == "torch":
        return parametrizations._SpectralNorm(weight, n_power_iterations, dim, eps)
    return SpectralNorm(weight, n_power_iterations=n_power_iterations, dim=dim, eps=eps)


def _norm(module: nn.Module, name: str) -> Norm | None:
    """What normalises this weight, in whichever way, or None."""
    if parametrize.is_parametrized(module, name):
        kinds = (SpectralNorm, parametrizations._SpectralNorm)
        return next((part for part in _chain(module, name) if isinstance(part, kinds)), None)
    return next((hook for hook in _hooks(module) if hook.name == name), None)


def _normalized(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Norm]]:
    """Every spectrally normalised weight of a model: (dotted name, module, name in the module, what normalises it)."""
    for path, module in model.named_modules():
        names = list(module.parametrizations) if parametrize.is_parametrized(module) else []
        for name in names + [hook.name for hook in _hooks(module)]:
            norm = _norm(module, name)
            if norm is not None:
                yield f"{path}.{name}" if path else name, module, name, norm


def _chain(module: nn.Module, name: str) -> parametrize.ParametrizationList:
    chain = module.parametrizations[name]  # type: ignore[index]
    assert isinstance(chain, parametrize.ParametrizationList)
    return chain


def _hooks(module: nn.Module) -> list[SpectralNormHook]:
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNormHook)]


def _vectors(module: nn.Module, name: str, norm: Norm) -> tuple[Tensor, Tensor]:
    if isinstance(norm, SpectralNormHook):
        return module.get_buffer(f"{name}_u"), module.get_buffer(f"{name}_v")
    return norm.get_buffer("_u"), norm.get_buffer("_v")


def _raw_weight(module: nn.Module, name: str, norm: Norm) -> Tensor:
    """What the norm divides: the parameter, or what parametrizations before the norm make of it."""
    if isinstance(norm, SpectralNormHook):
        return module.get_parameter(f"{name}_orig")
    chain = _chain(module, name)
    values = [chain.original] if chain.is_tensor else [getattr(chain, f"original{i}") for i in range(chain.ntensors)]
    with _frozen(module):
        for part in chain:
            if part is norm:
                break
            values = [part(*values)]
    return values[0]


def _remove_hook(module: nn.Module, name: str) -> None:
    original = module.get_parameter(f"{name}_orig")
    remove_hook(module, name)
    with torch.no_grad():
        original.copy_(module.get_parameter(name))
    # PyTorch makes a new parameter, which an optimiser would not know, and which would be trainable in any case.
    module.register_parameter(name, original)


def _select(model: nn.Module, include: Layers | None, exclude: Layers | None) -> dict[str, nn.Module]:
    """The layers to normalise, by the first of their names."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, NORMALIZABLE):
            paths.setdefault(module, []).append(path)
    kind = type(model).__name__
    if not paths:
        raise ValueError(f"{kind} has no convolution, linear layer or embedding to normalise")
    included = set(paths) if include is None else _take(paths, "include", include, kind)
    excluded = set() if exclude is None else _take(paths, "exclude", exclude, kind)
    chosen = {names[0]: layer for layer, names in paths.items() if layer in included - excluded}
    if not chosen:
        raise ValueError(f"include and exclude leave none of the {len(paths)} layers of {kind} to normalise")
    return chosen


def _take(paths: dict[nn.Module, list[str]], argument: str, layers: object, kind: str) -> set[nn.Module]:
    """The layers that ``include`` or ``exclude`` means."""
    if callable(layers) and not isinstance(layers, (type, nn.Module)):
        return {layer for layer, names in paths.items() if any(layers(name, layer) for name in names)}
    taken = set()
    for pattern in layers if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]:
        if not isinstance(pattern, str):
            got = type(pattern).__name__
            raise TypeError(f"{argument} takes dotted names, or a function of name and layer, got {got}")
        matching = {layer for layer, names in paths.items() if any(_matches(name, pattern) for name in names)}
        if not matching:
            known = sorted({above for names in paths.values() for name in names for above in _upwards(name)})
            nearest = ", ".join(map(repr, difflib.get_close_matches(pattern, known, cutoff=0)))
            raise ValueError(
                f"{argument}: {pattern!r} takes no convolution, linear layer or embedding of {kind}; nearest: {nearest}"
            )
        taken |= matching
    return taken


def _matches(path: str, pattern: str) -> bool:
    return any(fnmatchcase(above, pattern) for above in _upwards(path))


def _upwards(path: str) -> list[str]:
    """``a.b.c`` -> ``a``, ``a.b``, ``a.b.c``; without ``b`` where c is attention inserted after it."""
    above = accumulate(path.split("."), "{}.{}".format)
    return [name for name in above if not f"{path}.".startswith(f"{name}.{INSERTED}.")]


def _check_untied(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Raise when a weight to be normalised is held elsewhere in the model too."""
    holders: dict[nn.Parameter, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(parameter, []).append(f"{path}.{name}" if path else name)
    for layer in layers.values():
        parameter = layer._parameters.get("weight")
        if parameter is not None and len(holders[parameter]) > 1:
            names = " and ".join(map(repr, holders[parameter]))
            raise ValueError(
                f"{names} are one parameter, and normalising would untie them: leave their layers out by exclude"
            )


def _no_autocast(device_type: str) -> AbstractContextManager[object]:
    # Some devices, the meta device among them, know no autocast and refuse to disable it. A compiler may not ask.
    available = device_type != "meta" and (
        torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    )
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Reading a weight inside makes no power iteration, whatever mode the module is in."""
    parts = [part for part in module.modules() if part.training]
    for part in parts:
        part.training = False
    try:
        yield
    finally:
        for part in parts:
            part.training = True
