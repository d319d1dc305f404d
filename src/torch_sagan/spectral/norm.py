"""Spectral normalization of one weight: the parametrization, and the function that registers it."""

from __future__ import annotations

import sys
from typing import Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from torch_sagan._checks import at_least_one, one_of
from torch_sagan._torch import TorchSpectralNorm, no_autocast
from torch_sagan.spectral.iteration import divide_by_sigma, divisor, power_iteration, spectral_normalize
from torch_sagan.spectral.legacy import LegacySpectralNorm, drop_load_hook, legacy_hooks
from torch_sagan.spectral.selection import TRANSPOSED_CONVOLUTIONS

__all__ = ["Norm", "SpectralNorm", "as_matrix", "find_norm", "make_norm", "register", "spectral_norm"]

M = TypeVar("M", bound=nn.Module)

# PyTorch's spectral_norm also starts with 15.
WARM_UP_ITERATIONS = 15


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
        weight: reshaped to a matrix (h, w) with h = ``weight.shape[dim]``. A vector is divided by its norm.
        n_power_iterations: steps per access in training.
        dim: the dimension of the outputs. Pass 1 for a transposed convolution, as :func:`spectral_norm` does.
        eps: norms of at most this value count as zero. A weight whose spectral norm counts as zero, or is not finite,
            is returned unchanged, and u and v are kept.

    Raises:
        ValueError: for a scalar weight, a ``dim`` that the weight does not have, fewer than one iteration, or the
            assignment of a weight of another shape.
        TypeError: for an integer weight, or the assignment of None.

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
        # What iterate_together computed for the next access: the weight, its version, and u, v and the divisor.
        self._prepared: tuple[Tensor, int, tuple[Tensor, Tensor, Tensor]] | None = None
        if weight.ndim > 1:
            h, w = as_matrix(weight, self.dim).shape
            self.register_buffer("_u", weight.new_empty(h))
            self.register_buffer("_v", weight.new_empty(w))
            self.reset(weight)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight divided by its spectral norm, in the weight's own shape and dtype."""
        if self._prepared is not None:
            (prepared, version, arguments), self._prepared = self._prepared, None
            if self.training and prepared is weight and version == weight._version:
                return divide_by_sigma(weight, *arguments, dim=self.dim, eps=self.eps)
        if not weight.numel():
            return weight
        dtype = weight.dtype
        weight = _half_to_float32(weight)
        if weight.ndim == 1:
            return _normalize_vector(weight, self.eps).to(dtype)
        u, v, sigma = self._iterate(weight, self.n_power_iterations if self.training else 0)
        return spectral_normalize(weight, u, v, sigma, dim=self.dim, eps=self.eps).to(dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Accept a new weight: u and v are warmed up on it, so that sigma is right at once."""
        if not isinstance(weight, Tensor):
            raise TypeError(
                f"expected a tensor for a weight that is spectrally normalized, got {type(weight).__name__}: "
                "remove_spectral_norm first makes it a plain parameter"
            )
        # PyTorch calls this for a registration, too, and transfer_parametrizations_and_params registers a norm a second
        # time, at a weight that it then replaces by the one that u and v belong to. Only the list of parametrizations
        # of an assignment is complete.
        caller = sys._getframe(1).f_locals.get("self")
        if isinstance(caller, parametrize.ParametrizationList) and hasattr(caller, "ntensors"):
            _check_weight(weight, self.dim)
            h, w = as_matrix(weight[..., None], self.dim).shape
            outputs, each = (len(self._u), len(self._v)) if hasattr(self, "_u") else (h, 1)
            if (h, w) != (outputs, each):
                raise ValueError(f"expected {outputs} outputs with {each} weights each, got {h} with {w}")
            if weight.ndim > 1:
                self._warm_up(weight)
        return weight

    def reset(self, weight: Tensor) -> None:
        """Draw new u and v and warm them up on this weight."""
        for vector in (self._u, self._v):
            vector.normal_()
            vector /= torch.linalg.vector_norm(vector)
        self._warm_up(weight)

    def _warm_up(self, weight: Tensor) -> None:
        if weight.numel() and not weight.is_meta:  # whose iterations would take a second, on no values
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
        # In half precision, which autocast would choose, rounding spoils u and v, and norms overflow in float16. The
        # block is inside of no_grad: around it, an export would hold an empty one as well, which PyTorch cannot load.
        with no_autocast(weight.device.type):
            u, v, sigma = power_iteration(matrix, u, v, n_iterations=n_iterations, eps=self.eps)
        if n_iterations:
            self._u.copy_(u)
            self._v.copy_(v)
        return u, v, sigma

    def extra_repr(self) -> str:
        return f"n_power_iterations={self.n_power_iterations}, dim={self.dim}, eps={self.eps}"


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
    r"""Normalize one weight of a module in place, by its spectral norm: :math:`W / \sigma(W)`.

    It takes the arguments of :func:`torch.nn.utils.parametrizations.spectral_norm`.

    Args:
        module: the layer.
        name: the parameter to normalize.
        n_power_iterations, eps: as in :class:`SpectralNorm`.
        dim: the dimension of the outputs. Default: 1 for transposed convolutions, else 0.
        implementation: ``"sagan"`` for :class:`SpectralNorm`, ``"torch"`` for PyTorch's own.

    Returns:
        The module itself.

    Raises:
        ValueError: when the module has no such parameter; when the parameter has no shape yet, is computed by a hook,
            or is normalized already (by any implementation); for an unknown implementation, a ``dim`` that the weight
            does not have, or fewer than one iteration.
        TypeError: for an integer weight.

    >>> layer = spectral_norm(torch.nn.Conv2d(3, 64, 3))
    >>> layer.weight.shape
    torch.Size([64, 3, 3, 3])
    """
    register(module, name, make_norm(module, name, n_power_iterations, eps, dim, implementation))
    return module


def make_norm(
    module: nn.Module, name: str, n_power_iterations: int, eps: float, dim: int | None, implementation: str
) -> nn.Module:
    """The parametrization for one weight, not registered yet. Raises what :func:`spectral_norm` raises."""
    one_of(("sagan", "torch"), implementation=implementation)
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
        _check_weight(weight, dim)
        return TorchSpectralNorm(weight, n_power_iterations, dim, eps)
    return SpectralNorm(weight, n_power_iterations=n_power_iterations, dim=dim, eps=eps)


def register(module: nn.Module, name: str, norm: nn.Module) -> None:
    """Register what :func:`make_norm` made."""
    drop_load_hook(module, name)
    parametrize.register_parametrization(module, name, norm)


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


def _normalize_vector(vector: Tensor, eps: float) -> Tensor:
    # Divided by its largest entry first, as in `unit`, which gives a zero vector NaN for a gradient.
    largest, _ = divisor(torch.linalg.vector_norm(vector.detach(), torch.inf), 0)
    return vector / divisor(largest * torch.linalg.vector_norm(vector / largest), eps)[0]
