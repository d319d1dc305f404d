"""Make images with a trained generator.

    python examples/generate.py runs/faces                                     # a grid, from the newest checkpoint
    python examples/generate.py runs/animals --labels cat,dog                  # with classes: a row for each
    python examples/generate.py runs/faces --images --count 1000 --truncation 0.7
    python examples/generate.py runs/faces --interpolate --video webp          # walks between latent vectors
    python examples/generate.py runs/faces --score faces --export faces.safetensors
    python examples/generate.py faces.safetensors --seed 7                     # the exported generator needs no run
    python examples/generate.py sagan.pth --labels 207 --columns 16            # a published one (docs/pretrained.md)

On one machine the same command writes the same files, byte for byte; image number i of a seed does not depend on how
many are made.
"""

from __future__ import annotations

import training.threads  # noqa: F401  before torch  # isort: skip

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from evaluation.evaluator import listed, open_evaluator
from torch_sagan import SAGANGenerator
from training.data.image_folder import ImageFolder
from training.data.labels import parse_labels
from training.data.sources import DataSource, crop_setting, folder_of, open_data, open_held_out
from training.latents import draw_labels, draw_latents, walk
from training.output.image_io import save_animation, save_grid, save_images
from training.output.model_card import Card, open_generator, output_folder, save
from training.runs.folder import shared_cache
from training.script import Parser, fail, given_path, script

BATCH = 16  # fixed, because another batch size may round differently
ROWS = 16  # at most so many classes in a grid if none are named
LISTED = 8  # at most so many paths to print; of more, the first and the last


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        description="Make images with a trained generator: grids, single images, walks.",
        epilog="Without any of --grid, --images, --interpolate, --video, --export, --score: a grid.",
    )
    model = parser.add_argument_group("generator")
    model.add_argument("model", type=given_path, help="a run's folder, checkpoint, .safetensors, or a published .pth")
    model.add_argument("--no-ema", action="store_true", help="the last weights, not their average (checkpoints only)")
    model.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps … (default: %(default)s)")

    inputs = parser.add_argument_group("what is generated")
    inputs.add_argument("--seed", type=int, default=0, help="fixes the latent vectors (default: %(default)s)")
    inputs.add_argument(
        "--count", type=int, default=64, help="images on their own, or in a grid without classes (default: 64)"
    )
    inputs.add_argument(
        "--truncation", type=float, metavar="T",
        help="draw latent numbers outside [-T, T] again: less variety, fewer failures",
    )  # fmt: skip
    inputs.add_argument(
        "--labels",
        metavar="CLASSES",
        help="by name or number, such as cat,dog or 0,3: a row of the grid each, in turn with --images; a name with a "
        "comma is quoted (default: all)",
    )

    files = parser.add_argument_group("what is written")
    files.add_argument(
        "--out", type=given_path, help="folder (default: generated in the run's folder; runs/generated without a run)"
    )
    files.add_argument("--grid", action="store_true", help="grid.png")
    files.add_argument("--columns", type=int, default=8, help="images in a row of the grid (default: 8)")
    files.add_argument("--images", action="store_true", help="000000.png …, each on its own, pixel for pixel")
    files.add_argument("--interpolate", action="store_true", help="interpolation.png: a walk in each row")
    files.add_argument("--video", choices=("gif", "webp"), help="walk.gif or walk.webp: the same walk, in a circle")
    files.add_argument("--stops", type=int, default=4, help="latent vectors that the walk passes (default: 4)")
    files.add_argument("--frames", type=int, help="images from one stop to the next (default: rows 8, video 24)")
    files.add_argument("--fps", type=float, default=20, help="frames of the video in a second (default: 20)")
    files.add_argument(
        "--export",
        type=given_path,
        metavar="PATH",
        help="the generator alone, as .safetensors, and its card as .json",
    )

    score = parser.add_argument_group("scores")
    expanded = os.path.expanduser
    score.add_argument(
        "--score", metavar="DATA", type=expanded, help="compare with images; DATA as the trainer's --data"
    )
    score.add_argument(
        "--classes",
        default="auto",
        help="the classes of DATA, as the trainer's (default: own for a generator with classes, where DATA have some)",
    )
    score.add_argument("--attributes", type=expanded, default="", help="list_attr_celeba.txt, as the trainer's")
    score.add_argument("--samples", type=int, default=2048, help="images of each kind (default: 2048)")
    score.add_argument(
        "--against",
        choices=("held-out", "training"),
        default="held-out",
        help="training: against training images, as published FIDs are (default: held-out where there are some)",
    )
    score.add_argument("--crop", help="center crop, as the trainer's (default: that of the generator's run)")
    score.add_argument("--inception", type=given_path, metavar="PATH", help="its weights (default: torch.hub's)")
    return parser.parse_args(arguments)


