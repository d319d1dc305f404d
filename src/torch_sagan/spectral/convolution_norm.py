"""Spectral normalization of one weight by the norm of its convolution: the parametrization."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from torch_sagan._torch import is_recorded, no_autocast
from torch_sagan.spectral.iteration import divisor, unit
from torch_sagan.spectral.layer_map import LayerMap
from torch_sagan.spectral.norm import WARM_UP_ITERATIONS, SpectralNorm, half_to_float32
from torch_sagan.spectral.singular_value import largest_singular_value, start

__all__ = ["ConvolutionNorm"]

# How many singular vectors of a convolution are followed at once. With four, norms in training were up to 1.01.
FOLLOWED = 8


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
        self._iterate(half_to_float32(weight), WARM_UP_ITERATIONS)

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
