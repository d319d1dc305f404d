"""Does attention help? The same GAN with and without it, on faces whose distant parts have to agree.

    python benchmarks/long_range.py                # 5 seeds, both arms: 38 minutes on two busy cores
    python benchmarks/long_range.py --seeds 8      # three more pairs; finished runs are kept
    python benchmarks/long_range.py --report       # table and chart again, from the existing results
    python benchmarks/long_range.py --draw docs/images/long-range.json  # a chart from a summary, as in the docs

Both arms are SAGAN's networks with the same weights to begin with, trained on the same images and latent vectors for
the same number of steps. They differ in one thing, a layer in G and one in D:

    attention   SelfAttention2d:   o_j = Σ_i softmax_i(f(x_i)ᵀ g(x_j)) h(x_i)    a position attends to all
    local       LocalAttention:    o_j = σ(f(x_j)ᵀ g(x_j)) h(x_j)                a position attends to itself or nothing

so the local arm has the same number of parameters, all of them in use, and lacks only the view of other positions. (No
layer at all would mean fewer parameters, and a softmax over one position would leave f and g without a gradient.) What
is measured: how often the two eyes, earrings and cheeks, and headband and shirt, differ in color
(evaluation/color_agreement.py), and the sliced Wasserstein distance to faces that were not trained on.

At 32 pixels, an element of D's last map sees 22 of them, and the logit is linear in these elements. So without
attention D can compare the eyes (8 pixels apart) and the cheeks (11), hardly the earrings (19), and not at all band and
shirt (25).
"""

from __future__ import annotations

import examples_path  # noqa: F401  # isort: skip
import training.threads  # noqa: F401  before torch  # isort: skip

import argparse
import copy
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evaluation.color_agreement import PAIRS, ColorClassifiers
from evaluation.evaluator import evaluation_mode
from evaluation.sliced_wasserstein import sliced_wasserstein
from measurement.intervals import paired_difference
from measurement.summary_chart import draw
from torch_sagan import SAGANDiscriminator, SAGANGenerator, SelfAttention2d
from training.average import recalibrated, update_average
from training.data import procedural_faces as faces
from training.objectives import objective
from training.output.image_io import save_grid
from training.runs.atomic_files import write_json, write_text
from training.runs.standard_streams import escaped
from training.script import Parser, fail, flag, given_path, option, script
from training.step import GAN, Piece, no_augmentation, training_step

TRAINED_ON = 8192  # faces
HELD_OUT = 2_000_000  # number of the first face that generated ones are compared with
KEY_CHANNELS = 8  # channels of f and g in both arms; the default, C // 8, would be two in such narrow networks


class LocalAttention(SelfAttention2d):
    """SelfAttention2d's parameters without the view of other positions: o_j = σ(f(x_j)ᵀ g(x_j)) h(x_j).

    This is attention over two positions: the position itself and an empty one whose logit is 0.
    """

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        weight = torch.sigmoid((self.query(x) * self.key(x)).sum(1, keepdim=True))  # (B, 1, H, W)
        o: Tensor = self.out(weight * self.value(x))  # (B, C, H, W)
        return self.gamma * o + x


ARMS: dict[str, type[SelfAttention2d]] = {"attention": SelfAttention2d, "local": LocalAttention}


@dataclass(frozen=True)
class Settings:
    """What the results depend on, the same for both arms."""

    steps: int = option(4000, "experiment", "steps of D and of G")
    batch_size: int = option(32, "experiment", "images in a step")
    image_size: int = option(32, "experiment", "width and height of the faces, pixels")
    base_channels: int = option(16, "experiment", "channels of the largest feature map")
    z_dim: int = option(64, "experiment", "length of the latent vector")
    lr: float = option(1e-3, "experiment", "Adam's learning rate, of both networks")
    ema_decay: float = option(0.995, "experiment", "what the averaged generator, which is measured, keeps at each step")
    samples: int = option(1000, "experiment", "faces that are measured")


# ---------------------------------------------------------------------------------------------------------- training


