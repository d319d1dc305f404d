"""What the explorer's page shows: read off its canvas, and computed from the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from chromium import Page
from torch_sagan import AttentionRecord

VIOLET, ORANGE, YELLOW = torch.tensor([[0.45, 0.08, 0.43], [0.95, 0.45, 0.15], [0.99, 1.0, 0.75]])


def peaked(*shape: int) -> Tensor:
    return torch.randn(*shape).mul(2).softmax(2)


def shown(page: Page, rows: int, columns: int, covers: tuple[float, float] = (1, 1)) -> Tensor:
    """(rows, columns, 3) in [0, 1]: the middles of as many cells of the map's canvas, or of the covered part of it."""
    values = page.run(
        f"""(() => {{
          const canvas = document.getElementById("map"), [rows, columns] = [{rows}, {columns}];
          const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
          const middle = (i, n, size) => Math.floor((i + 0.5) / n * size);
          return Array.from({{ length: rows * columns }}, (_, i) => {{
            const y = middle(Math.floor(i / columns), rows, canvas.height * {covers[0]});
            const x = middle(i % columns, columns, canvas.width * {covers[1]});
            return [...pixels.slice(4 * (y * canvas.width + x), 4 * (y * canvas.width + x) + 3)];
          }});
        }})()"""
    )
    return torch.tensor(values, dtype=torch.float32).view(rows, columns, 3) / 255


def ramp(levels: Tensor) -> Tensor:
    low, high = (2 * levels).clamp(max=1), (2 * levels - 1).clamp(min=0)
    return VIOLET + low[..., None] * (ORANGE - VIOLET) + high[..., None] * (YELLOW - ORANGE)


def expected(weights: Tensor, n_keys: int, gray: float = 0.1) -> Tensor:
    """(h, w, 3) at full opacity over a plain image."""
    levels = (weights / max(float(weights.max()) / 2, 4 / n_keys)).clamp(max=1)
    return gray + levels[..., None] * (ramp(levels) - gray)


# Of a level, a byte loses at most 2 / 255, where the weight is that of the full level; color ramp and opacity together
# change at most 1.5 times as fast as the level. Canvas and table round to bytes, half of one each.
CLOSE = {"rtol": 0, "atol": 5 / 255}


def covered(record: AttentionRecord) -> tuple[float, float]:
    pool = record.query_size[0] // record.key_size[0]
    height, width = (key * pool / query for key, query in zip(record.key_size, record.query_size, strict=True))
    return height, width
