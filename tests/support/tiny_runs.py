"""Runs of the trainer on tiny networks, and what their checkpoints hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import train_celeba
from training.data.dataset import Batch
from training.flags import Config
from training.state import TrainingState
from training.step import Piece

TINY = ["--image-size", "16", "--base-channels", "4", "--batch-size", "4", "--z-dim", "8", "--device", "cpu"]
UNSCORED = ["--eval-every", "0"]  # or the shortest run would be evaluated at its end
SCRIPT = [str(Path(train_celeba.__file__)), *TINY, *UNSCORED, "--no-tensorboard"]


def train(out: Path, *arguments: str, **more: object) -> int:
    quiet = [] if "--tensorboard" in arguments else ["--no-tensorboard"]
    return train_celeba.main([*TINY, *UNSCORED, *quiet, "--data", "digits", "--out", str(out), *arguments], **more)


def resume(path: Path | str, *arguments: str) -> int:
    return train_celeba.main(["--resume", str(path), *arguments])


def checkpoint(out: Path, name: str = "checkpoint.pt") -> dict:
    return torch.load(out / name, weights_only=True)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def leaves(tree: object, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{path}/{key}")
    else:
        yield path, tree


def assert_same(one: dict, other: dict, *, apart_from: tuple[str, ...] = ()) -> None:
    one_leaves, other_leaves = dict(leaves(one)), dict(leaves(other))
    assert one_leaves.keys() == other_leaves.keys()
    for path, value in one_leaves.items():
        if path not in apart_from:
            equal = torch.equal(value, other_leaves[path]) if isinstance(value, torch.Tensor) else None
            assert equal if equal is not None else value == other_leaves[path], path


def leave_out_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs draw nothing, which takes most of their time: for tests of other things."""
    monkeypatch.setattr(train_celeba, "draw", lambda state, out: {})
    for name in ("redraw", "save_reals"):
        monkeypatch.setattr(train_celeba, name, lambda *_: None)


def tiny_state(**settings: object) -> TrainingState:
    config = Config(**({"image_size": 16, "base_channels": 4, "batch_size": 4, "z_dim": 8} | settings))
    return TrainingState(config, image_channels=1, device=torch.device("cpu"))


def noise(state: TrainingState) -> Iterator[list[Piece]]:
    """Batches without end, in the state's pieces."""
    size = state.config.batch_size // state.config.grad_accum_steps
    rng = torch.Generator().manual_seed(0)

    def data() -> Iterator[Batch]:
        while True:
            yield Batch(torch.randint(256, (size, 1, 16, 16), dtype=torch.uint8, generator=rng))

    return state.batches(data())
