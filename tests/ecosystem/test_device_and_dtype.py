"""Every layer and network takes ``device`` and ``dtype``, as PyTorch's own do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from torch_sagan import ConditionalBatchNorm2d, ProjectionHead, SAGANDiscriminator, SAGANGenerator, SelfAttention2d

KINDS: dict[str, Callable[..., nn.Module]] = {
    "attention": lambda **where: SelfAttention2d(8, **where),
    "attention, of the paper": lambda **where: SelfAttention2d.paper(8, **where),
    "attention, of its code": lambda **where: SelfAttention2d.official(8, **where),
    "conditional batch norm": lambda **where: ConditionalBatchNorm2d(8, 3, **where),
    "projection head": lambda **where: ProjectionHead(8, 3, **where),
    "G dcgan": lambda **where: SAGANGenerator(16, base_channels=4, **where),
    "G resnet": lambda **where: SAGANGenerator(16, base_channels=4, num_classes=3, architecture="resnet", **where),
    "D dcgan": lambda **where: SAGANDiscriminator(16, base_channels=4, **where),
    "D resnet": lambda **where: SAGANDiscriminator(16, base_channels=4, architecture="resnet", **where),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_made_on_a_device(kind: str) -> None:
    module = KINDS[kind](device="meta")
    assert {tensor.device.type for tensor in (*module.parameters(), *module.buffers())} == {"meta"}


@kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_made_in_a_dtype(kind: str, dtype: torch.dtype) -> None:
    """With the values of a module that is converted afterwards."""
    torch.manual_seed(0)
    module = KINDS[kind](dtype=dtype)
    torch.manual_seed(0)
    expected = KINDS[kind]().to(dtype)
    for (name, tensor), other in zip(module.state_dict().items(), expected.state_dict().values(), strict=True):
        assert tensor.dtype == other.dtype
        assert torch.equal(tensor, other), name


@kinds
def test_the_defaults_are_pytorchs(kind: str) -> None:
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in KINDS[kind]().parameters())
    assert all(parameter.dtype == torch.float32 for parameter in KINDS[kind]().parameters())


@kinds
def test_integers_are_refused(kind: str) -> None:
    with pytest.raises(TypeError, match="floating point"):
        KINDS[kind](dtype=torch.int64)
