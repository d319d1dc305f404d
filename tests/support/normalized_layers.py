"""Layers of each kind under spectral norm of each implementation, and a small model, for the tests of spectral norm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as legacy_spectral_norm

from torch_sagan import spectral_norm

# A layer of each kind, the dimension that its outputs are counted along, and the shape of an input.
LAYERS: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(7, 5), 0, (3, 7)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), 0, (2, 4, 8)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2)), 0, (2, 4, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2), 0, (2, 2, 4, 3, 5)),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(4, 6, 3), 1, (2, 4, 8)),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(4, 6, (3, 2)), 1, (2, 4, 6, 5)),
    "transposed conv3d": (lambda: nn.ConvTranspose3d(2, 6, 2), 1, (2, 2, 4, 3, 5)),
    "embedding": (lambda: nn.Embedding(9, 4), 0, (3,)),
}

layers = pytest.mark.parametrize("kind", LAYERS)


# The gradcheck of torch 2.5 calls a vmap that it deprecates.
batched = pytest.mark.filterwarnings("ignore:Please use `torch.vmap`:FutureWarning")


def make(kind: str, **arguments: object) -> nn.Module:
    return spectral_norm(LAYERS[kind][0]().double(), **arguments)


def inputs(kind: str) -> Tensor:
    shape = LAYERS[kind][2]
    return torch.randint(0, 9, shape) if kind == "embedding" else torch.randn(shape, dtype=torch.float64)


def original(layer: nn.Module) -> Tensor:
    return layer.parametrizations.weight.original


def norm_of(layer: nn.Module) -> nn.Module:
    return layer.parametrizations.weight[0]


def u_and_v(layer: nn.Module) -> tuple[Tensor, Tensor]:
    return norm_of(layer)._u.clone(), norm_of(layer)._v.clone()


def converge(layer: nn.Module, reads: int = 150) -> None:
    layer.train()
    with torch.no_grad():
        for _ in range(reads):
            _ = layer.weight
    layer.eval()


NORMALIZERS: dict[str, Callable[..., nn.Module]] = {
    "sagan": spectral_norm,
    "torch": parametrizations.spectral_norm,
    "legacy": legacy_spectral_norm,
}

normalizers = pytest.mark.parametrize("normalizer", NORMALIZERS)


def model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(6 * 8 * 8, 5),
    )


def normalized(network: nn.Module) -> set[str]:
    return {name for name, module in network.named_modules() if parametrize.is_parametrized(module)}
