"""Attention maps over their images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_sagan.attention import AttentionRecord

__all__ = ["attention_overlay", "mark_queries"]

# A dark-to-bright ramp (black, violet, orange, pale yellow) that reads the same without colour.
RAMP = ((0.0, 0.0, 0.02), (0.45, 0.08, 0.43), (0.95, 0.45, 0.15), (0.99, 1.0, 0.75))
# Green, magenta, blue, white, teal, sky: none lies on the ramp, and to the red-green blind the first five differ too.
MARKS = ((0.1, 1.0, 0.2), (1.0, 0.1, 0.85), (0.1, 0.2, 1.0), (1.0, 1.0, 1.0), (0.1, 0.65, 0.55), (0.3, 0.8, 1.0))

Query = tuple[int, int]


@torch.no_grad()
def attention_overlay(
    images: Tensor,
    attention: Tensor | AttentionRecord,
    query: Query | Sequence[Query],
    *,
    query_size: tuple[int, int] | None = None,
    key_size: tuple[int, int] | None = None,
    strength: float = 0.7,
    mark: bool = True,
) -> Tensor:
    """Where one position looks, or several, drawn over the images, with that position marked.

    The weights of the query's row are stretched over the image (bilinearly) and scaled so that the largest is
    brightest; each pixel is then mixed towards a colour ramp by ``strength`` times its weight, while what gets no
    attention darkens. Rows and columns of the feature map that pooling left without a key get none.

    Args:
        images: (B, 3, H, W) or (B, 1, H, W), in [-1, 1].
        attention: (B, N, M), as ``return_attention=True`` gives it, or what :func:`record_attention` recorded, which
            knows its sizes.
        query: (row, column) of the position that looks, in pixels of the image, or a sequence of Q of them.
        query_size: (height, width) of the feature map behind N. Default: the one shaped like the image.
        key_size: (height, width) behind M. Default: as for N.
        strength: how much of the picture the map takes, from 0 (the image alone) to 1.
        mark: whether the query is marked, as :func:`mark_queries` marks it.

    Returns:
        (B, 3, H, W) in [0, 1]; for a sequence of queries (B, Q, 3, H, W), each with its own mark alone.

    Raises:
        ValueError: for images or maps of other shapes, images of integers, a query that is no pixel of the image, a
            strength outside of [0, 1], sizes that do not multiply to N and M, or sizes beside a record.

    >>> images = torch.rand(2, 3, 64, 64) * 2 - 1
    >>> attention = torch.rand(2, 256, 64).softmax(2)
    >>> attention_overlay(images, attention, (20, 40)).shape
    torch.Size([2, 3, 64, 64])
    >>> attention_overlay(images, attention, [(20, 40), (3, 3), (60, 32)]).shape
    torch.Size([2, 3, 3, 64, 64])
    """
    pictures = _pictures(images)  # (B, 3, H, W)
    if isinstance(attention, AttentionRecord):
        if query_size is not None or key_size is not None:
            raise ValueError("a record knows its sizes: give neither query_size nor key_size")
        attention, query_size, key_size = attention
    shape = tuple(getattr(attention, "shape", ()))
    if len(shape) != 3 or shape[0] != len(images):
        came = shape or f"a {type(attention).__name__}"
        raise ValueError(f"expected an attention map (B, N, M) with B = {len(images)}, got {came}")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be between 0 and 1, got {strength}")
    height, width = images.shape[2:]
    queries, several = _queries(query, (height, width))
    query_size = _map_size(attention.shape[1], query_size, (height, width), "query_size")
    key_size = _map_size(attention.shape[2], key_size, (height, width), "key_size")

    cells = [(row * query_size[0] // height, column * query_size[1] // width) for row, column in queries]
    positions = [row * query_size[1] + column for row, column in cells]
    weights = attention[:, positions].float().unflatten(2, key_size)  # (B, Q, h, w)
    rows, columns = _covered(query_size, key_size, (height, width))
    weights = F.interpolate(weights, size=(rows, columns), mode="bilinear")
    weights = F.pad(weights, (0, width - columns, 0, height - rows)).unsqueeze(2)  # (B, Q, 1, H, W)
    peak = weights.amax(dim=(3, 4), keepdim=True)  # (B, Q, 1, 1, 1)
    weights = weights / torch.where(peak > 0, peak, 1.0)  # (B, Q, 1, H, W), the largest is 1

    overlay = torch.lerp(pictures.unsqueeze(1), _colours(weights), strength * (0.4 + 0.6 * weights))  # (B, Q, 3, H, W)
    for i, place in enumerate(queries if mark else []):
        _draw_mark(overlay[:, i], place, i)
    return overlay if several else overlay.squeeze(1)


@torch.no_grad()
def mark_queries(images: Tensor, queries: Query | Sequence[Query]) -> Tensor:
    """The images with query points on them, each in the colour that :func:`attention_overlay` gives it.

    A point is a square, at least 3 pixels wide, in proportion to the image; from 64 pixels on it has a black edge. The
    colours repeat after the sixth.

    Args:
        images: (B, 3, H, W) or (B, 1, H, W), in [-1, 1].
        queries: (row, column) in pixels of the image, or a sequence of them; later ones cover earlier ones.

    Returns:
        (B, 3, H, W) in [0, 1].

    Raises:
        ValueError: for images of another shape or of integers, or a query that is no pixel of the image.
    """
    pictures = _pictures(images)  # (B, 3, H, W)
    places, _ = _queries(queries, (images.shape[2], images.shape[3]))
    for i, place in enumerate(places):
        _draw_mark(pictures, place, i)
    return pictures


def _pictures(images: Tensor) -> Tensor:
    """In colour and in [0, 1], as a tensor of its own."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"expected images (B, 3, H, W) or (B, 1, H, W), got {tuple(images.shape)}")
    if not torch.is_floating_point(images):
        raise ValueError(f"expected images of floating point in [-1, 1], got {images.dtype}")
    return ((images.float() + 1) / 2).clamp(0, 1).repeat(1, 3 // images.shape[1], 1, 1)


def _queries(query: Query | Sequence[Query], image_size: tuple[int, int]) -> tuple[list[Query], bool]:
    """The queries as a list, and whether they came as one."""
    try:
        given = torch.as_tensor(query, device="cpu")
    except (TypeError, ValueError):
        given = torch.empty(0)
    if given.ndim not in (1, 2) or given.shape[-1] != 2 or len(given) == 0 or given.is_floating_point():
        raise ValueError(f"expected a query (row, column) in whole pixels, or a sequence of them, got {query}")
    height, width = image_size
    queries: list[Query] = [(row, column) for row, column in given.view(-1, 2).tolist()]
    for row, column in queries:
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"the query {(row, column)} is outside of an image of {height}×{width} pixels")
    return queries, given.ndim == 2


