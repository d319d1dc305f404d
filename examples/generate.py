"""Make pictures with a trained generator.

    python examples/generate.py runs/faces                                     # a grid, from the newest checkpoint
    python examples/generate.py runs/faces --images --count 1000 --truncation 0.7
    python examples/generate.py runs/faces --strip --video webp                # walks between latent vectors
    python examples/generate.py runs/faces --attention --look-from 0.52,0.37   # what an eye looks at
    python examples/generate.py runs/faces --score faces --export faces.safetensors
    python examples/generate.py faces.safetensors --seed 7                     # the exported generator needs no run

The same command gives the same files, byte for byte, on the same machine; image number i of a seed is the same however
many are made.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from command_line import Parser, script
from judging import Judge, real_images
from model_card import Card, open_generator, save
from pictures import save_animation, save_attention, save_grid, save_images
from sources import Folder, crop_setting, open_source
from torch_sagan import SAGANGenerator

BATCH = 16  # fixed, because another batch size may round differently
EXPLAINED = 6  # images in an attention figure
LISTED = 8  # paths to print at most; of more, the first and the last

# Where attention figures look from, (row, column) as fractions: an eye, the mouth, the hair, the background of a face.
PLACES = [(0.52, 0.37), (0.73, 0.5), (0.15, 0.5), (0.06, 0.06)]


def fail(message: object) -> NoReturn:
    """End with one line on stderr and a non-zero status."""
    raise SystemExit("generate.py: " + " ".join(str(message).split()))


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        "generate.py",
        description="Make pictures with a trained generator: grids, single images, walks, attention figures.",
        epilog="Without any of --grid, --images, --strip, --video, --attention, --export, --score: a grid.",
    )
    model = parser.add_argument_group("generator")
    model.add_argument("model", type=Path, help="a run's folder, a checkpoint of the trainer, or a .safetensors file")
    model.add_argument("--current", action="store_true", help="the last weights, not their average (checkpoints only)")
    model.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps … (default: %(default)s)")

    chance = parser.add_argument_group("what is drawn")
    chance.add_argument("--seed", type=int, default=0, help="fixes the latent vectors (default: %(default)s)")
    chance.add_argument("--count", type=int, default=64, help="images in the grid, or on their own (default: 64)")
    chance.add_argument(
        "--truncation", type=float, metavar="T",
        help="latent numbers lie in [-T, T], as if larger ones were drawn again: less variety, fewer failures",
    )  # fmt: skip
    chance.add_argument(
        "--labels", type=labels, metavar="A,B,…",
        help="classes of the images, in turn, for a conditional generator (default: all classes in turn)",
    )  # fmt: skip

    files = parser.add_argument_group("what is written")
    files.add_argument("--out", type=Path, default=Path("pictures"), help="folder for it (default: %(default)s)")
    files.add_argument("--grid", action="store_true", help="grid.png")
    files.add_argument("--columns", type=int, default=8, help="images in a row of the grid (default: 8)")
    files.add_argument("--images", action="store_true", help="000000.png …, each on its own, pixel for pixel")
    files.add_argument("--strip", action="store_true", help="strip.png: a row for each way from one image to the next")
    files.add_argument("--video", choices=("gif", "webp"), help="walk.gif or walk.webp: the same walk, in a circle")
    files.add_argument("--stops", type=int, default=4, help="latent vectors that the walk passes (default: 4)")
    files.add_argument("--frames", type=int, help="images from one stop to the next (default: strip 8, video 24)")
    files.add_argument("--fps", type=float, default=20, help="frames of the video in a second (default: 20)")
    files.add_argument("--attention", action="store_true", help="attention-16.png …: a figure for each attention layer")
    files.add_argument(
        "--look-from", type=place, action="append", metavar="ROW,COLUMN",
        help="a place in the attention figure, fractions of the image from its upper left corner; repeat for more",
    )  # fmt: skip
    files.add_argument(
        "--export", type=Path, metavar="PATH", help="the generator alone, as .safetensors and a .json with its card"
    )

    score = parser.add_argument_group("scores")
    score.add_argument(
        "--score", metavar="DATA", help="score the generator against faces, digits or a folder, as the trainer's --data"
    )
    score.add_argument("--samples", type=int, default=2048, help="images of each kind (default: 2048)")
    score.add_argument(
        "--crop", default="auto", help="centre crop of a folder's images, as the trainer's (default: auto)"
    )
    score.add_argument(
        "--inception-weights", type=Path, metavar="PATH", help="for FID and KID (default: where torch.hub keeps them)"
    )
    return parser.parse_args(arguments)


def labels(text: str) -> list[int]:
    return [int(label) for label in text.split(",")]


def place(text: str) -> tuple[float, float]:
    try:
        row, column = (float(number) for number in text.split(","))
    except ValueError:
        row = column = math.nan
    if not (0 <= row < 1 and 0 <= column < 1):
        raise argparse.ArgumentTypeError(f"expected ROW,COLUMN, two fractions from 0 to below 1, got {text!r}")
    return row, column


def check(given: argparse.Namespace, generator: SAGANGenerator) -> None:
    for name in ("count", "columns", "stops", "frames", "samples"):
        value = getattr(given, name)
        least = 2 if name in ("stops", "samples") else 1
        if value is not None and value < least:
            fail(f"--{name} must be at least {least}, got {value}")
    if not 0 <= given.seed < 2**62:
        fail(f"--seed must be from 0 to below 2^62, got {given.seed}")
    crop_setting(given.crop)
    if given.truncation is not None and not (given.truncation > 0 and math.isfinite(given.truncation)):
        fail(f"--truncation must be above 0, got {given.truncation}")
    if not 0.01 <= given.fps <= 100:  # a GIF counts hundredths of a second, at most 65535 of them for a frame
        fail(f"--fps must be from 0.01 to 100, got {given.fps}")
    if given.labels and generator.num_classes is None:
        fail("--labels: this generator has no classes")
    for label in given.labels or []:
        if not 0 <= label < (generator.num_classes or 0):
            fail(f"--labels must be from 0 to {(generator.num_classes or 0) - 1}, got {label}")
    if given.look_from and not given.attention:
        fail("--look-from: without --attention there is no figure that it could be in")
    if given.attention and not generator.attention:
        fail("--attention: this generator has no attention layer")


# ---------------------------------------------------------------------------------------------------- latent vectors


def draw_latents(count: int, z_dim: int, random: torch.Generator, truncation: float | None = None) -> Tensor:
    """`count` standard normal vectors (count, z_dim); with truncation t their components lie in [-t, t].

    The truncated normal is that of drawing again whatever lies outside (Brock et al., arXiv:1809.11096).
    """
    rows = []
    for _ in range(count):  # one by one, so that the first vectors do not depend on how many follow
        if truncation is None:
            rows.append(torch.randn(z_dim, generator=random))
        else:
            rows.append(nn.init.trunc_normal_(torch.empty(z_dim), a=-truncation, b=truncation, generator=random))
    return torch.stack(rows)


def slerp(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """The points (n, D) at shares (n,) of the way from one vector (D,) to another, along the arc between them.

    (sin((1 − t) Ω) a + sin(t Ω) b) / sin Ω, with Ω the angle between a and b; a straight line where that is 0 or π.
    The middle of a straight line is shorter than the vectors that the generator was trained with.
    """
    share = share[:, None]  # (n, 1)
    cosine = nn.functional.cosine_similarity(start, end, dim=0).clamp(-1, 1)
    angle = torch.arccos(cosine)
    if angle.sin() < 1e-4:
        return torch.lerp(start, end, share)
    return (((1 - share) * angle).sin() * start + (share * angle).sin() * end) / angle.sin()


def walk(stops: Tensor, frames: int, *, closed: bool) -> Tensor:
    """Latent vectors from each of the stops (k, D) towards the next: (legs, frames, D), without the last end."""
    ends = torch.cat([stops[1:], stops[:1]]) if closed else stops[1:]
    shares = torch.arange(frames) / frames
    return torch.stack([slerp(a, b, shares) for a, b in zip(stops[: len(ends)], ends, strict=True)])


def in_turn(choice: list[int] | None, generator: SAGANGenerator, count: int) -> Tensor | None:
    """The classes of `count` images: those chosen, or all, one after the other; None without classes."""
    if generator.num_classes is None:
        return None
    chosen = choice or range(generator.num_classes)
    return torch.tensor([chosen[i % len(chosen)] for i in range(count)])


# ------------------------------------------------------------------------------------------------------------ output


@torch.no_grad()
def make(generator: SAGANGenerator, z: Tensor, classes: Tensor | None, device: torch.device) -> Tensor:
    """The images (n, C, S, S) of latent vectors (n, z_dim), on the CPU."""
    made = []
    for start in range(0, len(z), BATCH):
        part = slice(start, start + BATCH)
        made.append(generator(z[part].to(device), None if classes is None else classes[part].to(device)).cpu())
    return torch.cat(made)


def draw(given: argparse.Namespace, generator: SAGANGenerator, device: torch.device) -> list[Path]:
    """Write all pictures that were asked for; returns their paths."""
    written: list[Path] = []

    def latents(count: int) -> Tensor:
        return draw_latents(count, generator.z_dim, torch.Generator().manual_seed(given.seed), given.truncation)

    def file(name: str) -> Path:
        written.append(given.out / name)
        return written[-1]

    def walked(legs: Tensor) -> Tensor:
        label = (given.labels or [0])[:1]  # a walk stays in one class
        z = legs.flatten(0, 1)  # (legs · frames, D)
        return make(generator, z, in_turn(label, generator, len(z)), device)

    if given.grid or given.images:
        images = make(generator, latents(given.count), in_turn(given.labels, generator, given.count), device)
        if given.grid:
            save_grid(file("grid.png"), images, given.columns)
        if given.images:
            save_images([file(f"{i:06d}.png") for i in range(given.count)], images)
    if given.strip:
        stops = latents(given.stops)  # (stops, D)
        legs = torch.cat([walk(stops, given.frames or 8, closed=False), stops[1:, None]], dim=1)
        save_grid(file("strip.png"), walked(legs), legs.shape[1])
    if given.video:
        legs = walk(latents(given.stops), given.frames or 24, closed=True)
        save_animation(file(f"walk.{given.video}"), walked(legs), given.fps)
    if given.attention:
        z, classes = latents(EXPLAINED).to(device), in_turn(given.labels, generator, EXPLAINED)
        with torch.no_grad():
            images, maps = generator(z, None if classes is None else classes.to(device), return_attention=True)
        for size, attention in zip(sorted(map(int, generator.attention)), maps, strict=True):
            save_attention(file(f"attention-{size}.png"), images, attention, given.look_from or PLACES)
    return written


def score(given: argparse.Namespace, generator: SAGANGenerator, image_size: int, device: torch.device) -> Card:
    """Score the generator against `--score DATA`."""
    try:
        source = open_source(given.score, size=image_size, crop=crop_setting(given.crop))
    except ValueError as error:
        fail(str(error).replace("--data", "--score", 1))
    real = real_images(source, given.samples, flip=given.score != "digits")
    judge = Judge(real, samples=given.samples, device=device, inception=given.inception_weights)
    if isinstance(source, Folder):
        for path, reason in (source.others | source.unreadable).items():
            print(f"{reason}, left out: {path}", file=sys.stderr)
    if judge.note:
        print(judge.note, file=sys.stderr)

    def sampler(count: int, random: torch.Generator) -> tuple[Tensor, ...]:
        z = draw_latents(count, generator.z_dim, random, given.truncation)
        if generator.num_classes is None:
            return (z,)
        choice = torch.tensor(given.labels or range(generator.num_classes))
        return z, choice[torch.randint(len(choice), (count,), generator=random)]

    scores = judge(generator, sampler, seed=given.seed)
    return {"data": Path(given.score).name, "images": judge.samples} | {k: round(v, 4) for k, v in scores.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    given = read_arguments(arguments)
    if not any((given.images, given.strip, given.video, given.attention, given.export, given.score)):
        given.grid = True
    try:
        device = torch.device(given.device)
        generator, card = open_generator(given.model, average=not given.current)
        if given.current and "averaged" in card and card["averaged"]:
            fail("--current: an exported generator has only the weights that were exported")
        check(given, generator)
        generator.to(device)
        written = draw(given, generator, device)
        if given.score:
            card["scores"] = score(given, generator, card["generator"]["image_size"], device)
            print("scores    " + ", ".join(f"{name} {value}" for name, value in card["scores"].items()))
        if given.export:
            save(generator.cpu().state_dict(), card, given.export)
            written += [given.export, given.export.with_suffix(".json")]
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        fail(str(error).splitlines()[0] if str(error) else type(error).__name__)
    for path in written if len(written) <= LISTED else [*written[:1], "…", *written[-LISTED:]]:
        print(path)
    return 0


if __name__ == "__main__":
    script(main)
