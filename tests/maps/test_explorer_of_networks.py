"""The explorer's page of real networks, in Chromium: each layer's map over the image that the network made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chromium import Page
from explorer_page import CLOSE, covered, expected, shown
from networks.cyclegan import Generator
from torch_sagan import (
    SAGANGenerator,
    SelfAttention2d,
    explore_attention,
    insert_self_attention,
    record_attention,
)


def official_with_sharp_maps(channels: int) -> nn.Module:
    layer = SelfAttention2d.official(channels)
    with torch.no_grad():
        layer.query.weight.mul_(5)
    return layer


def inserted_twice() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """An image-to-image network as in a CycleGAN, with layers put in, on images that are not square."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(),
                          nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Tanh())  # fmt: skip
    x = torch.randn(2, 3, 20, 28)
    return insert_self_attention(model, ["1", "3"], example_input=x, attention=official_with_sharp_maps), (x,)


def cyclegan(layers: list[str], *shape: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The examples' CycleGAN generator, which knows nothing of attention, with layers put in."""
    x = torch.randn(shape)
    return insert_self_attention(Generator(), layers, example_input=x, attention=official_with_sharp_maps), (x,)


NETWORKS = {
    "cyclegan": lambda: cyclegan(["model.9", "model.12", "model.15"], 2, 3, 32, 32),
    "cyclegan, one wide image, one layer": lambda: cyclegan(["model.12"], 1, 3, 24, 40),
    "dcgan": lambda: (SAGANGenerator(32, base_channels=4, attention=official_with_sharp_maps), (torch.randn(2, 128),)),
    "resnet": lambda: (
        SAGANGenerator(32, base_channels=4, architecture="resnet", num_classes=3, attention=official_with_sharp_maps),
        (torch.randn(2, 128), torch.tensor([0, 2])),
    ),
    "inserted": inserted_twice,
}


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(make, id=name, marks=[] if name in ("cyclegan", "resnet") else pytest.mark.exhaustive)
        for name, make in NETWORKS.items()
    ],
)
def test_networks(page: Page, tmp_path: Path, network: Any) -> None:
    model, inputs = network()
    with record_attention(model.eval()) as records, torch.no_grad():
        images = model(*inputs)
    explore_attention(images, records).save(tmp_path / "page.html")
    image = len(images) - 1
    gray = 0.1 + 0.55 * ((images[image] + 1) / 2 * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)  # (H, W)
    zoom = round(640 / max(images.shape[2:]))
    for i, (name, (record,)) in enumerate(records.items()):
        row, column = record.query_size[0] - 1, 2
        page.open((tmp_path / "page.html").as_uri() + f"#image={image}&layer={i}&query={row},{column}&opacity=1")
        assert page.run(f"document.getElementById('layer').options[{i}].text").startswith(f"{name} (")
        weights = record.attention[image, row * record.query_size[1] + column].view(record.key_size)
        cover = covered(record)
        middles = [
            [int((k + 0.5) / n * size * zoom * part) // zoom for k in range(n)]
            for n, size, part in zip(record.key_size, images.shape[2:], cover, strict=True)
        ]
        under = gray[middles[0]][:, middles[1]][..., None]
        wanted = expected(weights, weights.numel(), under)
        ring = [
            (at + 0.5) / n * size
            for at, n, size in zip((row, column), record.query_size, images.shape[2:], strict=True)
        ]
        clear = torch.cdist(torch.cartesian_prod(*map(torch.tensor, middles)).float(), torch.tensor([ring])) > 1.5
        clear = clear.view(record.key_size)  # of the mark
        assert clear.float().mean() > 0.8
        torch.testing.assert_close(shown(page, *record.key_size, cover)[clear], wanted[clear], **CLOSE)
    assert page.run("document.getElementById('images').hidden") is (len(images) == 1)
    assert page.run("document.getElementById('layer').options.length") == len(records)
    assert page.complaints() == []
