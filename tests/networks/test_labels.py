"""Class labels: what is wrong with them is said in one line, and with the same words however a network is run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from torch_sagan import ConditionalBatchNorm2d, ProjectionHead, SAGANDiscriminator, SAGANGenerator

CONDITIONAL: dict[str, Callable[[Tensor | None], object]] = {
    "batch norm": lambda labels: ConditionalBatchNorm2d(3, 5)(torch.randn(2, 3, 4, 4), labels),
    "projection": lambda labels: ProjectionHead(3, 5)(torch.randn(2, 3), labels),
    "generator": lambda labels: SAGANGenerator(8, base_channels=2, num_classes=5)(torch.randn(2, 128), labels),
    "discriminator": lambda labels: SAGANDiscriminator(8, base_channels=2, num_classes=5)(
        torch.randn(2, 3, 8, 8), labels
    ),
    "generator with the class at z": lambda labels: SAGANGenerator(
        8, base_channels=2, num_classes=5, conditioning="latent"
    )(torch.randn(2, 128), labels),
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


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in ("batch norm", "projection", "generator") else pytest.mark.exhaustive)
        for kind in CONDITIONAL
    ],
)
def test_fake_labels_have_no_values(kind: str) -> None:
    with FakeTensorMode():
        CONDITIONAL[kind](torch.tensor([4, 0]))
        with pytest.raises(ValueError, match=r"shape \(2,\).*\(1,\)"):
            CONDITIONAL[kind](torch.tensor([1]))


@pytest.mark.parametrize("kind", CONDITIONAL)
def test_labels_on_another_device(kind: str) -> None:
    with pytest.raises(ValueError, match="expected labels on cpu, where the other input is, got meta"):
        CONDITIONAL[kind](torch.tensor([4, 0], device="meta"))
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match="expected labels on meta, where the other input is, got cpu"),
    ):
        CONDITIONAL[kind](torch.tensor([4, 0], device="cpu"))


def test_refused_labels_change_nothing() -> None:
    """No power iteration and no batch statistics: the call can be repeated with the right labels."""
    generator = SAGANGenerator(8, z_dim=8, base_channels=2, num_classes=5)
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    with pytest.raises(ValueError, match="got 5"):
        generator(torch.randn(2, 8), torch.tensor([0, 5]))
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())


# --- however a network is run --------------------------------------------------------------------------------------

Run = Callable[[Tensor], object]
RIGHT = torch.tensor([1, 3])


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in module.named_parameters()}


def by_autocast(module: nn.Module, x: Tensor) -> Run:
    def run(labels: Tensor) -> object:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(x, labels)

    return run


def by_gradient(module: nn.Module, x: Tensor) -> Run:
    return lambda labels: grad(lambda p: functional_call(module, p, (x, labels)).sum())(parameters(module))


def by_gradient_of_each(module: nn.Module, x: Tensor) -> Run:
    def loss(p: dict[str, Tensor], sample: Tensor, label: Tensor) -> Tensor:
        return functional_call(module, p, (sample[None], label[None])).sum()

    return lambda labels: vmap(grad(loss), in_dims=(None, 0, 0))(parameters(module), x, labels)


def by_compiler(module: nn.Module, x: Tensor) -> Run:
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    return lambda labels: compiled(x, labels).sum().backward()


WAYS: dict[str, Callable[[nn.Module, Tensor], Run]] = {
    "eager": partial,
    "training": lambda module, x: partial(module.train(), x),
    "no gradients": lambda module, x: torch.no_grad()(partial(module, x)),
    "autocast": by_autocast,
    "torch.func.grad": by_gradient,
    "vmap of grad": by_gradient_of_each,
    "make_fx": lambda module, x: partial(make_fx(module), x),
    "made by make_fx": lambda module, x: partial(make_fx(module)(x, RIGHT), x),
    "torch.export": lambda module, x: partial(torch.export.export(module, (x, RIGHT)).module(), x),
}


def network(kind: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    if kind is SAGANGenerator:
        return kind(8, z_dim=8, base_channels=2, num_classes=5, attention_resolutions=()).eval(), torch.randn(2, 8)
    return kind(8, base_channels=2, num_classes=5, attention_resolutions=()).eval(), torch.randn(2, 3, 8, 8)


def assert_range_is_asserted(run: Run) -> None:
    run(RIGHT)
    for wrong in ([0, 5], [-1, 2]):
        with pytest.raises((ValueError, RuntimeError), match="expected labels from 0 to 4"):
            run(torch.tensor(wrong))


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's exporter uses it
@pytest.mark.parametrize(
    ("kind", "way"),
    [
        *((SAGANGenerator, way) for way in WAYS),
        *((SAGANDiscriminator, way) for way in WAYS if way != "torch.export"),
        pytest.param(SAGANDiscriminator, "torch.export", marks=pytest.mark.exhaustive),  # tracing takes seconds
    ],
)
def test_the_range_however_it_is_run(kind: type[nn.Module], way: str) -> None:
    assert_range_is_asserted(WAYS[way](*network(kind)))


# A trace omits checks of shapes, and drops assertions.
@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", [SAGANGenerator, SAGANDiscriminator])
def test_a_trace_of_torch_script_has_the_error_of_the_look_up(kind: type[nn.Module]) -> None:
    module, x = network(kind)
    traced = torch.jit.trace(module, (x, RIGHT))
    for wrong in ([0, 5], [-1, 2]):
        with pytest.raises(RuntimeError, match="index out of range"):
            traced(x, torch.tensor(wrong))


@pytest.mark.exhaustive  # the compiler
@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [SAGANGenerator, SAGANDiscriminator])
def test_the_range_when_compiled(kind: type[nn.Module], training: bool) -> None:
    module, x = network(kind)
    assert_range_is_asserted(by_compiler(module.train(training), x))


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("way", ["torch.export", "vmap of grad", "torch.jit.trace"])
def test_the_range_where_the_class_is_at_the_latent_vector(way: str) -> None:
    options = {"z_dim": 8, "base_channels": 2, "num_classes": 5, "attention_resolutions": (), "conditioning": "latent"}
    module, x = SAGANGenerator(8, **options).eval(), torch.randn(2, 8)
    if way != "torch.jit.trace":
        return assert_range_is_asserted(WAYS[way](module, x))
    traced = torch.jit.trace(module, (x, RIGHT))
    assert torch.equal(traced(x, RIGHT.flip(0)), module(x, RIGHT.flip(0)))
    for wrong in ([0, 5], [-1, 2]):
        with pytest.raises(RuntimeError, match="index out of range"):
            traced(x, torch.tensor(wrong))


@pytest.mark.parametrize("architecture", ["dcgan", "resnet"])
def test_a_traced_network_takes_other_labels(architecture: str) -> None:
    """The trace contains no value of a label."""
    generator = SAGANGenerator(
        8, base_channels=2, num_classes=5, architecture=architecture, attention_resolutions=()
    ).eval()
    with torch.no_grad():
        for norm in generator.modules():
            if isinstance(norm, ConditionalBatchNorm2d):
                nn.init.normal_(norm.gamma)
        z = torch.randn(2, 128)
        traced = make_fx(generator)(z, torch.tensor([4, 0]))
        expected = generator(z, torch.tensor([1, 3]))
        assert not torch.equal(expected, generator(z, torch.tensor([4, 0])))
        assert torch.equal(traced(z, torch.tensor([1, 3])), expected)
