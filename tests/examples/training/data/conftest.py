"""Runs without the images that they draw, for tests of what they read."""

from __future__ import annotations

import pytest

from tiny_runs import leave_out_images


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_images(monkeypatch)
