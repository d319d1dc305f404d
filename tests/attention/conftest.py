"""Tiles and blocks so small that small maps take several."""

from __future__ import annotations

import pytest

from attention_paths import TILE
from torch_sagan.attention import blocks, tiles


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_QUERIES", TILE)
    monkeypatch.setattr(tiles, "TILE_KEYS", TILE)
    monkeypatch.setattr(blocks, "BLOCK_QUERIES", 3)
