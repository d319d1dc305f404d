"""``SAGANGenerator``: sizes, layers, maps, what is normalized, errors."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from references import self_attention_by_loops
from torch_sagan import SAGANGenerator, SelfAttention2d, SpectralNorm, spectral_norm

both_kernels = pytest.mark.usefixtures("kernels")  # the branch of the CPU and that of CUDA

# Odd first maps and even ones, few stages and many; the rest of the sizes is exhaustive.
FAST = (16, 28, 48, 256)
SIZES = [
    pytest.param(size, marks=[] if size in FAST else pytest.mark.exhaustive)
    for size in (16, 28, 32, 48, 64, 96, 128, 256)
]

Entry = tuple[Any, ...]


def trace(network: SAGANGenerator, z: Tensor) -> list[Entry]:
    """What ran, in order: convolutions, batch norms and attentions, each with its channels and output size."""
    ran: list[Entry] = []

    def note(module: nn.Module, _: object, out: Any) -> None:
        y = out[0] if isinstance(out, tuple) else out
        if isinstance(module, SelfAttention2d):
            ran.append(("attention", y.shape[1], y.shape[2]))
        elif isinstance(module, nn.BatchNorm2d):
            ran.append(("norm", y.shape[1], y.shape[2]))
        elif isinstance(module, nn.ConvTranspose2d):
            ran.append(("transposed", module.in_channels, module.out_channels, module.kernel_size[0], y.shape[2]))

    handles = [module.register_forward_hook(note) for module in network.modules()]
    network(z)
    for handle in handles:
        handle.remove()
    return ran


def attention_sizes(network: SAGANGenerator) -> list[int]:
    """Width of every feature map with attention."""
    _, maps = network(torch.randn(2, 128), return_attention=True)
    sizes = [round(attention.shape[1] ** 0.5) for attention in maps]
    assert [size**2 for size in sizes] == [attention.shape[1] for attention in maps]
    return sizes


def normalized_flags(network: nn.Module) -> list[bool]:
    return [parametrize.is_parametrized(m) for m in network.modules() if isinstance(m, nn.ConvTranspose2d)]


# --- sizes and layers ----------------------------------------------------------------------------------------------


@both_kernels
@pytest.mark.parametrize("image_size", SIZES)
def test_forward_and_backward_at_every_size(image_size: int) -> None:
    network = SAGANGenerator(image_size, base_channels=4)
    z = torch.randn(2, 128, requires_grad=True)
    images = network(z)
    assert images.shape == (2, 3, image_size, image_size)
    images.square().sum().backward()
    assert z.grad is not None
    assert z.grad.abs().max() > 0
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("base_channels", [8, 32, 64])
def test_base_widths(base_channels: int) -> None:
    network = SAGANGenerator(32, base_channels=base_channels)
    network(torch.randn(1, 128)).sum().backward()
    wide = max(m.out_channels for m in network.modules() if isinstance(m, nn.ConvTranspose2d))
    assert wide == 4 * base_channels


@settings(max_examples=settings().max_examples // 2)  # each builds a network
@given(
    init=st.integers(4, 7),
    doublings=st.integers(1, 3),
    z_dim=st.integers(1, 9),
    image_channels=st.integers(1, 4),
    batch=st.integers(1, 3),
)
def test_any_init_times_a_power_of_two(init: int, doublings: int, z_dim: int, image_channels: int, batch: int) -> None:
    size = init * 2**doublings
    network = SAGANGenerator(size, z_dim=z_dim, base_channels=2, image_channels=image_channels)
    assert network(torch.randn(batch, z_dim)).shape == (batch, image_channels, size, size)


def test_layers_at_64_pixels() -> None:
    """The network of the tutorials, layer for layer."""
    network = SAGANGenerator(64)
    assert trace(network, torch.randn(2, 128)) == [
        ("transposed", 128, 512, 4, 4),
        ("norm", 512, 4),
        ("transposed", 512, 256, 4, 8),
        ("norm", 256, 8),
        ("transposed", 256, 128, 4, 16),
        ("norm", 128, 16),
        ("attention", 128, 16),
        ("transposed", 128, 64, 4, 32),
        ("norm", 64, 32),
        ("attention", 64, 32),
        ("transposed", 64, 3, 4, 64),
    ]
    assert normalized_flags(network) == [True, True, True, True, False]
    for module in network.modules():
        if isinstance(module, nn.ConvTranspose2d):
            assert module.stride == ((1, 1) if module.in_channels == 128 and module.out_channels == 512 else (2, 2))
            assert module.padding == ((0, 0) if module.stride == (1, 1) else (1, 1))
            assert module.bias is not None
        if isinstance(module, SelfAttention2d):
            assert not any(parametrize.is_parametrized(part) for part in module.modules())
            assert module.query.out_channels == module.channels // 8
            assert module.value.out_channels == module.channels


def test_relu_after_every_norm_and_tanh_at_the_end() -> None:
    """By value: what enters each layer after a batch norm is that norm's output, cut at zero."""
    network = SAGANGenerator(32, base_channels=4, attention_resolutions=()).eval()
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        seen.append((module, args[0].clone(), out.clone()))

    for module in network.modules():
        if isinstance(module, nn.ConvTranspose2d | nn.BatchNorm2d):
            module.register_forward_hook(note)
    images = network(torch.randn(2, 128))
    for (before, _, out), (after, entered, _) in itertools.pairwise(seen):
        if isinstance(before, nn.BatchNorm2d):
            assert isinstance(after, nn.ConvTranspose2d)
            torch.testing.assert_close(entered, out.clamp(min=0))
            assert (out < 0).any()
    torch.testing.assert_close(images, seen[-1][2].tanh())


