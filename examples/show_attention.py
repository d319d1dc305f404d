"""Draw what a trained generator attends to, as a figure and as an interactive page.

    python examples/show_attention.py runs/faces                        # the checkpoint of that run
    python examples/show_attention.py runs/faces/checkpoint.pt --query 33,24 --query 0.92,0.5 --samples 6 --seed 3

The figure shows samples with query positions on them, and beside each sample what the positions attend to, framed in
their colors. The page, an HTML file beside it, shows what any position attends to, in every layer.
"""

from __future__ import annotations

import training.threads  # noqa: F401  before torch  # isort: skip

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch

from torch_sagan import record_attention
from training.data.labels import parse_labels
from training.output.image_io import save_attention, save_explorer
from training.output.model_card import open_generator, output_folder
from training.output.query_points import COUNT, telling_queries
from training.script import Parser, fail, given_path, script


def fraction(text: str, size: int) -> float:
    """A coordinate as a fraction of the image: 0.5 is a fraction already, 12 means the middle of pixel 12."""
    value = float(text) if "." in text else (int(text) + 0.5) / size
    if not 0 <= value < 1:
        raise ValueError
    return value


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(usage="%(prog)s MODEL [options]", description="Draw what a generator attends to.")
    parser.add_argument("model", type=given_path, help="a run's folder, a checkpoint, or a .safetensors file")
    parser.add_argument(
        "--query", metavar="ROW,COLUMN", action="append",
        help="a query position: pixels (33,24) or fractions of the image (0.52,0.37), from its upper left corner; "
        f"repeat for more (default: {COUNT} positions that attend to different things)",
    )  # fmt: skip
    parser.add_argument("--layer", help="the attention layer of the figure (default: the last one)")
    parser.add_argument("--samples", type=int, default=4, help="images, one row each (default: %(default)s)")
    parser.add_argument(
        "--labels", metavar="CLASSES", help="in turn, by name or number, such as cat,dog or 0,3 (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="fixes the latent vectors (default: %(default)s)")
    parser.add_argument(
        "--out", type=given_path,
        help="the figure, or a folder for attention.png; the page has its name with .html (default: "
        "generated/attention.png in the run's folder, or in runs/ without a run)",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    if given.samples < 1:
        parser.error(f"--samples must be at least 1, got {given.samples}")
    out: Path = given.out or output_folder(given.model) / "attention.png"
    figure = out / "attention.png" if out.is_dir() else out
    if not figure.suffix:
        parser.error(f"--out {figure}: expected a folder that exists, or a file such as attention.png")
    try:
        generator, card = open_generator(given.model)
        z = torch.randn(given.samples, generator.z_dim, generator=torch.Generator().manual_seed(given.seed))
        count = generator.num_classes or 0
        if given.labels is not None and not count:
            parser.error("--labels: this generator has no classes")
        names = list(card["classes"]) or [str(number) for number in range(count)]
        chosen = parse_labels(given.labels, names, count) if given.labels is not None else range(count)
        labels = torch.tensor(list(itertools.islice(itertools.cycle(chosen), given.samples)))  # (B,), or none
        with record_attention(generator) as records, torch.no_grad():
            images = generator(z, labels if len(labels) else None)  # (B, C, S, S)
        # Which includes that of its maps, whose layers are below the images.
        if not images.isfinite().all():
            raise ValueError(f"{given.model}: its images hold infinities or NaN: the training has diverged")
    except ValueError as error:
        parser.error(str(error))

    layer = given.layer or list(records)[-1]
    if layer not in records:
        parser.error(f"--layer {layer}: this generator has {', '.join(records)}")
    size, positions = images.shape[2], [] if given.query else telling_queries(records[layer][0])
    for query in given.query or ():
        try:
            row, column = (fraction(text, size) for text in query.split(","))
        except ValueError:
            parser.error(f"--query {query}: expected pixels from 0,0 to {size - 1},{size - 1}, or fractions below 1")
        positions.append((row, column))
    page = figure.with_suffix(".html")
    try:
        rows = [names[label] for label in labels.tolist()]
        save_attention(figure, images, records[layer][0], positions, rows)
        explored = save_explorer(page, images, records)
    except (ValueError, OSError) as error:
        fail(f"--out {figure}: {error}")
    print(f"figure    {figure}: {layer} of {given.samples} samples")
    print(f"explorer  {page}: {', '.join(records)} of {explored} samples")


if __name__ == "__main__":
    script(main)
