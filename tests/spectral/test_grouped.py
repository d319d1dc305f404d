"""The power iterations of a network's pass, all at once, are those of each weight alone."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from torch_sagan import (
    SAGANDiscriminator,
    SAGANGenerator,
    SpectralNorm,
    apply_spectral_norm,
    functional,
    spectral_norm,
    spectral_norms,
)
from training.flags import Config
from training.objectives import objective
from training.state import build_networks
from training.step import GAN, Piece, no_augmentation, training_step

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "G dcgan": lambda **settings: SAGANGenerator(16, base_channels=4, **settings),
    "D dcgan, classes": lambda **settings: SAGANDiscriminator(16, base_channels=4, num_classes=3, **settings),
    "G resnet, classes": lambda **settings: SAGANGenerator(
        16, base_channels=4, architecture="resnet", num_classes=3, **settings
    ),
    "D resnet": lambda **settings: SAGANDiscriminator(16, base_channels=4, architecture="resnet", **settings),
}
networks = pytest.mark.parametrize("kind", NETWORKS)


def inputs(kind: str, count: int = 3) -> tuple[Tensor, ...]:
    x = torch.randn((count, 128) if kind.startswith("G") else (count, 3, 16, 16), dtype=torch.float64)
    return (x, torch.arange(count) % 3) if "classes" in kind else (x,)


def norms(network: nn.Module) -> list[SpectralNorm]:
    return [module for module in network.modules() if isinstance(module, SpectralNorm)]


@contextmanager
def each_alone() -> Iterator[None]:
    """Every weight iterates when it is read."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("generator", "discriminator"):
            patch.setattr(f"torch_sagan.networks.{module}.iterate_together", lambda network: None)
        yield


def gradients(y: Tensor, network: nn.Module, *, twice: bool = False) -> list[Tensor]:
    # Not of a mean, whose gradient in front of a tanh or a batch norm could vanish.
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() + y.square().sum()
    parameters = [p for name, p in network.named_parameters() if not name.endswith("key.bias")]  # its gradient is 0
    first = torch.autograd.grad(loss, parameters, create_graph=twice)
    return list(torch.autograd.grad(sum(g.square().sum() for g in first), parameters)) if twice else list(first)


