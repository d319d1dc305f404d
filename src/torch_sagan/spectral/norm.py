"""Spectral normalization of one weight by the norm of its matrix: the parametrization."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torch_sagan._checks import at_least_one
from torch_sagan._torch import no_autocast
from torch_sagan.spectral.iteration import divide_by_sigma, divisor, power_iteration, spectral_normalize

__all__ = ["WARM_UP_ITERATIONS", "SpectralNorm", "as_matrix", "check_weight", "half_to_float32"]

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
        check_weight(weight, dim)
        self.n_power_iterations = n_power_iterations
        self.dim: int = dim % weight.ndim
        self.eps = eps
        # What iterate_together computed for the next access: the weight, its version, and u, v and the divisor.
        self._prepared: tuple[Tensor, int, tuple[Tensor, Tensor, Tensor]] | None = None
        if weight.ndim > 1:
            self._register_buffers(weight)
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
        weight = half_to_float32(weight)
        if weight.ndim == 1:
            return _normalize_vector(weight, self.eps).to(dtype)
        return self._normalize(weight, self.n_power_iterations if self.training else 0).to(dtype)

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
            check_weight(weight, self.dim)
            self._check_shape(weight)
            if weight.ndim > 1:
                self._warm_up(weight)
        return weight

    def reset(self, weight: Tensor) -> None:
        """Draw new u and v and warm them up on this weight."""
        for vector in (self._u, self._v):
            vector.normal_()
            vector /= torch.linalg.vector_norm(vector)
        self._warm_up(weight)

    def _register_buffers(self, weight: Tensor) -> None:
        for name, shape in zip(("_u", "_v"), self._shapes(weight), strict=True):
            self.register_buffer(name, weight.new_empty(shape))

    def _shapes(self, weight: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Those of u and v."""
        h, w = as_matrix(weight, self.dim).shape
        return (h,), (w,)

    def _check_shape(self, weight: Tensor) -> None:
        """Raise a ValueError for a new weight of another shape."""
        h, w = as_matrix(weight[..., None], self.dim).shape
        outputs, each = (len(self._u), len(self._v)) if hasattr(self, "_u") else (h, 1)
        if (h, w) != (outputs, each):
            raise ValueError(f"expected {outputs} outputs with {each} weights each, got {h} with {w}")

    def _normalize(self, weight: Tensor, n_iterations: int) -> Tensor:
        u, v, sigma = self._iterate(weight, n_iterations)
        return spectral_normalize(weight, u, v, sigma, dim=self.dim, eps=self.eps)

    def _warm_up(self, weight: Tensor) -> None:
        if weight.numel() and not weight.is_meta:  # whose iterations would take a second, on no values
            self._iterate(half_to_float32(weight), WARM_UP_ITERATIONS)

    @torch.no_grad()
    def _iterate(self, weight: Tensor, n_iterations: int) -> tuple[Tensor, Tensor, Tensor]:
        """Run the iterations, store u and v, and return them with sigma."""
        u, v = self._vectors(weight.dtype, copy=n_iterations == 0)
        matrix = as_matrix(weight, self.dim)  # (h, w)
        # In half precision, which autocast would choose, rounding spoils u and v, and norms overflow in float16. The
        # block is inside of no_grad: around it, an export would hold an empty one as well, which PyTorch cannot load.
        with no_autocast(weight.device.type):
            u, v, sigma = power_iteration(matrix, u, v, n_iterations=n_iterations, eps=self.eps)
        if n_iterations:
            self._u.copy_(u)
            self._v.copy_(v)
        return u, v, sigma

    def _vectors(self, dtype: torch.dtype, *, copy: bool) -> tuple[Tensor, Tensor]:
        # The autograd graph must not hold the buffers: the next forward, DistributedDataParallel's broadcast and
        # load_state_dict write to them, perhaps before the backward. An iteration makes new tensors; without one, u and
        # v are copied here.
        u, v = (vector.to(dtype, copy=copy) for vector in (self._u, self._v))
        if self._u.dtype != dtype:  # they are stored in half precision: rounding lost their unit norm
            u, v = u / torch.linalg.vector_norm(u), v / torch.linalg.vector_norm(v)
        return u, v

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        here, there = getattr(self, "_v", None), state_dict.get(f"{prefix}_v")
        if isinstance(here, Tensor) and isinstance(there, Tensor) and here.shape != there.shape:
            kinds = [_kind_of_norm(v) for v in (there, here)]
            if kinds[0] != kinds[1]:
                error_msgs.append(f"{prefix}_u and _v are those of {kinds[0]}, and this is {kinds[1]}")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        return f"n_power_iterations={self.n_power_iterations}, dim={self.dim}, eps={self.eps}"


def _kind_of_norm(v: Tensor) -> str:
    """Of which spectral norm this is the vector v, in the words of an error."""
    if v.ndim == 1:
        return "the norm of a matrix"
    return f"the norm of a convolution of {'×'.join(map(str, v.shape[2:]))} feature maps"


def check_weight(weight: Tensor, dim: int) -> None:
    """Raise for a weight that has no spectral norm."""
    if not (weight.is_floating_point() or weight.is_complex()):
        raise TypeError(f"expected a floating-point or complex weight, got {weight.dtype}")
    if not -weight.ndim <= dim < weight.ndim:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} has no dimension {dim}")


def as_matrix(weight: Tensor, dim: int) -> Tensor:
    """The weight as a matrix (h, w), h along ``dim``."""
    return weight.movedim(dim, 0).flatten(1)


def half_to_float32(weight: Tensor) -> Tensor:
    """In half precision norms overflow, and rounding spoils u and v."""
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight


def _normalize_vector(vector: Tensor, eps: float) -> Tensor:
    # Divided by its largest entry first, as in `unit`, which gives a zero vector NaN for a gradient.
    largest, _ = divisor(torch.linalg.vector_norm(vector.detach(), torch.inf), 0)
    return vector / divisor(largest * torch.linalg.vector_norm(vector / largest), eps)[0]
