"""``attention_overlay``: color on what the query attends to, and the query marked."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torch_sagan import (
    SAGANGenerator,
    SelfAttention2d,
    attention_overlay,
    mark_queries,
)

# The ramp of colors, from no attention to full level, written down a second time.
VIOLET, ORANGE, YELLOW = torch.tensor([[0.45, 0.08, 0.43], [0.95, 0.45, 0.15], [0.99, 1.0, 0.75]])


def colored(gray: Tensor, levels: Tensor, strength: float = 0.9) -> Tensor:
    """A gray image (1, H, W) under levels (H, W): the ramp's color at each level, as opaque as the level is high."""
    low, high = (2 * levels).clamp(max=1), (2 * levels - 1).clamp(min=0)
    ramp = VIOLET[:, None, None] + low * (ORANGE - VIOLET)[:, None, None] + high * (YELLOW - ORANGE)[:, None, None]
    return gray + strength * levels * (ramp - gray)  # (3, H, W)


def looks_at(batch: int, queries: int, keys: int, query: int, key: int) -> Tensor:
    """An attention map in which one query attends to one key, and every other query to all keys alike."""
    attention = torch.full((batch, queries, keys), 1 / keys)
    attention[:, query] = 0
    attention[:, query, key] = 1
    return attention


def brightness(overlay: Tensor, rows: slice, columns: slice) -> float:
    return float(overlay[..., rows, columns].mean())


def cell(index: int, size: tuple[int, int], image: tuple[int, int]) -> tuple[slice, slice]:
    """The pixels of a feature map's cell, counted row by row."""
    row, column = divmod(index, size[1])
    height, width = image[0] // size[0], image[1] // size[1]
    return slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width)


