"""Fashion-MNIST on a CPU: the trainer's recipe, a plain DCGAN in the same CPU time, and attention in either network.

    python benchmarks/real_images.py                                # the recipe and the plain DCGAN, three seeds each
    python benchmarks/real_images.py --arms recipe G D both --seeds 5 --out runs/attention -- --steps 600
    python benchmarks/real_images.py --report                       # the table again, from the existing results
    python benchmarks/real_images.py --draw docs/images/real-images-recipe.json  # a chart, as in the docs

An arm is the trainer with `recipes/fashion-mnist.txt` and what it adds; settings behind `--` go to every arm:

    recipe      nothing
    G, D, both  attention in the generator at 14×14, in the discriminator at 7×7, or in both
    conv        spectral norm of D's convolutions in the place of their unfolded kernels (`--d-norm convolution`)
    plain       no trainer: a DCGAN of forty lines with spectral norm in D (measurement/plain_dcgan.py), Adam at 2e-3,
                which was better than 1e-3; it trains as many CPU-seconds as the recipe's runs took in all, with their
                start and evaluation

With `--equal-time` the arms above `plain` get the recipe's time instead of its steps: the times of their steps are
measured first, and they train fewer.

All are scored alike, by features of a classifier of the real images, against the test images. Each run has one thread.
"""

from __future__ import annotations

import examples_path  # isort: skip
import training.threads  # noqa: F401  before torch  # isort: skip

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluation.classifier_cache import open_classifier
from evaluation.evaluator import open_evaluator
from measurement.dot_chart import Panel, dot_chart
from measurement.intervals import paired_difference
from measurement.plain_dcgan import Z_DIM, train
from measurement.stopwatch import Stopwatch
from measurement.summary_chart import draw
from recipe_costs import gan_and_batch, read_recipe
from torch_sagan import record_attention
from training.data.sources import InfiniteBatchSampler, open_data, open_held_out
from training.flags import Config
from training.output.model_card import open_generator
from training.runs.atomic_files import write_json, write_text
from training.script import Parser, fail, given_path, script
from training.step import training_step

RECIPE = examples_path.EXAMPLES / "recipes" / "fashion-mnist.txt"
DATA = "fashion-mnist"
SAMPLES = 5000
ARMS = {
    "recipe": [],
    "G": ["--g-attention", "14"],
    "D": ["--d-attention", "7"],
    "both": ["--g-attention", "14", "--d-attention", "7"],
    "conv": ["--d-norm", "convolution"],
}
LABELS = {
    "recipe": "recipe",
    "G": "in G",
    "D": "in D",
    "both": "in both",
    "conv": "conv. norm",
    "plain": "plain",
}  # in the chart
RATE, BATCH = 2e-3, 64  # of the plain DCGAN
# Score, heading, and how many digits it is shown with.
SHOWN = {
    "classifier_distance": ("distance", ".1f"),
    "agreement": ("agreement, %", ".1f"),
    "classifier_precision": ("precision", ".3f"),
    "classifier_recall": ("recall", ".3f"),
    "swd": ("SWD", ".1f"),
}

Result = dict[str, Any]


# -------------------------------------------------------------------------------------------------------------- runs


def fewer_steps(more: Sequence[str]) -> dict[str, list[str]]:
    """For each arm but the recipe, settings with which it takes the recipe's time, by the measured time of a step."""
    torch.set_num_threads(1)
    configs = {arm: read_recipe(RECIPE, *added, *more) for arm, added in ARMS.items()}
    times = Stopwatch(torch.device("cpu"), seconds=60)(**{arm: one_step(config) for arm, config in configs.items()})
    settings = {}
    for arm, config in configs.items():
        share = times["recipe"] / times[arm]
        steps, decay_from = (round(share * number) for number in (config.steps, config.decay_from))
        settings[arm] = ["--steps", str(steps), "--decay-from", str(decay_from)]
    return settings | {"recipe": []}


def one_step(config: Config) -> Callable[[], object]:
    """What trains the networks of a recipe by a step."""
    gan, batch = gan_and_batch(config, 1, 10, lambda network: torch.optim.Adam(network.parameters(), config.lr_d))
    return lambda: training_step(gan, iter([batch]))


