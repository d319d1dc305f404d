"""What the tests of the ecosystem run: each layer, its variants, and both networks, with inputs and a loss for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torch_sagan import (
    SAGANDiscriminator,
    SAGANGenerator,
    SelfAttention1d,
    SelfAttention2d,
    SelfAttention3d,
    spectral_norm,
    spectral_norms,
)
from torch_sagan.attention.layer import SelfAttention


class Subject(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    num_classes: int | None = None


SUBJECTS = {
    "attention": Subject(lambda: SelfAttention2d(16), (16, 6, 5)),
    # So many positions that the attention matrix is not materialized.
    "attention in tiles": Subject(lambda: SelfAttention2d(8), (8, 33, 33)),
    "official attention": Subject(lambda: SelfAttention2d.official(16), (16, 6, 5)),
    "attention in a sequence": Subject(lambda: SelfAttention1d.official(16), (16, 31)),
    "attention in a volume": Subject(lambda: SelfAttention3d.official(16), (16, 4, 3, 5)),
    "l2 attention": Subject(lambda: SelfAttention2d(16, similarity="l2"), (16, 6, 5)),
    "spectral norm": Subject(lambda: spectral_norm(nn.Conv2d(4, 6, 3)), (4, 6, 5)),
    "spectral norm of a convolution": Subject(
        lambda: spectral_norm(nn.Conv2d(4, 6, 3), of="convolution", input_size=(6, 5)), (4, 6, 5)
    ),
    "torch's spectral norm": Subject(lambda: spectral_norm(nn.Conv2d(4, 6, 3), implementation="torch"), (4, 6, 5)),
    "generator": Subject(lambda: SAGANGenerator(16, z_dim=8, base_channels=8), (8,)),
    "residual generator with classes": Subject(
        lambda: SAGANGenerator(16, z_dim=8, base_channels=8, architecture="resnet", num_classes=5), (8,), 5
    ),
    "discriminator": Subject(lambda: SAGANDiscriminator(16, base_channels=8), (3, 16, 16)),
    "discriminator with classes": Subject(
        lambda: SAGANDiscriminator(16, base_channels=8, num_classes=5), (3, 16, 16), 5
    ),
    "residual discriminator with classes": Subject(
        lambda: SAGANDiscriminator(16, base_channels=8, architecture="resnet", num_classes=5), (3, 16, 16), 5
    ),
}
ATTENTION = [name for name in SUBJECTS if "attention" in name]
LAYERS = ["spectral norm", "spectral norm of a convolution", "torch's spectral norm"]
NETWORKS = [name for name in SUBJECTS if name not in ATTENTION + LAYERS]
NORMALIZED = LAYERS + NETWORKS

# One for each column of the table, the one with most in it.
REPRESENTATIVE = ("official attention", "spectral norm", "residual generator with classes", "discriminator")


def subjects(names: Iterable[str] = SUBJECTS, *, tiles: bool = False) -> pytest.MarkDecorator:
    """The test for each subject. Those that are not representative are exhaustive.

    Args:
        names: of the subjects.
        tiles: attention in tiles, with derivatives of its own, is representative too.
    """
    fast = (*REPRESENTATIVE, "attention in tiles") if tiles else REPRESENTATIVE
    return pytest.mark.parametrize(
        "subject", [pytest.param(name, marks=[] if name in fast else pytest.mark.exhaustive) for name in names]
    )


def build(subject: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The subject with gamma ≠ 0, and with u and v that lag behind the weights, so that iterations have an effect."""
    module = SUBJECTS[subject].make().to(dtype)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, SelfAttention):
                part.gamma.fill_(0.7)
            if isinstance(part, parametrize.ParametrizationList):
                part.original.add_(0.5 * part.original.std() * torch.randn_like(part.original))
    return module


def inputs(subject: str, batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    _, shape, num_classes = SUBJECTS[subject]
    x = torch.randn(batch, *shape, dtype=dtype)
    return (x,) if num_classes is None else (x, torch.randint(num_classes, (batch,)))


def channels_last(subject: str) -> torch.memory_format:
    return torch.channels_last_3d if len(SUBJECTS[subject].shape) == 4 else torch.channels_last


def score(y: Tensor) -> Tensor:
    """One number for each sample, of whatever a subject returns."""
    return y.flatten(1).square().mean(1) if y.ndim > 1 else y


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def assert_close(actual: object, expected: object, *, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    """Equal but for the order of summation, in float64 unless other tolerances are given."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def worst_norm(module: nn.Module) -> float:
    """How far the largest singular value of any normalized weight is from 1."""
    return max(abs(norm - 1) for norm in spectral_norms(module).values())
