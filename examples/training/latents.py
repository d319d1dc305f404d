"""The inputs of a generator: latent vectors, with or without truncation, ways between them, and labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def draw_latents(count: int, z_dim: int, rng: torch.Generator, truncation: float | None = None) -> Tensor:
    """`count` standard normal vectors (count, z_dim); with truncation t their components lie in [-t, t].

    As if components outside were drawn again (Brock et al., arXiv:1809.11096).
    """
    rows = []
    for _ in range(count):  # one by one, so that the first vectors do not depend on the count
        if truncation is None:
            rows.append(torch.randn(z_dim, generator=rng))
        else:
            rows.append(nn.init.trunc_normal_(torch.empty(z_dim), a=-truncation, b=truncation, generator=rng))
    return torch.stack(rows)


def draw_labels(count: int, images_per_class: Sequence[int], rng: torch.Generator) -> Tensor:
    """`count` class numbers, as often as the images of each class: the labels that a generator was trained with.

    Scores and batch statistics depend on the mix of classes, and those of real images are of the real mix.
    """
    return torch.multinomial(torch.tensor(images_per_class).double(), count, replacement=True, generator=rng)


def slerp(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """The points (n, D) at fractions (n,) of the arc from one vector (D,) to another.

    (sin((1 − t) Ω) a + sin(t Ω) b) / sin Ω, with Ω the angle between a and b; a straight line where that is 0 or π.
    (The middle of a straight line would be shorter than the latent vectors that the generator was trained with.)
    """
    share = share[:, None]  # (n, 1)
    cosine = nn.functional.cosine_similarity(start, end, dim=0).clamp(-1, 1)
    angle = torch.arccos(cosine)
    if angle.sin() < 1e-4:
        return torch.lerp(start, end, share)
    return (((1 - share) * angle).sin() * start + (share * angle).sin() * end) / angle.sin()


def walk(stops: Tensor, frames: int, *, closed: bool) -> Tensor:
    """Latent vectors from each of the stops (k, D) toward the next: (legs, frames, D), without the last end point."""
    ends = torch.cat([stops[1:], stops[:1]]) if closed else stops[1:]
    shares = torch.arange(frames) / frames
    return torch.stack([slerp(a, b, shares) for a, b in zip(stops[: len(ends)], ends, strict=True)])