def run(
    arm: str, seed: int, out: Path, more: Sequence[str], cpu_seconds: float, fewer: Mapping[str, list[str]] | None
) -> Result:
    """Train and score one arm in a process of its own, which writes its result into the folder."""
    folder, path = out / f"{arm}-{seed}", out / f"{arm}-{seed}.json"
    if arm == "plain":
        command = [__file__, "--plain", str(cpu_seconds), "--seed", str(seed), "--out", str(folder)]
    else:
        command = [
            str(examples_path.EXAMPLES / "train_celeba.py"),
            f"@{RECIPE}",
            *ARMS[arm],
            *more,
            *(fewer or {}).get(arm, []),
        ]
        command += ["--seed", str(seed), "--eval-samples", str(SAMPLES), "--no-tensorboard", "--out", str(folder)]
    begun = time.monotonic()
    with open(out / f"{arm}-{seed}.txt", "w") as log:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        fail(f"{arm}, seed {seed}: status {process.returncode}, see {out / f'{arm}-{seed}.txt'}")
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    result = {
        "arm": arm,
        "seed": seed,
        "steps": last["step"],
        "settings": list(more),
        "equal_time": fewer is not None,
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "minutes": round((time.monotonic() - begun) / 60, 2),
        "scores": last["scores"],
        "gamma": last.get("gamma", {}),
        "even_keys": {} if arm == "plain" else even_keys(folder),
    }
    write_json(path, result)
    return result


def plain(cpu_seconds: float, seed: int, out: Path) -> int:
    """Train the plain DCGAN for so many CPU-seconds of this process, and write its scores where the trainer would."""
    torch.set_num_threads(1)
    data, held_out = open_data(DATA, size=28, classes="own"), open_held_out(DATA, size=28, classes="own")
    assert data.labels is not None
    classes = len(data.labels.classes)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for indices in InfiniteBatchSampler(len(data), BATCH, seed=seed, flip=False):
            images, labels = data[indices]
            assert labels is not None
            yield images.float() / 127.5 - 1, labels

    trained = enumerate(train(batches(), classes, RATE, seed), start=1)
    steps, generator = next(step for step in trained if time.process_time() > cpu_seconds)
    evaluate = open_evaluator(data, held_out, samples=SAMPLES, cache=out.parent / "cache", device=torch.device("cpu"))

    def inputs(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(count, Z_DIM, generator=rng), torch.randint(classes, (count,), generator=rng)

    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "log.jsonl", json.dumps({"step": steps, "scores": evaluate(generator, inputs, seed=seed)}) + "\n")
    return 0


