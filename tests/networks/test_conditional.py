"""Conditional batch norm against batch norm class by class, the projection against its formula, and the two in
networks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torch_sagan import (
    ConditionalBatchNorm2d,
    ProjectionHead,
    SAGANDiscriminator,
    SAGANGenerator,
    gradient_penalty,
    spectral_norms,
)


def tables(norm: ConditionalBatchNorm2d) -> None:
    with torch.no_grad():
        norm.gamma.normal_()
        norm.beta.normal_()


@given(
    batch=st.integers(2, 5),
    channels=st.integers(1, 6),
    classes=st.integers(1, 4),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    training=st.booleans(),
)
def test_equals_batch_norm_class_by_class(
    batch: int, channels: int, classes: int, height: int, width: int, training: bool
) -> None:
    """Each class's scale and shift, through F.batch_norm over the whole batch, of which each sample takes its own."""
    norm = ConditionalBatchNorm2d(channels, classes).double().train(training)
    tables(norm)
    norm.norm.running_mean.normal_()
    norm.norm.running_var.uniform_(0.5, 2)
    mean, var = norm.norm.running_mean.clone(), norm.norm.running_var.clone()
    x = torch.randn(batch, channels, height, width, dtype=torch.float64)
    labels = torch.randint(classes, (batch,))
    y = norm(x, labels)
    for c in range(classes):
        class_mean, class_var = mean.clone(), var.clone()
        expected = F.batch_norm(x, class_mean, class_var, norm.gamma[c], norm.beta[c], training)
        torch.testing.assert_close(y[labels == c], expected[labels == c], rtol=0, atol=1e-10)
    torch.testing.assert_close(norm.norm.running_mean, class_mean)
    torch.testing.assert_close(norm.norm.running_var, class_var)


def test_starts_as_batch_norm() -> None:
    x, labels = torch.randn(4, 3, 5, 5), torch.tensor([0, 1, 1, 4])
    assert torch.equal(ConditionalBatchNorm2d(3, 5)(x, labels), nn.BatchNorm2d(3, affine=False)(x))


def test_gradients_reach_the_rows_of_the_classes_that_came() -> None:
    norm = ConditionalBatchNorm2d(3, 5)
    norm(torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 1, 4])).square().sum().backward()
    came = torch.tensor([True, True, False, False, True])
    for table in (norm.gamma, norm.beta):
        assert torch.equal(table.grad.abs().sum(1) > 0, came)


def test_converts_to_synchronized_batch_norm() -> None:
    network = nn.SyncBatchNorm.convert_sync_batchnorm(SAGANGenerator(8, base_channels=2, num_classes=3))
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in network.modules()) == 1
    assert not any(type(m) is nn.BatchNorm2d for m in network.modules())


@given(batch=st.integers(1, 4), channels=st.integers(1, 8), classes=st.integers(1, 5))
def test_the_projection_is_its_formula(batch: int, channels: int, classes: int) -> None:
    head = ProjectionHead(channels, classes).double().eval()
    nn.init.normal_(head.linear.bias)
    h, labels = torch.randn(batch, channels, dtype=torch.float64), torch.randint(classes, (batch,))
    logits = head(h, labels)
    assert logits.shape == (batch,)
    for b in range(batch):
        expected = head.linear.weight[0] @ h[b] + head.linear.bias[0] + head.embedding.weight[labels[b]] @ h[b]
        assert float(logits[b].detach()) == pytest.approx(float(expected.detach()), abs=1e-10)


def test_the_projection_without_classes_is_linear() -> None:
    head = ProjectionHead(6).eval()
    h = torch.randn(3, 6)
    torch.testing.assert_close(head(h), head.linear(h)[:, 0])


def test_the_projection_is_normalized_unless_told() -> None:
    assert set(spectral_norms(ProjectionHead(6, 3))) == {"linear.weight", "embedding.weight"}
    assert not spectral_norms(ProjectionHead(6, 3, spectral_norm=None))


@pytest.mark.parametrize("architecture", ["dcgan", "resnet"])
def test_the_label_changes_the_image_and_the_logit(architecture: str) -> None:
    generator = SAGANGenerator(16, base_channels=4, num_classes=5, architecture=architecture).eval()
    discriminator = SAGANDiscriminator(16, base_channels=4, num_classes=5, architecture=architecture).eval()
    with torch.no_grad():
        for norm in generator.modules():
            if isinstance(norm, ConditionalBatchNorm2d):
                tables(norm)
        z, x = torch.randn(1, 128).expand(2, -1), torch.randn(1, 3, 16, 16).expand(2, -1, -1, -1)
        images, logits = generator(z, torch.tensor([1, 3])), discriminator(x, torch.tensor([1, 3]))
        assert not torch.allclose(images[0], images[1], atol=1e-3)
        assert not torch.allclose(logits[0], logits[1], atol=1e-3)
        torch.testing.assert_close(*generator(z, torch.tensor([2, 2])))


def test_gradient_penalty_takes_labels() -> None:
    discriminator = SAGANDiscriminator(8, base_channels=2, num_classes=5, spectral_norm=None)
    real, fake, labels = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.tensor([1, 4])
    gradient_penalty(discriminator, real, fake, labels).backward()
    rows = discriminator.to_logit.projection.embedding.weight.grad.abs().sum(1) > 0
    assert torch.equal(rows, torch.tensor([False, True, False, False, True]))


@pytest.mark.parametrize("kind", [SAGANGenerator, SAGANDiscriminator])
def test_no_classes_is_an_error(kind: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        kind(16, num_classes=0)


def test_reset_parameters_makes_a_new_batch_norm() -> None:
    """Also after the meta device, whose memory may hold anything."""
    with torch.device("meta"):
        norm = ConditionalBatchNorm2d(4, 3)
    norm.to_empty(device="cpu")
    for tensor in norm.state_dict().values():
        tensor.fill_(7)
    norm.reset_parameters()
    for name, tensor in ConditionalBatchNorm2d(4, 3).state_dict().items():
        assert torch.equal(norm.state_dict()[name], tensor), name
