"""``explore_attention``: what the page holds. (``test_explorer_in_a_browser.py`` is about what it shows and does.)"""

from __future__ import annotations

import base64
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from explorer_page import peaked
from torch_sagan import (
    AttentionRecord,
    SelfAttention2d,
    explore_attention,
    record_attention,
)


def contents(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def decoded(content: str, n_queries: int, n_keys: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Largest weights, entropies and distances (N,), and weights (N, M) of one stored map."""
    stored = torch.frombuffer(bytearray(base64.b64decode(content)), dtype=torch.uint8)
    peak, entropy, distance = stored[: 12 * n_queries].view(torch.float32).view(3, n_queries)
    shares = (stored[12 * n_queries :].view(n_queries, n_keys).float() / 255) ** 2
    return peak, entropy, distance, peak[:, None] * shares


# --- what the page holds ---------------------------------------------------------------------------------------------


def test_the_page_holds_the_weights() -> None:
    attention = peaked(2, 12, 6)
    attention[0, 0] = torch.tensor([1.0, 0, 0, 0, 0, 0])
    record = AttentionRecord(attention, (3, 4), (2, 3), torch.tensor([-0.25]))
    data = contents(explore_attention(torch.rand(2, 3, 24, 32) * 2 - 1, {"body.3": [record]}).page)
    assert data["size"] == [24, 32]
    (layer,) = data["layers"]
    assert (layer["name"], layer["gamma"], layer["queries"], layer["keys"]) == ("body.3", -0.25, [3, 4], [2, 3])
    for content, weights in zip(layer["maps"], attention, strict=True):
        peak, entropy, distance, stored = decoded(content, 12, 6)
        torch.testing.assert_close(peak, weights.amax(1), rtol=0, atol=0)
        # A byte is half a step of 1 / 255 off at most, and the square doubles that.
        assert ((stored - weights).abs() <= peak[:, None] / 255 * 1.01).all()
        for n, row in enumerate(weights.tolist()):
            assert entropy[n] == pytest.approx(sum(-w * math.log2(w) for w in row if w > 0), abs=1e-5)
            middles = [((k // 3 + 0.5) * 3 / 2, (k % 3 + 0.5) * 4 / 3) for k in range(6)]
            expected = sum(w * math.dist((n // 4 + 0.5, n % 4 + 0.5), at) for w, at in zip(row, middles, strict=True))
            assert distance[n] == pytest.approx(expected, abs=1e-5)


def test_distances_of_pooled_keys_are_to_where_they_were_pooled() -> None:
    """Five by five positions and two by two keys: those lie on the first four rows and columns."""
    attention = torch.eye(4)[torch.arange(25) % 4].unsqueeze(0)
    (layer,) = contents(
        explore_attention(torch.zeros(1, 1, 10, 10), [AttentionRecord(attention, (5, 5), (2, 2))]).page
    )["layers"]
    _, _, distance, _ = decoded(layer["maps"][0], 25, 4)
    for n in range(25):
        key = n % 4
        expected = math.dist((n // 5 + 0.5, n % 5 + 0.5), (2 * (key // 2) + 1, 2 * (key % 2) + 1))
        assert distance[n] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_page_holds_the_images(channels: int) -> None:
    images = torch.rand(2, channels, 4, 6) * 2.2 - 1.1  # a little outside of [-1, 1]
    data = contents(explore_attention(images, [peaked(2, 6, 6)]).page)
    for content, image in zip(data["images"], images, strict=True):
        stored = torch.tensor(list(base64.b64decode(content))).view(4, 6, 3).permute(2, 0, 1)
        expected = ((image + 1) / 2).clamp(0, 1).mul(255).expand(3, 4, 6)
        assert (stored - expected).abs().max() <= 0.501  # rounded


def test_sizes_are_derived_from_the_images() -> None:
    data = contents(explore_attention(torch.zeros(1, 3, 16, 64), [peaked(1, 16, 4), peaked(1, 64, 64)]).page)
    assert [(layer["queries"], layer["keys"]) for layer in data["layers"]] == [([2, 8], [1, 4]), ([4, 16], [4, 16])]


def test_every_call_of_a_layer_is_listed() -> None:
    layer = SelfAttention2d(4)
    model = nn.ModuleDict({"used": layer, "idle": SelfAttention2d(4)})
    with record_attention(model) as records:
        for gamma in (0.5, -0.5):
            nn.init.constant_(layer.gamma, gamma)
            layer(torch.randn(1, 4, 3, 3))
    data = contents(explore_attention(torch.zeros(1, 3, 9, 9), records).page)
    assert [(one["name"], one["gamma"]) for one in data["layers"]] == [("used, call 0", 0.5), ("used, call 1", -0.5)]


def test_sixteen_images_of_a_large_layer_are_under_24_megabytes() -> None:
    page = explore_attention(torch.zeros(16, 3, 64, 64), [torch.full((16, 1024, 1024), 1 / 1024)]).page
    assert len(page.encode()) < 24_000_000


def test_the_limit_and_the_way_out() -> None:
    images, maps = torch.zeros(4, 3, 32, 32), [peaked(4, 256, 256), peaked(4, 64, 64)]
    with pytest.raises(
        ValueError, match=r"on at most 2 of 4 images, or give fewer layers or a larger max_bytes"
    ) as raised:
        explore_attention(images, maps, max_bytes=250_000)
    assert len(explore_attention(images[:2], [one[:2] for one in maps], max_bytes=250_000).page) <= 250_000
    said = int(re.findall(r"take ([\d,]+) bytes", str(raised.value))[0].replace(",", ""))
    size = len(explore_attention(images, maps, max_bytes=said).page.encode())
    assert said - 100 < size <= said  # commas and quotes between the parts are counted generously
    with pytest.raises(ValueError, match=r"on at most 0 of 4 images"):
        explore_attention(images, maps, max_bytes=1000)


def test_saving_replaces_the_whole_file_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    explorer = explore_attention(torch.zeros(1, 1, 8, 8), [peaked(1, 4, 4)])
    path = tmp_path / "page.html"
    path.write_text("before")
    explorer.save(str(path))
    assert path.read_text(encoding="utf-8") == explorer.page
    path.write_text("before")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        explorer.save(path)
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("images", "records", "message"),
    [
        (torch.zeros(1, 2, 8, 8), [peaked(1, 4, 4)], r"\(B, 3, H, W\).*1, 2, 8, 8"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [peaked(1, 4, 4)], r"floating point.*uint8"),
        (torch.full((1, 3, 8, 8), math.nan), [peaked(1, 4, 4)], r"images in \[-1, 1\], got some that are not finite"),
        (torch.zeros(0, 3, 8, 8), [torch.ones(0, 4, 4)], r"0 images and 1 attention map"),
        (torch.zeros(1, 3, 8, 8), [], r"1 images and 0 attention maps"),
        (torch.zeros(1, 3, 8, 8), {"idle": []}, r"1 images and 0 attention maps"),
        (torch.zeros(2, 3, 8, 8), {"a.b": [AttentionRecord(peaked(1, 4, 4), (2, 2), (2, 2))]}, r"a.b.*B = 2.*\(1, 4"),
        (torch.zeros(1, 3, 8, 8), [torch.ones(4, 4)], r"attention 0: expected.*\(4, 4\)"),
        (torch.zeros(1, 3, 8, 8), ["map"], r"attention 0: expected.*a str"),
        (torch.zeros(1, 3, 8, 8), [torch.full((1, 4, 4), math.nan)], r"attention 0.*finite"),
        (torch.zeros(1, 3, 8, 8), [torch.full((1, 4, 4), math.inf)], r"attention 0.*finite"),
        (torch.zeros(1, 3, 8, 8), [-peaked(1, 4, 4)], r"attention 0.*not negative"),
        (
            torch.zeros(1, 3, 8, 8),
            {"a": [AttentionRecord(peaked(1, 4, 4), (2, 2), (2, 2), torch.tensor([math.nan]))]},
            r"a: gamma must be finite, got nan",
        ),
        (torch.zeros(1, 3, 8, 8), [peaked(1, 5, 4)], r"5 positions are not a map"),
        (torch.zeros(1, 3, 8, 8), [AttentionRecord(peaked(1, 4, 4), (3, 2), (2, 2))], r"4 positions.*3×2"),
        (torch.zeros(1, 3, 8, 8), [AttentionRecord(peaked(1, 8, 8), (2, 2, 2), (2, 2, 2))], r"a volume of 2×2×2"),
    ],
)
def test_errors(images: Tensor, records: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explore_attention(images, records)


@pytest.mark.parametrize("records", [peaked(1, 4, 4), AttentionRecord(peaked(1, 4, 4), (2, 2), (2, 2))])
def test_one_map_alone_is_not_a_list(records: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a list of attention maps.*got a (Tensor|AttentionRecord)"):
        explore_attention(torch.zeros(1, 3, 8, 8), records)
