"""An attention map over its image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attention_overlay"]

# A dark-to-bright ramp (black, violet, orange, pale yellow) that reads the same without colour.
RAMP = ((0.0, 0.0, 0.02), (0.45, 0.08, 0.43), (0.95, 0.45, 0.15), (0.99, 1.0, 0.75))
MARK = (0.1, 1.0, 0.2)


@torch.no_grad()
def attention_overlay(
    images: Tensor,
    attention: Tensor,
    query: tuple[int, int],
    *,
    query_size: tuple[int, int] | None = None,
    key_size: tuple[int, int] | None = None,
    strength: float = 0.7,
    mark: bool = True,
) -> Tensor:
    """Where one position looks, drawn over the images, with that position marked.

    The weights of the query's row are stretched over the image (bilinearly) and scaled so that the largest is
    brightest; each pixel is then mixed towards a colour ramp by ``strength`` times its weight, while what gets no
    attention darkens.

    Args:
        images: (B, 3, H, W) or (B, 1, H, W), in [-1, 1].
        attention: (B, N, M), as ``return_attention=True`` gives it.
        query: (row, column) of the position that looks, in pixels of the image.
        query_size: (height, width) of the feature map behind N. Default: the one shaped like the image.
        key_size: (height, width) behind M. Default: as for N.
        strength: how much of the picture the map takes, from 0 (the image alone) to 1.
        mark: whether a green frame marks the query.

    Returns:
        (B, 3, H, W) in [0, 1].

    Raises:
        ValueError: for images or maps of other shapes, a query outside of the image, a strength outside of [0, 1],
            or sizes that do not multiply to N and M.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"expected images (B, 3, H, W) or (B, 1, H, W), got {tuple(images.shape)}")
    if attention.ndim != 3 or len(attention) != len(images):
        raise ValueError(f"expected an attention map (B, N, M) with B = {len(images)}, got {tuple(attention.shape)}")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be between 0 and 1, got {strength}")
    height, width = images.shape[2:]
    row, column = query
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f"the query {(row, column)} is outside of an image of {height}×{width} pixels")
    query_height, query_width = _map_size(attention.shape[1], query_size, (height, width), "query_size")
    key_height, key_width = _map_size(attention.shape[2], key_size, (height, width), "key_size")

    position = (row * query_height // height) * query_width + column * query_width // width
    weights = attention[:, position].float().view(-1, 1, key_height, key_width)  # (B, 1, h, w)
    weights = F.interpolate(weights, size=(height, width), mode="bilinear")  # (B, 1, H, W)
    peak = weights.amax(dim=(2, 3), keepdim=True)  # (B, 1, 1, 1)
    weights = weights / torch.where(peak > 0, peak, 1.0)  # (B, 1, H, W), the largest is 1

    pictures = ((images.float() + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1)  # (B, 3, H, W)
    overlay = torch.lerp(pictures, _colours(weights), strength * (0.4 + 0.6 * weights))  # (B, 3, H, W)
    if mark:
        _draw_frame(overlay, row, column)
    return overlay


def _map_size(
    n_positions: int, given: tuple[int, int] | None, image_size: tuple[int, int], name: str
) -> tuple[int, int]:
    if given is None:
        height = round(math.sqrt(n_positions * image_size[0] / image_size[1]))
        given = (height, n_positions // max(height, 1))
    if given[0] * given[1] != n_positions:
        raise ValueError(f"{n_positions} positions are not a map of {given[0]}×{given[1]}: give {name}=(height, width)")
    return given


def _colours(weights: Tensor) -> Tensor:
    """(B, 1, H, W) in [0, 1] -> (B, 3, H, W), linear between the ramp's stops."""
    ramp = weights.new_tensor(RAMP)  # (stops, 3)
    at = weights.squeeze(1) * (len(ramp) - 1)  # (B, H, W)
    below = at.long().clamp(max=len(ramp) - 2)
    return torch.lerp(ramp[below], ramp[below + 1], (at - below).unsqueeze(-1)).movedim(-1, 1)


def _draw_frame(pictures: Tensor, row: int, column: int) -> None:
    """A square frame around the pixel, its size in proportion to the picture; written in place."""
    height, width = pictures.shape[2:]
    reach = max(1, min(height, width) // 32)
    rows = torch.arange(height, device=pictures.device)[:, None] - row  # (H, 1)
    columns = torch.arange(width, device=pictures.device)[None, :] - column  # (1, W)
    distance = torch.maximum(rows.abs(), columns.abs())  # (H, W)
    frame = (distance == reach) | ((distance == 0) & (reach > 1))
    pictures[:, :, frame] = pictures.new_tensor(MARK)[:, None]