@networks
@pytest.mark.parametrize("n_iterations", [1, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_equals_an_iteration_for_each_weight(kind: str, n_iterations: int, channels_last: bool) -> None:
    """Outputs, u, v and gradients of first and second order, over several passes."""

    def normalize(module: nn.Module) -> nn.Module:
        return spectral_norm(module, n_power_iterations=n_iterations)

    together = NETWORKS[kind](spectral_norm=normalize).double()
    for module in together.modules():
        if isinstance(module, nn.Module) and isinstance(getattr(module, "gamma", None), nn.Parameter):
            nn.init.constant_(module.gamma, 0.5)
    if channels_last:
        together = together.to(memory_format=torch.channels_last)
    alone = copy.deepcopy(together)
    for turn in range(3):
        x = inputs(kind)
        y = together(*x)
        with each_alone():
            expected = alone(*x)
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
        for (name, buffer), other in zip(together.named_buffers(), alone.buffers(), strict=True):
            torch.testing.assert_close(buffer, other, rtol=1e-11, atol=1e-11, msg=name)
        actual, others = gradients(y, together, twice=turn == 2), gradients(expected, alone, twice=turn == 2)
        # Rounding of float64 in sums of some thousands, of values up to the largest of all: the gradient of a bias in
        # front of a batch norm is zero but for such rounding.
        largest = max(float(other.abs().max()) for other in others)
        for mine, other in zip(actual, others, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12 * largest)


@networks
def test_every_weight_is_iterated_once_and_nothing_is_left(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = NETWORKS[kind]().double()
    monkeypatch.setattr(SpectralNorm, "_iterate", lambda *_: pytest.fail("a weight iterates on its own"))
    before = [norm._u.clone() for norm in norms(network)]
    network(*inputs(kind))
    for norm, old in zip(norms(network), before, strict=True):
        assert norm._prepared is None
        assert len(old) == 1 or not torch.equal(norm._u, old)  # u of one output is always 1


@networks
def test_evaluation_iterates_nothing(kind: str) -> None:
    network = NETWORKS[kind]().double().eval()
    before = copy.deepcopy(network.state_dict())
    network(*inputs(kind))
    assert all(norm._prepared is None for norm in norms(network))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_weights_that_count_as_zero_keep_their_vectors_beside_others() -> None:
    """And their gradient is that of the weight itself, which is returned as it is."""
    network = SAGANDiscriminator(16, base_channels=2, spectral_norm=lambda m: spectral_norm(m, eps=1e-3)).double()
    zero, tiny, others = norms(network)[0], norms(network)[1], norms(network)[2:]
    assert others == []
    with torch.no_grad():
        network.blocks[0].conv.parametrizations.weight.original.zero_()
        network.blocks[1].conv.parametrizations.weight.original.mul_(1e-5)
    alone = copy.deepcopy(network)
    before = [(norm._u.clone(), norm._v.clone()) for norm in (zero, tiny)]
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    y = network(x)
    with each_alone():
        expected = alone(x)
    assert torch.equal(y, expected)
    for norm, (u, v) in zip((zero, tiny), before, strict=True):
        assert torch.equal(norm._u, u)
        assert torch.equal(norm._v, v)
    for mine, other in zip(gradients(y, network), gradients(expected, alone), strict=True):
        assert torch.equal(mine, other)


def test_a_weight_that_changes_before_it_is_read_iterates_again() -> None:
    """What was prepared belongs to the weight as it was."""
    network = SAGANDiscriminator(16, base_channels=2).double()
    layer, norm = network.blocks[1].conv, norms(network)[1]
    original = layer.parametrizations.weight.original
    old, new = original.detach().clone(), torch.randn_like(original)

    def change(*_: Any) -> None:
        with torch.no_grad():
            original.copy_(new)

    layer.register_forward_pre_hook(change)
    u, v = norm._u.clone(), norm._v.clone()
    network(torch.randn(2, 3, 16, 16, dtype=torch.float64))
    for weight in (old, new):
        u, v, _ = functional.power_iteration(weight.flatten(1), u, v)
    torch.testing.assert_close(norm._u, u, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm._v, v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_weights_whose_squares_leave_the_range(scale: float) -> None:
    network = SAGANDiscriminator(16, base_channels=2, spectral_norm=lambda m: spectral_norm(m, eps=0))
    with torch.no_grad():
        network.blocks[1].conv.parametrizations.weight.original.mul_(scale)
    alone = copy.deepcopy(network)
    x = torch.randn(2, 3, 16, 16)
    y = network(x)
    with each_alone():
        expected = alone(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)  # rounding in float32
    assert y.abs().max() < 100
    for mine, other in zip(network.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_weight_that_is_not_finite_keeps_its_vectors_beside_others(value: float) -> None:
    """Also one whose sigma is not. It is returned as it is, and the other weights are not disturbed."""
    network = SAGANDiscriminator(16, base_channels=2)
    layer, twin = network.blocks[1].conv, copy.deepcopy(network)
    original = layer.parametrizations.weight.original
    with torch.no_grad():
        original.fill_(value) if value == 3e38 else original[0, 0, 0].fill_(value)
    u, v = norms(network)[1]._u.clone(), norms(network)[1]._v.clone()
    seen: list[Tensor] = []
    network.blocks[0].register_forward_hook(lambda *arguments: seen.append(layer.weight))
    x = torch.randn(2, 3, 16, 16)
    network(x)
    twin(x)
    torch.testing.assert_close(seen[0], original, rtol=0, atol=0, equal_nan=True)
    if value != 3e38:  # whose products have a direction
        assert torch.equal(norms(network)[1]._u, u)
        assert torch.equal(norms(network)[1]._v, v)
    assert torch.equal(norms(network)[0]._u, norms(twin)[0]._u)


def test_what_a_pass_left_that_failed_is_not_used_for_another_weight() -> None:
    """Not even for one that has had as many changes."""
    network = SAGANDiscriminator(16, base_channels=2).double()
    layer = network.blocks[1].conv
    handle = network.blocks[0].register_forward_hook(lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        network(inputs("D resnet")[0])
    handle.remove()
    chain = layer.parametrizations.weight
    u, version = chain[0]._u.clone(), chain.original._version
    chain.original = nn.Parameter(torch.randn_like(chain.original))
    for _ in range(version):
        with torch.no_grad():
            chain.original.add_(0)
    assert chain.original._version == version
    weight = layer.weight
    _, _, sigma = functional.power_iteration(chain.original.detach().flatten(1), u, chain[0]._v)
    torch.testing.assert_close(weight, chain.original / sigma, rtol=1e-12, atol=1e-12)


@networks
def test_in_inference_mode(kind: str) -> None:
    """Made and run there; its tensors have no versions."""
    with torch.inference_mode():
        network = NETWORKS[kind]().double()
        before = [norm._u.clone() for norm in norms(network)]
        network(*inputs(kind))
        assert any(not torch.equal(norm._u, old) for norm, old in zip(norms(network), before, strict=True))


@networks
def test_two_threads_and_one_network(kind: str) -> None:
    """They share u and v, as with a norm for each weight; every pass is as one of that network at that time."""
    network = NETWORKS[kind]().double()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            for _ in range(30):
                assert network(*inputs(kind)).isfinite().all()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    # After sixty passes sigma is exact to some per cent; a torn u or v would not be of unit norm.
    assert all(norm._u.norm().item() == pytest.approx(1) == norm._v.norm().item() for norm in norms(network))
    assert all(value == pytest.approx(1, abs=0.1) for value in spectral_norms(network).values())


@networks
def test_functional_call_with_other_tensors(kind: str) -> None:
    """Neither the weights nor u and v of the network itself are read or written."""
    network, other = NETWORKS[kind]().double(), NETWORKS[kind]().double()
    before, twin = copy.deepcopy(network.state_dict()), copy.deepcopy(other)
    tensors = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    x = inputs(kind)
    torch.testing.assert_close(torch.func.functional_call(network, tensors, x), twin(*x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(other.state_dict(), twin.state_dict(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert all(norm._prepared is None for norm in norms(network))


def test_a_transferred_norm_in_a_network() -> None:
    """It belongs to two modules, and to one parameter of both."""
    network = SAGANDiscriminator(16, base_channels=2).double()
    old = network.blocks[1].conv
    new = nn.Conv2d(old.in_channels, old.out_channels, 4, 2, 1).double()
    new.bias = old.bias
    twin = copy.deepcopy(network)
    u = norms(network)[1]._u.clone()
    new.eval()  # in training registration iterates
    parametrize.transfer_parametrizations_and_params(old, new)
    assert torch.equal(norms(network)[1]._u, u)
    network.blocks[1].conv = new
    network.train()
    x = inputs("D dcgan")[0]
    torch.testing.assert_close(network(x), twin(x), rtol=1e-12, atol=1e-12)
    for mine, other in zip(norms(network), norms(twin), strict=True):
        torch.testing.assert_close(mine._u, other._u, rtol=1e-12, atol=1e-12)


class Scaled(nn.Module):
    """A parametrization in front of the norm."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_weights_that_are_not_plain_parameters_iterate_on_their_own() -> None:
    """In half precision, or behind another parametrization; the rest of the network is not disturbed."""
    network = SAGANDiscriminator(16, base_channels=4, spectral_norm=None)
    first, second = (block.conv for block in network.blocks)
    parametrize.register_parametrization(first, "weight", Scaled())
    apply_spectral_norm(network)
    network.to_logit.to(torch.bfloat16)
    network.to_logit.register_forward_pre_hook(lambda module, args: (args[0].bfloat16(), args[1]))
    alone = copy.deepcopy(network)
    x = torch.randn(2, 3, 16, 16)
    y = network(x)
    with each_alone():
        expected = alone(x)
    torch.testing.assert_close(y, expected)
    for mine, other in zip(network.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(mine, other)
    assert second.parametrizations.weight[0]._prepared is None


def test_norms_of_convolutions_iterate_on_their_own() -> None:
    """Beside norms of matrices, which are grouped."""
    network = SAGANDiscriminator(16, base_channels=4, architecture="resnet", spectral_norm=None).double()
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    apply_spectral_norm(network, of="convolution", example_input=x)
    kinds = {type(norm).__name__ for norm in norms(network)}
    assert kinds == {"SpectralNorm", "ConvolutionNorm"}
    alone = copy.deepcopy(network)
    prepared: list[list[str]] = []
    network.blocks[0].register_forward_pre_hook(
        lambda *_: prepared.append([type(norm).__name__ for norm in norms(network) if norm._prepared])
    )
    y = network(x)
    with each_alone():
        torch.testing.assert_close(y, alone(x), rtol=1e-12, atol=1e-12)
    assert {*prepared[0]} == {"SpectralNorm"}
    torch.testing.assert_close(network.state_dict(), alone.state_dict(), rtol=1e-11, atol=1e-11)


class Subclass(nn.Parameter):
    """A weight that may do anything with the operations of tensors."""


def test_vectors_and_parameters_of_another_class_iterate_on_their_own() -> None:
    network = SAGANDiscriminator(16, base_channels=2).double()
    spectral_norm(network.blocks[0].conv, "bias")
    chain = network.blocks[1].conv.parametrizations.weight
    chain.original = Subclass(chain.original.detach())
    alone = copy.deepcopy(network)
    seen: list[object] = []
    network.blocks[0].register_forward_hook(lambda *_: seen.append(chain[0]._prepared))
    x = inputs("D resnet")[0]
    y = network(x)
    with each_alone():
        torch.testing.assert_close(y, alone(x), rtol=1e-12, atol=1e-12)
    assert seen == [None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_the_iteration(dtype: torch.dtype) -> None:
    network = SAGANGenerator(16, base_channels=4)
    twin = copy.deepcopy(network)
    z = torch.randn(3, 128)
    with torch.autocast("cpu", dtype):
        network(z)
    twin(z)
    for (name, mine), other in zip(network.named_buffers(), twin.buffers(), strict=True):
        if name.endswith(("_u", "_v")):
            assert torch.equal(mine, other), name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_block_of_the_network_can_be_checkpointed(use_reentrant: bool) -> None:
    """Its weights are read again in the backward, outside of the network's pass."""
    network = SAGANDiscriminator(16, base_channels=4, architecture="resnet").double()
    twin = copy.deepcopy(network)
    block = network.blocks[1]
    forward = block.forward
    block.forward = lambda x: checkpoint(forward, x, use_reentrant=use_reentrant)
    x = inputs("D resnet")[0].requires_grad_()
    y = network(x)
    assert torch.equal(y, twin(x))
    y.sum().backward()
    twin(x)  # the repetition iterates once more, so its gradient is of a second pass
    assert all(
        p.grad is not None and p.grad.isfinite().all() for n, p in network.named_parameters() if "key.bias" not in n
    )


class Idle:
    """An optimizer that costs nothing."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def zero_grad(self) -> None:
        for parameter in self.network.parameters():
            parameter.grad = None

    def step(self) -> None:
        pass


class Operators(TorchDispatchMode):
    """How many operators are called that launch something on a GPU, which views do not."""

    VIEWS = (
        "view", "_unsafe_view", "expand", "permute", "transpose", "t", "slice", "select", "squeeze", "unsqueeze",
        "alias", "as_strided", "split", "split_with_sizes", "unbind", "detach", "empty", "empty_like", "new_empty",
        "empty_strided", "_reshape_alias", "lift_fresh",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator.overloadpacket.__name__
        self.calls[name] += name not in self.VIEWS
        return operator(*args, **(kwargs or {}))


# With an iteration for each weight, padded attention and copies of weights that are stored channels last, a step of the
# same networks made 567 and 2361 operators.
@pytest.mark.parametrize(
    ("config", "classes", "at_most"),
    [(Config(), None, 304), (Config(image_size=128, architecture="resnet"), 1000, 1000)],
    ids=["dcgan, 64 px", "resnet, 128 px"],
)
def test_operators_of_a_step(config: Config, classes: int | None, at_most: int) -> None:
    """What a training step launches on CUDA, without Adam, counted on the meta device."""
    with torch.device("meta"):
        generator, discriminator = (
            network.to(memory_format=torch.channels_last) for network in build_networks(config, 3, classes)
        )
        gan = GAN(
            generator, discriminator, Idle(generator), Idle(discriminator), objective("hinge", 0.0, no_augmentation)
        )
        labels = None if classes is None else torch.zeros(2, dtype=torch.int64)
        real = torch.zeros(2, 3, config.image_size, config.image_size).to(memory_format=torch.channels_last)
        with Operators() as operators:
            training_step(gan, iter([[Piece(real, torch.zeros(2, 128), labels)]]))
    assert operators.calls["_softmax"] == 0  # attention is two operators of our own
    assert operators.calls.total() <= at_most, operators.calls.most_common()
