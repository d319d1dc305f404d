"""Conditional batch norm against batch norm class by class, the projection against its formula, and wrong labels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

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


def test_converts_to_synchronised_batch_norm() -> None:
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


# --- labels ----------------------------------------------------------------------------------------------------------

CONDITIONAL: dict[str, Callable[[Tensor | None], object]] = {
    "batch norm": lambda labels: ConditionalBatchNorm2d(3, 5)(torch.randn(2, 3, 4, 4), labels),
    "projection": lambda labels: ProjectionHead(3, 5)(torch.randn(2, 3), labels),
    "generator": lambda labels: SAGANGenerator(8, base_channels=2, num_classes=5)(torch.randn(2, 128), labels),
    "discriminator": lambda labels: SAGANDiscriminator(8, base_channels=2, num_classes=5)(
        torch.randn(2, 3, 8, 8), labels
    ),
    "residual generator": lambda labels: SAGANGenerator(
        8, base_channels=2, num_classes=5, architecture="resnet", attention_resolutions=()
    )(torch.randn(2, 128), labels),
    "residual discriminator": lambda labels: SAGANDiscriminator(
        8, base_channels=2, num_classes=5, architecture="resnet", attention_resolutions=()
    )(torch.randn(2, 3, 8, 8), labels),
}

WRONG = {
    "missing": (None, ValueError, "labels are needed.*5 classes"),
    "too large": (torch.tensor([0, 5]), ValueError, "from 0 to 4, got 5"),
    "negative": (torch.tensor([-1, 2]), ValueError, "from 0 to 4, got -1"),
    "a shape": (torch.tensor([[0], [1]]), ValueError, r"shape \(2,\).*\(2, 1\)"),
    "too few": (torch.tensor([1]), ValueError, r"shape \(2,\).*\(1,\)"),
    "one for all": (torch.tensor(1), ValueError, r"shape \(2,\).*\(\)"),
    "floats": (torch.tensor([0.0, 1.0]), TypeError, "int64 or int32, got torch.float32"),
    "one-hot": (torch.eye(5)[:2].bool(), TypeError, "int64 or int32, got torch.bool"),
    "a list": ([0, 1], TypeError, "int64 or int32, got list"),
}


@pytest.mark.parametrize("kind", CONDITIONAL)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_labels_are_one_line_errors(kind: str, wrong: str) -> None:
    labels, error, message = WRONG[wrong]
    with pytest.raises(error, match=message) as raised:
        CONDITIONAL[kind](labels)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", CONDITIONAL)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_right_labels(kind: str, dtype: torch.dtype) -> None:
    CONDITIONAL[kind](torch.tensor([4, 0], dtype=dtype))


@pytest.mark.parametrize("architecture", ["dcgan", "resnet"])
def test_labels_that_nobody_wants(architecture: str) -> None:
    labels = torch.tensor([0, 1])
    generator = SAGANGenerator(8, base_channels=2, architecture=architecture, attention_resolutions=())
    discriminator = SAGANDiscriminator(8, base_channels=2, architecture=architecture, attention_resolutions=())
    with pytest.raises(ValueError, match="not conditional"):
        generator(torch.randn(2, 128), labels)
    with pytest.raises(ValueError, match="not conditional"):
        discriminator(torch.randn(2, 3, 8, 8), labels)
    with pytest.raises(ValueError, match="not conditional"):
        ProjectionHead(3)(torch.randn(2, 3), labels)
    assert torch.isfinite(generator(torch.randn(2, 128), None)).all()


@pytest.mark.parametrize("kind", CONDITIONAL)
def test_fake_labels_have_no_values(kind: str) -> None:
    with FakeTensorMode():
        CONDITIONAL[kind](torch.tensor([4, 0]))
        with pytest.raises(ValueError, match=r"shape \(2,\).*\(1,\)"):
            CONDITIONAL[kind](torch.tensor([1]))


@pytest.mark.parametrize("architecture", ["dcgan", "resnet"])
def test_a_traced_network_takes_other_labels(architecture: str) -> None:
    """The trace contains no value of a label, and asserts the range."""
    generator = SAGANGenerator(
        8, base_channels=2, num_classes=5, architecture=architecture, attention_resolutions=()
    ).eval()
    with torch.no_grad():
        for norm in generator.modules():
            if isinstance(norm, ConditionalBatchNorm2d):
                tables(norm)
        z = torch.randn(2, 128)
        traced = make_fx(generator)(z, torch.tensor([4, 0]))
        expected = generator(z, torch.tensor([1, 3]))
        assert not torch.equal(expected, generator(z, torch.tensor([4, 0])))
        assert torch.equal(traced(z, torch.tensor([1, 3])), expected)
        for wrong in ([0, 5], [-1, 2]):
            with pytest.raises(RuntimeError, match="expected labels from 0 to 4"):
                traced(z, torch.tensor(wrong))


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
