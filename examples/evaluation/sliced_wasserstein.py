r"""The sliced Wasserstein distance between two sets of images: how far apart their patches are, scale by scale.

    from evaluation.sliced_wasserstein import sliced_wasserstein
    sliced_wasserstein(real, fake)    # {"64": 8.1, "32": 9.4, "16": 14.0, "mean": 10.5}

Images are split into the bands of a Laplacian pyramid, down to 16 pixels. In each band, 7×7 patches p are normalized
per channel and projected on random unit vectors w, and the distance is the mean over w of the Wasserstein distance of
the two sets of numbers, which in one dimension is the mean difference of the sorted values:

    SWD = 1000 · mean_w mean_i |sort(wᵀ p_real)_i − sort(wᵀ p_fake)_i|

It needs no network and no download. It is sensitive to textures (fine bands), shapes and colors (the last band), but
not to relations between distant positions. For two sets of one distribution it is not 0: compare with two sets of real
images.

Source: Karras et al., arXiv:1710.10196, section 5 (7×7 patches, bands down to 16 pixels, 4 × 128 directions, ×1000).
Departures from their code: 32 patches of an image in each of 4 rounds, not 128 in all rounds, and 4 × 64 directions. A
round's positions are the same for every image, so the order of the images has no effect; another round has other
positions. Both sets are normalized by the mean and deviation of the real one; theirs takes each set's own, and so
cannot see a wrong brightness or contrast. Numbers of different implementations are not comparable, nor are those of
different set sizes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

COARSEST = 16  # pixels, the smallest band
PATCH = 7
PATCHES = 32  # positions in a round
DIRECTIONS = 64  # in a round
ROUNDS = 4
CHUNK = 128  # images at a time
NOTHING = 1e-5  # smaller deviations are rounding errors of a constant channel, which is not normalized

Scale = tuple[Tensor, Tensor]  # mean and standard deviation of each channel, (1, C, 1, 1) both


class Slices(NamedTuple):
    """Projections of the patches of a set of images: a list entry for each band, finest first."""

    sizes: list[int]
    scales: list[Scale]
    projections: list[NDArray[np.float32]]  # (rounds · directions, images · patches), each row sorted


def sliced_wasserstein(real: Tensor, fake: Tensor, *, seed: int = 0) -> dict[str, float]:
    """The distance for each band, under the size of its image in pixels, and their mean.

    Args:
        real, fake: (N, C, H, W) with one shape, C = 1 or 3; uint8, or floating point in [-1, 1].
        seed: fixes patches and directions, and with them the result.

    Raises:
        ValueError: for other shapes or types, and for images below 16 pixels.
    """
    kept = slices(real, seed=seed)
    return distances(kept, slices(fake, like=kept, seed=seed))


def distances(real: Slices, fake: Slices) -> dict[str, float]:
    """The distances of two sets that were sliced with the same seed, the second one with `like` the first."""
    pairs = list(zip(real.projections, fake.projections, strict=True))
    if any(ours.shape != theirs.shape for ours, theirs in pairs):
        counts = [kept.projections[0].shape[1] // PATCHES for kept in (real, fake)]
        raise ValueError(f"expected as many generated images as real ones, got {counts[1]} and {counts[0]}")
    apart = [1000 * float(np.abs(ours - theirs).mean(dtype=np.float64)) for ours, theirs in pairs]
    return {str(size): value for size, value in zip(real.sizes, apart, strict=True)} | {"mean": float(np.mean(apart))}


@torch.no_grad()
def slices(
    images: Tensor, *, like: Slices | None = None, seed: int = 0, device: torch.device | str | None = None
) -> Slices:
    """Sorted projections of the patches of images (N, C, H, W), normalized as those of `like`, or by themselves."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images) or min(images.shape[2:]) < COARSEST:
        raise ValueError(f"expected images (N, 1 or 3, H, W) of {COARSEST} pixels or more, got {tuple(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"expected images as uint8, or as floating point in [-1, 1], got {images.dtype}")
    chunks = [slice(start, start + CHUNK) for start in range(0, len(images), CHUNK)]

    def bands(chunk: slice) -> list[Tensor]:
        part = images[chunk].to(device or images.device)
        return laplacian_pyramid(part.float() / 127.5 - 1 if part.dtype == torch.uint8 else part.float())

    shapes = [band.shape for band in bands(slice(0, 1))]
    sizes = [min(shape[2:]) for shape in shapes]
    if like and like.sizes != sizes:
        raise ValueError(f"expected images of {like.sizes[0]} pixels like the real ones, got {sizes[0]}")
    scales = like.scales if like else channel_scales(map(bands, chunks))
    if scales[0][0].shape[1] != images.shape[1]:
        raise ValueError(f"expected {scales[0][0].shape[1]} channels like the real images, got {images.shape[1]}")
    draws = [draw(seed, level, shape) for level, shape in enumerate(shapes)]
    projections = [np.empty((len(directions), DIRECTIONS, len(images), PATCHES), np.float32) for _, directions in draws]
    for chunk in chunks:
        for band, (mean, deviation), kept, (positions, directions) in zip(
            bands(chunk), scales, projections, draws, strict=True
        ):
            normalized = (band - mean) / deviation  # (n, C, h, w)
            for turn, (corners, vectors) in enumerate(zip(positions, directions, strict=True)):
                projected = patches_at(normalized, corners) @ vectors.to(band)  # (n, patches, directions)
                kept[turn, :, chunk] = projected.permute(2, 0, 1).cpu().numpy()
    rows = [kept.reshape(-1, len(images) * PATCHES) for kept in projections]
    for row in rows:
        row.sort(axis=1)  # numpy's sort of float32 is an order of magnitude faster than torch's on the CPU
    return Slices(sizes, scales, rows)


def laplacian_pyramid(images: Tensor) -> list[Tensor]:
    """Images (N, C, H, W) -> what each halving loses, finest first, and at last the smallest image itself."""
    bands = []
    while min(images.shape[2:]) >= 2 * COARSEST:
        smaller = _blur(images)[:, :, ::2, ::2]  # (N, C, ⌈H / 2⌉, ⌈W / 2⌉)
        spread = torch.zeros_like(images)
        spread[:, :, ::2, ::2] = smaller
        bands.append(images - 4 * _blur(spread))  # (N, C, H, W)
        images = smaller
    return [*bands, images]


def _blur(images: Tensor) -> Tensor:
    """The binomial filter 1 4 6 4 1 in both directions; the image is mirrored at its edges."""
    channels = images.shape[1]
    weights = images.new_tensor([1, 4, 6, 4, 1]) / 16
    kernel = (weights[:, None] * weights).expand(channels, 1, 5, 5)
    return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), kernel, groups=channels)


