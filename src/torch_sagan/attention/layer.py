"""Self-attention over the positions of a feature map."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple, TypeVar, overload

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from torch_sagan._checks import at_least_one, one_of
from torch_sagan._torch import (
    is_recorded,
    no_autocast,
    on_device,
    only_plain_operations,
    plain_tensor,
    runs_custom_operations,
)
from torch_sagan.attention import equation
from torch_sagan.attention.projections import pointwise_convolution, project, reset

__all__ = [
    "AttentionRecord",
    "SelfAttention",
    "SelfAttention1d",
    "SelfAttention2d",
    "SelfAttention3d",
    "expected_shape",
]

Self = TypeVar("Self", bound="SelfAttention")  # that of typing is in Python 3.11

# By the number of spatial dimensions.
SIZES = {1: "L", 2: "H, W", 3: "D, H, W"}
MAX_POOL: dict[int, Callable[[Tensor, int], Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


class SelfAttention(nn.Module):
    """The implementation of :class:`SelfAttention1d`, :class:`SelfAttention2d` and :class:`SelfAttention3d`.

    Attention itself does not know in how many directions positions lie. So the three differ in what takes a feature map
    to queries, keys and values: the convolutions and the pooling.

    Attributes:
        spatial_dims: how many dimensions of a feature map count positions; the first two are B and C.
    """

    spatial_dims: ClassVar[int]

    def __init__(
        self,
        channels: int,
        *,
        qk_channels: int | None = None,
        value_channels: int | None = None,
        pool: int = 1,
        out_projection: bool | None = None,
        bias: bool = True,
        projection: Callable[[int, int], nn.Module] | None = None,
        similarity: Literal["dot", "l2"] = "dot",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        one_of(("dot", "l2"), similarity=similarity)
        at_least_one(channels=channels, pool=pool)
        qk_channels = max(1, channels // 8) if qk_channels is None else qk_channels
        value_channels = channels if value_channels is None else value_channels
        at_least_one(qk_channels=qk_channels, value_channels=value_channels)
        if out_projection is None:
            out_projection = value_channels != channels
        if not out_projection and value_channels != channels:
            raise ValueError(
                f"without an output projection value_channels must equal channels ({channels}), got {value_channels}"
            )
        if similarity == "l2" and pool != 1:
            raise ValueError(
                f'similarity="l2" needs pool=1, got {pool}: its Lipschitz bound holds only if every query is also a key'
            )
        if projection is None:
            projection = pointwise_convolution(self.spatial_dims, bias)
        elif not bias:
            raise ValueError("bias=False has no effect on a projection of your own: build it without a bias")

        self.channels = channels
        self.pool = pool
        self.similarity = similarity
        with on_device(device):
            self.query: nn.Module = projection(channels, qk_channels)
            if similarity == "dot":
                self.key: nn.Module = projection(channels, qk_channels)
            self.value: nn.Module = projection(channels if similarity == "dot" else qk_channels, value_channels)
            self.out: nn.Module = projection(value_channels, channels) if out_projection else nn.Identity()
            self.gamma: nn.Parameter = nn.Parameter(torch.zeros(1))
        if dtype is not None:
            self.to(dtype)

    @classmethod
    def paper(
        cls: type[Self],
        channels: int,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The layer of the paper's text: value = C // 8 (at least 1), then the output projection back to C."""
        value_channels = max(1, channels // 8)
        return cls(channels, value_channels=value_channels, out_projection=True, device=device, dtype=dtype)

    @classmethod
    def official(
        cls: type[Self],
        channels: int,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The layer of the paper's released code: keys and values max-pooled by 2 in every direction,
        value = C // 2 (at least 1), output projection, no biases."""
        value_channels = max(1, channels // 2)
        return cls(
            channels, value_channels=value_channels, pool=2, out_projection=True, bias=False, device=device, dtype=dtype
        )

    @overload
    def forward(self, x: Tensor, *, return_attention: Literal[False] = False) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, *, return_attention: Literal[True]) -> tuple[Tensor, Tensor]: ...

    # Not keyword-only: PyTorch's older ONNX exporter passes every argument by position.
    def forward(self, x: Tensor, return_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Apply attention to a feature map.

        Args:
            x: the feature map, with C channels.
            return_attention: also return the attention map, whose memory grows with N·M.

        Returns:
            y, like x; with ``return_attention`` the pair of y and the attention map (B, N, M). N counts the positions
            of x, which are the queries, and M the keys left after pooling, both in row-major order; each row of the map
            sums to 1.
        """
        features = _check_feature_map(x, self.channels, self.spatial_dims)  # (B, C, …), as x
        if self.similarity == "l2":
            projected = self.query(features)  # (B, D, …)
            value = self.value(projected).flatten(2)  # (B, E, N)
            attended, attention = _attend_by_distance(_flatten_query(projected, x), value, return_attention)
        else:
            query, key, value = project(features, self.query, self.key, self.value)  # (B, D, …), (B, D, …), (B, E, …)
            query = _flatten_query(query, x)  # (B, D, N)
            key = _flatten_pooled(key, self.pool)  # (B, D, M)
            value = _flatten_pooled(value, self.pool)  # (B, E, M)
            attended, attention = _attend(query, key, value, return_attention)  # (B, E, N), (B, N, M) or None
        o = self.out(attended.unflatten(2, x.shape[2:]))  # (B, C, …)
        return _output(_add(x, self.gamma, o), attention)  # (B, C, …)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make this a new layer again: ``gamma`` is zero, and the modules of the projections reset their parameters.

        A layer that was built on the meta device needs it after ``to_empty``. Parametrized weights are included, and u
        and v of a spectral norm are drawn and warmed up.

        Raises:
            ValueError: for a weight that a hook computes, such as PyTorch's older ``spectral_norm``.
        """
        for module in list(self.modules())[1:]:
            if hasattr(module, "reset_parameters"):
                reset(module)
        self.gamma.zero_()

    def extra_repr(self) -> str:
        return f"{self.channels}, pool={self.pool}, similarity={self.similarity!r}"


class SelfAttention1d(SelfAttention):
    """Self-attention for sequences, a drop-in layer: (B, C, L) in, (B, C, L) out.

    The layer of :class:`SelfAttention2d` with L positions: the same equation, arguments, attributes and errors. Its
    projections are convolutions of one dimension.

    >>> import torch
    >>> from torch_sagan import SelfAttention1d
    >>> layer = SelfAttention1d.official(64)
    >>> y, attention = layer(torch.randn(2, 64, 400), return_attention=True)
    >>> y.shape, attention.shape
    (torch.Size([2, 64, 400]), torch.Size([2, 400, 200]))
    """

    spatial_dims = 1


class SelfAttention2d(SelfAttention):
    r"""Self-attention for feature maps, a drop-in layer: (B, C, H, W) in, (B, C, H, W) out.

    .. math::
        y_j = \gamma\, o_j + x_j, \qquad
        o_j = W_v \sum_i \beta_{ji}\, h(x_i), \qquad
        \beta_{ji} = \operatorname{softmax}_i\bigl(f(x_i)^\top g(x_j)\bigr)

    where j is the query position and i runs over the positions that it attends to. The letters are the paper's: f is
    the 1×1 convolution ``key``, g is ``query``, h is ``value``, and :math:`W_v` is ``out`` (the identity when there is
    none). The learned scalar ``gamma`` starts at zero: a new layer returns exactly its input, so it can be put into a
    trained model. As in the paper, there is no :math:`1/\sqrt{d}`. Logits and softmax are in float32 at least, and y
    has the dtype, the strides and the class of x.

    With ``similarity="l2"`` the negative squared distance takes the place of the dot product, and gives the layer a
    Lipschitz bound, which the dot product cannot have:

    .. math::
        \beta_{ji} = \operatorname{softmax}_i\bigl(-\lVert g(x_i) - g(x_j) \rVert^2\bigr), \qquad
        h(x_i) = V g(x_i)

    where g is ``query`` and V is ``value``. The bound holds only if query and key share one projection g, and if the
    values are projected from its result: there is no ``key``, and ``value`` has ``qk_channels`` inputs. The bound
    itself is in the documentation, under "Variants".

    Args:
        channels: C, the channels of the feature map.
        qk_channels: channels of query and key. Default: ``max(1, C // 8)``.
        value_channels: channels of the value. Default: C.
        pool: keys and values are max-pooled by this factor in every direction (rows and columns left over are
            dropped, as in PyTorch's pooling), so a query attends to ``(H // pool) · (W // pool)`` positions.
        out_projection: whether a convolution projects the result to C channels. Default: only where
            ``value_channels`` differs from C.
        bias: whether the 1×1 convolutions have biases. (The gradient of the key's bias is zero: it adds
            the same number to all logits of a query, which softmax ignores.)
        projection: a function ``projection(in_channels, out_channels) -> Module`` that makes each projection. Default:
            1×1 convolutions. The modules must keep H×W.
        similarity: ``"dot"``, the product, or ``"l2"``, the negative squared distance, both above.
        device: where the parameters are made; default: PyTorch's default device.
        dtype: of the parameters; default: PyTorch's default dtype.

    Attributes:
        query: the projection to queries.
        key: the projection to keys, except with ``similarity="l2"``.
        value: the projection to values.
        out: the projection of the result, or the identity.
        gamma: a parameter of shape (1,).

    Raises:
        ValueError: for sizes below 1, for ``out_projection=False`` where ``value_channels`` differs from C, for
            ``bias=False`` together with ``projection``, for an unknown ``similarity``, and for ``"l2"`` with pooled
            keys, where its bound does not hold; in ``forward`` for an input that is not (B, C, H, W), or is smaller
            than ``pool``.
        TypeError: in ``forward`` for an input that is not a tensor.

    The defaults are those of the PyTorch implementation that most tutorials copy. :meth:`paper` and
    :meth:`official` give the layers of the paper's text and of its released code.

    Source: Zhang et al., *Self-Attention Generative Adversarial Networks*, arXiv:1805.08318, section 3.

    >>> import torch
    >>> from torch_sagan import SelfAttention2d
    >>> layer = SelfAttention2d(64)
    >>> x = torch.randn(2, 64, 32, 32)
    >>> torch.equal(layer(x), x)
    True
    >>> y, attention = layer(x, return_attention=True)
    >>> attention.shape
    torch.Size([2, 1024, 1024])
    """

    spatial_dims = 2


class SelfAttention3d(SelfAttention):
    """Self-attention for volumes, a drop-in layer: (B, C, D, H, W) in, (B, C, D, H, W) out.

    The layer of :class:`SelfAttention2d` with D·H·W positions: the same equation, arguments, attributes and errors. Its
    projections are convolutions of three dimensions, and ``pool`` pools in all three. Every position attends to the
    whole volume: the attention matrix of 32×32×32 positions has 2³⁰ entries, 4 GiB, and is not materialized.

    >>> import torch
    >>> from torch_sagan import SelfAttention3d
    >>> layer = SelfAttention3d(16)
    >>> x = torch.randn(1, 16, 12, 12, 12)
    >>> torch.equal(layer(x), x)
    True
    """

    spatial_dims = 3


class AttentionRecord(NamedTuple):
    """The attention map of one call of one layer, with its sizes and its gamma.

    Attributes:
        attention: the attention map (B, N, M), detached; each row sums to 1.
        query_size: the size of the feature map, as (height, width), whose N positions are the queries.
        key_size: the size of that of the keys, M of them; smaller where the layer pools.
        gamma: the layer's ``gamma`` during the call, of shape (1,), detached; None where it is not known.
    """

    attention: torch.Tensor
    query_size: tuple[int, ...]
    key_size: tuple[int, ...]
    gamma: torch.Tensor | None = None


def expected_shape(channels: int | str, spatial_dims: int) -> str:
    """A feature map as errors name it: ``(B, 64, H, W)``."""
    return f"(B, {channels}, {SIZES[spatial_dims]})"


# torch.fx cannot trace branches on shapes or on return_attention. The functions below hold those branches, and are
# wrapped so that each appears as one call in the traced graph.


@torch.fx.wrap
def _check_feature_map(x: Tensor, channels: int, spatial_dims: int) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a tensor {expected_shape(channels, spatial_dims)}, got {type(x).__name__}")
    if x.ndim != spatial_dims + 2 or x.shape[1] != channels:
        raise ValueError(f"expected a feature map {expected_shape(channels, spatial_dims)}, got {tuple(x.shape)}")
    return plain_tensor(x)


@torch.fx.wrap
def _flatten_query(query: Tensor, x: Tensor) -> Tensor:
    if query.shape[2:] != x.shape[2:]:
        raise ValueError(
            f"a projection must keep the size of the feature map: {tuple(x.shape[2:])} became {tuple(query.shape[2:])}"
        )
    return query.flatten(2)  # (B, D, N)


@torch.fx.wrap
def _flatten_pooled(projected: Tensor, pool: int) -> Tensor:
    if pool > 1:
        if min(projected.shape[2:]) < pool:
            raise ValueError(
                f"a feature map of {tuple(projected.shape[2:])} is smaller than pool={pool}: no key is left"
            )
        projected = MAX_POOL[projected.ndim - 2](projected, pool)  # (B, ·, H // pool, …)
    return projected.flatten(2)  # (B, ·, M)


@torch.fx.wrap
def _attend(query: Tensor, key: Tensor, value: Tensor, return_attention: bool) -> tuple[Tensor, Tensor | None]:
    if return_attention:
        return equation.attention_and_map(query, key, value)  # (B, E, N), (B, N, M)
    return equation.attention(query, key, value), None  # (B, E, N)


@torch.fx.wrap
def _attend_by_distance(query: Tensor, value: Tensor, return_attention: bool) -> tuple[Tensor, Tensor | None]:
    with no_autocast(query.device.type):  # a square has twice the digits of the features
        query, key = equation.l2_as_dot_product(query, query)  # (B, D + 1, N)
        attended, attention = _attend(query, key, value.to(query.dtype), return_attention)
    return attended.to(value.dtype), attention if attention is None else attention.to(value.dtype)


@torch.fx.wrap
def _add(x: Tensor, gamma: Tensor, o: Tensor) -> Tensor:
    """γ o + x, in the dtype and with the strides of x; where γ is 0 that is x, also if o is infinite or NaN."""
    gamma = gamma.to(o.dtype)  # under autocast o, and perhaps x, is in half precision; a float32 γ would make y float32
    if _may_be_zero_times_infinity(gamma, o):
        o = o.masked_fill((gamma == 0) & ~o.isfinite(), 0)
    y = torch.addcmul(x, gamma, o).to(x.dtype)
    if y.stride() != x.stride() and runs_custom_operations():  # those of o, where x has dimensions of size 1
        like_x = torch.empty_like(x)
        y = y if y.stride() == like_x.stride() else like_x.copy_(y)
    return y


def _may_be_zero_times_infinity(gamma: Tensor, o: Tensor) -> bool:
    """Whether to look for it. Without the compiler that costs passes over o, so it is not done in every step."""
    if torch.compiler.is_compiling() or only_plain_operations(gamma, o):
        return True
    if type(o) is Tensor and o.is_cpu and not is_recorded():
        return gamma.item() == 0 and not math.isfinite(o.detach().sum())
    return o.dtype == torch.float16  # a GPU should not wait for γ; other dtypes overflow beyond some 1e18 alone


@torch.fx.wrap
def _output(y: Tensor, attention: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    return y if attention is None else (y, attention)