def test_widths_stop_at_sixteen_times_the_base() -> None:
    ran = trace(SAGANGenerator(256, base_channels=2, attention_resolutions=()), torch.randn(1, 128))
    assert [entry[2] for entry in ran if entry[0] == "transposed"] == [32, 32, 16, 8, 4, 2, 3]


# --- attention -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image_size", "expected"),
    [
        (8, [4]),
        (16, [8]),
        (28, [14]),
        (32, [16]),
        (40, [20]),
        (48, [24]),
        (56, [28]),
        (64, [16, 32]),
        (96, [24]),
        (112, [28]),
        (128, [16, 32]),
        (256, [16, 32]),
    ],
)
def test_attention_by_default(image_size: int, expected: list[int]) -> None:
    assert attention_sizes(SAGANGenerator(image_size, base_channels=2)) == expected


@pytest.mark.parametrize("resolutions", [(), (4,), (8, 16), (32, 4), (4, 8, 16, 32)])
def test_attention_where_it_was_asked_for(resolutions: tuple[int, ...]) -> None:
    network = SAGANGenerator(64, base_channels=2, attention_resolutions=resolutions)
    assert attention_sizes(network) == sorted(resolutions)
    assert sum(isinstance(m, SelfAttention2d) for m in network.modules()) == len(resolutions)


@both_kernels
def test_maps_at_64_pixels() -> None:
    """Input side first, one row for each query, and each row sums to 1."""
    network = SAGANGenerator(64, base_channels=8)
    images, maps = network(torch.randn(3, 128), return_attention=True)
    assert images.shape == (3, 3, 64, 64)
    assert isinstance(maps, list)
    assert [tuple(attention.shape) for attention in maps] == [(3, 256, 256), (3, 1024, 1024)]
    for attention in maps:
        torch.testing.assert_close(attention.sum(2), torch.ones(attention.shape[:2]))


