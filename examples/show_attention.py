"""Where a trained generator looks: samples with query points on them, and beside them one map for each point.

    python examples/show_attention.py runs/faces                        # the checkpoint of that run
    python examples/show_attention.py runs/faces/checkpoint.pt --query 33,24 --query 0.92,0.5 --samples 6 --seed 3

As in the figure of the paper, the colour of a point says which map is its own: they stand in the order of the points.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch

from command_line import Parser
from model_card import open_generator
from pictures import save_attention
from torch_sagan import record_attention

PLACES = ["0.52,0.37", "0.73,0.5", "0.15,0.5", "0.06,0.06"]  # an eye, the mouth, the hair, the background of a face


def fraction(text: str, size: int) -> float:
    """A coordinate as a fraction of the image: 0.5 is one already, 12 is the middle of a pixel."""
    value = float(text) if "." in text else (int(text) + 0.5) / size
    if not 0 <= value < 1:
        raise ValueError
    return value


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("show_attention.py", "%(prog)s MODEL [options]", description="Draw where a generator looks.")
    parser.add_argument("model", type=Path, help="a run's folder, a checkpoint of the trainer, or a .safetensors file")
    parser.add_argument(
        "--query", metavar="ROW,COLUMN", action="append",
        help="a point that looks: pixels (33,24) or fractions of the image (0.52,0.37), from its upper left corner; "
        f"repeat for more (default: {' '.join(PLACES)})",
    )  # fmt: skip
    parser.add_argument("--layer", help="an attention layer of the generator (default: the last one)")
    parser.add_argument("--samples", type=int, default=4, help="images, one row each (default: %(default)s)")
    parser.add_argument("--labels", type=int, nargs="+", help="classes in turn, if there are any (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="fixes the latent vectors (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/attention.png"), help="default: %(default)s")
    given = parser.parse_args(arguments)
    if given.samples < 1:
        parser.error(f"--samples must be at least 1, got {given.samples}")
    try:
        generator, _ = open_generator(given.model)
        z = torch.randn(given.samples, generator.z_dim, generator=torch.Generator().manual_seed(given.seed))
        classes = itertools.cycle(given.labels or range(generator.num_classes or 0))
        labels = torch.tensor(list(itertools.islice(classes, given.samples)))  # (B,), or none
        with record_attention(generator) as records, torch.no_grad():
            images = generator(z, labels if len(labels) else None)  # (B, C, S, S)
    except ValueError as error:
        parser.error(str(error))

    layer = given.layer or list(records)[-1]
    if layer not in records:
        parser.error(f"--layer {layer}: this generator has {', '.join(records)}")
    size, places = images.shape[2], []
    for query in given.query or PLACES:
        try:
            row, column = (fraction(text, size) for text in query.split(","))
        except ValueError:
            parser.error(f"--query {query}: expected pixels from 0,0 to {size - 1},{size - 1}, or fractions below 1")
        places.append((row, column))
    try:
        save_attention(given.out, images, records[layer][0], places)
    except (ValueError, OSError) as error:
        raise SystemExit(f"show_attention.py: --out {given.out}: {error}") from None
    print(f"{layer} of {given.samples} samples: {given.out}")


if __name__ == "__main__":
    main()
