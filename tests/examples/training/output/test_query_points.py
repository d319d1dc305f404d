"""The query positions of a figure are those that attend to different things, wherever these are in the images."""

import math

import pytest
import torch

from torch_sagan import AttentionRecord
from training.output.query_points import telling_queries


def record(attention: torch.Tensor, height: int, width: int) -> AttentionRecord:
    """A record of maps (B, N, M) whose keys are not pooled."""
    return AttentionRecord(attention, (height, width), (height, width))


def test_positions_that_attend_to_other_things_are_chosen_where_they_are() -> None:
    height, width = 4, 6
    maps = torch.full((2, 24, 24), 1 / 24)
    for query, key in ((1, 0), (13, 23), (22, 5)):  # the others attend to everything
        maps[:, query] = torch.eye(24)[key]
    chosen = {(int(row * height), int(column * width)) for row, column in telling_queries(record(maps, height, width))}
    assert {(0, 1), (2, 1), (3, 4)} < chosen
    assert len(chosen) == 4


def test_the_first_is_the_most_concentrated() -> None:
    maps = torch.full((1, 4, 4), 0.25)
    maps[0, 2] = torch.tensor([0.7, 0.1, 0.1, 0.1])
    maps[0, 3] = torch.tensor([0.5, 0.5, 0.0, 0.0])  # log 2 = 0.69 nats, against 0.94
    assert telling_queries(record(maps, 2, 2), 1) == [(0.75, 0.75)]


def test_images_count_together() -> None:
    maps = torch.full((2, 4, 4), 0.25)
    maps[0, 1], maps[1, 1] = torch.eye(4)[0], torch.eye(4)[3]  # in the mean half of each: 0.69 nats
    maps[:, 2] = torch.tensor([0.85, 0.05, 0.05, 0.05])  # 0.59
    assert telling_queries(record(maps, 2, 2), 1) == [(0.75, 0.25)]


def test_positions_are_apart_so_that_their_marks_are_seen() -> None:
    """All that attends to something of its own is a block of 3×3 in a map of 16×16."""
    maps = torch.full((1, 256, 256), 1 / 256)
    for row in range(3):
        for column in range(3):
            maps[0, 16 * (5 + row) + 6 + column] = torch.eye(256)[3 * row + column]
    places = [(row * 16, column * 16) for row, column in telling_queries(record(maps, 16, 16))]
    apart = [max(abs(a - c), abs(b - d)) for i, (a, b) in enumerate(places) for c, d in places[:i]]
    assert len(apart) == 6
    assert min(apart) >= 3.2
    assert sum(5 < row < 8 and 6 < column < 9 for row, column in places) == 1


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 3), (5, 5)])
def test_equal_attention_still_gives_different_positions(height: int, width: int) -> None:
    n = height * width
    queries = telling_queries(record(torch.full((3, n, n), 1 / n), height, width))
    assert len(set(queries)) == len(queries) == min(4, n)
    assert all(0 < value < 1 and math.isfinite(value) for query in queries for value in query)
