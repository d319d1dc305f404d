"""Which script runs, for its errors: tests call the scripts as functions."""

from __future__ import annotations

from pathlib import Path

import pytest

SCRIPTS = [path.stem for path in (Path(__file__).parents[2] / "examples").glob("*.py")]


@pytest.fixture(autouse=True)
def _script_that_runs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that the test's file is named after, else the trainer."""
    tested = request.path.stem.removeprefix("test_")
    script = max((name for name in SCRIPTS if tested.startswith(name)), key=len, default="train_celeba")
    monkeypatch.setattr("sys.argv", [f"{script}.py"])