def channel_scales(chunks: Iterable[list[Tensor]]) -> list[Scale]:
    """Mean and standard deviation of each band's channels, over all images and pixels, from chunk after chunk."""
    counts: dict[int, int] = defaultdict(int)
    sums: dict[int, Tensor] = {}
    for bands in chunks:
        for level, band in enumerate(bands):
            values = band.double().transpose(0, 1).flatten(1)  # (C, N · H · W)
            counts[level] += values.shape[1]
            sums[level] = sums.get(level, 0) + torch.stack([values.sum(1), values.square().sum(1)])  # (2, C)
    scales = []
    for level, (total, squares) in sums.items():
        mean = total / counts[level]  # (C,)
        deviation = (squares / counts[level] - mean**2).clamp(min=0).sqrt()
        deviation = torch.where(deviation > NOTHING, deviation, 1.0)
        scales.append((mean.float().view(1, -1, 1, 1), deviation.float().view(1, -1, 1, 1)))
    return scales


def draw(seed: int, level: int, shape: tuple[int, ...]) -> tuple[NDArray[np.int64], Tensor]:
    """A band's upper left corners of patches (rounds, 2, patches) and unit vectors (rounds, C · 49, directions)."""
    random = np.random.default_rng((seed, level))
    _, channels, height, width = shape
    corners = [random.integers(0, side - PATCH + 1, (ROUNDS, PATCHES)) for side in (height, width)]
    vectors = random.standard_normal((ROUNDS, channels * PATCH**2, DIRECTIONS))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.stack(corners, axis=1), torch.from_numpy(vectors)


def patches_at(band: Tensor, corners: NDArray[Any]) -> Tensor:
    """The patches of a band (N, C, H, W) at corners (2, patches), as vectors: (N, patches, C · 49)."""
    rows, columns = torch.from_numpy(corners).to(band.device)
    windows = band.unfold(2, PATCH, 1).unfold(3, PATCH, 1)[:, :, rows, columns]  # (N, C, patches, 7, 7)
    return windows.transpose(1, 2).flatten(2)  # (N, patches, C · 49)
