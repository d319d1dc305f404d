"""Pure functions: attention over positions, and the power iteration behind spectral normalisation.

No modules and no state. Everything here works on plain tensors, so that the mathematics can be read and tested alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torch_sagan.dispatch import is_autocast, is_transformed
from torch_sagan.fused_attention import fused_attention, has_kernel
from torch_sagan.tiled_attention import tiled_attention

__all__ = ["attention", "attention_map", "l2_as_dot_product", "power_iteration", "spectral_normalize"]

# The kernels that do not materialize the attention matrix, by the type of the device. On the meta device, where nothing
# is computed, operations and costs are counted as on CUDA.
KERNELS = {"cpu": tiled_attention, "cuda": fused_attention, "meta": fused_attention}

# Attention matrices of up to this many entries in the whole batch are faster than the kernel (measured). On CUDA that
# holds for float32 alone, and where its products may be TF32: the kernel makes three of them for each. Larger matrices
# would be faster too, by up to a half, but this many take 256 MiB, and the backward needs several.
SMALL_MATRIX = {"cpu": 2**20, "cuda": 2**26, "meta": 0}

# Before PyTorch 2.7 exporting cannot be told from compiling: there, both materialise the matrix.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def attention_map(query: Tensor, key: Tensor) -> Tensor:
    r"""What every query position attends to: :math:`\beta_{ji} = \operatorname{softmax}_i(f_i^\top g_j)`.

    There is no :math:`1/\sqrt{D}`: the paper has none.

    Args:
        query: g, (B, D, N), one column per query position j.
        key: f, (B, D, M), one column per key position i.

    Returns:
        (B, N, M); each row is a distribution over the keys and sums to 1.

    Source: Zhang et al., arXiv:1805.08318, equation 1.
    """
    return torch.softmax(torch.bmm(query.mT, key), dim=2)  # (B, N, M)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    r"""Exact softmax attention over positions: :math:`o_j = \sum_i \beta_{ji} h_i`.

    On the CPU and on CUDA the attention matrix is not materialized, so memory grows with N + M. The exceptions are
    matrices so small that they are faster, on the CPU, and on CUDA with TF32; float64 on CUDA; other devices, AMD's
    GPUs among them; exported programs; and where only plain operations work (``torch.func``, forward-mode derivatives,
    ``torch.jit.trace``). Differentiable twice.

    The weights :math:`\beta_{ji}` are those of :func:`attention_map`, and :math:`h_i` is column i of ``value``.

    Args:
        query: g, (B, D, N).
        key: f, (B, D, M).
        value: h, (B, E, M). E may differ from D.

    Returns:
        (B, E, N).

    Raises:
        ValueError: for shapes that do not match.
        TypeError: for integers, or for different dtypes outside of autocast.

    Source: Zhang et al., arXiv:1805.08318, equation 2 without the output projection.
    """
    _check(query, key, value)
    if _should_materialize(query, key, value):
        # In this order of the factors PyTorch's backward needs no transposed copies of the matrix.
        return torch.bmm(attention_map(query, key), value.mT).mT  # (B, E, N)
    return KERNELS[query.device.type](query, key, value)  # (B, E, N)


def l2_as_dot_product(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    r"""The query and key for :func:`attention` that give the softmax of :math:`-\lVert f_i - g_j \rVert^2`.

    .. math::
        (2 g_j, 1) \cdot (f_i, -\lVert f_i \rVert^2) \allowbreak = \lVert g_j \rVert^2 - \lVert f_i - g_j \rVert^2

    Softmax over i ignores the first term on the right. The mean key is subtracted from both beforehand: distances stay
    the same, and an offset that all positions share costs no precision.

    Args:
        query: g, (B, D, N).
        key: f, (B, D, M).

    Returns:
        Query (B, D + 1, N) and key (B, D + 1, M).

    Source: Kim, Papamakarios and Mnih, *The Lipschitz Constant of Self-Attention*, arXiv:2006.04710, section 3.2.
    """
    mean = key.mean(dim=2, keepdim=True)  # (B, D, 1)
    query, key = query - mean, key - mean
    squared_norm = key.square().sum(dim=1, keepdim=True).to(key.dtype)  # (B, 1, M); autocast sums in float32
    return (
        torch.cat([2 * query, torch.ones_like(query[:, :1])], dim=1),  # (B, D + 1, N)
        torch.cat([key, -squared_norm], dim=1),  # (B, D + 1, M)
    )


def power_iteration(
    matrix: Tensor, u: Tensor, v: Tensor, *, n_iterations: int = 1, eps: float = 1e-12
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Turn u and v towards the first singular vectors: :math:`v = W^\top u / \lVert W^\top u \rVert`,
    :math:`u = W v / \lVert W v \rVert`, ``n_iterations`` times.

    A product whose norm is at most ``eps`` has no direction, so the old vector is kept. A weight that is zero for some
    steps therefore does not destroy u and v.

    Args:
        matrix: (h, w).
        u: (h,), of unit norm.
        v: (w,), of unit norm.
        n_iterations: how often to iterate; with 0, sigma is estimated from u and v as they are.
        eps: norms of at most this value count as zero.

    Returns:
        New u (h,), new v (w,), and the estimate of the spectral norm :math:`\sigma = u^\top W v`, a scalar tensor.
        The arguments are not modified.

    Source: Miyato et al., *Spectral Normalization for GANs*, arXiv:1802.05957, algorithm 1.
    """
    if n_iterations == 0:
        return u, v, torch.vdot(u, matrix @ v)
    for _ in range(n_iterations):
        v = _unit(matrix.mH @ u, otherwise=v, eps=eps)  # (w,)
        image = matrix @ v  # (h,)
        u = _unit(image, otherwise=u, eps=eps)  # (h,)
    return u, v, torch.vdot(u, image)