@given(
    queries=st.sampled_from([(4, 4), (8, 8), (2, 4), (4, 2), (3, 6)]),
    pool=st.sampled_from([1, 2]),
    data=st.data(),
)
def test_light_falls_where_the_query_looks(queries: tuple[int, int], pool: int, data: st.DataObject) -> None:
    keys = (queries[0] // pool, queries[1] // pool)
    image = (queries[0] * 8, queries[1] * 8)
    row, column = data.draw(st.integers(0, image[0] - 1)), data.draw(st.integers(0, image[1] - 1))
    key = data.draw(st.integers(0, keys[0] * keys[1] - 1))
    query = (row // 8) * queries[1] + column // 8
    attention = looks_at(2, queries[0] * queries[1], keys[0] * keys[1], query, key)
    overlay = attention_overlay(
        torch.zeros(2, 3, *image), attention, (row, column), mark=False, query_size=queries, key_size=keys
    )
    assert overlay.shape == (2, 3, *image)
    rows, columns = cell(key, keys, image)
    inside = brightness(overlay, rows, columns)
    if keys[0] * keys[1] > 1:
        for other in range(keys[0] * keys[1]):
            if other != key:
                assert inside > brightness(overlay, *cell(other, keys, image)) + 0.01


def test_rows_are_queries() -> None:
    """Query 5 attends to key 10, and query 10 to all keys alike; with rows and columns exchanged the result differs."""
    attention = looks_at(1, 16, 16, 5, 10)
    image = torch.zeros(1, 3, 32, 32)
    looking = attention_overlay(image, attention, (12, 12), mark=False)  # the cell of query 5
    assert brightness(looking, *cell(10, (4, 4), (32, 32))) > brightness(looking, *cell(5, (4, 4), (32, 32))) + 0.01
    plain = attention_overlay(image, attention, (20, 20), mark=False)  # the cell of query 10
    assert plain.flatten(2).std(2).max() < 1e-5  # evenly lit
    assert looking.flatten(2).std(2).max() > 0.01


@pytest.mark.parametrize(
    ("image", "queries", "keys"),
    [
        ((32, 32), (8, 8), (8, 8)),
        ((32, 32), (8, 8), (4, 4)),
        ((32, 64), (4, 8), (4, 8)),
        ((64, 32), (8, 4), (4, 2)),
        ((28, 28), (7, 7), (3, 3)),
        ((48, 32), (6, 4), (6, 4)),
    ],
)
def test_sizes_are_inferred(image: tuple[int, int], queries: tuple[int, int], keys: tuple[int, int]) -> None:
    n_queries, n_keys = queries[0] * queries[1], keys[0] * keys[1]
    attention = torch.rand(2, n_queries, n_keys).softmax(2)
    images = torch.rand(2, 3, *image) * 2 - 1
    query = (image[0] - 2, 1)
    inferred = attention_overlay(images, attention, query)
    told = attention_overlay(images, attention, query, query_size=queries, key_size=keys)
    assert torch.equal(inferred, told)
    other = attention.clone()
    cell_of_query = (query[0] * queries[0] // image[0]) * queries[1]
    other[:, cell_of_query] = torch.rand(2, n_keys)
    assert not torch.equal(attention_overlay(images, other, query), inferred)


def test_the_aspect_ratio_of_the_image_comes_first() -> None:
    """16 positions of an image four times as wide as high are 2 by 8, though 16 is a square too."""
    attention = torch.rand(1, 16, 16)
    images = torch.rand(1, 3, 8, 32) * 2 - 1
    inferred = attention_overlay(images, attention, (6, 30))
    assert torch.equal(inferred, attention_overlay(images, attention, (6, 30), query_size=(2, 8), key_size=(2, 8)))


@given(
    channels=st.sampled_from([1, 3]),
    batch=st.integers(1, 3),
    scale=st.sampled_from([0.0, 0.3, 1.0]),
    strength=st.sampled_from([0.0, 0.5, 1.0]),
    sharpness=st.sampled_from([0.0, 1.0, 50.0]),
)
def test_range_and_shape(channels: int, batch: int, scale: float, strength: float, sharpness: float) -> None:
    images = scale * torch.randn(batch, channels, 16, 16).clamp(-1, 1)
    attention = (sharpness * torch.randn(batch, 16, 16)).softmax(2)
    overlay = attention_overlay(images, attention, (3, 9), strength=strength)
    assert overlay.shape == (batch, 3, 16, 16)
    assert overlay.dtype == torch.float32
    assert overlay.isfinite().all()
    assert overlay.min() >= 0
    assert overlay.max() <= 1
    assert not overlay.requires_grad


def test_image_shows_through() -> None:
    """White stays brighter than black, left stays left, and a gray image is that of three equal channels."""
    images = -torch.ones(1, 1, 32, 32)
    images[..., :16] = 1
    attention = torch.full((1, 16, 16), 1 / 16)
    overlay = attention_overlay(images, attention, (20, 20), mark=False)
    assert brightness(overlay, slice(None), slice(0, 16)) > brightness(overlay, slice(None), slice(16, 32)) + 0.1
    color = attention_overlay(images.expand(1, 3, 32, 32), attention, (20, 20), mark=False)
    torch.testing.assert_close(overlay, color)


@pytest.mark.parametrize("channels", [1, 3])
def test_strength_zero_is_the_gray_image(channels: int) -> None:
    images = torch.rand(2, channels, 16, 16) * 2 - 1
    overlay = attention_overlay(images, torch.rand(2, 16, 16), (3, 9), strength=0.0, mark=False)
    red, green, blue = ((images + 1) / 2).expand(2, 3, 16, 16).unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    torch.testing.assert_close(overlay, (0.1 + 0.55 * luma).unsqueeze(1).expand(2, 3, 16, 16))


def test_a_uniform_map_is_unremarkable() -> None:
    """Every weight is 1 / M, a quarter of 4 / M: one pale color everywhere."""
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    uniform = torch.full((2, 64, 64), 1 / 64)
    gray = attention_overlay(images, uniform, (5, 5), strength=0.0, mark=False)
    overlay = attention_overlay(images, uniform, (5, 5), mark=False)
    for shown, under in zip(overlay, gray, strict=True):
        torch.testing.assert_close(shown, colored(under[:1], torch.full((32, 32), 0.25)))
    one_hot = attention_overlay(images, looks_at(2, 64, 64, 9, 0), (5, 5), mark=False)
    assert (overlay - gray).abs().max() < 0.25 * (one_hot - gray).abs().max()


def test_one_weight_of_one_is_one_bright_position() -> None:
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    attention = looks_at(1, 64, 64, 0, 27)  # row 3, column 3 of positions that are 8 pixels wide
    gray = attention_overlay(images, attention, (0, 0), strength=0.0, mark=False)[0]
    overlay = attention_overlay(images, attention, (0, 0), mark=False)[0]
    # Bilinearly, a weight falls to 0 where the next positions have their middles, and is above one half inside its own.
    center = overlay[:, 26:30, 26:30]
    torch.testing.assert_close(center, colored(gray[:1, 26:30, 26:30], torch.ones(4, 4)))
    far = torch.ones(64, 64, dtype=torch.bool)
    far[20:36, 20:36] = False
    assert torch.equal(overlay[:, far], gray[:, far])
    assert not torch.isclose(overlay[:, 22:34, 27], gray[:, 22:34, 27]).all(0).any()


def test_levels_are_proportional_up_to_half_of_the_largest_weight() -> None:
    attention = torch.zeros(1, 1, 100)
    attention[0, 0, :5] = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0])
    overlay = attention_overlay(
        -torch.ones(1, 1, 10, 10), attention, (0, 0), query_size=(1, 1), key_size=(10, 10), mark=False
    )[0]  # one pixel for each key: nothing is interpolated
    expected = colored(torch.full((1, 1, 5), 0.1), torch.tensor([[1.0, 1.0, 1.0, 0.5, 0.0]]))
    torch.testing.assert_close(overlay[:, :1, :5], expected)


def test_strength() -> None:
    images = torch.zeros(1, 3, 32, 32)
    attention = looks_at(1, 16, 16, 0, 15)
    contrast = []
    for strength in (0.2, 0.5, 0.9):
        overlay = attention_overlay(images, attention, (1, 1), strength=strength, mark=False)
        contrast.append(
            brightness(overlay, *cell(15, (4, 4), (32, 32))) - brightness(overlay, *cell(3, (4, 4), (32, 32)))
        )
    assert contrast[0] < contrast[1] < contrast[2]


@pytest.mark.parametrize("query", [(0, 0), (80, 20), (127, 127), (10, 120)])
def test_the_mark_is_a_ring_around_the_query_and_a_frame(query: tuple[int, int]) -> None:
    images = torch.rand(2, 3, 128, 128) * 2 - 1
    attention = torch.rand(2, 64, 64).softmax(2)
    marked = attention_overlay(images, attention, query)
    bare = attention_overlay(images, attention, query, mark=False)
    assert torch.equal(marked, attention_overlay(images, attention, query, mark=True))
    green = torch.tensor([0.1, 1.0, 0.2])
    inside = slice(2, -2)
    for border in (marked[:, :, :2], marked[:, :, -2:], marked[..., :2], marked[..., -2:]):
        assert torch.equal(border, green[:, None, None].expand_as(border))
    changed = (marked != bare).any(1).any(0)
    changed[:2], changed[-2:], changed[:, :2], changed[:, -2:] = False, False, False, False
    rows, columns = changed.nonzero(as_tuple=True)
    assert len(rows) > 0
    distance = torch.hypot((rows - query[0]).float(), (columns - query[1]).float())
    assert distance.max() < 8
    assert distance.min() > 2  # the position itself stays visible
    row, column = query
    if row + 5 in range(*inside.indices(128)):  # 5 pixels from the query is the middle of the stroke
        assert torch.equal(marked[:, :, row + 5, column], green.expand(2, 3))


def test_each_image_has_its_own_map() -> None:
    attention = torch.cat([looks_at(1, 16, 16, 0, 3), looks_at(1, 16, 16, 0, 12)])
    overlay = attention_overlay(torch.zeros(2, 3, 32, 32), attention, (0, 0), mark=False)
    right, left = cell(3, (4, 4), (32, 32)), cell(12, (4, 4), (32, 32))
    assert brightness(overlay[0], *right) > brightness(overlay[0], *left) + 0.01
    assert brightness(overlay[1], *left) > brightness(overlay[1], *right) + 0.01


def test_inputs_are_not_changed() -> None:
    images, attention = torch.rand(1, 3, 16, 16), torch.rand(1, 16, 16)
    before = images.clone(), attention.clone()
    attention_overlay(images, attention, (0, 0))
    assert torch.equal(images, before[0])
    assert torch.equal(attention, before[1])


def test_maps_of_a_network() -> None:
    network = SAGANGenerator(32, base_channels=8, attention=SelfAttention2d.official)
    images, maps = network(torch.randn(2, 128), return_attention=True)
    assert attention_overlay(images, maps[0], (31, 0)).shape == (2, 3, 32, 32)


# --- several queries -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [False, True])
def test_several_queries_are_each_one_of_them(mark: bool) -> None:
    images = torch.rand(2, 3, 48, 64) * 2 - 1
    attention = torch.randn(2, 12 * 16, 6 * 8).softmax(2)
    queries = [(1, 2), (47, 63), (20, 30)]
    overlay = attention_overlay(images, attention, queries, mark=mark)
    assert overlay.shape == (2, 3, 3, 48, 64)
    for i, query in enumerate(queries):
        alone = attention_overlay(images, attention, query, mark=mark)
        differ = (overlay[:, i] != alone).any(1).any(0)
        assert not differ.any() or (mark and i > 0)  # only the color of ring and frame may differ
        near = torch.hypot(torch.arange(48.0)[:, None] - query[0], torch.arange(64.0) - query[1]) < 4
        near[0], near[-1], near[:, 0], near[:, -1] = True, True, True, True
        assert not (differ & ~near).any()


def test_a_sequence_of_one_stays_a_sequence() -> None:
    images, attention = torch.zeros(2, 1, 16, 16), torch.rand(2, 16, 16)
    one, alone = attention_overlay(images, attention, [(3, 4)]), attention_overlay(images, attention, (3, 4))
    assert one.shape == (2, 1, 3, 16, 16)
    assert torch.equal(one[:, 0], alone)


def test_queries_may_be_lists_and_tensors() -> None:
    images, attention = torch.rand(1, 3, 16, 16), torch.rand(1, 16, 16)
    expected = attention_overlay(images, attention, [(3, 4), (9, 15)])
    for queries in ([[3, 4], [9, 15]], torch.tensor([[3, 4], [9, 15]]), ((3, 4), (9, 15))):
        assert torch.equal(attention_overlay(images, attention, queries), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(128, 128), (64, 96), (32, 48)])
