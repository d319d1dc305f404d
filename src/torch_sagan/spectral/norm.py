"""Spectral normalization of one weight: the parametrization, and the function that registers it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from torch_sagan._checks import at_least_one, one_of
from torch_sagan._torch import TorchSpectralNorm, is_recorded, no_autocast
from torch_sagan.spectral.iteration import divide_by_sigma, divisor, power_iteration, spectral_normalize, unit
from torch_sagan.spectral.layer_map import LayerMap, is_pointwise, spatial_dims
from torch_sagan.spectral.legacy import LegacySpectralNorm, drop_load_hook, legacy_hooks
from torch_sagan.spectral.selection import TRANSPOSED_CONVOLUTIONS
from torch_sagan.spectral.singular_value import largest_singular_value, start

__all__ = [
    "ConvolutionNorm",
    "Norm",
    "SpectralNorm",
    "as_matrix",
    "find_norm",
    "make_norm",
    "own_class",
    "register",
    "spectral_norm",
]

M = TypeVar("M", bound=nn.Module)

# PyTorch's spectral_norm also starts with 15.
WARM_UP_ITERATIONS = 15

# How many singular vectors of a convolution are followed at once. With four, norms in training were up to 1.01.
FOLLOWED = 8


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
        weight = _half_to_float32(weight)
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
            _check_weight(weight, self.dim)
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
            self._iterate(_half_to_float32(weight), WARM_UP_ITERATIONS)

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


class ConvolutionNorm(SpectralNorm):
    r"""Divide a weight by the operator norm of its convolution on feature maps of one size.

    :class:`SpectralNorm` with the convolution, :math:`A x = W * x`, in the place of the matrix; u is one image of its
    layer, (1, out, …), and v one feature map, (1, C, …). The upper end of a convolution's spectrum is so dense that in
    training one singular value overtakes another within a few steps. An iteration therefore follows a space of eight
    images, u among them: block power iteration, of which v is the best vector (Rayleigh-Ritz),

    .. math::
        Q = \operatorname{orth}(A^* [u, r_1, \dots, r_7]), \qquad
        v = \operatorname*{argmax}_{v \in Q, \, \lVert v \rVert = 1} \lVert A v \rVert, \qquad
        u = \frac{A v}{\lVert A v \rVert}, \qquad [u, r_1, \dots, r_7] \leftarrow A Q.

    An access in training takes one adjoint and one convolution of eight feature maps for each iteration, and then one
    convolution of a single one, through which the gradient flows. The seven other images are a buffer, and in the state
    dict, since training would otherwise go on with slightly other values of sigma. :func:`spectral_norm` makes it, with
    ``of="convolution"``.

    Args:
        weight: of a convolution.
        layer: its layer without bias, as a function of the weight.
        n_power_iterations, dim, eps: as in :class:`SpectralNorm`.

    Raises:
        ValueError: as :class:`SpectralNorm` does.
        TypeError: also for a complex weight.

    Source: Saad, *Numerical Methods for Large Eigenvalue Problems*, 2011, section 5.2 (subspace iteration with
    projection).
    """

    _rivals: Tensor

    def __init__(
        self, weight: Tensor, layer: LayerMap, *, n_power_iterations: int = 1, dim: int = 0, eps: float = 1e-12
    ) -> None:
        if weight.is_complex():
            raise TypeError(f"expected a real weight for the norm of a convolution, got {weight.dtype}")
        self.layer: LayerMap = layer  # first, since the shapes of u and v are its
        super().__init__(weight, n_power_iterations=n_power_iterations, dim=dim, eps=eps)

    def _register_buffers(self, weight: Tensor) -> None:
        super()._register_buffers(weight)
        # In state dicts, so that a resumed training goes on as it would have; evaluation needs u and v alone.
        count = min(FOLLOWED, self._u.numel(), self._v.numel()) - 1
        self.register_buffer("_rivals", weight.new_zeros(count, *self._u.shape[1:]))

    def _shapes(self, weight: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.layer.out_shape, self.layer.in_shape

    def _check_shape(self, weight: Tensor) -> None:
        if tuple(weight.shape) != self.layer.weight_shape:
            raise ValueError(f"expected a weight {self.layer.weight_shape}, got {tuple(weight.shape)}")

    def _normalize(self, weight: Tensor, n_iterations: int) -> Tensor:
        # Sigma is linear in the weight, so autograd has its derivatives of every order.
        _, _, sigma = self._iterate(weight, n_iterations)
        return weight / divisor(sigma, self.eps)[0]

    @torch.no_grad()
    def _warm_up(self, weight: Tensor) -> None:
        # The upper end of a convolution's spectrum is so dense that 15 steps of power iteration end some per cent
        # below the norm.
        if weight.is_meta or is_recorded():
            return
        self._rivals.copy_(start(tuple(self._rivals.shape), torch.device("cpu")))
        if not (weight.any() and weight.isfinite().all()):
            return
        for buffer, vector in zip((self._u, self._v), self.singular_vectors(weight, self._v)[1:], strict=True):
            buffer.copy_(vector)
        self._iterate(_half_to_float32(weight), WARM_UP_ITERATIONS)

    def singular_vectors(
        self, weight: Tensor, v: Tensor | None = None, *, tolerance: float = 1e-4, restarts: int = 8
    ) -> tuple[float, Tensor, Tensor]:
        """The norm of the convolution with a weight that is finite and not zero, and its first singular vectors u and
        v, in float64: looked for from v on, or from numbers that are always the same."""
        weight = weight.detach().cpu().double()  # some devices have no float64
        scale = weight.abs().max()
        apply, adjoint = partial(self.layer, weight / scale), partial(self.layer.adjoint, weight / scale)
        first = start(self.layer.in_shape, weight.device) if v is None else v.cpu().double()
        sigma, v = largest_singular_value(apply, adjoint, first, tolerance=tolerance, restarts=restarts)
        u = apply(v)
        return float(scale * sigma), u / torch.linalg.vector_norm(u), v

    def _iterate(self, weight: Tensor, n_iterations: int) -> tuple[Tensor, Tensor, Tensor]:
        """Run the iterations, store u and v, and return them with sigma, which has a graph to the weight."""
        with torch.no_grad():
            u, v = self._vectors(weight.dtype, copy=n_iterations == 0)
            rivals = self._rivals.to(weight.dtype)
        with no_autocast(weight.device.type):
            with torch.no_grad():
                for _ in range(n_iterations):
                    u, v, rivals = self._step(weight, u, v, rivals)
            image = self.layer(weight, v)  # (1, out, …)
            with torch.no_grad():
                if n_iterations:
                    u = self._unit(image, otherwise=u)
            sigma = (u * image).sum()
        if n_iterations:
            with torch.no_grad():
                self._u.copy_(u)
                self._v.copy_(v)
                self._rivals.copy_(rivals)
        return u, v, sigma

    def _step(self, weight: Tensor, u: Tensor, v: Tensor, rivals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images = torch.cat([u, rivals])  # (k, out, …)
        maps = self.layer.adjoint(weight, images)  # (k, C, …)
        rows, _, nonzero = unit(maps.flatten(), otherwise=torch.zeros_like(maps).flatten(), eps=self.eps)
        basis = torch.linalg.qr(rows.view(len(maps), -1).mT).Q.mT  # (k, n), orthonormal
        images = self.layer(weight, basis.view_as(maps))
        images = self._unit(images, otherwise=torch.zeros_like(images))
        products = images.flatten(1)  # (k, m)
        first = _first_eigenvector(products @ products.mT)  # (k,)
        # The reflection that turns it into a multiple of (1, 0, …) leaves images of what is orthogonal to it.
        normal = torch.cat([first[:1] + torch.where(first[:1] < 0, -1, 1), first[1:]])
        others = products - torch.outer(normal * (2 / normal.square().sum()), normal @ products)
        new = torch.where(nonzero, first @ basis, v.flatten()).view_as(v)
        image = torch.tensordot(first, images, 1)[None]
        return self._unit(image, otherwise=u), new, torch.where(nonzero, others[1:].view_as(rivals), rivals)

    def _unit(self, x: Tensor, *, otherwise: Tensor) -> Tensor:
        return unit(x.flatten(), otherwise=otherwise.flatten(), eps=self.eps)[0].view_as(x)

    def extra_repr(self) -> str:
        return f"input_size={self.layer.input_size}, {super().extra_repr()}"


def _first_eigenvector(gram: Tensor) -> Tensor:
    """That of the largest eigenvalue of a Gram matrix (k, k), nearly: a column of its 4096th power.

    An eigenvector whose eigenvalue is smaller by a share d keeps a share of exp(-4096 d) in it. That takes less than
    1e-4 of the largest. torch.linalg.eigh would wait for the GPU.
    """
    for _ in range(4):
        gram = torch.linalg.matrix_power(gram / gram.diagonal().sum(), 8)
    column = gram.index_select(1, gram.diagonal().argmax(keepdim=True))[:, 0]
    return column / torch.linalg.vector_norm(column)


def _kind_of_norm(v: Tensor) -> str:
    """Of which spectral norm this is the vector v, in the words of an error."""
    if v.ndim == 1:
        return "the norm of a matrix"
    return f"the norm of a convolution of {'×'.join(map(str, v.shape[2:]))} feature maps"


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
        _check_weight(weight, dim)
        if of == "convolution":
            raise ValueError('implementation="torch" has the norm of a matrix alone, got of="convolution"')
        return TorchSpectralNorm(weight, n_power_iterations, dim, eps)
    if of == "convolution":
        _check_weight(weight, dim)
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
