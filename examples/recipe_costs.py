"""Estimate the cost of each recipe from its networks, and write it into the recipe.

    python examples/recipe_costs.py           # print the estimates
    python examples/recipe_costs.py --write   # and write them into examples/recipes/*.txt

Nothing is trained: a step runs on the meta device, where tensors have shapes but no values.
"""

from __future__ import annotations

import training.threads  # noqa: F401  before torch  # isort: skip

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from training.checkpointing import write
from training.command_line import read_arguments, resolve_config, script
from training.configuration import Config
from training.memory import readable
from training.objectives import objective
from training.state import build_networks
from training.step import GAN, Piece, no_augmentation, training_step

RECIPES = Path(__file__).parent / "recipes"
GPU, UTILIZATION = 312e12, 0.3  # an A100's bf16 operations per second, and the share of them that a training reaches
FIRST, LAST = "# Estimated by recipe_costs.py, not measured:", "# End of the estimate."
BATCH = 2  # batch size of the counted step, whose costs are proportional to it


class Data(NamedTuple):
    """The data of a recipe."""

    images: int
    classes: int
    channels: int
    decoded: bool  # into a cache


DATA = {
    "biggan-schedule": Data(1_281_167, 1000, 3, True),
    "celeba64": Data(202_599, 0, 3, True),
    "cifar10": Data(50_000, 10, 3, False),
    "digits": Data(1_797, 10, 1, False),
    "faces-cpu": Data(4_096, 6, 3, False),
    "paper128": Data(1_281_167, 1000, 3, True),
    "small-dataset": Data(1_000, 0, 3, True),
}


class Costs(NamedTuple):
    """The costs of training a recipe."""

    operations: float  # multiplications and additions for an image of a step
    gradients: int  # bytes that a step's gradients take, which several processes exchange
    state: int  # bytes of weights, their average, gradients and Adam's means
    activations: int  # bytes that D keeps for its backward pass, for a real and a generated image
    checkpoint: int  # bytes
    cache: int  # bytes of decoded images


def read_recipe(path: Path) -> Config:
    """The settings in a recipe."""
    args = read_arguments(Config, [f"@{path}"], "")
    return resolve_config(Config, {name: args[name] for name in args.keys() - {"resume", "dry_run"}}, None)


def costs(config: Config, data: Data) -> Costs:
    """The costs of one step, counted on the meta device."""
    with torch.device("meta"):
        generator, discriminator = build_networks(config, data.channels, data.classes or None)
        g_optimizer, d_optimizer = (torch.optim.SGD(network.parameters()) for network in (generator, discriminator))
        # Augmentation and the penalty's random numbers cost almost nothing, but need tensors with values.
        minimised = objective(config.loss, config.penalty, no_augmentation)
        gan = GAN(generator, discriminator, g_optimizer, d_optimizer, minimised)
        labels = torch.zeros(BATCH, dtype=torch.int64) if data.classes else None
        real = torch.zeros(BATCH, data.channels, config.image_size, config.image_size)
        piece = Piece(real, torch.zeros(BATCH, config.z_dim), labels)
        with FlopCounterMode(display=False) as counter:
            training_step(gan, iter([[piece]] * config.d_steps), d_steps=config.d_steps)
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = discriminator(real.repeat(2, 1, 1, 1), None if labels is None else labels.repeat(2))
        del logits
    g, d = (4 * sum(p.numel() for p in network.parameters()) for network in (generator, discriminator))
    return Costs(
        operations=counter.get_total_flops() / BATCH,
        gradients=g + config.d_steps * d,
        state=5 * g + 4 * d,
        activations=(sum(kept.values()) - d) // BATCH,
        checkpoint=4 * g + 3 * d,
        cache=data.images * data.channels * config.image_size**2 if data.decoded else 0,
    )


def estimate(config: Config, data: Data) -> Iterator[str]:
    """The lines of a recipe that state its costs."""
    cost = costs(config, data)
    hours = cost.operations * config.batch_size * config.steps / (GPU * UTILIZATION) / 3600
    step = f"{config.batch_size} images in a step"
    yield FIRST
    yield f"#   {cost.operations / 1e9:.3g} GFLOP for an image ({step}, {config.d_steps} of D), {config.steps} steps"
    yield f"#   {hours:.3g} hours on one GPU of 312 TFLOP/s used to {UTILIZATION:.0%}, {hours / 8:.2g} on eight"
    yield f"#   gradients exchanged per step by several GPUs: {readable(cost.gradients)} on each"
    activations = readable(cost.activations * config.batch_size)
    yield f"#   memory: {readable(cost.state)} for networks and optimisers, about {activations} for D's activations"
    yield f"#   disk: {readable(cost.checkpoint)} a checkpoint, {readable(cost.cache)} of decoded images"
    yield LAST


def with_estimate(recipe: str, lines: Sequence[str]) -> str:
    """The text of a recipe with these lines instead of its estimate, or before its first flag."""
    old = recipe.splitlines()
    if FIRST in old and LAST in old:
        start, end = old.index(FIRST), old.index(LAST) + 1
    else:
        start = end = next(i for i, line in enumerate(old) if line.startswith("--"))
    return "\n".join([*old[:start], *lines, *old[end:]]) + "\n"


def write_text(path: Path, text: str) -> None:
    write(path, lambda file: file.write(text.encode()))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("recipe_costs.py", description="Estimate what the recipes cost.")
    parser.add_argument("--write", action="store_true", help="write the estimates into the recipes")
    args = parser.parse_args(arguments)
    for name, data in DATA.items():
        path = RECIPES / f"{name}.txt"
        lines = list(estimate(read_recipe(path), data))
        print(f"{name}\n" + "\n".join(lines[1:-1]))
        if args.write:
            write_text(path, with_estimate(path.read_text(encoding="utf-8"), lines))
    return 0


if __name__ == "__main__":
    script(main)
