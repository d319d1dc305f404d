"""Estimate the cost of each recipe on a GPU from its networks, and write it into the recipe.

    python benchmarks/recipe_costs.py           # print the estimates
    python benchmarks/recipe_costs.py --write   # and write them into examples/recipes/*.txt

Nothing is trained: steps run on the meta device, where tensors have shapes but no values, and attention takes the
branch of CUDA.
"""

from __future__ import annotations

import examples_path  # isort: skip
import training.threads  # noqa: F401  before torch  # isort: skip

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from measurement.operators import OperatorCounter
from training.flags import Config
from training.objectives import objective
from training.runs.atomic_files import write_text
from training.runs.memory import readable
from training.script import Parser, read_arguments, resolve_config, script
from training.state import build_networks
from training.step import GAN, Piece, no_augmentation, training_step

RECIPES = examples_path.EXAMPLES / "recipes"
# Assumed: an A100's operations per second, by `--precision` (float32 is multiplied in TF32), and the share of them that
# a training reaches, since it also waits for memory.
GPU, UTILIZATION = {"bf16": 312e12, "float32": 156e12}, 0.3
# Measured: the default step at 64 pixels, 282 operators as they are counted here, takes 27 ms on an H200 that computes
# for 4 of them. It includes what is not counted: Adam, the average, casts of autocast, and Python itself.
LAUNCH = 95e-6
FIRST, LAST = "# Estimated by recipe_costs.py, not measured:", "# End of the estimate."


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
    "fashion-mnist": Data(60_000, 10, 1, False),
    "images-cpu": Data(1_000, 0, 3, True),
    "paper128": Data(1_281_167, 1000, 3, True),
    "small-dataset": Data(1_000, 0, 3, True),
}


class Costs(NamedTuple):
    """The costs of training a recipe on one GPU."""

    operations: float  # multiplications and additions for an image of a step
    launches: int  # operators of a step that start kernels, in float32, without the few of Adam and of the average
    gradients: int  # bytes that a step's gradients take, which several processes exchange
    state: int  # bytes of weights, their average and Adam's means: also the size of a checkpoint
    peak: int  # bytes of all else at its peak in a step: activations of both networks, gradients; in float32
    cache: int  # bytes of decoded images


class Idle(torch.optim.SGD):
    """An optimizer whose update costs nothing."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Nothing."""


def read_recipe(path: Path, *more: str) -> Config:
    """The settings in a recipe, and more of them."""
    args = read_arguments(Config, [f"@{path}", *more], "")
    return resolve_config(Config, {name: args[name] for name in args.keys() - {"resume", "dry_run"}}, None)


def costs(config: Config, data: Data) -> Costs:
    """The costs, counted on the meta device in the layout of CUDA."""
    steps = 2
    with torch.device("meta"):
        gan, batch = gan_and_batch(config, data.channels, data.classes or None, idle)
        for network in (gan.generator, gan.discriminator):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        batch = [piece._replace(real=piece.real.to(memory_format=torch.channels_last)) for piece in batch]
        step = partial(training_step, gan, d_steps=config.d_steps)
        with FlopCounterMode(display=False) as flops:  # alone, because it takes some operators apart
            step(iter([batch] * config.d_steps))
        with OperatorCounter() as counter:
            for _ in range(steps):  # from the second on, G's last gradients are in memory while D learns
                step(iter([batch] * config.d_steps))
    g, d = (4 * sum(p.numel() for p in network.parameters()) for network in (gan.generator, gan.discriminator))
    return Costs(
        operations=flops.get_total_flops() / config.batch_size,
        launches=counter.launches // steps,
        gradients=g + config.d_steps * d,
        state=4 * g + 3 * d,
        peak=counter.peak,
        cache=data.images * data.channels * config.image_size**2 if data.decoded else 0,
    )


def gan_and_batch(
    config: Config, channels: int, classes: int | None, optimizer: Callable[[nn.Module], torch.optim.Optimizer]
) -> tuple[GAN, list[Piece]]:
    """A recipe's networks and one of its batches, on the default device."""
    generator, discriminator = build_networks(config, channels, classes)
    # Augmentation and the penalty's random numbers cost almost nothing, but need tensors with values.
    minimized = objective(config.loss, config.penalty, no_augmentation)
    gan = GAN(generator, discriminator, optimizer(generator), optimizer(discriminator), minimized)
    labels = torch.zeros(config.batch_size, dtype=torch.int64) if classes else None
    real = torch.zeros(config.batch_size, channels, config.image_size, config.image_size)
    return gan, [Piece(real, torch.zeros(config.batch_size, config.z_dim), labels)]


def idle(network: nn.Module) -> Idle:
    return Idle(network.parameters())


def estimate(config: Config, data: Data) -> Iterator[str]:
    """The lines of a recipe that state its costs."""
    cost, gpu = costs(config, data), GPU[config.precision]
    arithmetic = cost.operations * config.batch_size * config.steps / (gpu * UTILIZATION)
    launches = cost.launches * LAUNCH * config.steps
    one, eight = (longest(arithmetic=arithmetic / gpus, launches=launches) for gpus in (1, 8))
    step = f"{config.batch_size} images in a step"
    rate = f"{gpu / 1e12:.0f} TFLOP/s ({config.precision}) used to {UTILIZATION:.0%}"
    yield FIRST
    yield f"#   {cost.operations / 1e9:.3g} GFLOP for an image ({step}, {config.d_steps} of D), {config.steps} steps"
    yield f"#   time: {one} on one GPU, {eight} on eight, the longer of"
    yield f"#     arithmetic, {duration(arithmetic)} on a GPU of {rate}, an eighth on eight"
    each = f"{cost.launches} operators in a step, {LAUNCH * 1e6:.0f} µs each"
    yield f"#     launches, {duration(launches)} on any number: {each}; on one GPU --cuda-graph removes them"
    yield f"#   gradients exchanged per step by several GPUs: {readable(cost.gradients)} on each"
    rest = f"{readable(cost.peak)} more in a step (float32{'; bf16 about half' if config.precision == 'bf16' else ''})"
    yield f"#   memory: {readable(cost.state)} for networks, average and Adam, {rest}"
    yield f"#   disk: {readable(cost.state)} a checkpoint, {readable(cost.cache)} of decoded images"
    yield LAST


def longest(**bounds: float) -> str:
    """The largest of several seconds, and what it is for."""
    name = max(bounds, key=bounds.__getitem__)
    return f"{duration(bounds[name])} ({name})"


def duration(seconds: float) -> str:
    """Seconds in the largest unit that makes them at least 1."""
    size, unit = (3600, "h") if seconds >= 3600 else (60, "min") if seconds >= 60 else (1, "s")
    return f"{float(f'{seconds / size:.2g}'):g} {unit}"


def with_estimate(recipe: str, lines: Sequence[str]) -> str:
    """The text of a recipe with these lines instead of its estimate, or before its first flag."""
    old = recipe.splitlines()
    if FIRST in old and LAST in old:
        start, end = old.index(FIRST), old.index(LAST) + 1
    else:
        start = end = next(i for i, line in enumerate(old) if line.startswith("--"))
    return "\n".join([*old[:start], *lines, *old[end:]]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description="Estimate what the recipes cost.")
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