def _map_size(
    n_positions: int, given: tuple[int, int] | None, image_size: tuple[int, int], name: str
) -> tuple[int, int]:
    if given is None:
        height = round(math.sqrt(n_positions * image_size[0] / image_size[1]))
        given = (height, n_positions // max(height, 1))
    if given[0] * given[1] != n_positions:
        raise ValueError(f"{n_positions} positions are not a map of {given[0]}×{given[1]}: give {name}=(height, width)")
    return given


def _covered(query_size: tuple[int, int], key_size: tuple[int, int], image_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width, in pixels, of the part of the image that the keys lie on."""
    pool = min(query // key for query, key in zip(query_size, key_size, strict=True))
    if pool == 0 or key_size != tuple(query // pool for query in query_size):
        return image_size  # the keys are not what pooling makes of the queries' map
    rows, columns = (
        round(size * key * pool / query) for size, query, key in zip(image_size, query_size, key_size, strict=True)
    )
    return rows, columns


def _colours(weights: Tensor) -> Tensor:
    """(…, 1, H, W) in [0, 1] -> (…, 3, H, W), linear between the ramp's stops."""
    ramp = weights.new_tensor(RAMP)  # (stops, 3)
    at = weights.squeeze(-3) * (len(ramp) - 1)  # (…, H, W)
    below = at.long().clamp(max=len(ramp) - 2)
    return torch.lerp(ramp[below], ramp[below + 1], (at - below).unsqueeze(-1)).movedim(-1, -3)


def _draw_mark(pictures: Tensor, query: Query, number: int) -> None:
    """A square on (B, 3, H, W) in the colour of that number, with a black edge where it is large enough; in place."""
    height, width = pictures.shape[2:]
    reach = max(1, min(height, width) // 32)
    rows = torch.arange(height, device=pictures.device)[:, None] - query[0]  # (H, 1)
    columns = torch.arange(width, device=pictures.device)[None, :] - query[1]  # (1, W)
    distance = torch.maximum(rows.abs(), columns.abs())  # (H, W)
    pictures[:, :, distance <= reach] = 0.0
    inside = distance <= reach - (reach + 2) // 4 if reach > 1 else distance <= reach
    pictures[:, :, inside] = pictures.new_tensor(MARKS[number % len(MARKS)])[:, None]
