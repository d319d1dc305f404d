"""Self-attention over the positions of a feature map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, overload

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from torch_sagan._checks import at_least_one, one_of
from torch_sagan._torch import on_device
from torch_sagan.attention import equation

__all__ = ["AttentionRecord", "SelfAttention2d"]


class SelfAttention2d(nn.Module):
    r"""Self-attention for feature maps, a drop-in layer: (B, C, H, W) in, (B, C, H, W) out.

    .. math::
        y_j = \gamma\, o_j + x_j, \qquad
        o_j = W_v \sum_i \beta_{ji}\, h(x_i), \qquad
        \beta_{ji} = \operatorname{softmax}_i\bigl(f(x_i)^\top g(x_j)\bigr)

    where j is the query position and i runs over the positions that it attends to. The letters are the paper's: f is
    the 1×1 convolution ``key``, g is ``query``, h is ``value``, and :math:`W_v` is ``out`` (the identity when there is
    none). The learned scalar ``gamma`` starts at zero: a new layer returns exactly its input, so it can be put into a
    trained model. As in the paper, there is no :math:`1/\sqrt{d}`.

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
        pool: keys and values are max-pooled by this factor in both directions (rows and columns left over are
            dropped, as in PyTorch's pooling), so a query attends to ``(H // pool) · (W // pool)`` positions.
        out_projection: whether a convolution projects the result to C channels. Default: only where
            ``value_channels`` differs from C.
        bias: whether the 1×1 convolutions have biases. (The gradient of the key's bias is zero: it adds
            the same number to all logits of a query, which softmax ignores.)
        projection: a function ``projection(in_channels, out_channels) -> Module`` that makes each projection. Default:
            1×1 convolutions. The modules must keep H×W.
        similarity: ``"dot"``, the product above, or ``"l2"``, the negative squared distance below.
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
            projection = _conv1x1 if bias else _conv1x1_without_bias
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
        cls, channels: int, *, device: torch.device | str | int | None = None, dtype: torch.dtype | None = None
    ) -> SelfAttention2d:
        """The layer of the paper's text: value = C // 8 (at least 1), then the output projection back to C."""
        value_channels = max(1, channels // 8)
        return cls(channels, value_channels=value_channels, out_projection=True, device=device, dtype=dtype)

    @classmethod
    def official(
        cls, channels: int, *, device: torch.device | str | int | None = None, dtype: torch.dtype | None = None
    ) -> SelfAttention2d:
        """The layer of the paper's released code: keys and values max-pooled 2×2, value = C // 2 (at least 1),
        output projection, no biases."""
        value_channels = max(1, channels // 2)
        return cls(
            channels,
            value_channels=value_channels,
            pool=2,
            out_projection=True,
            bias=False,
            device=device,
            dtype=dtype,
        )

    @overload
    def forward(self, x: Tensor, *, return_attention: Literal[False] = False) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, *, return_attention: Literal[True]) -> tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, *, return_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Apply attention to a feature map.

        Args:
            x: (B, C, H, W).
            return_attention: also return the attention map, whose memory grows with N·M.

        Returns:
            y (B, C, H, W); with ``return_attention`` the pair of y and the attention map (B, N, M). N = H·W counts the
            query positions and M the keys left after pooling, both in row-major order; each row of the map sums to 1.
        """
        x = _check_feature_map(x, self.channels)  # (B, C, H, W)
        if self.similarity == "l2":
            features = self.query(x)  # (B, D, H, W)
            query = _flatten_query(features, x)  # (B, D, N)
            value = self.value(features).flatten(2)  # (B, E, N)
            query, key = equation.l2_as_dot_product(query, query)  # (B, D + 1, N)
        else:
            query, key, value = self._project(x)  # (B, D, H, W), (B, D, H, W), (B, E, H, W)
            query = _flatten_query(query, x)  # (B, D, N)
            key = _flatten_pooled(key, self.pool)  # (B, D, M)
            value = _flatten_pooled(value, self.pool)  # (B, E, M)
        attended, attention = _attend(query, key, value, return_attention)  # (B, E, N), (B, N, M) or None
        o = self.out(attended.unflatten(2, x.shape[2:]))  # (B, C, H, W)
        # y has x's dtype. Under autocast o, and perhaps x, is in half precision; a float32 gamma would make y float32.
        y = torch.addcmul(x, self.gamma.to(o.dtype), o)  # (B, C, H, W)
        return _output(y, attention)

    def _project(self, x: Tensor | torch.fx.Proxy) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value: one convolution if all three are plain 1×1 convolutions (faster), else three calls."""
        projections = (self.query, self.key, self.value)
        # torch.fx traces with a Proxy for x, and its graph should name the three modules.
        if not (isinstance(x, Tensor) and all(map(_is_plain_1x1_convolution, projections))):
            query, key, value = (projection(x) for projection in projections)
            return query, key, value
        # Each weight is read once, because reading it may run a power iteration.
        weights, biases = zip(*((projection.weight, projection.bias) for projection in projections), strict=True)
        bias = None
        if any(b is not None for b in biases):
            bias = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)])
        projected = F.conv2d(x, torch.cat(weights), bias)  # (B, 2D + E, H, W)
        query, key, value = projected.split([len(weight) for weight in weights], dim=1)
        return query, key, value

    def extra_repr(self) -> str:
        return f"{self.channels}, pool={self.pool}, similarity={self.similarity!r}"