def check(args: argparse.Namespace, generator: SAGANGenerator) -> None:
    for name in ("count", "columns", "stops", "frames", "samples"):
        value = getattr(args, name)
        least = 2 if name in ("stops", "samples") else 1
        if value is not None and value < least:
            fail(f"--{name} must be at least {least}, got {value}")
    if not 0 <= args.seed < 2**62:
        fail(f"--seed must be from 0 to below 2^62, got {args.seed}")
    if args.truncation is not None and not (args.truncation > 0 and math.isfinite(args.truncation)):
        fail(f"--truncation must be above 0, got {args.truncation}")
    if not 0.01 <= args.fps <= 100:  # a GIF counts hundredths of a second, at most 65535 of them for a frame
        fail(f"--fps must be from 0.01 to 100, got {args.fps}")
    if args.labels is not None and generator.num_classes is None:
        fail("--labels: this generator has no classes")
    crop_setting(args.crop or "auto")
    given = args.classes != "auto" or args.attributes or args.crop is not None or args.against != "held-out"
    if not args.score and given:
        fail("--classes, --attributes, --crop and --against: without --score there are no real images to read")
    if args.classes not in ("auto", "none") and generator.num_classes is None:
        fail(f"--classes {args.classes}: this generator has no classes")


def class_names(generator: SAGANGenerator, card: Card) -> list[str]:
    """The names of all classes; a published generator has numbers alone."""
    return list(card.get("classes", ())) or [str(number) for number in range(generator.num_classes or 0)]


def chosen_classes(args: argparse.Namespace, generator: SAGANGenerator, card: Card) -> list[int]:
    """The numbers of the classes that the command line names, by default of all; empty without classes."""
    if generator.num_classes is None:
        return []
    if args.labels is None:
        return list(range(generator.num_classes))
    try:
        return parse_labels(args.labels, list(card.get("classes", ())), generator.num_classes)
    except ValueError as error:
        fail(f"--labels {args.labels}: {error}")


# ------------------------------------------------------------------------------------------------------------ output


@torch.no_grad()
def make(generator: SAGANGenerator, z: Tensor, labels: list[int], device: torch.device) -> Tensor:
    """The images (n, C, S, S) of latent vectors (n, z_dim), on the CPU. The labels are taken in turn."""
    made = []
    classes = torch.tensor([labels[i % len(labels)] for i in range(len(z))]) if labels else None  # (n,)
    for start in range(0, len(z), BATCH):
        part = slice(start, start + BATCH)
        made.append(generator(z[part].to(device), None if classes is None else classes[part].to(device)).cpu())
    images = torch.cat(made)
    if not images.isfinite().all():
        raise ValueError("the generator's images hold infinities or NaN: its training has diverged")
    return images


