"""Attention with the signature of PyTorch's, for rows of channels, with heads and masks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_sagan._torch import no_autocast
from torch_sagan.attention.equation import attention, in_one_dtype, kernel_for, takes_blocks
from torch_sagan.attention.forward_mode import attention_in_blocks
from torch_sagan.attention.plain import attend, in_float32, scaled

__all__ = ["scaled_dot_product_attention"]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    r"""What :func:`torch.nn.functional.scaled_dot_product_attention` computes, differentiable in every way.

    .. math::
        o = \operatorname{softmax}(s\, Q K^\top + \text{mask})\, V

    PyTorch's fused kernels have neither second derivatives nor a forward mode, and its plain path stores the L×S
    matrix. Here every derivative exists, of every order and in both modes, and no matrix is stored; :func:`attention`
    has the details. For its kernels a mask of keys alone, (…, 1, S), is one more channel of query and key. A mask that
    differs by query, and ``is_causal``, are computed in blocks of queries, from a part of the mask for each; compiled,
    exported or traced, they materialize the matrix.

    Args:
        query: (…, L, E). Leading dimensions, such as batch and heads, are broadcast.
        key: (…, S, E).
        value: (…, S, Ev).
        attn_mask: broadcast to (…, L, S). Boolean, True where a query attends to a key; or floating-point, and added to
            the logits. It may require a gradient. A query that attends to no key has the result zero.
        dropout_p: has to be 0, since dropped weights would have to be stored for the derivatives.
        is_causal: query i attends to keys 0 to i.
        scale: what logits are multiplied by, :math:`1/\sqrt{E}` by default.
        enable_gqa: each head of key and value, in dimension -3, is repeated for several heads of the query in turn.

    Returns:
        (…, L, Ev), in the dtype of query, key and value, or of autocast where that is on. Logits and softmax are
        computed in float32 at least, and with a mask all is.

    Raises:
        ValueError: for shapes that do not match, dropout, or a mask with ``is_causal``.
        TypeError: for integers, or for different dtypes outside of autocast.
    """
    if dropout_p != 0:  # NaN too
        raise ValueError(f"expected dropout_p=0, got {dropout_p}: dropped weights would have to be stored")
    if is_causal and attn_mask is not None:
        raise ValueError("expected attn_mask or is_causal, got both: make the mask causal instead")
    query, key, value = in_one_dtype(query, key, value)
    if enable_gqa:
        key, value = _heads_of(query, key), _heads_of(query, value)
    leading = _leading(query, key, value)
    scale = 1 / math.sqrt(max(1, query.shape[-1])) if scale is None else scale
    q, k, v = (tensor.expand(*leading, *tensor.shape[-2:]) for tensor in (query, key, value))
    if attn_mask is None and not is_causal:
        return _attention(q, k, v, scale)  # (…, L, Ev)
    with no_autocast(query.device.type):
        q, k, v = in_float32(q, k, v)
        q = scaled(q, scale)
        mask = None if attn_mask is None else _checked_mask(attn_mask, (*leading, q.shape[-2], k.shape[-2]))
        columns = q.mT, k.mT, v.mT  # (…, E or Ev, L or S)
        if mask is not None and mask.shape[-2] == 1 and kernel_for(*columns):
            return _with_key_mask(q, k, v, mask).to(value.dtype)  # (…, L, Ev)
        mask = None if mask is None else mask.mT  # (…, S, L or 1)
        if takes_blocks(*columns[:2]):
            attended = attention_in_blocks(*columns, mask, causal=is_causal)  # (…, Ev, L)
        else:
            (attended,) = attend(0, *columns, mask, causal=is_causal)
    return attended.mT.to(value.dtype).contiguous()  # (…, L, Ev)


def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> Tensor:
    """Without a mask: (…, L, Ev), for tensors with the same leading dimensions."""
    q, k, v = (tensor.flatten(end_dim=-3) if tensor.ndim > 2 else tensor[None] for tensor in (query, key, value))
    rows = attention(q.mT, k.mT, v.mT, scale=scale).mT  # (B, L, Ev)
    return rows.reshape(*query.shape[:-1], value.shape[-1]).contiguous()


def _with_key_mask(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """With a mask (…, 1, S): (…, L, Ev), for a query that is scaled already.

    The query has one more channel, of ones, and the key that of what is added to logits. That has to be finite, since
    derivatives multiply it by zero: it is so low that weights are zero, and far enough from the lowest number that
    sums and differences with logits of its size are finite.
    """
    hidden = ~mask if mask.dtype == torch.bool else mask == -math.inf  # (…, 1, S)
    low = -torch.finfo(key.dtype).max / 4
    added = torch.zeros_like(mask, dtype=key.dtype) if mask.dtype == torch.bool else mask.to(key.dtype)
    channel = added.masked_fill(hidden, low).mT.expand(*key.shape[:-1], 1)  # (…, S, 1)
    query, key = torch.cat([query, torch.ones_like(query[..., :1])], -1), torch.cat([key, channel], -1)
    return _attention(query, key, value).masked_fill(hidden.all(dim=-1, keepdim=True), 0)


def _checked_mask(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """With at least two dimensions, the last one that of keys; raises for what is no mask of logits of this shape."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"expected a boolean or floating-point attn_mask, got {mask.dtype}")
    given = tuple(mask.shape)
    if len(given) > len(shape) or any(a not in (1, b) for a, b in zip(reversed(given), reversed(shape), strict=False)):
        raise ValueError(f"expected an attn_mask that can be broadcast to (…, L, S) = {shape}, got {given}")
    mask = mask if mask.ndim > 1 else mask.expand(1, shape[-1])
    return mask.expand(*mask.shape[:-1], shape[-1])


def _heads_of(query: Tensor, tensor: Tensor) -> Tensor:
    """A key or a value with as many heads as the query."""
    if min(query.ndim, tensor.ndim) < 3 or query.shape[-3] % tensor.shape[-3]:
        raise ValueError(
            "enable_gqa: expected heads in dimension -3, a multiple of those of key and value in the query, got "
            f"{tuple(tensor.shape)} for a query {tuple(query.shape)}"
        )
    return tensor.repeat_interleave(query.shape[-3] // tensor.shape[-3], dim=-3)


def _leading(query: Tensor, key: Tensor, value: Tensor) -> torch.Size:
    """The leading dimensions of the result; raises for shapes that do not match."""
    shapes = [tuple(tensor.shape) for tensor in (query, key, value)]
    if (
        all(len(shape) >= 2 for shape in shapes)
        and query.shape[-1] == key.shape[-1]
        and key.shape[-2] == value.shape[-2]
    ):
        try:
            return torch.broadcast_shapes(*(shape[:-2] for shape in shapes))
        except RuntimeError:
            pass
    raise ValueError(
        f"expected query (…, L, E), key (…, S, E) and value (…, S, Ev), got {shapes[0]}, {shapes[1]} and {shapes[2]}"
    )
