"""The images that a run writes: sample grids and attention maps, always from the same latent vectors."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from torch_sagan import SAGANGenerator, record_attention
from training.average import recalibrated
from training.data.dataset import ImageSet
from training.data.sources import InfiniteBatchSampler
from training.output.image_io import save_attention, save_explorer, save_grid
from training.output.query_points import telling_queries
from training.script import fail
from training.state import TrainingState

COLUMNS = 8
CLASSES_SHOWN = 16  # at most so many rows in a grid with classes


def sample_inputs(state: TrainingState) -> tuple[Tensor, Tensor | None]:
    """The latent vectors of a grid of 8 × 8; with classes a row for each class, all with the same 8 vectors."""
    fixed = torch.Generator().manual_seed(state.config.seed + 2)  # drawing does not change the training
    z = torch.randn(COLUMNS**2, state.config.z_dim, generator=fixed).to(state.device)  # (64, z_dim)
    if not state.classes:
        return z, None
    count = min(len(state.classes), CLASSES_SHOWN)
    shown = torch.arange(count, device=state.device) * len(state.classes) // count  # spread over all classes
    return z[:COLUMNS].repeat(count, 1), shown.repeat_interleave(COLUMNS)


def image_paths(state: TrainingState, out: Path) -> dict[str, Path]:
    """The files that `draw` writes at this step."""
    names = {"samples": "samples-{:06d}.png"}
    if state.average.attention:
        names["attention"] = "attention-{:06d}.png"
        if state.step >= state.config.steps:  # only at the end, since a page takes megabytes
            names["explorer"] = "attention-{:06d}.html"
    return {kind: out / name.format(state.step) for kind, name in names.items()}


def usable_average(state: TrainingState) -> SAGANGenerator:
    """The averaged generator with the sigmas and batch statistics of its own weights; the run ends if they diverged."""
    if not all(weight.isfinite().all() for weight in state.average.parameters()):
        fail(f"step {state.step}: training has diverged, the averaged generator holds infinities or NaN")
    return recalibrated(state.average, list(state.classes.values()))


@torch.no_grad()
def draw(state: TrainingState, out: Path) -> dict[str, Path]:
    """Write samples of the averaged generator and its last layer's attention; at the end, a page with all layers."""
    generator, paths = usable_average(state), image_paths(state, out)
    z, labels = sample_inputs(state)
    parts = zip(z.split(16), [None] * len(z) if labels is None else labels.split(16), strict=False)
    classes = list(state.classes)
    rows = [] if labels is None else [classes[label] for label in labels[::COLUMNS].tolist()]
    save_grid(paths["samples"], torch.cat([generator(*part) for part in parts]), COLUMNS, rows)
    if "attention" in paths:
        shown = slice(0, 6 * COLUMNS, COLUMNS) if state.classes else slice(6)  # of different classes
        with record_attention(generator) as records:
            images = generator(z[shown], None if labels is None else labels[shown])  # (6, C, S, S)
        *_, (last,) = records.values()
        save_attention(paths["attention"], images, last, telling_queries(last), rows[:6])
        if "explorer" in paths:
            save_explorer(paths["explorer"], images, records)
    return paths


def redraw(state: TrainingState, out: Path) -> None:
    """Write the images of the step at which a run is resumed, if it was killed before it had drawn them."""
    due = state.step % state.config.sample_every == 0 or state.step >= state.config.steps
    if due and not all(path.exists() for path in image_paths(state, out).values()):
        draw(state, out)


def save_reals(data: ImageSet, seed: int, path: Path) -> None:
    """Write a grid of the run's first images as the discriminator sees them: cropped, resized, mirrored."""
    order = InfiniteBatchSampler(len(data), min(64, len(data)), seed=seed, flip=data.flip)
    images = data[next(iter(order))].images  # (64, C, S, S); unreadable files are reported when the training reads them
    save_grid(path, images / 127.5 - 1, columns=COLUMNS)