def spectral_normalize(
    weight: Tensor, u: Tensor, v: Tensor, sigma: Tensor, *, dim: int = 0, eps: float = 1e-12
) -> Tensor:
    r"""Divide a weight by its spectral norm, :math:`W / \sigma` with :math:`\sigma = u^\top W v`.

    The gradient treats u and v as constants. It is :math:`(G - \langle G, W/\sigma \rangle\, u v^\top) / \sigma` for a
    gradient G of the result: one product, one sum and one division. It can be differentiated again. Where sigma is at
    most ``eps`` in absolute value (an all-zero weight) there is nothing to divide by: the weight is returned as it is.

    Args:
        weight: any shape, reshaped to a matrix (h, w) with h = ``weight.shape[dim]``.
        u: (h,), of unit norm.
        v: (w,), of unit norm.
        sigma: the value of :math:`u^\top W v`, as :func:`power_iteration` returns it.
        dim: the dimension of u.
        eps: a sigma of at most this value counts as zero.

    Returns:
        The normalised weight, in the shape of the weight.

    Source: Miyato et al., arXiv:1802.05957, equations 8 and 12.
    """
    if _only_plain_operations(weight):
        u, v = _along(u.detach(), weight, dim), _across(v.detach(), weight, dim)
        sigma = (u.conj() * v * weight).sum()
        return weight / torch.where(sigma.abs() > eps, sigma, 1.0)
    nonzero = sigma.abs() > eps
    divisor = torch.where(nonzero, sigma, 1.0)
    return divide_by_sigma(weight, u * (nonzero / divisor.conj()), v, divisor, dim=dim, eps=eps)


def divide_by_sigma(weight: Tensor, u: Tensor, v: Tensor, divisor: Tensor, *, dim: int, eps: float) -> Tensor:
    """:func:`spectral_normalize` with sigma as it is needed: u divided by it, or zero where sigma counts as zero, and
    the divisor, which is then 1."""
    normalized: Tensor = _DivideBySigma.apply(  # type: ignore[no-untyped-call]
        weight, _along(u, weight, dim), _across(v, weight, dim), divisor, eps
    )
    return normalized


