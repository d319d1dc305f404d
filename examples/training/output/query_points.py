"""Query positions that show what an attention layer does, whatever the images are of.

They are chosen by the attention itself: positions that attend to different things. An eye or a mouth would be at the
same place in faces alone.
"""

from __future__ import annotations

import torch

from torch_sagan import AttentionRecord

COUNT = 4


def telling_queries(record: AttentionRecord, count: int = COUNT) -> list[tuple[float, float]]:
    """`count` positions (row, column), as fractions of the image, whose attention differs most from that of each other.

    The first attends least evenly: its mean attention over the images has the lowest entropy. Each further one is that
    whose mean attention has the largest total variation distance from the nearest one of those chosen before. A map
    with fewer positions gives all of them.
    """
    mean = record.attention.float().mean(0)  # (N, M)
    height, width = record.query_size
    chosen = [int(torch.special.entr(mean).sum(1).argmin())]
    nearest = _distance(mean, chosen[0])  # (N,)
    while len(chosen) < min(count, len(mean)):
        nearest[chosen] = -1  # where all attend to the same, every position still comes once
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, _distance(mean, chosen[-1]))
    return [((i // width + 0.5) / height, (i % width + 0.5) / width) for i in chosen]


def _distance(mean: torch.Tensor, query: int) -> torch.Tensor:
    """The total variation distance (N,) between the attention of each position and that of one."""
    return (mean - mean[query]).abs().sum(1) / 2
