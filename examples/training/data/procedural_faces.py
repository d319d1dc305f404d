"""Procedural portraits: an endless, aligned set of cartoon faces that needs no download.

Face `index` of `seed` is always the same face, at every size. Five pairs of distant parts have one color each: the two
irises, the two earrings, the two cheeks, the hair and the brows, the headband and the shirt. Nothing near a part shows
which color it should have, so only a model that relates distant positions can draw both alike.

    from training.data.procedural_faces import render, traits
    images = render(traits(64), size=64)        # uint8, (64, 3, 64, 64)

Coordinates run from -1 to 1, x to the right and y downward. Every shape is a signed distance (negative inside), and the
coverage of a pixel follows from its distance to the edge. That is the anti-aliasing, and it works at any size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]  # float32 throughout

EYES = ((38, 92, 235), (22, 158, 62), (146, 76, 18), (160, 50, 205), (226, 36, 44), (20, 190, 205))
EARRINGS = ((250, 205, 30), (60, 220, 190), (245, 90, 170), (70, 110, 245), (240, 240, 245), (240, 95, 30))
BANDS = ((214, 48, 60), (48, 118, 210), (245, 190, 50), (56, 158, 96), (150, 82, 190), (246, 244, 238))
CHEEKS = ((242, 120, 120), (246, 150, 96), (214, 104, 160))
HAIR = ((38, 28, 30), (88, 52, 30), (150, 92, 40), (226, 182, 92), (186, 72, 32), (150, 148, 156))
HAIR_COLORS = ("black", "brown", "chestnut", "blond", "red", "gray")  # in the order of HAIR
SKIN = ((255, 226, 200), (244, 202, 166), (226, 172, 128), (190, 130, 88), (146, 94, 62), (108, 68, 46))

EYE_CENTER = (0.255, 0.04)  # of the right-hand eye before the pose; the other one is its mirror image
WHITE, NIGHT, TEETH = (np.full((1, 3), value, np.float32) for value in (250, 18, 244))
LIPS = np.array([[112, 10, 28]], np.float32)  # added to a share of the skin's color


class Traits(NamedTuple):
    """What distinguishes n faces. Colors are (n, 3) in 0 … 255, everything else (n,)."""

    eyes: Floats
    earrings: Floats
    band: Floats  # and the shirt
    cheeks: Floats
    hair: Floats  # and the brows
    skin: Floats
    sky: Floats  # the background's upper end
    ground: Floats  # its lower end
    width: Floats  # half the head's width
    chin: Floats  # half the head's height
    locks: Floats  # how far down the hair hangs
    fringe: Floats  # where the hair ends on the forehead
    parting: Floats  # to which side the fringe opens
    eye_size: Floats
    gaze: Floats
    brow_lift: Floats
    brow_slope: Floats
    smile: Floats
    mouth_open: Floats
    mouth_width: Floats
    turn: Floats  # how far the features are shifted against the head
    tilt: Floats  # radians
    zoom: Floats
    shift_x: Floats
    shift_y: Floats


def traits(count: int, *, seed: int = 0, first: int = 0) -> Traits:
    """The traits of the faces `first` … `first + count - 1` of the set `seed`."""
    # A counter-based generator with the key (seed, index) draws any face without drawing those before it.
    draws = np.stack(
        [np.random.Generator(np.random.Philox(key=[seed, first + i])).random(32) for i in range(count)]
    ).astype(np.float32)  # (n, 32)
    columns: Iterator[Floats] = iter(draws.T)

    def pick(palette: tuple[tuple[int, int, int], ...]) -> Floats:
        chosen = (next(columns) * len(palette)).astype(int)
        return np.take(np.array(palette, np.float32), chosen, axis=0)

    def between(low: float, high: float) -> Floats:
        return np.float32(low) + np.float32(high - low) * next(columns)

    def pastel() -> Floats:
        hue = 2 * np.pi * next(columns)[:, None] + np.array([0, 2, 4], np.float32) * np.float32(np.pi / 3)
        return (196 + 40 * np.cos(hue)).astype(np.float32)

    def blend(palette: tuple[tuple[int, int, int], ...]) -> Floats:
        position = next(columns) * (len(palette) - 1)  # anywhere between two neighbors of the palette
        left = position.astype(int)
        colors = np.array(palette, np.float32)
        low, high = np.take(colors, left, axis=0), np.take(colors, left + 1, axis=0)
        blended: Floats = low + (position - left)[:, None].astype(np.float32) * (high - low)
        return blended

    return Traits(
        eyes=pick(EYES),
        earrings=pick(EARRINGS),
        band=pick(BANDS),
        cheeks=pick(CHEEKS),
        hair=pick(HAIR),
        skin=blend(SKIN),
        sky=pastel(),
        ground=pastel(),
        width=between(0.5, 0.58),
        chin=between(0.6, 0.68),
        locks=between(-0.1, 0.9),
        fringe=between(-0.36, -0.24),
        parting=between(-0.4, 0.4),
        eye_size=between(0.92, 1.12),
        gaze=between(-0.03, 0.03),
        brow_lift=between(-0.03, 0.03),
        brow_slope=between(-0.2, 0.15),
        smile=between(0.05, 0.2),
        mouth_open=np.maximum(between(-0.1, 0.14), 0),
        mouth_width=between(0.18, 0.26),
        turn=between(-0.04, 0.04),
        tilt=between(-0.07, 0.07),
        zoom=between(0.96, 1.04),
        shift_x=between(-0.03, 0.03),
        shift_y=between(-0.03, 0.03),
    )


def hair_colors(people: Traits) -> NDArray[np.int64]:
    """The number of each face's hair color (n,), its index in `HAIR_COLORS`."""
    same = (people.hair[:, None] == np.array(HAIR, np.float32)).all(2)  # (n, 6)
    numbers: NDArray[np.int64] = same.argmax(1).astype(np.int64)
    return numbers


