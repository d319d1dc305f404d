"""Names and shapes at full size, as each framework's own code makes them: every list is recognized and fits.

On the meta device, where nothing is allocated and no value is computed.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from torch_sagan import SAGANGenerator, load_published

with gzip.open(Path(__file__).parents[2] / "data" / "published-sizes.json.gz") as file:
    LISTS: dict[str, dict[str, list[int]]] = json.load(file)

# The framework and network -> pixels, classes, attention, and the widest and narrowest maps of G.
NETWORKS: dict[str, tuple[int, int, list[int], tuple[int, int]]] = {
    "mmgeneration/sagan-32": (32, 10, [16], (256, 256)),
    "mmgeneration/sngan-32": (32, 10, [], (256, 256)),
    "mmgeneration/sagan-128": (128, 1000, [64], (1024, 64)),
    "mmgeneration/sngan-128": (128, 1000, [], (1024, 64)),
    "mmgeneration/sagan-128-biggan": (128, 1000, [64], (1024, 64)),
    "biggan/sagan-32": (32, 1000, [], (256, 256)),
    "biggan/sagan-64": (64, 1000, [32], (1024, 128)),
    "biggan/sagan-128": (128, 1000, [64], (1024, 64)),
    "studiogan/sagan-32": (32, 10, [16], (256, 256)),
    "studiogan/sngan-32": (32, 10, [], (256, 256)),
    "studiogan/sagan-64": (64, 200, [32], (1024, 64)),
    "studiogan/sngan-64": (64, 200, [], (1024, 64)),
    "studiogan/sagan-128": (128, 1000, [64], (1024, 64)),
    "studiogan/sngan-128": (128, 1000, [], (1024, 64)),
}

# Of each framework, kind of network and size at least one.
FIRST = (
    "mmgeneration/sagan-128",
    "mmgeneration/sngan-32",
    "biggan/sagan-64",
    "studiogan/sagan-32",
    "studiogan/sngan-64",
)
networks = pytest.mark.parametrize(
    "name", [name if name in FIRST else pytest.param(name, marks=pytest.mark.exhaustive) for name in NETWORKS]
)


def weights_of(name: str) -> dict[str, Tensor]:
    return {
        key: torch.empty(shape, device="meta", dtype=torch.long if key.endswith("tracked") else None)
        for key, shape in LISTS[name].items()
    }


def test_every_list_has_a_row() -> None:
    assert set(LISTS) == {f"{name}/{kind}" for name in NETWORKS for kind in ("generator", "discriminator")}


@networks
def test_generator(name: str) -> None:
    weights = weights_of(f"{name}/generator")
    generator = load_published(weights)
    size, classes, attention, (widest, narrowest) = NETWORKS[name]
    arguments: dict[str, Any] = generator.arguments
    assert (arguments["image_size"], arguments["num_classes"]) == (size, classes)
    assert arguments["attention_resolutions"] == attention
    assert (max(arguments["widths"]), arguments["widths"][-1]) == (widest, narrowest)
    assert parameters(generator) == sum(value.numel() for key, value in weights.items() if is_parameter(key))


@networks
def test_discriminator(name: str) -> None:
    weights = weights_of(f"{name}/discriminator")
    discriminator = load_published(weights, network="discriminator")
    size, classes, attention, _ = NETWORKS[name]
    assert (discriminator.image_shape, discriminator.num_classes) == ((3, size, size), classes)
    assert [int(size) for size in discriminator.attention] == attention
    assert parameters(discriminator) == sum(value.numel() for key, value in weights.items() if is_parameter(key))


def parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def is_parameter(key: str) -> bool:
    last = key.rsplit(".", 1)[-1]
    return last not in ("weight_u", "weight_v", "u0", "sv0") and not last.startswith(("running_", "stored_", "num_"))


@pytest.mark.parametrize("kind", ["generator", "discriminator"])
def test_the_guide_builds_these_for_cifar10(kind: Literal["generator", "discriminator"]) -> None:
    """The lines of docs/pretrained.md that build networks to be filled."""
    page = (Path(__file__).parents[3] / "docs" / "pretrained.md").read_text(encoding="utf-8")
    (code,) = [block for block in page.split("```") if "downsampling_blocks=2" in block]
    namespace: dict[str, Any] = {}
    with torch.device("meta"):
        exec(code.removeprefix("python\n"), namespace)
    model = namespace[kind]
    assert load_published(weights_of(f"studiogan/sagan-32/{kind}"), model) is model
    assert isinstance(model, SAGANGenerator) == (kind == "generator")
