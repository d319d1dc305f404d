"""Attention maps over their images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_sagan.attention.layer import AttentionRecord

__all__ = ["attention_overlay", "mark_queries"]

# Violet, orange, pale yellow: on a gray image, only attention has a color.
RAMP = ((0.45, 0.08, 0.43), (0.95, 0.45, 0.15), (0.99, 1.0, 0.75))
# Green, magenta, blue, teal, sky: none is on the ramp, all are visible on white and on black, and the first four
# differ for red-green color-blind people, too.
MARKS = ((0.1, 1.0, 0.2), (1.0, 0.1, 0.85), (0.1, 0.2, 1.0), (0.1, 0.65, 0.55), (0.3, 0.8, 1.0))

LUMA = (0.299, 0.587, 0.114)

Query = tuple[int, int]


@torch.no_grad()
def attention_overlay(
    images: Tensor,
    attention: Tensor | AttentionRecord,
    query: Query | Sequence[Query],
    *,
    query_size: tuple[int, int] | None = None,
    key_size: tuple[int, int] | None = None,
    strength: float = 0.9,
    mark: bool = True,
) -> Tensor:
    r"""What one or several query positions attend to, in color over the image in gray.

    .. math::
        \text{level}_i = \min(1, \beta_{ji} / s_j), \qquad
        s_j = \max(\max_k \beta_{jk} / 2,\ 4 / M)

    The query's row of the attention map is stretched over the image (bilinearly), and each level is both a position on
    a color ramp and, times ``strength``, the opacity of that color: positions without attention stay gray. All
    weights from half of the largest one have the full level, so that a peak covers its whole position; the 4 / M keeps
    a uniform attention map, whose weights are 1 / M, pale. Rows and columns of the feature map that pooling left
    without a key stay gray.

    The attention of a :class:`SelfAttention1d` is drawn as a strip, over the width of the image and its whole height:
    over a spectrogram, for example. That of a volume has no image; take a slice, as the guide shows.

    Enlarge small images first, to 192 pixels or more: a mark of a few pixels can hardly be seen.

    Args:
        images: (B, 3, H, W) or (B, 1, H, W), in [-1, 1].
        attention: (B, N, M), as ``return_attention=True`` gives it, or a record of :func:`record_attention`, which
            has its sizes.
        query: (row, column) of the query position, in pixels of the image, or a sequence of Q of them.
        query_size: (height, width) of the queries, N of them. Default: shaped like the image.
        key_size: (height, width) of the keys, M of them. Default: shaped like the image.
        strength: opacity of the full level, from 0 (the gray image alone) to 1.
        mark: whether the query is marked, as :func:`mark_queries` marks it, with a frame of the same color around the
            image.

    Returns:
        (B, 3, H, W) in [0, 1]; for a sequence of queries (B, Q, 3, H, W), each with its own mark alone.

    Raises:
        ValueError: for images or maps of other shapes, images of integers or that are not finite, weights of the query
            that are negative or not finite, a query outside the image, a strength outside [0, 1], sizes that do not
            multiply to N and M, sizes given together with a record, or a record of a volume.

    >>> import torch
    >>> from torch_sagan import attention_overlay
    >>> images = torch.rand(2, 3, 64, 64) * 2 - 1
    >>> attention = torch.rand(2, 256, 64).softmax(2)
    >>> attention_overlay(images, attention, (20, 40)).shape
    torch.Size([2, 3, 64, 64])
    >>> attention_overlay(images, attention, [(20, 40), (3, 3), (60, 32)]).shape
    torch.Size([2, 3, 3, 64, 64])
    """
    rgb = _rgb(images)  # (B, 3, H, W)
    if isinstance(attention, AttentionRecord):
        if query_size is not None or key_size is not None:
            raise ValueError("a record knows its sizes: give neither query_size nor key_size")
        query_size, key_size = drawn_size(attention.query_size), drawn_size(attention.key_size)
        attention = attention.attention
    shape = tuple(getattr(attention, "shape", ()))
    if len(shape) != 3 or shape[0] != len(images):
        received = shape or f"a {type(attention).__name__}"
        raise ValueError(f"expected an attention map (B, N, M) with B = {len(images)}, got {received}")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be between 0 and 1, got {strength}")
    height, width = images.shape[2:]
    queries, several = _queries(query, (height, width))
    query_size = map_size(attention.shape[1], query_size, (height, width), "query_size")
    key_size = map_size(attention.shape[2], key_size, (height, width), "key_size")

    cells = [(row * query_size[0] // height, column * query_size[1] // width) for row, column in queries]
    positions = [row * query_size[1] + column for row, column in cells]
    weights = attention[:, positions].float()  # (B, Q, M)
    check_weights(weights)
    scale = (weights.amax(2, keepdim=True) / 2).clamp(min=4 / weights.shape[2])  # (B, Q, 1)
    levels = (weights / scale).unflatten(2, key_size)  # (B, Q, h, w)
    extent = keys_extent(query_size, key_size)
    rows, columns = (round(pixels * e / n) for pixels, e, n in zip((height, width), extent, query_size, strict=True))
    levels = F.interpolate(levels, size=(rows, columns), mode="bilinear").clamp(max=1)
    levels = F.pad(levels, (0, width - columns, 0, height - rows)).unsqueeze(2)  # (B, Q, 1, H, W)

    gray = 0.1 + 0.55 * (rgb * rgb.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)  # (B, 1, H, W)
    overlay = torch.lerp(gray.unsqueeze(1), _colors(levels), strength * levels)  # (B, Q, 3, H, W)
    for i, position in enumerate(queries if mark else []):
        _draw_ring(overlay[:, i], position, i)
        _draw_frame(overlay[:, i], i)
    return overlay if several else overlay.squeeze(1)


@torch.no_grad()
def mark_queries(images: Tensor, queries: Query | Sequence[Query]) -> Tensor:
    """The images with query positions on them, each in the color that :func:`attention_overlay` gives it.

    A mark is a ring, in proportion to the image, so that the position itself stays visible; from 64 pixels on it has
    black edges. The colors repeat after the fifth.

    Args:
        images: (B, 3, H, W) or (B, 1, H, W), in [-1, 1].
        queries: (row, column) in pixels of the image, or a sequence of them; later ones cover earlier ones.

    Returns:
        (B, 3, H, W) in [0, 1].

    Raises:
        ValueError: for images of another shape, of integers or not finite, or a query outside the image.
    """
    rgb = _rgb(images)  # (B, 3, H, W)
    positions, _ = _queries(queries, (images.shape[2], images.shape[3]))
    for i, position in enumerate(positions):
        _draw_ring(rgb, position, i)
    return rgb


def check_images(images: Tensor) -> None:
    """Raise unless these are images (B, 1 or 3, H, W) of floating point, and finite."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"expected images (B, 3, H, W) or (B, 1, H, W), got {tuple(images.shape)}")
    if not torch.is_floating_point(images):
        raise ValueError(f"expected images of floating point in [-1, 1], got {images.dtype}")
    if not images.isfinite().all():
        raise ValueError("expected images in [-1, 1], got some that are not finite")


