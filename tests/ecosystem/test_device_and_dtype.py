"""Every layer and network takes ``device`` and ``dtype``, as PyTorch's own do, and works where its input is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from torch_sagan import (
    ConditionalBatchNorm2d,
    ProjectionHead,
    SAGANDiscriminator,
    SAGANGenerator,
    SelfAttention1d,
    SelfAttention2d,
    SelfAttention3d,
    apply_spectral_norm,
    attention_overlay,
    explore_attention,
    gradient_penalty,
    insert_self_attention,
    mark_queries,
    recalibrate,
    record_attention,
    remove_spectral_norm,
    reset_power_iteration,
    spectral_norms,
)

KINDS: dict[str, Callable[..., nn.Module]] = {
    "attention": lambda **where: SelfAttention2d(8, **where),
    "attention, of the paper": lambda **where: SelfAttention2d.paper(8, **where),
    "attention, of its code": lambda **where: SelfAttention2d.official(8, **where),
    "attention in a sequence": lambda **where: SelfAttention1d.paper(8, **where),
    "attention in a volume": lambda **where: SelfAttention3d.official(8, **where),
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


# --- where the input is, whatever the default device ---------------------------------------------------------------


def penalized() -> Tensor:
    d = SAGANDiscriminator(8, base_channels=4, num_classes=3, spectral_norm=None, device="cpu")
    images, labels = torch.randn(2, 2, 3, 8, 8, device="cpu"), torch.tensor([0, 2], device="cpu")
    gradient_penalty(d, *images, labels).backward()
    return d.to_logit.projection.linear.weight.grad


def normalized() -> Tensor:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, device="cpu"), nn.Conv2d(8, 8, 3, device="cpu"))
    apply_spectral_norm(model)
    model(torch.randn(2, 3, 8, 8, device="cpu")).sum().backward()
    reset_power_iteration(model)
    recalibrate(model)
    assert all(abs(norm - 1) < 1e-3 for norm in spectral_norms(model).values())
    return remove_spectral_norm(model)[0].weight


def inserted() -> Tensor:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, device="cpu"), nn.ReLU())
    insert_self_attention(model, "0", example_input=torch.randn(1, 3, 8, 8, device="cpu"))
    return model(torch.randn(1, 3, 8, 8, device="cpu"))


def drawn() -> Tensor:
    images, attention = torch.zeros(1, 3, 16, 16, device="cpu"), torch.full((1, 16, 16), 1 / 16, device="cpu")
    assert attention_overlay(images, attention, (3, 9)).device == mark_queries(images, (3, 9)).device
    assert explore_attention(images, [attention]).page
    return attention_overlay(images, attention, (3, 9))


def trained() -> Tensor:
    g = SAGANGenerator(16, base_channels=4, num_classes=3, architecture="resnet", device="cpu")
    with record_attention(g) as records:
        g(torch.randn(2, 128, device="cpu"), torch.tensor([0, 2], device="cpu")).sum().backward()
    assert all(record.attention.is_cpu for calls in records.values() for record in calls)
    layer = SelfAttention2d(8, device="cpu")  # in tiles
    return layer(torch.randn(1, 8, 33, 33, device="cpu"))


@pytest.mark.parametrize("work", [penalized, normalized, inserted, drawn, trained])
def test_works_where_the_input_is(work: Callable[[], Tensor]) -> None:
    """With another default device, as after ``torch.set_default_device("cuda")``; "meta" stands in for it."""
    with torch.device("meta"):
        assert work().is_cpu