@both_kernels
def test_maps_are_those_of_the_layers() -> None:
    network = SAGANGenerator(16, base_channels=8, attention_resolutions=(4, 8)).double().eval()
    entered: list[tuple[SelfAttention2d, Tensor]] = []
    for module in network.modules():
        if isinstance(module, SelfAttention2d):
            nn.init.constant_(module.gamma, 0.9)
            module.register_forward_pre_hook(lambda m, args: entered.append((m, args[0])))
    z = torch.randn(2, 128, dtype=torch.float64)
    images, maps = network(z, return_attention=True)
    for (layer, x), attention in zip(entered, maps, strict=True):
        _, expected = self_attention_by_loops(x, layer.state_dict())
        torch.testing.assert_close(attention, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(network(z), images)


@both_kernels
def test_gamma_changes_the_image() -> None:
    network = SAGANGenerator(16, base_channels=8).eval()
    z = torch.randn(2, 128)
    before = network(z)
    for module in network.modules():
        if isinstance(module, SelfAttention2d):
            nn.init.constant_(module.gamma, 1.0)
    assert (network(z) - before).abs().max() > 1e-4


def test_another_attention() -> None:
    channels: list[int] = []

    def factory(count: int) -> nn.Module:
        channels.append(count)
        return SelfAttention2d.official(count)

    network = SAGANGenerator(64, base_channels=8, attention=factory)
    _, maps = network(torch.randn(1, 128), return_attention=True)
    assert channels == [16, 8]
    assert [tuple(attention.shape) for attention in maps] == [(1, 256, 64), (1, 1024, 256)]
    network = SAGANGenerator(32, base_channels=2, attention=lambda _: nn.Identity())
    assert network(torch.randn(1, 128)).shape == (1, 3, 32, 32)
    assert not any(isinstance(m, SelfAttention2d) for m in network.modules())


# --- the MNIST system, inputs and outputs --------------------------------------------------------------------------


def test_mnist_system() -> None:
    network = SAGANGenerator(28, image_channels=1, base_channels=8, attention_resolutions=(7,))
    images, maps = network(torch.randn(2, 128), return_attention=True)
    assert images.shape == (2, 1, 28, 28)
    assert [tuple(attention.shape) for attention in maps] == [(2, 49, 49)]


def test_both_shapes_of_z() -> None:
    network = SAGANGenerator(16, z_dim=10, base_channels=4).eval()
    z = torch.randn(3, 10)
    assert torch.equal(network(z), network(z[:, :, None, None]))


def test_images_are_between_minus_one_and_one() -> None:
    network = SAGANGenerator(32, base_channels=8)
    images = network(100 * torch.randn(4, 128))
    assert images.abs().max() <= 1
    assert images.min() < -0.01
    assert images.max() > 0.01


def test_another_output_activation() -> None:
    torch.manual_seed(1)
    plain = SAGANGenerator(16, base_channels=4, output_activation=nn.Identity).eval()
    torch.manual_seed(1)
    tanh = SAGANGenerator(16, base_channels=4).eval()
    z = torch.randn(2, 128)
    torch.testing.assert_close(tanh(z), plain(z).tanh())
    assert not torch.allclose(tanh(z), plain(z))


def test_one_seed_one_network() -> None:
    networks = []
    for _ in range(2):
        torch.manual_seed(7)
        networks.append(SAGANGenerator(16, base_channels=4))
    z = torch.randn(2, 128)
    assert torch.equal(networks[0](z), networks[1](z))
    assert networks[0].state_dict().keys() == networks[1].state_dict().keys()
    for network in networks:
        network.eval()
    state = {name: value.clone() for name, value in networks[0].state_dict().items()}
    assert torch.equal(networks[0](z), networks[0](z))
    assert all(torch.equal(value, state[name]) for name, value in networks[0].state_dict().items())
    other = SAGANGenerator(16, base_channels=4)
    assert not torch.equal(other.eval()(z), networks[0](z))


@both_kernels
def test_samples_do_not_mix_in_evaluation() -> None:
    network = SAGANGenerator(16, base_channels=4).double().eval()
    z = torch.randn(3, 128, dtype=torch.float64)
    torch.testing.assert_close(network(z), torch.cat([network(sample[None]) for sample in z]))


# --- spectral norm -------------------------------------------------------------------------------------------------


def test_normalized_by_our_own() -> None:
    network = SAGANGenerator(32, base_channels=4)
    norms = [m for m in network.modules() if isinstance(m, SpectralNorm)]
    assert len(norms) == 3
    assert all(norm.dim == 1 for norm in norms)


@pytest.mark.parametrize("dim", [0, 1])
def test_another_spectral_norm(dim: int) -> None:
    network = SAGANGenerator(32, base_channels=4, spectral_norm=functools.partial(spectral_norm, dim=dim))
    assert [m.dim for m in network.modules() if isinstance(m, SpectralNorm)] == [dim] * 3
    network = SAGANGenerator(32, base_channels=4, spectral_norm=parametrizations.spectral_norm)
    assert normalized_flags(network) == [True, True, True, False]
    assert not any(isinstance(m, SpectralNorm) for m in network.modules())


def test_no_spectral_norm() -> None:
    network = SAGANGenerator(32, base_channels=4, spectral_norm=None)
    assert normalized_flags(network) == [False] * 4
    assert network(torch.randn(1, 128)).shape == (1, 3, 32, 32)


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [50, 17, 36, 33, 3, 0, -64])
def test_wrong_image_size(image_size: int) -> None:
    with pytest.raises(ValueError, match=f"{image_size}") as error:
        SAGANGenerator(image_size)
    message = str(error.value)
    assert "4" in message
    assert "7" in message
    assert "2" in message


def test_wrong_attention_resolution_lists_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"5.*4, 8, 16, 32|4, 8, 16, 32.*5"):
        SAGANGenerator(64, attention_resolutions=(5,))
    with pytest.raises(ValueError, match="64"):
        SAGANGenerator(64, attention_resolutions=(16, 64))
    with pytest.raises(ValueError, match="7, 14"):
        SAGANGenerator(28, attention_resolutions=(16,))


@pytest.mark.parametrize("shape", [(2, 9), (10,), (2, 10, 1), (2, 10, 2, 2), (2, 9, 1, 1), (2, 10, 1, 1, 1)])
def test_wrong_z(shape: tuple[int, ...]) -> None:
    network = SAGANGenerator(16, z_dim=10, base_channels=4)
    with pytest.raises(ValueError, match="10") as error:
        network(torch.randn(shape))
    for size in shape:
        assert str(size) in str(error.value)


@pytest.mark.parametrize("name", ["z_dim", "base_channels", "image_channels"])
def test_counts_below_one(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*0"):
        SAGANGenerator(16, **{name: 0})


def test_unknown_architecture() -> None:
    with pytest.raises(ValueError, match="unet") as error:
        SAGANGenerator(16, architecture="unet")
    assert "dcgan" in str(error.value)


def test_arguments_after_the_size_are_keyword_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        SAGANGenerator(64, 128)


def test_the_default_architecture_can_be_named() -> None:
    named, default = SAGANGenerator(16, base_channels=4, architecture="dcgan"), SAGANGenerator(16, base_channels=4)
    assert str(named) == str(default)