# u and v are given the dimensions of the weight, so that it need not be reshaped.


def _along(u: Tensor, weight: Tensor, dim: int) -> Tensor:
    return u.view([-1 if i == dim else 1 for i in range(weight.ndim)])


def _across(v: Tensor, weight: Tensor, dim: int) -> Tensor:
    return v if v.ndim == weight.ndim else v.view([1 if i == dim else size for i, size in enumerate(weight.shape)])


class _DivideBySigma(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, u: Tensor, v: Tensor, divisor: Tensor, eps: float) -> Tensor:
        # No setup_context: with one, every call inspects the signature of forward, which takes 50 µs.
        ctx.save_for_backward(weight, u, v, divisor)
        ctx.eps = eps
        return weight / divisor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        weight, u, v, divisor = ctx.saved_tensors  # u is divided by sigma
        # nn.Embedding(sparse=True) has a sparse gradient, but the one through sigma reaches every row. A dense gradient
        # stays as it is; a branch on the layout would break compiling in torch 2.5.
        gradient = gradient.to_dense()
        if torch.is_grad_enabled():  # for a double backward, in which sigma depends on the weight
            u = u * divisor.conj()
            sigma = (u.conj() * v * weight).sum()
            nonzero = sigma.abs() > ctx.eps
            divisor = torch.where(nonzero, sigma, 1.0)
            u = u * (nonzero / divisor.conj())
        # (G - <W, G> u / sigma v*) / sigma, with conjugates where the weight is complex. Both are read in the order in
        # which the weight is stored, so that a layout such as channels last needs no copy.
        order = sorted(range(weight.ndim), key=lambda i: weight.stride(i), reverse=True)
        # reshape, because flatten refuses the batched gradients of is_grads_batched
        product = torch.vdot(weight.permute(order).reshape(-1), gradient.permute(order).reshape(-1))
        return torch.addcmul(gradient, product * u, v.conj(), value=-1).div_(divisor.conj()), None, None, None, None


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in (query, key, value)]
    if not (
        all(len(shape) == 3 for shape in shapes)
        and query.shape[0] == key.shape[0] == value.shape[0]
        and query.shape[1] == key.shape[1]
        and key.shape[2] == value.shape[2]
    ):
        raise ValueError(
            f"expected query (B, D, N), key (B, D, M) and value (B, E, M), got {shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    dtypes = [tensor.dtype for tensor in (query, key, value)]
    # Autocast casts all of them to one dtype, except float64.
    alike = len(set(dtypes)) == 1 or (is_autocast(query.device.type) and torch.float64 not in dtypes)
    if not (alike and all(dtype.is_floating_point for dtype in dtypes)):
        raise TypeError(
            f"expected query, key and value in one floating-point dtype, got {dtypes[0]}, {dtypes[1]} and {dtypes[2]}"
        )


def _should_materialize(query: Tensor, key: Tensor, value: Tensor) -> bool:
    device = query.device.type
    # An exported program should hold plain operators that every runtime knows.
    if _is_exporting() or device not in KERNELS or _only_plain_operations(query, key, value):
        return True
    if KERNELS[device] is fused_attention and not has_kernel(query.dtype):
        return True
    if device == "cuda" and (query.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"):
        return False
    return query.shape[0] * query.shape[2] * key.shape[2] <= SMALL_MATRIX[device]


def runs_custom_operations() -> bool:
    """Whether operations run as they are called, by the CPU or a GPU: not in a compiler, a transform or a trace."""
    return not (torch.compiler.is_compiling() or _only_plain_operations())


def _only_plain_operations(*tensors: Tensor) -> bool:
    # A custom autograd.Function has no vmap and no forward mode here, and a trace that contains one cannot be saved.
    if torch.compiler.is_compiling():
        return False
    if is_transformed() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return True
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def _unit(direction: Tensor, *, otherwise: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(direction)
    # No branch on the value: that would synchronise with the device and break a compiled graph.
    return torch.where(norm > eps, direction / norm, otherwise)
