"""Query positions that show what an attention layer does, whatever the images are of.

They are chosen by the attention itself: positions that attend to different things. An eye or a mouth would be at the
same place in faces alone. They are some way apart, so that their marks do not cover each other.
"""

from __future__ import annotations

import math

import torch

from torch_sagan import AttentionRecord

COUNT = 4


def telling_queries(record: AttentionRecord, count: int = COUNT) -> list[tuple[float, float]]:
    """`count` positions (row, column), as fractions of the image, whose attention differs most from that of each other.

    The first attends least evenly: its mean attention over the images has the lowest entropy. Each further one is that
    whose mean attention has the largest total variation distance from the nearest one of those chosen before, of the
    positions that are a fifth of the image's larger side away from them, as long as there are any. A map with fewer
    positions gives all of them.
    """
    mean = record.attention.float().mean(0)  # (N, M)
    height, width = record.query_size
    places = torch.stack([torch.arange(height * width) // width, torch.arange(height * width) % width], 1)  # (N, 2)
    chosen = [int(torch.special.entr(mean).sum(1).argmin())]
    nearest, away = torch.full((len(mean),), math.inf), torch.full((len(mean),), math.inf)  # (N,) both
    while len(chosen) < min(count, len(mean)):
        last = chosen[-1]
        nearest = torch.minimum(nearest, (mean - mean[last]).abs().sum(1).cpu() / 2)
        away = torch.minimum(away, (places - places[last]).abs().amax(1))
        allowed = away >= max(height, width) / 5
        candidates = (allowed if allowed.any() else away > 0).nonzero()[:, 0]
        chosen.append(int(candidates[nearest[candidates].argmax()]))
    return [((i // width + 0.5) / height, (i % width + 0.5) / width) for i in chosen]
