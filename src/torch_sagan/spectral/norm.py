"""Spectral normalisation of one weight: the parametrization, and the function that registers it."""

from __future__ import annotations

from typing import Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from torch_sagan._checks import at_least_one, one_of
from torch_sagan._torch import TorchSpectralNorm, no_autocast, runs_custom_operations
from torch_sagan.spectral import iteration
from torch_sagan.spectral.grouped import Iterated, Member, iterate
from torch_sagan.spectral.legacy import LegacySpectralNorm, legacy_hooks

__all__ = ["Norm", "SpectralNorm", "as_matrix", "find_norm", "iterate_together", "make_norm", "spectral_norm"]

M = TypeVar("M", bound=nn.Module)

# PyTorch's spectral_norm also starts with 15.
WARM_UP_ITERATIONS = 15

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class SpectralNorm(nn.Module):
    r"""Divide a weight by its largest singular value, found by power iteration.

    .. math::
        W_{SN} = W / \sigma, \qquad \sigma = u^\top W v, \qquad
        v = \frac{W^\top u}{\lVert W^\top u \rVert}, \qquad u = \frac{W v}{\lVert W v \rVert}

    A parametrization for :func:`torch.nn.utils.parametrize.register_parametrization`; :func:`spectral_norm` registers
    it for you. Its state-dict keys are those of PyTorch's own spectral norm, so checkpoints move both ways.

    Each access in training mode runs ``n_power_iterations`` steps; in evaluation u and v stay as they are. They are
    warmed up by 15 steps on creation and whenever the weight is assigned (``module.weight = w``). The iteration runs in
    float32 for weights in half precision, and outside of autocast. No gradient flows through u and v. The result can
    be differentiated twice.

    Args:
        weight: the weight to be normalised. It is reshaped to a matrix (h, w) with h = ``weight.shape[dim]``.
            A vector is divided by its norm.
        n_power_iterations: steps per access in training.
        dim: the dimension of the outputs. Pass 1 for a transposed convolution, as :func:`spectral_norm` does.
        eps: norms of at most this value count as zero. A weight whose spectral norm counts as zero is returned
            unchanged.

    Raises:
        ValueError: for a scalar weight, a ``dim`` that the weight does not have, or fewer than one iteration.
        TypeError: for an integer weight.

    Source: Miyato et al., *Spectral Normalization for Generative Adversarial Networks*, arXiv:1802.05957.
    """

    _u: Tensor
    _v: Tensor

    def __init__(self, weight: Tensor, *, n_power_iterations: int = 1, dim: int = 0, eps: float = 1e-12) -> None:
        super().__init__()
        at_least_one(n_power_iterations=n_power_iterations)
        _check_weight(weight, dim)
        self.n_power_iterations = n_power_iterations
        self.dim: int = dim % weight.ndim
        self.eps = eps
        self._prepared: tuple[int, Iterated] | None = None  # the weight's version, and what was computed for it
        if weight.ndim > 1:
            h, w = as_matrix(weight, self.dim).shape
            self.register_buffer("_u", weight.new_empty(h))
            self.register_buffer("_v", weight.new_empty(w))
            self.reset(weight)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight divided by its spectral norm, in the weight's own shape and dtype."""
        dtype = weight.dtype
        prepared, self._prepared = self._prepared, None
        if prepared and self.training and prepared[0] == weight._version:
            return iteration.divide_by_sigma(weight, *prepared[1], dim=self.dim, eps=self.eps)
        if weight.ndim == 1:
            sigma = torch.linalg.vector_norm(weight)
            return weight / torch.where(sigma > self.eps, sigma, 1.0)
        # In half precision, which autocast would choose, rounding spoils u and v, and norms overflow in float16.
        with no_autocast(weight.device.type):
            weight = _half_to_float32(weight)
            u, v, sigma = self._iterate(weight, self.n_power_iterations if self.training else 0)
            normalized = iteration.spectral_normalize(weight, u, v, sigma, dim=self.dim, eps=self.eps)
        return normalized.to(dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Accept a new weight: u and v are warmed up on it, so that sigma is right at once."""
        if weight.ndim > 1:
            self._warm_up(weight)
        return weight

    @torch.no_grad()
    def reset(self, weight: Tensor) -> None:
        """Draw new u and v and warm them up on this weight."""
        if weight.ndim > 1:
            self._u.normal_()
            self._v.normal_()
            self._u /= torch.linalg.vector_norm(self._u)
            self._v /= torch.linalg.vector_norm(self._v)
            self._warm_up(weight)

    def _warm_up(self, weight: Tensor) -> None:
        with no_autocast(weight.device.type):
            self._iterate(_half_to_float32(weight), WARM_UP_ITERATIONS)

    @torch.no_grad()
    def _iterate(self, weight: Tensor, n_iterations: int) -> tuple[Tensor, Tensor, Tensor]:
        """Run the iterations, store u and v, and return them with sigma."""
        # The autograd graph must not hold the buffers: the next forward, DistributedDataParallel's broadcast and
        # load_state_dict write to them, perhaps before the backward. power_iteration returns new tensors if it runs an
        # iteration; if it runs none, u and v are copied here.
        u, v = (vector.to(weight.dtype, copy=n_iterations == 0) for vector in (self._u, self._v))
        if self._u.dtype != weight.dtype:  # they are stored in half precision: rounding lost their unit norm
            u, v = u / torch.linalg.vector_norm(u), v / torch.linalg.vector_norm(v)
        matrix = as_matrix(weight, self.dim)  # (h, w)
        u, v, sigma = iteration.power_iteration(matrix, u, v, n_iterations=n_iterations, eps=self.eps)
        if n_iterations:
            self._u.copy_(u)
            self._v.copy_(v)
        return u, v, sigma

    def extra_repr(self) -> str:
        return f"n_power_iterations={self.n_power_iterations}, dim={self.dim}, eps={self.eps}"


def iterate_together(model: nn.Module) -> None:
    """Run the power iterations of a model's next pass in training mode, those of all weights at once.

    Each :class:`SpectralNorm` uses what was computed for it when its weight is next read, unless the weight has changed
    by then. Weights in half precision, of tensor subclasses, or computed by other parametrizations iterate on their
    own, when they are read, as all do under a compiler or a transform.
    """
    groups: dict[tuple[torch.device, torch.dtype, int, float], list[tuple[SpectralNorm, Tensor]]] = {}
    for module in model.modules() if runs_custom_operations() else ():
        if isinstance(module, parametrize.ParametrizationList) and len(module) == 1:
            norm, weight = module[0], module.original
            if isinstance(norm, SpectralNorm) and norm.training and _can_be_grouped(norm, weight):
                key = weight.device, weight.dtype, norm.n_power_iterations, norm.eps
                groups.setdefault(key, []).append((norm, weight))
    for (device, _, n_iterations, eps), norms in groups.items():
        members = [Member(weight, norm.dim, norm._u, norm._v) for norm, weight in norms]
        with no_autocast(device.type):
            results = iterate(members, n_iterations=n_iterations, eps=eps)
        for (norm, weight), result in zip(norms, results, strict=True):
            norm._prepared = weight._version, result


def _can_be_grouped(norm: SpectralNorm, weight: Tensor) -> bool:
    # FullyShardedDataParallel leaves a part of the weight, of another shape or class, until its module is called.
    whole = type(weight) is nn.Parameter and weight.ndim > 1 and weight.numel() == len(norm._u) * len(norm._v)
    return whole and weight.dtype in (torch.float32, torch.float64) and norm._u.dtype == weight.dtype


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
) -> M:
    r"""Normalise one weight of a module in place, by its spectral norm: :math:`W / \sigma(W)`.

    It takes the arguments of :func:`torch.nn.utils.parametrizations.spectral_norm`.

    Args:
        module: the layer.
        name: the parameter to normalise.
        n_power_iterations: power-iteration steps per access in training.
        eps: norms of at most this value count as zero.
        dim: the dimension of the outputs. Default: 1 for transposed convolutions, else 0.
        implementation: ``"sagan"`` for :class:`SpectralNorm`, ``"torch"`` for PyTorch's own.

    Returns:
        The module itself.

    Raises:
        ValueError: when the module has no such parameter; when the parameter has no shape yet, is computed by a hook,
            or is normalised already (by any implementation); for an unknown implementation, a ``dim`` that the weight
            does not have, or fewer than one iteration.
        TypeError: for an integer weight.

    >>> from torch import nn
    >>> from torch_sagan import spectral_norm
    >>> layer = spectral_norm(nn.Conv2d(3, 64, 3))
    >>> layer.weight.shape
    torch.Size([64, 3, 3, 3])
    """
    norm = make_norm(module, name, n_power_iterations, eps, dim, implementation)
    parametrize.register_parametrization(module, name, norm)
    return module


def make_norm(
    module: nn.Module, name: str, n_power_iterations: int, eps: float, dim: int | None, implementation: str
) -> nn.Module:
    """The parametrization for one weight, not registered yet. Raises what :func:`spectral_norm` raises."""
    one_of(("sagan", "torch"), implementation=implementation)
    at_least_one(n_power_iterations=n_power_iterations)
    kind = type(module).__name__
    if find_norm(module, name) is not None:
        raise ValueError(f"{name!r} of {kind} is spectrally normalised already")
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        whole = "; apply_spectral_norm takes whole models" if any(module.children()) else ""
        raise ValueError(f"{kind} has no parameter named {name!r}{whole}")
    if is_lazy(weight):
        raise ValueError(f"{name!r} of {kind} has no shape yet: run one forward pass first")
    own_tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    if not (parametrize.is_parametrized(module, name) or name in own_tensors):
        raise ValueError(f"{name!r} of {kind} is not a parameter: a hook or another module computes it")
    if dim is None:
        dim = 1 if isinstance(module, TRANSPOSED) else 0
    if implementation == "torch":
        _check_weight(weight, dim)
        return TorchSpectralNorm(weight, n_power_iterations, dim, eps)
    return SpectralNorm(weight, n_power_iterations=n_power_iterations, dim=dim, eps=eps)


def find_norm(module: nn.Module, name: str) -> Norm | None:
    """The spectral norm of this weight, of whichever implementation, or None."""
    if parametrize.is_parametrized(module, name):
        chain = module.parametrizations[name]  # type: ignore[index]
        return next((part for part in chain if isinstance(part, SpectralNorm | TorchSpectralNorm)), None)
    return legacy_hooks(module).get(name)


def _check_weight(weight: Tensor, dim: int) -> None:
    if not (weight.is_floating_point() or weight.is_complex()):
        raise TypeError(f"expected a floating-point or complex weight, got {weight.dtype}")
    if not -weight.ndim <= dim < weight.ndim:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} has no dimension {dim}")


def as_matrix(weight: Tensor, dim: int) -> Tensor:
    """The weight as a matrix (h, w), h along ``dim``."""
    return weight.movedim(dim, 0).flatten(1)


def _half_to_float32(weight: Tensor) -> Tensor:
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