def write_images(
    args: argparse.Namespace, generator: SAGANGenerator, card: Card, classes: list[int], device: torch.device
) -> list[Path]:
    """Write all images that were asked for; returns their paths."""
    written: list[Path] = []

    def latents(count: int) -> Tensor:
        return draw_latents(count, generator.z_dim, torch.Generator().manual_seed(args.seed), args.truncation)

    def file(name: str) -> Path:
        written.append(args.out / name)
        return written[-1]

    if args.grid and classes:  # a row for each class, a column for each latent vector
        rows = classes if args.labels is not None or len(classes) <= ROWS else classes[:: -(-len(classes) // ROWS)]
        z = latents(args.columns).repeat(len(rows), 1)  # (rows · columns, z_dim)
        labels = [label for label in rows for _ in range(args.columns)]
        names = class_names(generator, card)
        save_grid(file("grid.png"), make(generator, z, labels, device), args.columns, [names[label] for label in rows])
    elif args.grid:
        save_grid(file("grid.png"), make(generator, latents(args.count), [], device), args.columns)
    if args.images:
        images = make(generator, latents(args.count), classes, device)
        save_images([file(f"{i:06d}.png") for i in range(args.count)], images)
    one_class = classes[:1]  # a walk stays in one class
    if args.interpolate:
        stops = latents(args.stops)  # (stops, z_dim)
        legs = torch.cat([walk(stops, args.frames or 8, closed=False), stops[1:, None]], dim=1)  # (legs, frames, z_dim)
        save_grid(file("interpolation.png"), make(generator, legs.flatten(0, 1), one_class, device), legs.shape[1])
    if args.video:
        legs = walk(latents(args.stops), args.frames or 24, closed=True)
        save_animation(file(f"walk.{args.video}"), make(generator, legs.flatten(0, 1), one_class, device), args.fps)
    return written


def open_real_images(args: argparse.Namespace, card: Card, conditional: bool) -> tuple[DataSource, DataSource | None]:
    """The images of `--score DATA`, and those that DATA hold out. They have the classes of the generator, or none."""
    size, channels = card["generator"]["image_size"], str(card["generator"].get("image_channels", 3))
    mirror = bool(card.get("mirror", True))

    def opened(classes: str) -> tuple[DataSource, DataSource | None]:
        data = open_data(
            args.score,
            size=size,
            crop=crop_setting(args.crop or str(card.get("crop", "auto"))),
            classes=classes,
            attributes=args.attributes,
            channels=channels,
            mirror=mirror,
        )
        held_out = open_held_out(args.score, size=size, classes=classes, channels=channels, mirror=mirror)
        if data.labels and list(data.labels.classes) != list(card.get("classes", ())):
            theirs, ours = (", ".join(names) for names in (data.labels.classes, card.get("classes", ())))
            raise ValueError(
                f"--data {args.score}: its classes ({theirs}) are not the generator's ({ours}); see --classes"
            )
        return data, held_out

    if args.classes != "auto" or not conditional:
        return opened("none" if args.classes == "auto" else args.classes)
    try:
        return opened("own")
    except ValueError:
        data, held_out = opened("none")
        if folder_of(data) is None:  # a data set with classes, which are others
            raise
        return data, held_out


def cache_folder(model: Path) -> Path:
    """Where the run of a model keeps what runs share. A model that lies in `runs` itself shares with those there."""
    images = output_folder(model).resolve()
    return shared_cache(images if images.parent == Path("runs").resolve() else images.parent)


def score(
    args: argparse.Namespace, generator: SAGANGenerator, card: Card, classes: list[int], device: torch.device
) -> Card:
    """Scores of the generator against `--score DATA`, each beside that of real images."""
    try:
        data, held_out = open_real_images(args, card, bool(classes))
    except ValueError as error:
        fail(str(error).replace("--data", "--score", 1))
    evaluator = open_evaluator(
        data,
        held_out,
        samples=args.samples,
        cache=cache_folder(args.model),
        device=device,
        inception=args.inception,
        per_class=True,
        against_training=args.against == "training",
    )
    print(f"scored    {evaluator.samples} images of each kind, against {evaluator.against}")
    if evaluator.classifier:
        print(f"classifier {evaluator.classifier.about}")
    if evaluator.note:
        print(evaluator.note, file=sys.stderr)

    counts = list((data.labels.counts() if data.labels else card.get("classes", {})).values())
    shares = [counts[label] for label in classes] if counts else []
    shares = shares if any(shares) else [1] * len(classes)

    def inputs(count: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        z = draw_latents(count, generator.z_dim, rng, args.truncation)  # (count, z_dim)
        if not classes:
            return (z,)
        return z, torch.tensor(classes)[draw_labels(count, shares, rng)]

    if isinstance(data, ImageFolder):
        for path, reason in (data.others | data.unreadable).items():
            print(f"{reason}, left out: {path}", file=sys.stderr)
    scores = evaluator(generator, inputs, seed=args.seed)
    return {"data": Path(args.score).name, "images": evaluator.samples} | {k: round(v, 4) for k, v in scores.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    args = read_arguments(arguments)
    args.out = args.out or output_folder(args.model)
    args.grid = args.grid or not any((args.images, args.interpolate, args.video, args.export, args.score))
    try:
        device = torch.device(args.device)
        generator, card = open_generator(args.model, average=not args.no_ema)
        if args.no_ema and "averaged" in card and card["averaged"]:
            fail("--no-ema: an exported generator has only the weights that were exported")
        check(args, generator)
        classes = chosen_classes(args, generator, card)
        generator.to(device)
        written = write_images(args, generator, card, classes, device)
        if args.score:
            card["scores"] = score(args, generator, card, classes, device)
            print(f"scores    {listed({n: value for n, value in card['scores'].items() if isinstance(value, float)})}")
        if args.export:
            save(generator.cpu().state_dict(), card, args.export)
            written += [args.export, args.export.with_suffix(".json")]
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        fail(str(error).splitlines()[0] if str(error) else type(error).__name__)
    for path in written if len(written) <= LISTED else [*written[:1], "…", *written[-LISTED:]]:
        print(path)
    return 0


if __name__ == "__main__":
    script(main)