def check_weights(weights: Tensor, where: str = "") -> None:
    """Raise unless these can be attention weights."""
    if not ((weights >= 0) & weights.isfinite()).all():
        raise ValueError(f"{where}attention weights must be finite and not negative")


def drawn_size(size: tuple[int, ...]) -> tuple[int, int]:
    """(height, width) in which the positions of a recorded feature map are drawn: those of a sequence are one row."""
    if len(size) > 2:
        raise ValueError(
            f"attention in a volume of {'×'.join(map(str, size))} positions cannot be drawn over an image: draw a "
            'slice of it, as the documentation shows under "Visualize attention"'
        )
    return (1, size[0]) if len(size) == 1 else (size[0], size[1])


def map_size(
    n_positions: int, given: tuple[int, int] | None, image_size: tuple[int, int], name: str
) -> tuple[int, int]:
    """(height, width) of a feature map of that many positions: the given one, or the one shaped like the image."""
    if given is None:
        height = round(math.sqrt(n_positions * image_size[0] / image_size[1]))
        given = (height, n_positions // max(height, 1))
    if given[0] * given[1] != n_positions:
        raise ValueError(f"{n_positions} positions are not a map of {given[0]}×{given[1]}: give {name}=(height, width)")
    return given


def keys_extent(query_size: tuple[int, ...], key_size: tuple[int, ...]) -> tuple[int, ...]:
    """How many rows and columns of the query positions the keys cover: all but those that pooling dropped."""
    # What is a single row may be a sequence, which is pooled along that row.
    pool = min((query // key for query, key in zip(query_size, key_size, strict=True) if query > 1), default=1)
    if pool == 0 or key_size != tuple(max(1, query // pool) for query in query_size):
        return query_size  # the keys do not come from pooling
    return tuple(min(query, key * pool) for query, key in zip(query_size, key_size, strict=True))


def _rgb(images: Tensor) -> Tensor:
    """(B, 1 or 3, H, W) in [-1, 1] -> (B, 3, H, W) in [0, 1], in memory of its own."""
    check_images(images)
    return ((images.float() + 1) / 2).clamp(0, 1).repeat(1, 3 // images.shape[1], 1, 1)


def _queries(query: Query | Sequence[Query], image_size: tuple[int, int]) -> tuple[list[Query], bool]:
    """The queries as a list, and whether they were given as one."""
    try:
        given = torch.as_tensor(query, device="cpu")
    except (TypeError, ValueError):
        given = torch.empty(0, device="cpu")
    if given.ndim not in (1, 2) or given.shape[-1] != 2 or len(given) == 0 or given.is_floating_point():
        raise ValueError(f"expected a query (row, column) in whole pixels, or a sequence of them, got {query}")
    height, width = image_size
    queries: list[Query] = [(row, column) for row, column in given.view(-1, 2).tolist()]
    for row, column in queries:
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"the query {(row, column)} is outside an image of {height}×{width} pixels")
    return queries, given.ndim == 2


def _colors(levels: Tensor) -> Tensor:
    """(…, 1, H, W) in [0, 1] -> (…, 3, H, W), linear between the ramp's stops."""
    ramp = levels.new_tensor(RAMP)  # (stops, 3)
    at = levels.squeeze(-3) * (len(ramp) - 1)  # (…, H, W)
    below = at.long().clamp(max=len(ramp) - 2)
    return torch.lerp(ramp[below], ramp[below + 1], (at - below).unsqueeze(-1)).movedim(-1, -3)


def _draw_ring(rgb: Tensor, query: Query, number: int) -> None:
    """A ring on (B, 3, H, W) around the query, in the color of that number, with smooth edges; in place."""
    height, width = rgb.shape[2:]
    unit = max(1.0, min(height, width) / 64)
    rows = torch.arange(height, device=rgb.device)[:, None] - query[0]  # (H, 1)
    columns = torch.arange(width, device=rgb.device)[None, :] - query[1]  # (1, W)
    distance = (torch.hypot(rows.float(), columns.float()) - round(2.6 * unit)).abs()  # (H, W), from the stroke
    edge = rgb.new_zeros(3, 1, 1)
    color = rgb.new_tensor(MARKS[number % len(MARKS)])[:, None, None]
    for ink, stroke in ((edge, 1.8 * unit), (color, unit)) if min(height, width) >= 64 else ((color, unit),):
        rgb.copy_(torch.lerp(rgb, ink, (stroke / 2 + 0.5 - distance).clamp(0, 1)))


def _draw_frame(rgb: Tensor, number: int) -> None:
    """A frame on the border of (B, 3, H, W) in the color of that number; in place."""
    height, width = rgb.shape[2:]
    stroke = max(1, min(height, width) // 64)
    border = torch.ones(height, width, dtype=torch.bool, device=rgb.device)
    border[stroke:-stroke, stroke:-stroke] = False
    rgb[:, :, border] = rgb.new_tensor(MARKS[number % len(MARKS)])[:, None]
