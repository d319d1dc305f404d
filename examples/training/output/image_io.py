"""Write tensors to files: grids, attention figures and pages, single images, animations."""

from __future__ import annotations

import json
import math
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from torch_sagan import AttentionRecord, attention_overlay, explore_attention, mark_queries
from training.runs.atomic_files import write, write_text

GAP = 2  # pixels between two tiles
TILE = 192  # least width of an overlay in pixels, so that its marks and positions are visible
PAGE_BYTES = 8_000_000  # bytes that a page of several images may have
TEXT = 24  # height of the letters of a row's name, legible where a grid is shrunk to a column of text
ROWS = "rows"  # the entry of a PNG that holds the names of its rows


def save_grid(path: Path, images: Tensor, columns: int, rows: Sequence[str] = ()) -> None:
    """Write images (B, 1 or 3, H, W) in [-1, 1] as one PNG, row by row, with the names of the rows, if they have any.

    The names are at the left, and as text in the file, where `row_names` finds them.
    """
    _save(path, (images.float().cpu() + 1) / 2, columns, rows)


def save_attention(
    path: Path,
    images: Tensor,
    attention: Tensor | AttentionRecord,
    queries: Sequence[tuple[float, float]],
    rows: Sequence[str] = (),
) -> None:
    """Write a row for each image: itself with the query positions (fractions) marked, then what each attends to."""
    images = _enlarged(images, TILE)  # (B, C, H, W), enlarged first, so that the marks are fine
    height, width = images.shape[2:]
    points = [(int(row * height), int(column * width)) for row, column in queries]
    tiles = torch.cat([mark_queries(images, points).unsqueeze(1), attention_overlay(images, attention, points)], 1)
    _save(path, tiles.flatten(0, 1).cpu(), 1 + len(points), rows)


def save_explorer(path: Path, images: Tensor, records: Mapping[str, Sequence[AttentionRecord]]) -> int:
    """Write an attention explorer with as many of the images as fit into 8 MB, at least one. Returns how many."""
    weights = sum(record.attention[0].numel() for calls in records.values() for record in calls)  # of an image
    count = max(1, min(len(images), PAGE_BYTES // (2 * weights)))  # a weight takes 4/3 bytes; the rest is small
    first = {
        name: [record._replace(attention=record.attention[:count]) for record in calls]
        for name, calls in records.items()
    }
    page = explore_attention(images[:count], first, max_bytes=sys.maxsize).page
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return count


def save_images(paths: Sequence[Path], images: Tensor) -> None:
    """Write each of the images (B, 1 or 3, H, W) in [-1, 1] as a PNG of its own, pixel for pixel."""
    for path, image in zip(paths, _pil_images((images.float().cpu() + 1) / 2), strict=True):
        _write(path, image)


def save_animation(path: Path, images: Tensor, frames_per_second: float) -> None:
    """Write images (B, 1 or 3, H, W) in [-1, 1] as the frames of an endless GIF or WebP, as the suffix says."""
    first, *others = _pil_images(_enlarged((images.float().cpu() + 1) / 2, 128))
    duration = round(1000 / frames_per_second)
    _write(path, first, save_all=True, append_images=others, duration=duration, loop=0, quality=90)


def row_names(path: Path) -> list[str]:
    """The names of the rows of a PNG; none if they have none, and for a file that cannot be read."""
    try:
        with Image.open(path) as image:
            names = json.loads(image.text[ROWS])  # type: ignore[attr-defined]
    except (OSError, ValueError, KeyError, AttributeError, RecursionError, SyntaxError, Image.DecompressionBombError):
        return []
    return list(map(str, names)) if isinstance(names, list) else []


def _pil_images(images: Tensor) -> list[Image.Image]:
    pixels = images.expand(-1, 3, -1, -1).mul(255).round().clamp(0, 255).byte()
    return [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in pixels]


def _enlarged(images: Tensor, least: int) -> Tensor:
    """The images, enlarged to at least so many pixels if they are smaller."""
    zoom = -(-least // images.shape[-1])
    return images.expand(-1, 3, -1, -1).repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)


def _save(path: Path, tiles: Tensor, columns: int, rows: Sequence[str]) -> None:
    tiles = _enlarged(tiles, 128)
    tiles = F.pad(tiles, (GAP, 0, GAP, 0), value=1.0)  # (B, 3, h, w), a white margin left and above
    tiles = F.pad(tiles, (0, 0, 0, 0, 0, 0, 0, -len(tiles) % columns), value=1.0)  # complete the last row
    _, channels, height, width = tiles.shape
    sheet = tiles.view(-1, columns, channels, height, width).permute(0, 3, 1, 4, 2)  # (rows, h, columns, w, 3)
    sheet = F.pad(sheet.reshape(-1, columns * width, channels), (0, 0, 0, GAP, 0, GAP), value=1.0)
    image = Image.fromarray(sheet.mul(255).round().clamp(0, 255).byte().numpy())
    if not rows:
        return _write(path, image)
    text = PngInfo()
    text.add_itxt(ROWS, json.dumps(rows))
    _write(path, _with_names(image, rows, height), pnginfo=text)


def _with_names(sheet: Image.Image, rows: Sequence[str], height: int) -> Image.Image:
    """The sheet, of rows of this height, with the names of the rows in a white margin at its left."""
    font = ImageFont.load_default(TEXT)
    names = [_drawable(name) for name in rows]
    while max(map(font.getlength, names)) > 2 * height:  # so that they leave the images most of the space
        names = [name if font.getlength(name) <= 2 * height else name[:-2].rstrip("…") + "…" for name in names]
    margin = math.ceil(max(map(font.getlength, names))) + TEXT // 2
    image = Image.new("RGB", (margin + sheet.width, sheet.height), "white")
    image.paste(sheet, (margin, 0))
    draw = ImageDraw.Draw(image)
    for row, name in enumerate(names):
        draw.text((margin - TEXT // 4, row * height + height // 2), name, "black", font, anchor="rm")
    return image


def _drawable(name: str) -> str:
    """The name in what the font has, ASCII: without accents, and with escapes for other scripts."""
    letters = (unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode() or letter for letter in name)
    return "".join(
        letter if letter.isascii() and letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in letters
    )


def _write(path: Path, image: Image.Image, **options: Any) -> None:
    """Write an image completely or not at all, in the format that the suffix names."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"unknown file extension: {path.suffix!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, lambda file: image.save(file, format=kind, **options))