def networks(arm: str, settings: Settings) -> tuple[SAGANGenerator, SAGANDiscriminator]:
    """G and D of one arm, with its layer at maps of a quarter of the image's size, as in the paper (32 of 128)."""
    layer = partial(ARMS[arm], qk_channels=KEY_CHANNELS)
    resolutions = [settings.image_size // 4]
    generator = SAGANGenerator(
        settings.image_size,
        z_dim=settings.z_dim,
        base_channels=settings.base_channels,
        attention_resolutions=resolutions,
        attention=layer,
    )
    discriminator = SAGANDiscriminator(
        settings.image_size, base_channels=settings.base_channels, attention_resolutions=resolutions, attention=layer
    )
    return generator, discriminator


def train(arm: str, seed: int, settings: Settings) -> tuple[nn.Module, dict[str, float]]:
    """The averaged generator after the last step, and the gammas. The seed fixes weights, images and latent vectors."""
    torch.manual_seed(seed)
    generator, discriminator = networks(arm, settings)
    average = copy.deepcopy(generator).eval()
    g_adam, d_adam = (
        torch.optim.Adam(network.parameters(), lr=settings.lr, betas=(0.0, 0.9), fused=True)
        for network in (generator, discriminator)
    )
    gan = GAN(generator, discriminator, g_adam, d_adam, objective("hinge", 0.0, no_augmentation))
    images = torch.from_numpy(faces.render(faces.traits(TRAINED_ON), settings.image_size))
    rng = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[list[Piece]]:
        while True:
            chosen = torch.randint(TRAINED_ON, (settings.batch_size,), generator=rng)
            real = images[chosen].float() / 127.5 - 1  # (B, 3, S, S)
            yield [Piece(real, torch.randn(settings.batch_size, settings.z_dim, generator=rng))]

    drawn = batches()
    for step in range(settings.steps):
        losses = training_step(gan, drawn)
        update_average(average, generator, decay=settings.ema_decay, steps=step)
        if step % 100 == 99 and not losses.isfinite().all():
            raise ArithmeticError(f"{arm}, seed {seed}: the losses are not finite at step {step + 1}")
    gammas = {
        f"{name}.{path}": module.gamma.item()
        for name, network in (("G", generator), ("D", discriminator))
        for path, module in network.named_modules()
        if isinstance(module, SelfAttention2d)
    }
    return recalibrated(average), gammas


@torch.no_grad()
def generate(generator: nn.Module, settings: Settings) -> Tensor:
    """`samples` faces, uint8, always from the same latent vectors."""
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(settings.samples, settings.z_dim, generator=rng)
    with evaluation_mode(generator):
        images = torch.cat([generator(part) for part in z.split(64)])
    return (images * 127.5 + 127.5).round().byte()


# ----------------------------------------------------------------------------------------------------------- results


def measure(images: Tensor, classifiers: ColorClassifiers, settings: Settings) -> dict[str, Any]:
    """The disagreements of a set of faces, their mean relative to chance, and the distance to as many real faces."""
    readings = classifiers(images.numpy())
    unseen = torch.from_numpy(faces.render(faces.traits(len(images), first=HELD_OUT), settings.image_size))
    return {
        "pairs": {name: reading._asdict() for name, reading in readings.items()},
        "relative": statistics.mean(reading.relative for reading in readings.values()),
        "swd": sliced_wasserstein(unseen, images)["mean"],
    }


def run(arm: str, seed: int, settings: Settings, out: Path) -> str:
    """Train and measure one arm with one seed, in a process of its own; writes a JSON and a grid of faces."""
    torch.set_num_threads(1)  # since there is a process for each core
    start = time.monotonic()
    generator, gammas = train(arm, seed, settings)
    images = generate(generator, settings)
    result = measure(images, ColorClassifiers(settings.image_size), settings)
    minutes = (time.monotonic() - start) / 60
    result |= {"arm": arm, "seed": seed, "gammas": gammas, "minutes": round(minutes, 2), "settings": asdict(settings)}
    save_grid(out / f"{arm}-{seed}.png", images[:64].float() / 127.5 - 1, columns=8)
    write_json(out / f"{arm}-{seed}.json", result)
    return f"{arm}, seed {seed}: differ / chance {result['relative']:.2f}, SWD {result['swd']:.1f} ({minutes:.1f} min)"


def baselines(settings: Settings) -> dict[str, Any]:
    """The ends of the scale: real faces, faces put together from two halves, and a generator before its training."""
    classifiers = ColorClassifiers(settings.image_size)
    one, other = (
        torch.from_numpy(faces.render(faces.traits(settings.samples, first=first), settings.image_size))
        for first in (2 * HELD_OUT, 3 * HELD_OUT)
    )
    middle = settings.image_size // 2
    halves = one.clone()
    halves[..., middle:] = other[..., middle:]
    apart = measure(halves, classifiers, settings)
    halves = one.clone()
    halves[:, :, middle:] = other[:, :, middle:]  # band and shirt lie one above the other
    apart["pairs"]["band and shirt"] = classifiers(halves.numpy())["band and shirt"]._asdict()
    apart["relative"] = statistics.mean(p["disagreement"] / p["chance"] for p in apart["pairs"].values())
    torch.manual_seed(0)
    untrained, _ = networks("local", settings)
    return {
        "real faces": measure(one, classifiers, settings),
        "halves of different faces": apart,
        "before training": measure(generate(untrained, settings), classifiers, settings),
    }


def collect(out: Path, settings: Settings) -> dict[str, dict[int, dict[str, Any]]]:
    """The results in the folder, by arm and seed. Results of other settings are an error: they are not comparable."""
    found: dict[str, dict[int, dict[str, Any]]] = {arm: {} for arm in ARMS}
    for arm, results in found.items():
        for path in out.glob(f"{arm}-*.json"):
            try:
                result = json.loads(path.read_text())
                changed = [name for name, value in asdict(settings).items() if result["settings"][name] != value]
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                fail(f"{path}: it cannot be read as a result ({error!r})")
            if changed:
                fail(f"{path} was made with {changed[0]} {result['settings'][changed[0]]}: give another --out")
            results[result["seed"]] = result
    return found


# ------------------------------------------------------------------------------------------------------------ report

HEADINGS = [f"{pair.name} differ, %" for pair in PAIRS] + ["differ / chance", "SWD"]


def numbers(result: dict[str, Any]) -> list[float]:
    """The columns of the table: how often each pair differs, in per cent, the mean relative to chance, the distance."""
    differ = [100 * result["pairs"][pair.name]["disagreement"] for pair in PAIRS]
    return [*differ, result["relative"], result["swd"]]


def table(found: dict[str, dict[int, dict[str, Any]]], marks: dict[str, Any]) -> str:
    """Markdown: the ends of the scale, mean ± standard deviation of each arm, and the difference of the pairs."""
    rows = [(name, [f"{value:.3g}" for value in numbers(mark)]) for name, mark in marks.items()]
    chances = [100 * marks["real faces"]["pairs"][pair.name]["chance"] for pair in PAIRS]
    rows.insert(1, ("chance", [f"{value:.3g}" for value in [*chances, 1.0]] + ["–"]))
    for arm, results in found.items():
        columns = list(zip(*map(numbers, results.values()), strict=True))
        cells = [f"{statistics.mean(c):.3g} ± {statistics.stdev(c) if len(c) > 1 else math.nan:.2g}" for c in columns]
        rows.append((f"**{arm}**, {len(results)} seeds", cells))
    seeds = sorted(found["attention"].keys() & found["local"].keys())
    if seeds:
        one, other = (
            zip(*(numbers(found[arm][seed]) for seed in seeds), strict=True) for arm in ("attention", "local")
        )
        differences = [paired_difference(a, b) for a, b in zip(one, other, strict=True)]
        cells = [f"{mean:+.2g} [{mean - half:+.2g}, {mean + half:+.2g}]" for mean, half in differences]
        rows.append((f"attention − local, {len(seeds)} pairs [95 % interval]", cells))
    lines = [["", *HEADINGS], ["---"] * (1 + len(HEADINGS)), *([name, *cells] for name, cells in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def summarize(found: dict[str, dict[int, dict[str, Any]]], marks: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """The data of the chart: for each pair its distance, and how often it differs, in per cent."""
    summary: dict[str, Any] = {}
    for i, pair in enumerate(PAIRS):
        summary[pair.name] = {
            "pixels apart": math.dist(pair.here, pair.there) / 2 * settings.image_size,
            "chance": 100 * marks["real faces"]["pairs"][pair.name]["chance"],
            "real faces": numbers(marks["real faces"])[i],
        }
        for arm, results in found.items():
            differ = [numbers(result)[i] for result in results.values()]
            deviation = statistics.stdev(differ) if len(differ) > 1 else 0.0
            summary[pair.name][arm] = {"mean": statistics.mean(differ), "deviation": deviation}
    return summary


# Legible on white and on black, and on a phone, whose width the chart has.
COLORS = {"attention": "#e8813a", "local": "#6f8fc0", "chance": "#c0508a", "real faces": "#2f9e6e"}
INK, SPREAD = "#777777", "#333333"
WIDTH, HEIGHT, LEFT, ABOVE, BELOW, BAR = 398, 368, 34, 76, 46, 30


def chart(summary: dict[str, Any]) -> str:
    """The pairs as SVG, near ones first: a bar with standard deviation for each arm; chance and real faces as lines."""
    step = (WIDTH - LEFT) / len(summary)

    def y(percent: float) -> float:
        return HEIGHT - BELOW - percent / 100 * (HEIGHT - BELOW - ABOVE)

    parts = [f'<text x="{LEFT}" y="14">generated faces in which the two differ in color, %</text>']
    for i, (name, text) in enumerate(
        zip(COLORS, ("attention", "without attention", "chance", "real faces"), strict=True)
    ):
        left, top = LEFT + (0, 170)[i % 2], 24 + 18 * (i // 2)
        shape = f"M{left} {top}h14v10h-14z" if name in ARMS else f"M{left} {top + 4}h14v3h-14z"
        parts.append(f'<path d="{shape}" fill="{COLORS[name]}"/><text x="{left + 20}" y="{top + 10}">{text}</text>')
    for percent in range(0, 101, 20):
        parts.append(f'<path d="M{LEFT} {y(percent):.1f}H{WIDTH}" stroke="{INK}" opacity=".3"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(percent) + 5:.1f}" text-anchor="end">{percent}</text>')
    for i, (label, pair) in enumerate(sorted(summary.items(), key=lambda item: item[1]["pixels apart"])):
        name = escape(escaped(label))  # a summary may come from anybody, and a chart is opened in a browser
        middle = LEFT + (i + 0.5) * step
        for arm, x in zip(ARMS, (middle - BAR - 3, middle + 3), strict=True):
            mean, deviation = pair[arm]["mean"], pair[arm]["deviation"]
            low, high = y(max(mean - deviation, 0)), y(min(mean + deviation, 100))
            bar = (
                f'<rect x="{x:.1f}" y="{y(mean):.1f}" width="{BAR}" height="{y(0) - y(mean):.1f}" fill="{COLORS[arm]}">'
            )
            parts.append(f"{bar}<title>{name}, {arm}: {mean:.3g} ± {deviation:.2g} %</title></rect>")
            center = x + BAR / 2
            spread = f"M{center:.1f} {low:.1f}V{high:.1f}M{center - 5:.1f} {low:.1f}h10M{center - 5:.1f} {high:.1f}h10"
            # A dark line with a light edge shows on a bar, on white and on black.
            parts.append(f'<path d="{spread}" stroke="#fff" stroke-width="5" opacity=".8" fill="none"/>')
            parts.append(f'<path d="{spread}" stroke="{SPREAD}" stroke-width="2" fill="none"/>')
        for mark in ("chance", "real faces"):
            line = f"M{middle - BAR - 12:.1f} {y(pair[mark]):.1f}H{middle + BAR + 12:.1f}"
            parts.append(f'<path d="{line}" stroke="{COLORS[mark]}" stroke-width="3"/>')
        parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 24}" text-anchor="middle" font-size="12">{name}</text>')
        apart = f"{pair['pixels apart']:.0f} px apart"
        parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 7}" text-anchor="middle" font-size="12">{apart}</text>')
    style = f'font-family="system-ui, sans-serif" font-size="13" fill="{INK}"'
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"


# -------------------------------------------------------------------------------------------------------------- main


def read_arguments(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Settings]:
    parser = Parser(description="Train with and without attention, and measure what it changes.")
    experiment = parser.add_argument_group("experiment")
    experiment.add_argument("--seeds", type=int, default=5, help="pairs of runs (default: 5)")
    for setting in fields(Settings):
        experiment.add_argument(
            flag(setting.name),
            type=type(setting.default),
            default=setting.default,
            metavar=type(setting.default).__name__.upper(),
            help=f"{setting.metadata['help']} (default: {setting.default})",
        )
    files = parser.add_argument_group("running")
    files.add_argument("--out", type=given_path, default=Path("runs/long-range"), help="folder (default: %(default)s)")
    files.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time (default: one per core)")
    files.add_argument("--report", action="store_true", help="only table and chart, from the existing results")
    files.add_argument(
        "--draw", type=given_path, metavar="SUMMARY", help="only the chart, from a summary.json that a run wrote"
    )
    args = parser.parse_args(arguments)
    for name in ("seeds", "processes", *(setting.name for setting in fields(Settings))):
        if not getattr(args, name) > 0:
            fail(f"{flag(name)} must be above 0, got {getattr(args, name)}")
    return args, Settings(**{setting.name: getattr(args, setting.name) for setting in fields(Settings)})


def main(arguments: Sequence[str] | None = None) -> int:
    args, settings = read_arguments(arguments)
    if args.draw:
        return draw(args.draw, chart)
    out: Path = args.out
    try:
        networks("local", settings)
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        fail(error)
    found = collect(out, settings)
    wanted = [(arm, seed) for seed in range(args.seeds) for arm in ARMS if seed not in found[arm]]
    if wanted and not args.report:
        print(f"{len(wanted)} runs of {settings.steps} steps, {args.processes} at a time", flush=True)
        with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
            try:
                for done in as_completed([pool.submit(run, arm, seed, settings, out) for arm, seed in wanted]):
                    print(done.result(), flush=True)
            except BaseException:  # after Ctrl-C, too: cancel runs that have not begun; finished ones are on the disk
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        found = collect(out, settings)
    if not all(found.values()):
        fail(f"{out}: expected results of both arms")
    marks_file = out / "baselines.json"
    if not marks_file.exists():
        write_json(marks_file, baselines(settings))
    marks = json.loads(marks_file.read_text())
    text = table(found, marks)
    write_text(out / "table.md", text)
    print(text, end="")
    write_json(out / "summary.json", summarize(found, marks, settings))
    draw(out / "summary.json", chart)
    print(f"results, table and images are in {out}")
    return 0


if __name__ == "__main__":
    script(main)
