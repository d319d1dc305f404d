"""Attention maps as an HTML page, on which the pointer chooses the query position."""

from __future__ import annotations

import base64
import ctypes
import html
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_sagan.attention.layer import AttentionRecord
from torch_sagan.maps.overlay import MARKS, RAMP, check_images, check_weights, drawn_size, keys_extent, map_size

__all__ = ["AttentionExplorer", "explore_attention"]

Records = Mapping[str, Sequence[AttentionRecord]] | Sequence[Tensor | AttentionRecord]


class AttentionExplorer:
    """A page that :func:`explore_attention` made. A notebook shows it where it is the value of a cell.

    Attributes:
        page: the whole HTML document.
    """

    def __init__(self, page: str) -> None:
        self.page = page

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page to one file, completely or not at all. It needs no other file and no network."""
        path = Path(path)
        with tempfile.TemporaryDirectory(prefix=".explorer-", dir=path.parent) as folder:
            partial = Path(folder) / "page.html"
            partial.write_text(self.page, encoding="utf-8", newline="\n")
            os.replace(partial, path)

    def _repr_html_(self) -> str:
        # A frame of its own keeps the page's scripts and styles apart from the notebook's.
        return (
            '<iframe title="Attention explorer" sandbox="allow-scripts" style="width: 100%; height: 800px; border: 0" '
            f'srcdoc="{html.escape(self.page)}"></iframe>'
        )


@torch.no_grad()
def explore_attention(images: Tensor, records: Records, *, max_bytes: int = 32_000_000) -> AttentionExplorer:
    """A page that shows what the position under the pointer attends to, for several images and layers.

    Pointer, touch and arrow keys choose a query position; its attention map is drawn as :func:`attention_overlay` draws
    it, position by position. A click pins it, so that several can be compared. The page can also show which positions
    attend to the chosen one, or the entropy or the mean attention distance of every position. The address of a saved
    page stores the view: ``#image=2&layer=1&query=14,9&mode=from`` is ``images[2]``, the second layer, row 14 and
    column 9 of its feature map; ``mode`` is ``from``, ``to``, ``entropy`` or ``distance``.

    The page holds every weight, as a byte: the square root of its share of the largest one in its row. A shown weight
    is off by at most 0.4 % of the row's largest; entropies and distances are computed from the weights as they are.

    Args:
        images: (B, 3, H, W) or (B, 1, H, W), in [-1, 1].
        records: what :func:`record_attention` yields (every call of a layer is listed, and must have been made on
            these images); or a list of :class:`AttentionRecord`; or a list of maps (B, N, M), as the networks return
            them with ``return_attention=True``, whose feature maps are taken to be shaped like the images.
        max_bytes: size that the page may have. A weight takes 4/3 bytes, as base64.

    Returns:
        An :class:`AttentionExplorer`, which a notebook shows and whose ``save(path)`` writes one HTML file.

    Raises:
        ValueError: for images of another shape, of integers or not finite, empty records, maps of another shape or
            batch size, a record of a volume, weights that are negative or not finite, a gamma that is not finite, and
            for a page above ``max_bytes``.
        TypeError: for one map or record that is not in a list.

    >>> import torch
    >>> from torch_sagan import SAGANGenerator, explore_attention
    >>> generator = SAGANGenerator(16, base_channels=4).eval()
    >>> images, maps = generator(torch.randn(2, 128), return_attention=True)
    >>> explorer = explore_attention(images, maps)
    >>> explorer.save("attention.html")  # doctest: +SKIP
    """
    check_images(images)
    layers = list(_layers(images, records))
    if not len(images) or not layers:
        raise ValueError(f"nothing to explore: {len(images)} images and {len(layers)} attention maps")
    template = resources.files("torch_sagan.maps").joinpath("explorer.html").read_text(encoding="utf-8")
    data: dict[str, Any] = {"size": list(images.shape[2:]), "ramp": RAMP, "marks": MARKS, "images": [], "layers": []}
    for name, record in layers:
        extent = keys_extent(record.query_size, record.key_size)
        gamma = None if record.gamma is None else float(record.gamma)
        if gamma is not None and not math.isfinite(gamma):
            raise ValueError(f"{name}: gamma must be finite, got {gamma}")
        data["layers"].append(
            {"name": name, "gamma": gamma, "queries": record.query_size, "keys": record.key_size, "extent": extent,
             "maps": []}
        )  # fmt: skip

    frame = len(template.encode()) + len(_json(data))
    contents = [3 * images[0, 0].numel(), *(len(r.attention[0]) * (r.attention.shape[2] + 12) for _, r in layers)]
    per_image = sum(4 * -(-content // 3) + len('"", ') for content in contents)  # in base64, quoted
    size = frame + len(images) * per_image
    if size > max_bytes:
        fitting = max((max_bytes - frame) // per_image, 0)
        raise ValueError(
            f"the page would take {size:,} bytes, more than max_bytes={max_bytes:,}: an image with its maps takes "
            f"{per_image:,}, so run the model again on at most {fitting} of {len(images)} images, or give fewer layers "
            "or a larger max_bytes"
        )

    data["images"] = [_encoded_image(image) for image in images]
    for (_, record), description in zip(layers, data["layers"], strict=True):
        distances = _distances(record.query_size, record.key_size)  # (N, M)
        description["maps"] = [_encoded_map(weights.float().cpu(), distances) for weights in record.attention]
    return AttentionExplorer(template.replace("__DATA__", _json(data)))


def _layers(images: Tensor, records: Records) -> Iterator[tuple[str, AttentionRecord]]:
    """Every call of every layer with a name, checked."""
    if isinstance(records, (Tensor, AttentionRecord)):
        what = type(records).__name__
        raise TypeError(f"expected a list of attention maps, or a dict of lists of records, got a {what}")
    calls: list[tuple[str, Tensor | AttentionRecord]]
    if isinstance(records, Mapping):
        calls = [
            (f"{path or 'attention'}, call {i}" if len(of_layer) > 1 else path or "attention", call)
            for path, of_layer in records.items()
            for i, call in enumerate(of_layer)
        ]
    else:
        calls = [(f"attention {i}", call) for i, call in enumerate(records)]
    for name, call in calls:
        attention = call.attention if isinstance(call, AttentionRecord) else call
        shape = tuple(getattr(attention, "shape", ()))
        if len(shape) != 3 or shape[0] != len(images):
            received = shape or f"a {type(attention).__name__}"
            raise ValueError(f"{name}: expected an attention map (B, N, M) with B = {len(images)}, got {received}")
        check_weights(attention, f"{name}: ")
        record = call if isinstance(call, AttentionRecord) else None
        image_size = (images.shape[2], images.shape[3])
        query_size = map_size(shape[1], record and drawn_size(record.query_size), image_size, "query_size")
        key_size = map_size(shape[2], record and drawn_size(record.key_size), image_size, "key_size")
        yield name, AttentionRecord(attention, query_size, key_size, record and record.gamma)


def _distances(query_size: tuple[int, ...], key_size: tuple[int, ...]) -> Tensor:
    """(N, M) from the middle of each query position to that of each key, in query positions."""
    extent = keys_extent(query_size, key_size)
    queries, keys = (
        torch.cartesian_prod(
            *((torch.arange(n, device="cpu") + 0.5) * (e / n) for n, e in zip(size, covered, strict=True))
        )
        for size, covered in ((query_size, query_size), (key_size, extent))
    )  # (N, 2), (M, 2)
    return torch.cdist(queries, keys, compute_mode="donot_use_mm_for_euclid_dist")


def _encoded_map(weights: Tensor, distances: Tensor) -> str:
    """(N, M) as the page reads it: each row's largest weight, entropy in bits and mean distance, then its bytes."""
    peak = weights.amax(1)  # (N,)
    entropy = torch.special.entr(weights).sum(1) / math.log(2)  # (N,)
    distance = (weights * distances).sum(1)  # (N,)
    shares = weights / torch.where(peak > 0, peak, 1.0).unsqueeze(1)  # (N, M) in [0, 1]
    rows = torch.stack([peak, entropy, distance]).view(torch.uint8)  # (3, 4N)
    return _base64(torch.cat([rows.flatten(), shares.sqrt().mul(255).round().byte().flatten()]))


def _encoded_image(image: Tensor) -> str:
    """(1 or 3, H, W) in [-1, 1] as red, green and blue of each pixel."""
    pixels = (image.float() + 1).mul(255 / 2).round().clamp(0, 255).byte().cpu()
    return _base64(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous())


def _base64(content: Tensor) -> str:
    return base64.b64encode(ctypes.string_at(content.data_ptr(), content.nbytes)).decode("ascii")


def _json(data: object) -> str:
    # No name of a layer can end the script element that the data is in.
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c")
