"""What tests of scripts share: which script runs, for its errors, signals as in a terminal, and small figures."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from training import average
from training.output import image_io
from training.runs.signals import ASKING

SCRIPTS = [path.stem for path in (Path(__file__).parents[2] / "examples").glob("*.py")]


@pytest.fixture(autouse=True)
def _script_that_runs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that the test's file is named after, else the trainer."""
    tested = request.path.stem.removeprefix("test_")
    script = max((name for name in SCRIPTS if tested.startswith(name)), key=len, default="train_celeba")
    monkeypatch.setattr("sys.argv", [f"{script}.py"])


@pytest.fixture(autouse=True, scope="session")
def _no_signal_is_ignored() -> Iterator[None]:
    """As in a terminal: under nohup and in a shell's background, tests and the processes that they start inherit it."""
    ignored = [number for number in ASKING if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(scope="module")
def small_figures() -> Iterator[None]:
    """Runs of this process draw all their figures, but not enlarged, and with batch statistics of few latent vectors.

    These two take most of the time of a run of few steps. Not for tests of the figures themselves, nor for those that
    compare with the figures of another process.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_io, "_enlarged", lambda images, least: images.expand(-1, 3, -1, -1))
        patch.setattr(average, "CALIBRATION", (1, 16))
        yield