def test_marks_have_colors_of_their_own(size: tuple[int, int]) -> None:
    """Every ring is around its query, in another color than the rest; the image is unchanged elsewhere."""
    height, width = size
    images = torch.rand(2, 3, height, width) * 2 - 1
    unit = max(1.0, min(size) / 64)
    radius = round(2.6 * unit)
    queries = [(0, 0), (height - 1, 0), (0, width - 1), (height - 1, width - 1), (height // 2, width // 2)]
    marked = mark_queries(images, queries)
    assert marked.shape == images.shape
    assert marked.min() >= 0
    assert marked.max() <= 1
    beside = [(row, column + (radius if column == 0 else -radius)) for row, column in queries]
    colors = torch.stack([marked[0, :, row, column] for row, column in beside])  # (5, 3)
    assert torch.cdist(colors, colors)[~torch.eye(5, dtype=torch.bool)].min() > 0.3
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    far = torch.ones(height, width, dtype=torch.bool)
    for row, column in queries:
        far &= torch.hypot((rows - row).float(), (columns - column).float()) > radius + unit + 0.5  # half a pixel fades
    torch.testing.assert_close(marked[:, :, far], ((images + 1) / 2)[:, :, far])
    assert torch.equal(marked[..., height // 2, width // 2], ((images + 1) / 2)[..., height // 2, width // 2])


@pytest.mark.parametrize("size", [(16, 16), (7, 5), (1, 1)])
def test_marks_of_tiny_images(size: tuple[int, int]) -> None:
    images = -torch.ones(1, 1, *size)
    overlay = attention_overlay(images, torch.ones(1, 1, 1), (0, 0), query_size=(1, 1), key_size=(1, 1))
    for drawn in (mark_queries(images, [(0, 0), (size[0] - 1, size[1] - 1)]), overlay):
        assert drawn.isfinite().all()
        assert drawn.min() >= 0
        assert drawn.max() <= 1
    assert torch.equal(overlay[0, :, -1, -1], torch.tensor([0.1, 1.0, 0.2]))  # the frame


def test_marks_and_overlays_use_the_same_colors() -> None:
    images, attention = torch.rand(1, 1, 128, 128) * 2 - 1, torch.rand(1, 64, 64)
    queries = [(16, 16), (16, 80), (80, 16), (80, 80), (110, 110), (40, 100)]
    marked, overlays = mark_queries(images, queries), attention_overlay(images, attention, queries)
    assert marked.shape == (1, 3, 128, 128)
    for i, (row, column) in enumerate(queries):
        assert torch.equal(overlays[:, i, :, row, column + 5], marked[:, :, row, column + 5])
        assert torch.equal(overlays[:, i, :, 0, 0], marked[:, :, row, column + 5])
        bare = attention_overlay(images, attention, (row, column), mark=False)
        for y, x in queries:  # each overlay has its own mark alone
            if (y, x) != (row, column):
                assert torch.equal(overlays[:, i, :, y, x + 5], bare[:, :, y, x + 5])
    assert torch.equal(mark_queries(images, (8, 8)), mark_queries(images, [(8, 8)]))


def test_marking_does_not_change_the_images() -> None:
    images = torch.rand(1, 3, 16, 16)
    before = images.clone()
    mark_queries(images, [(1, 1), (9, 9)])
    assert torch.equal(images, before)


# --- pooled keys -----------------------------------------------------------------------------------------------------


def stretched(
    keys: list[list[float]], queries: tuple[int, int], pool: int, image: tuple[int, int]
) -> list[list[float]]:
    """Pooled weights over the image, pixel by pixel: the bilinear mixture of the nearest keys, 0 where none lies."""
    n_rows, n_columns = len(keys), len(keys[0])

    def along(pixel: int, n_pixels: int, n_cells: int, n_keys: int) -> list[tuple[int, float]]:
        cell = (pixel + 0.5) * n_cells / n_pixels  # in cells of the queries' map
        if cell > n_keys * pool:
            return []
        key = min(max(cell / pool - 0.5, 0.0), n_keys - 1.0)  # 0 in the middle of the first key
        low = min(int(key), max(n_keys - 2, 0))
        return [(low, 1 - (key - low)), (min(low + 1, n_keys - 1), key - low)]

    return [
        [
            sum(
                u * v * keys[i][j]
                for i, u in along(row, image[0], queries[0], n_rows)
                for j, v in along(column, image[1], queries[1], n_columns)
            )
            for column in range(image[1])
        ]
        for row in range(image[0])
    ]


@pytest.mark.parametrize(
    ("queries", "pool", "image"),
    [
        ((7, 7), 2, (28, 28)),
        ((7, 7), 2, (70, 7)),
        ((7, 9), 2, (28, 72)),
        ((11, 8), 3, (44, 32)),
        ((6, 4), 2, (24, 16)),
        ((5, 3), 1, (20, 12)),
        ((2, 9), 2, (16, 36)),
    ],
)
def test_pooled_keys_lie_where_they_were_pooled(queries: tuple[int, int], pool: int, image: tuple[int, int]) -> None:
    keys = (queries[0] // pool, queries[1] // pool)
    attention = torch.randn(2, queries[0] * queries[1], keys[0] * keys[1]).mul(2).softmax(2)
    row, column = image[0] - 1, image[1] // 2
    position = (queries[0] - 1) * queries[1] + column * queries[1] // image[1]
    overlay = attention_overlay(
        -torch.ones(2, 3, *image), attention, (row, column), mark=False, query_size=queries, key_size=keys
    )
    for sample in range(2):
        weights = torch.tensor(stretched(attention[sample, position].view(keys).tolist(), queries, pool, image))
        scale = max(float(attention[sample, position].max()) / 2, 4 / (keys[0] * keys[1]))
        expected = colored(torch.full((1, *image), 0.1), (weights / scale).clamp(max=1))
        torch.testing.assert_close(overlay[sample], expected, rtol=0, atol=1e-4)  # interpolation in float32


def test_nothing_is_seen_beyond_the_last_pooled_key() -> None:
    attention = looks_at(1, 49, 9, 0, 8)  # the last of 3×3 keys, which ends one cell before the border
    overlay = attention_overlay(-torch.ones(1, 3, 28, 28), attention, (0, 0), mark=False)
    assert torch.equal(overlay[..., 24:, :], torch.full((1, 3, 4, 28), 0.1))  # the gray of black
    assert torch.equal(overlay[..., :, 24:], torch.full((1, 3, 28, 4), 0.1))
    assert overlay[..., 22, 22].max() > 0.5


def test_keys_that_are_not_pooled_queries_cover_the_image() -> None:
    """7×7 queries and 4×4 keys: no pooling drops less than it keeps here, so the keys reach the border."""
    overlay = attention_overlay(-torch.ones(1, 3, 28, 28), looks_at(1, 49, 16, 0, 15), (0, 0), mark=False)
    assert overlay[..., 27, 27].max() > 0.5


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ([], r"got \[\]"),
        ((1, 2, 3), r"\(1, 2, 3\)"),
        ([(1, 2), (3,)], r"whole pixels"),
        ((0.5, 0.5), r"0\.5"),
        ([(1, 2), (16, 0)], r"\(16, 0\).*16×16"),
        ("12", r"12"),
        (3, r"got 3"),
    ],
)
def test_wrong_queries(queries: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_overlay(torch.zeros(1, 3, 16, 16), torch.ones(1, 16, 16), queries)
    with pytest.raises(ValueError, match=message):
        mark_queries(torch.zeros(1, 3, 16, 16), queries)


def test_a_list_of_maps_is_no_map() -> None:
    with pytest.raises(ValueError, match="got a list"):
        attention_overlay(torch.zeros(1, 3, 16, 16), [torch.ones(1, 16, 16)], (0, 0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1, 2, 8, 8"):
        mark_queries(torch.zeros(1, 2, 8, 8), (0, 0))


def test_images_of_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"floating point in \[-1, 1\], got torch.uint8"):
        mark_queries(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), (0, 0))


@pytest.mark.parametrize(
    ("images", "attention", "arguments", "message"),
    [
        ((2, 2, 16, 16), (2, 16, 16), {}, r"2, 2, 16, 16"),
        ((3, 16, 16), (2, 16, 16), {}, r"3, 16, 16"),
        ((2, 3, 16, 16), (16, 16), {}, r"16, 16"),
        ((2, 3, 16, 16), (3, 16, 16), {}, r"3"),
        ((2, 3, 16, 16), (2, 16, 16), {"query": (16, 0)}, r"16"),
        ((2, 3, 16, 16), (2, 16, 16), {"query": (0, -1)}, r"-1"),
        ((2, 3, 16, 16), (2, 17, 16), {}, r"17"),
        ((2, 3, 16, 16), (2, 16, 13), {}, r"13"),
        ((2, 3, 16, 16), (2, 16, 16), {"query_size": (3, 5)}, r"3.*5|16"),
        ((2, 3, 16, 16), (2, 16, 16), {"key_size": (3, 5)}, r"3.*5|16"),
    ],
)
def test_errors(images: tuple[int, ...], attention: tuple[int, ...], arguments: dict[str, Any], message: str) -> None:
    arguments = {"query": (0, 0), **arguments}
    with pytest.raises(ValueError, match=message):
        attention_overlay(torch.zeros(images), torch.ones(attention), **arguments)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1])
def test_what_is_not_a_weight_or_a_pixel_is_refused(value: float) -> None:
    """As after training that diverged; it would be drawn in some color. Only the query's own row is looked at."""
    images, attention = torch.zeros(1, 3, 8, 8), torch.full((1, 4, 4), 0.25)
    attention[0, 3, 2] = value
    assert attention_overlay(images, attention, (0, 0)).isfinite().all()
    with pytest.raises(ValueError, match="attention weights must be finite and not negative"):
        attention_overlay(images, attention, [(0, 0), (7, 7)])
    if value < 0:
        return
    images[0, 1, 2, 3] = value
    for draw in (lambda: attention_overlay(images, attention, (0, 0)), lambda: mark_queries(images, (0, 0))):
        with pytest.raises(ValueError, match=r"expected images in \[-1, 1\], got some that are not finite"):
            draw()