@torch.no_grad()
def even_keys(folder: Path, samples: int = 200) -> dict[str, float]:
    """The share of each attention layer's weight in G on keys whose row + column is even: about a half, unless its maps
    show the lattice of transposed convolutions."""
    generator, _ = open_generator(folder)
    z = torch.randn(samples, generator.z_dim, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(samples) % (generator.num_classes or 1)
    if not generator.attention:
        return {}
    with record_attention(generator) as records:
        generator(z, labels)
    shares = {}
    for path, (record,) in records.items():
        height, width = record.key_size
        even = (torch.arange(height)[:, None] + torch.arange(width)) % 2 == 0  # (H, W)
        shares[path] = round(record.attention.mean((0, 1)).view(height, width)[even].sum().item(), 3)
    return shares


def collect(
    out: Path, arms: Sequence[str], more: Sequence[str], *, equal_time: bool = False
) -> dict[str, dict[int, Result]]:
    """The results in the folder, by arm and seed. Results of other settings are an error: they are not comparable."""
    found: dict[str, dict[int, Result]] = {arm: {} for arm in arms}
    for arm, results in found.items():
        for path in sorted(out.glob(f"{arm}-*.json")):
            try:
                result = json.loads(path.read_text(encoding="utf-8"))
                settings, seed, timed = result["settings"], result["seed"], result.get("equal_time", False)
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                fail(f"{path}: it cannot be read as a result ({error!r})")
            if arm != "plain" and settings != list(more):
                fail(f"{path} was made with {' '.join(settings) or 'the recipe alone'}: give another --out")
            if arm in ARMS.keys() - {"recipe"} and timed != equal_time:
                fail(f"{path} was made {'with' if timed else 'without'} --equal-time: give another --out")
            results[seed] = result
    return found


# ------------------------------------------------------------------------------------------------------------ report


def shown(name: str, value: float, sign: str = "") -> str:
    """A score as the table has it."""
    return format(100 * value if name == "agreement" else value, sign + SHOWN[name][1])


def table(found: dict[str, dict[int, Result]]) -> str:
    """Markdown: of each arm the median and the range, real images, and the mean difference of attention's pairs."""
    results = next(iter(found.values())).values()
    real = next(iter(results))["scores"]
    rows = [["real images", *(shown(name, real[f"{name}_real"]) for name in SHOWN), ""]]
    for arm, by_seed in found.items():
        cells = []
        for name in SHOWN:
            values = [result["scores"][name] for result in by_seed.values()]
            cells.append(
                f"{shown(name, statistics.median(values))} [{shown(name, min(values))}, {shown(name, max(values))}]"
            )
        seconds = statistics.median(result["cpu_seconds"] for result in by_seed.values())
        rows.append([f"**{arm}**, {len(by_seed)} seeds", *cells, f"{seconds:.0f}"])
    base = found.get("recipe", {})
    for arm in [arm for arm in found if base and arm not in ("recipe", "plain")]:
        seeds = sorted(base.keys() & found[arm].keys())
        cells = []
        for name in SHOWN:
            mean, half = paired_difference(
                [found[arm][seed]["scores"][name] for seed in seeds], [base[seed]["scores"][name] for seed in seeds]
            )
            low, middle, high = (shown(name, value, "+") for value in (mean - half, mean, mean + half))
            cells.append(f"{middle} [{low}, {high}]")
        rows.append([f"{arm} − recipe, {len(seeds)} pairs [95 % interval]", *cells, ""])
    lines = [["", *(heading for heading, _ in SHOWN.values()), "CPU-seconds"], ["---"] * (2 + len(SHOWN)), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def chart(summary: Result) -> str:
    """Distance, agreement and recall of every run, and of real images, as SVG."""
    runs = summary["runs"]
    panels = []
    for name, better in (("classifier_distance", "smaller"), ("agreement", "larger"), ("classifier_recall", "larger")):
        heading, form = SHOWN[name]
        scale = 100 if name == "agreement" else 1
        values = {
            label: [scale * run["scores"][name] for run in runs if run["arm"] == arm]
            for arm, label in LABELS.items()
            if any(run["arm"] == arm for run in runs)
        }
        real = scale * runs[0]["scores"][f"{name}_real"]
        panels.append(Panel(f"{heading} ({better} is better)", values, real, form))
    return dot_chart(panels)


# -------------------------------------------------------------------------------------------------------------- main


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description="Train on Fashion-MNIST in several ways, and compare their scores.")
    names = [*ARMS, "plain"]
    parser.add_argument("--arms", nargs="+", choices=names, default=["recipe", "plain"], help="(default: recipe plain)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm (default: 3)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time (default: one per core)")
    parser.add_argument(
        "--out", type=given_path, default=Path("runs/real-images"), help="folder (default: %(default)s)"
    )
    parser.add_argument(
        "--equal-time", action="store_true", help="fewer steps for arms that take longer, in equal time"
    )
    parser.add_argument("--report", action="store_true", help="only the table, from the existing results")
    parser.add_argument(
        "--draw", type=given_path, metavar="SUMMARY", help="only a chart, from a summary.json that a run wrote"
    )
    parser.add_argument("--plain", type=float, help=argparse.SUPPRESS)  # what a run of that arm is started with
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", metavar="-- SETTINGS", help="of the trainer, added to every arm's")
    args = parser.parse_args(arguments)
    for name in ("seeds", "processes"):
        if getattr(args, name) < 1:
            fail(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = read_arguments(arguments)
    out: Path = args.out
    if args.plain:
        return plain(args.plain, args.seed, out)
    if args.draw:
        return draw(args.draw, chart)
    collected = partial(collect, out, args.arms, args.settings, equal_time=args.equal_time)
    found = collected()
    if not args.report:
        out.mkdir(parents=True, exist_ok=True)
        data, held_out = open_data(DATA, size=28, classes="own"), open_held_out(DATA, size=28, classes="own")
        print(open_classifier(data, held_out, out / "cache").about, flush=True)  # so that no run has to train it
        fewer = fewer_steps(args.settings) if args.equal_time else None
        # The plain DCGAN last, because it gets the time that the recipe took.
        for arms in ([arm for arm in args.arms if arm != "plain"], [arm for arm in args.arms if arm == "plain"]):
            wanted = [(a, s) for s, a in itertools.product(range(args.seeds), arms) if s not in found[a]]
            taken = [result["cpu_seconds"] for result in found.get("recipe", {}).values()]
            if "plain" in arms and not taken:
                fail("--arms plain: expected runs of the recipe in the same folder, whose time it gets")
            with ThreadPoolExecutor(args.processes) as pool:
                runs = [
                    pool.submit(run, a, s, out, args.settings, statistics.median(taken or [0]), fewer)
                    for a, s in wanted
                ]
                for result in (done.result() for done in runs):
                    print(f"{result['arm']}, seed {result['seed']}: {result['minutes']} min", flush=True)
            found = collected()
    if not all(found.values()):
        fail(f"{out}: expected results of {', '.join(arm for arm in args.arms if not found[arm])}")
    text = table(found)
    print(text, end="")
    about = {
        "command": " ".join(["python benchmarks/real_images.py", *(sys.argv[1:] if arguments is None else arguments)]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.processes} runs at a time, one thread each",
        "torch": torch.__version__,
        "recipe": [line for line in RECIPE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")],
    }
    write_json(
        out / "summary.json", about | {"runs": [result for by_seed in found.values() for result in by_seed.values()]}
    )
    write_text(out / "table.md", text)
    print(f"results and table are in {out}")
    return 0


if __name__ == "__main__":
    script(main)