def render(people: Traits, size: int) -> NDArray[np.uint8]:
    """The faces at size × size pixels: uint8, (n, 3, size, size)."""
    count = len(people.eyes)
    images = np.empty((count, 3, size, size), np.uint8)
    step = max(1, 2**17 // size**2)  # faces at a time: few enough that every intermediate stays in the cache

    def draw(start: int) -> None:
        part = slice(start, start + step)
        images[part] = _draw(Traits(*(trait[part] for trait in people)), size)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy releases the interpreter's lock
        list(pool.map(draw, range(0, count, step)))
    return images


def _draw(people: Traits, size: int) -> NDArray[np.uint8]:
    scalars = {name: value[:, None, None] for name, value in people._asdict().items() if value.ndim == 1}
    face = Traits(**(people._asdict() | scalars))
    axis = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / size) - 1
    # Undo the pose: the face is drawn upright, in its own coordinates x and y (n, size, size).
    left, down = axis[None, None, :] - face.shift_x, axis[None, :, None] - face.shift_y
    cos, sin = np.cos(face.tilt) / face.zoom, np.sin(face.tilt) / face.zoom
    x, y = left * cos + down * sin, down * cos - left * sin
    inner = x - face.turn  # the features' x; its magnitude draws both sides of the face at once
    pair, side = np.abs(inner), np.sign(inner)
    ears = np.abs(x)
    eye_x, eye_y = EYE_CENTER

    blend = (axis[None, None, :, None] + 1) / 2
    canvas = face.sky[:, :, None, None] * (1 - blend) + face.ground[:, :, None, None] * blend
    canvas = np.repeat(canvas, size, axis=3)  # (n, 3, size, size)

    def paint(distance: Floats, color: Floats, opacity: float = 1.0, soft: float = 0.0) -> None:
        edge = np.float32(2 / size + soft)
        cover = np.clip(0.5 - distance / edge, 0, 1) * np.float32(opacity)
        # Most shapes are small: only the rows and columns that the shape touches in some face are blended.
        rows, columns = cover.any((0, 2)).nonzero()[0], cover.any((0, 1)).nonzero()[0]
        if len(rows):
            box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
            patch = canvas[(slice(None), slice(None), *box)]
            patch += cover[(slice(None), None, *box)] * (color[:, :, None, None] - patch)

    # Back to front.
    back = _ellipse(x, y + 0.14, face.width + 0.15, face.chin + 0.1)
    hanging = np.maximum(ears - face.width - 0.11, np.maximum(-0.15 - y, y - face.locks))
    paint(np.minimum(back, hanging), people.hair * np.float32(0.82))
    paint(_ellipse(x, y - 1.18, 0.86, 0.42), people.band)
    paint(np.maximum(ears - 0.2, np.maximum(0.4 - y, y - 0.84)), people.skin * np.float32(0.84))
    paint(_ellipse(ears - face.width, y - 0.1, 0.1, 0.15), people.skin * np.float32(0.92))
    paint(_ellipse(ears - face.width - 0.04, y - 0.35, 0.075, 0.1), people.earrings)
    head = _ellipse(x, y - 0.04, face.width, face.chin)
    paint(head, people.skin)
    paint(_ellipse(pair - 0.34, y - 0.28, 0.13, 0.09), people.cheeks, 0.55, 0.12)

    scalp = _ellipse(x, y + 0.02, face.width + 0.05, face.chin + 0.07)
    paint(np.maximum(scalp, y - face.fringe - 0.9 * (x - face.parting * 0.5) ** 2 + 0.12), people.hair)
    paint(np.maximum(scalp - 0.03, np.abs(y + 0.44 + 0.2 * (1 - x * x)) - 0.06), people.band)

    brow = np.abs(y + 0.2 + face.brow_lift + face.brow_slope * (pair - eye_x) - (pair - eye_x) ** 2 * 2)
    paint(np.maximum(brow - 0.032, np.abs(pair - eye_x) - 0.15), people.hair * np.float32(0.9))

    white = _ellipse(pair - eye_x, y - eye_y, 0.165 * face.eye_size, 0.14 * face.eye_size)
    paint(white, WHITE)
    iris_x, iris_y = pair - eye_x - side * face.gaze, y - eye_y
    paint(np.maximum(_ellipse(iris_x, iris_y, 0.115, 0.125), white), people.eyes)
    paint(_ellipse(iris_x, iris_y, 0.05, 0.055), NIGHT)
    paint(_ellipse(inner - side * eye_x - face.gaze - 0.04, iris_y + 0.045, 0.028, 0.03), WHITE)

    paint(_ellipse(inner, y - 0.24, 0.07, 0.05), people.skin * np.float32(0.76), 1.0, 0.03)
    arch = np.clip(1 - (inner / face.mouth_width) ** 2, 0, 1)  # 1 in the middle of the mouth, 0 at its corners
    lips = y - 0.44 - face.smile * (arch - 0.5)
    corners = np.abs(inner) - face.mouth_width
    low, high = lips - (0.05 + face.mouth_open) * arch, -lips - 0.035 * arch
    paint(np.maximum(corners, np.maximum(low, high)), people.skin * np.float32(0.35) + LIPS)
    inside = np.maximum(low, -lips + 0.012) + 0.022
    paint(np.maximum(corners + 0.03, np.maximum(inside, lips - 0.05)), TEETH)
    return np.clip(canvas + np.float32(0.5), 0, 255).astype(np.uint8)


def _ellipse(x: Floats, y: Floats, rx: Floats | float, ry: Floats | float) -> Floats:
    # f / |grad f| of the implicit ellipse: the distance near the edge, which is all that anti-aliasing looks at.
    u, v = x / rx, y / ry
    slope = 2 * np.sqrt((u / rx) ** 2 + (v / ry) ** 2) + np.float32(1e-6)
    return (u * u + v * v - 1) / slope