class AttentionRecord(NamedTuple):
    """The attention map of one call of one layer, with its sizes and its gamma.

    Attributes:
        attention: the attention map (B, N, M), detached; each row sums to 1.
        query_size: (height, width) of the queries, N of them.
        key_size: (height, width) of the keys, M of them.
        gamma: the layer's ``gamma`` during the call, of shape (1,), detached; None where it is not known.
    """

    attention: torch.Tensor
    query_size: tuple[int, int]
    key_size: tuple[int, int]
    gamma: torch.Tensor | None = None


# torch.fx cannot trace branches on shapes or on return_attention. The functions below hold those branches, and are
# wrapped so that each appears as one call in the traced graph.


@torch.fx.wrap
def _check_feature_map(x: Tensor, channels: int) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a tensor (B, {channels}, H, W), got {type(x).__name__}")
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"expected a feature map (B, {channels}, H, W), got {tuple(x.shape)}")
    return x


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
        projected = F.max_pool2d(projected, pool)  # (B, ·, H // pool, W // pool)
    return projected.flatten(2)  # (B, ·, M)


@torch.fx.wrap
def _attend(query: Tensor, key: Tensor, value: Tensor, return_attention: bool) -> tuple[Tensor, Tensor | None]:
    if not return_attention:
        return equation.attention(query, key, value), None  # (B, E, N)
    attention = equation.attention_map(query, key)  # (B, N, M)
    return torch.bmm(attention, value.mT).mT, attention  # (B, E, N), (B, N, M)


@torch.fx.wrap
def _output(y: Tensor, attention: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    return y if attention is None else (y, attention)


def _is_plain_1x1_convolution(module: nn.Module) -> bool:
    """Whether calling the module computes a 1×1 convolution and nothing else. Its weight may be parametrized."""
    return (
        isinstance(module, nn.Conv2d)
        # Neither the class nor the instance has methods of its own for it.
        and getattr(module.forward, "__func__", None) is nn.Conv2d.forward
        and getattr(module._conv_forward, "__func__", None) is nn.Conv2d._conv_forward
        and (module.kernel_size, module.stride, module.padding, module.groups) == ((1, 1), (1, 1), (0, 0), 1)
        # No hooks on this module, and no global ones. Up to torch 2.13 this has no public API.
        and not (module._forward_pre_hooks or module._forward_hooks)
        and not (module._backward_pre_hooks or module._backward_hooks)
        and not (module_hooks._global_forward_pre_hooks or module_hooks._global_forward_hooks)
        and not (module_hooks._global_backward_pre_hooks or module_hooks._global_backward_hooks)
    )


def _conv1x1(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Conv2d(in_channels, out_channels, kernel_size=1)


def _conv1x1_without_bias(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
