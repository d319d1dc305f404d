"""Tensors to PNG files: a grid of images, and a figure of where a generator looks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from torch_sagan import attention_overlay

GAP = 2  # pixels between two tiles


def save_grid(path: Path, images: Tensor, columns: int) -> None:
    """Write images (B, 1 or 3, H, W) in [-1, 1] as one PNG, row by row."""
    _save(path, (images.float().cpu() + 1) / 2, columns)


def save_attention(path: Path, images: Tensor, attention: Tensor, places: Sequence[tuple[float, float]]) -> None:
    """Write one row for each image: itself, then where each of the places (row, column as fractions) looks."""
    size = images.shape[-1]
    tiles = [((images + 1) / 2).expand(-1, 3, -1, -1)]
    for row, column in places:
        tiles.append(attention_overlay(images, attention, (int(row * size), int(column * size))))
    _save(path, torch.stack(tiles, 1).flatten(0, 1).float().cpu(), len(tiles))


def _save(path: Path, tiles: Tensor, columns: int) -> None:
    zoom = max(1, 128 // tiles.shape[-1])  # small images are enlarged, pixel by pixel, so that a person can see them
    tiles = tiles.expand(-1, 3, -1, -1).repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    tiles = F.pad(tiles, (GAP, 0, GAP, 0), value=1.0)  # (B, 3, h, w), a white margin left and above
    tiles = F.pad(tiles, (0, 0, 0, 0, 0, 0, 0, -len(tiles) % columns), value=1.0)  # complete the last row
    _, channels, height, width = tiles.shape
    sheet = tiles.view(-1, columns, channels, height, width).permute(0, 3, 1, 4, 2)  # (rows, h, columns, w, 3)
    sheet = F.pad(sheet.reshape(-1, columns * width, channels), (0, 0, 0, GAP, 0, GAP), value=1.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet.mul(255).round().clamp(0, 255).byte().numpy()).save(path)
