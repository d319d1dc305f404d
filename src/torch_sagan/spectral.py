"""Spectral normalisation: one layer, or a whole model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from torch_sagan import functional

__all__ = [
    "SpectralNorm",
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
NORMALIZABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, nn.Linear, nn.Embedding)


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

    Source: Miyato et al., *Spectral Normalization for Generative Adversarial Networks*, arXiv:1802.05957.
    """

    _u: Tensor
    _v: Tensor

    def __init__(self, weight: Tensor, *, n_power_iterations: int = 1, dim: int = 0, eps: float = 1e-12) -> None:
        super().__init__()
        if n_power_iterations < 1:
            raise ValueError(f"n_power_iterations must be at least 1, got {n_power_iterations}")
        if not -weight.ndim <= dim < weight.ndim:
            raise ValueError(f"a weight of shape {tuple(weight.shape)} has no dimension {dim}")
        self.n_power_iterations = n_power_iterations
        self.dim = dim % weight.ndim
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
        ValueError: when the module has no such parameter, it is normalised already, or the implementation is unknown.

    >>> from torch import nn
    >>> layer = spectral_norm(nn.Conv2d(3, 64, 3))
    >>> layer.weight.shape
    torch.Size([64, 3, 3, 3])
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"{type(module).__name__} has no parameter named {name!r}")
    if _is_normalized(module, name):
        raise ValueError(f"{name!r} of {type(module).__name__} is spectrally normalised already")
    if dim is None:
        dim = 1 if isinstance(module, TRANSPOSED) else 0
    if implementation == "sagan":
        norm = SpectralNorm(weight, n_power_iterations=n_power_iterations, dim=dim, eps=eps)
        parametrize.register_parametrization(module, name, norm)
    elif implementation == "torch":
        parametrizations.spectral_norm(module, name, n_power_iterations, eps, dim)
    else:
        raise ValueError(f"implementation must be 'sagan' or 'torch', got {implementation!r}")
    return module


def remove_spectral_norm(module: M, name: str = "weight") -> M:
    """Undo :func:`spectral_norm` (either implementation): the normalised weight stays, as a plain parameter.

    Raises:
        ValueError: when that weight is not spectrally normalised, or carries other parametrizations as well (removing
            one of several is not possible in PyTorch).
    """
    if not _is_normalized(module, name):
        raise ValueError(f"{name!r} of {type(module).__name__} is not spectrally normalised")
    with _frozen(module):
        chain = _parametrizations(module, name)
        if len(chain) > 1:
            raise ValueError(f"{name!r} of {type(module).__name__} has {len(chain)} parametrizations, expected one")
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return module


def apply_spectral_norm(
    model: M,
    *,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    implementation: Literal["sagan", "torch"] = "sagan",
) -> M:
    """Normalise the weight of every convolution (transposed too), linear layer and embedding of a model, in place.

    Weights that are normalised already are left alone. Arguments are those of :func:`spectral_norm`.

    Returns:
        The model itself.

    Raises:
        ValueError: when the model has no such layer.
    """
    layers = [module for module in model.modules() if isinstance(module, NORMALIZABLE)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no convolution, linear layer or embedding to normalise")
    for layer in layers:
        if not _is_normalized(layer, "weight"):
            spectral_norm(layer, "weight", n_power_iterations, eps, implementation=implementation)
    return model


def reset_power_iteration(model: nn.Module) -> None:
    """Draw u and v of every :class:`SpectralNorm` of a model anew and warm them up on the present weights.

    Call it after the raw weights were changed behind the parametrization's back, for example by
    ``nn.init.orthogonal_(module.parametrizations.weight.original)``.
    """
    for _, module, name in _normalized(model):
        chain = _parametrizations(module, name)
        for norm in chain:
            if isinstance(norm, SpectralNorm):
                norm.reset(chain.original)


@torch.no_grad()
def spectral_norms(model: nn.Module) -> dict[str, float]:
    """The largest singular value of every normalised weight of a model, exactly (by singular value decomposition).

    Values near 1 say that the power iteration keeps up with training. u and v are not touched.

    Returns:
        A dictionary from the weight's dotted name to its spectral norm, of both implementations.
    """
    values = {}
    for path, module, name in _normalized(model):
        norm = _parametrizations(module, name)[-1]
        with _frozen(module):
            weight = getattr(module, name)
        assert isinstance(norm.dim, int)
        matrix = _matrix(weight, norm.dim) if weight.ndim > 1 else weight[:, None]  # (h, w)
        values[path] = torch.linalg.matrix_norm(matrix.double(), ord=2).item()
    return values


def _matrix(weight: Tensor, dim: int) -> Tensor:
    """The weight unfolded to (h, w), h along ``dim``."""
    return weight.movedim(dim, 0).flatten(1)


def _at_least_single(weight: Tensor) -> Tensor:
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight


def _parametrizations(module: nn.Module, name: str) -> parametrize.ParametrizationList:
    chain = module.parametrizations[name]  # type: ignore[index]
    assert isinstance(chain, parametrize.ParametrizationList)
    return chain


def _is_normalized(module: nn.Module, name: str) -> bool:
    kinds = (SpectralNorm, parametrizations._SpectralNorm)
    return parametrize.is_parametrized(module, name) and any(
        isinstance(norm, kinds) for norm in _parametrizations(module, name)
    )


def _normalized(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every spectrally normalised weight of a model: (dotted name, module, name in the module)."""
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for name in module.parametrizations:
                if _is_normalized(module, name):
                    yield f"{path}.{name}" if path else name, module, name


def _no_autocast(device_type: str) -> AbstractContextManager[object]:
    # Some devices, the meta device among them, know no autocast and refuse to disable it.
    available = torch.amp.is_autocast_available(device_type)
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
