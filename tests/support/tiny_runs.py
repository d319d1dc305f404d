"""Runs of the trainer on tiny networks, and what their checkpoints hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

import train_celeba

TINY = ["--image-size", "16", "--base-channels", "4", "--batch-size", "4", "--z-dim", "8", "--device", "cpu"]
SCRIPT = [str(Path(train_celeba.__file__)), *TINY, "--no-tensorboard"]


def train(out: Path, *arguments: str, **more: object) -> int:
    quiet = [] if "--tensorboard" in arguments else ["--no-tensorboard"]
    return train_celeba.main([*TINY, *quiet, "--data", "digits", "--out", str(out), *arguments], **more)


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
