"""``SAGANDiscriminator``: sizes, layers, maps, what is normalized, errors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from references import self_attention_by_loops
from torch_sagan import SAGANDiscriminator, SelfAttention2d, SpectralNorm, spectral_norms

both_kernels = pytest.mark.usefixtures("kernels")  # the branch of the CPU and that of CUDA

# Odd first maps and even ones, few stages and many; the rest of the sizes is exhaustive.
FAST = (16, 28, 48, 256)
SIZES = [
    pytest.param(size, marks=[] if size in FAST else pytest.mark.exhaustive)
    for size in (16, 28, 32, 48, 64, 96, 128, 256)
]


def trace(network: SAGANDiscriminator, images: Tensor) -> list[tuple[Any, ...]]:
    """What ran, in order: convolutions outside attention, and attentions, each with its channels and output size."""
    ran: list[tuple[Any, ...]] = []
    inside = {
        id(part) for m in network.modules() if isinstance(m, SelfAttention2d) for part in m.modules() if part is not m
    }

    def note(module: nn.Module, _: object, out: Any) -> None:
        y = out[0] if isinstance(out, tuple) else out
        if isinstance(module, SelfAttention2d):
            ran.append(("attention", y.shape[1], y.shape[2]))
        elif isinstance(module, nn.Conv2d) and id(module) not in inside:
            ran.append(("conv", module.in_channels, module.out_channels, module.kernel_size[0], y.shape[2]))

    handles = [module.register_forward_hook(note) for module in network.modules()]
    network(images)
    for handle in handles:
        handle.remove()
    return ran


def attention_sizes(network: SAGANDiscriminator, image_size: int) -> list[int]:
    """Width of every feature map with attention, input side first."""
    _, maps = network(torch.randn(2, 3, image_size, image_size), return_attention=True)
    sizes = [round(attention.shape[1] ** 0.5) for attention in maps]
    assert [size**2 for size in sizes] == [attention.shape[1] for attention in maps]
    return sizes


# --- sizes and layers ----------------------------------------------------------------------------------------------


@both_kernels
@pytest.mark.parametrize("image_size", SIZES)
def test_forward_and_backward_at_every_size(image_size: int) -> None:
    network = SAGANDiscriminator(image_size, base_channels=4)
    images = torch.randn(2, 3, image_size, image_size, requires_grad=True)
    logits = network(images)
    assert logits.shape == (2,)
    logits.square().sum().backward()
    assert images.grad is not None
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("base_channels", [8, 32, 64])
def test_base_widths(base_channels: int) -> None:
    network = SAGANDiscriminator(32, base_channels=base_channels)
    network(torch.randn(1, 3, 32, 32)).sum().backward()
    assert max(m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)) == 4 * base_channels


@settings(max_examples=settings().max_examples // 2)  # each builds a network
@given(init=st.integers(4, 7), doublings=st.integers(1, 3), image_channels=st.integers(1, 4), batch=st.integers(1, 3))
def test_any_init_times_a_power_of_two(init: int, doublings: int, image_channels: int, batch: int) -> None:
    size = init * 2**doublings
    network = SAGANDiscriminator(size, base_channels=2, image_channels=image_channels)
    assert network(torch.randn(batch, image_channels, size, size)).shape == (batch,)


@pytest.mark.parametrize("return_attention", [False, True])
def test_a_batch_of_one_gives_a_vector_of_one(return_attention: bool) -> None:
    out = SAGANDiscriminator(16, base_channels=4)(torch.randn(1, 3, 16, 16), return_attention=return_attention)
    assert (out[0] if return_attention else out).shape == (1,)


def test_layers_at_64_pixels() -> None:
    """The network of the tutorials, layer for layer."""
    network = SAGANDiscriminator(64)
    assert trace(network, torch.randn(2, 3, 64, 64)) == [
        ("conv", 3, 64, 4, 32),
        ("conv", 64, 128, 4, 16),
        ("conv", 128, 256, 4, 8),
        ("attention", 256, 8),
        ("conv", 256, 512, 4, 4),
        ("attention", 512, 4),
        ("conv", 512, 1, 4, 1),
    ]
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (4, 4)]
    assert [parametrize.is_parametrized(m) for m in convolutions] == [True, True, True, True, False]
    assert [m.stride for m in convolutions[:-1]] == [(2, 2)] * 4
    assert [m.padding for m in convolutions] == [(1, 1)] * 4 + [(0, 0)]
    assert all(m.bias is not None for m in convolutions)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
    for module in network.modules():
        if isinstance(module, SelfAttention2d):
            assert not any(parametrize.is_parametrized(part) for part in module.modules())


def test_leaky_relu_of_a_tenth_after_every_convolution_but_the_last() -> None:
    network = SAGANDiscriminator(32, base_channels=4, attention_resolutions=()).eval()
    seen: list[tuple[Tensor, Tensor]] = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, args, out: seen.append((args[0].clone(), out.clone())))
    logits = network(torch.randn(2, 3, 32, 32))
    assert len(seen) == 4
    for (_, out), (entered, _) in itertools.pairwise(seen):
        torch.testing.assert_close(entered, torch.where(out > 0, out, 0.1 * out))
        assert (out < 0).any()
    torch.testing.assert_close(logits, seen[-1][1].flatten())


def test_widths_stop_at_sixteen_times_the_base() -> None:
    ran = trace(SAGANDiscriminator(256, base_channels=2, attention_resolutions=()), torch.randn(1, 3, 256, 256))
    assert [entry[2] for entry in ran] == [2, 4, 8, 16, 32, 32, 1]


@pytest.mark.parametrize("init", [5, 6, 7])
def test_the_last_convolution_covers_the_last_map(init: int) -> None:
    (*_, last) = trace(SAGANDiscriminator(4 * init, base_channels=2), torch.randn(1, 3, 4 * init, 4 * init))
    assert last == ("conv", 4, 1, init, 1)


# --- attention -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image_size", "expected"),
    [(8, [4]), (16, [8, 4]), (28, [14, 7]), (48, [12, 6]), (64, [8, 4]), (128, [8, 4]), (256, [8, 4])],
)
def test_attention_by_default(image_size: int, expected: list[int]) -> None:
    assert attention_sizes(SAGANDiscriminator(image_size, base_channels=2), image_size) == expected


@pytest.mark.parametrize("resolutions", [(), (4,), (8, 16), (32, 4), (4, 8, 16, 32)])
def test_attention_where_it_was_asked_for(resolutions: tuple[int, ...]) -> None:
    network = SAGANDiscriminator(64, base_channels=2, attention_resolutions=resolutions)
    assert attention_sizes(network, 64) == sorted(resolutions, reverse=True)
    assert sum(isinstance(m, SelfAttention2d) for m in network.modules()) == len(resolutions)


@both_kernels
def test_maps_at_64_pixels() -> None:
    logits, maps = SAGANDiscriminator(64, base_channels=8)(torch.randn(3, 3, 64, 64), return_attention=True)
    assert logits.shape == (3,)
    assert isinstance(maps, list)
    assert [tuple(attention.shape) for attention in maps] == [(3, 64, 64), (3, 16, 16)]
    for attention in maps:
        torch.testing.assert_close(attention.sum(2), torch.ones(attention.shape[:2]))


@both_kernels
def test_maps_are_those_of_the_layers() -> None:
    network = SAGANDiscriminator(16, base_channels=8).double().eval()
    entered: list[tuple[SelfAttention2d, Tensor]] = []
    for module in network.modules():
        if isinstance(module, SelfAttention2d):
            nn.init.constant_(module.gamma, 0.9)
            module.register_forward_pre_hook(lambda m, args: entered.append((m, args[0])))
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    logits, maps = network(x, return_attention=True)
    assert len(maps) == 2
    for (layer, features), attention in zip(entered, maps, strict=True):
        _, expected = self_attention_by_loops(features, layer.state_dict())
        torch.testing.assert_close(attention, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(network(x), logits)


def test_another_attention() -> None:
    channels: list[int] = []

    def factory(count: int) -> nn.Module:
        channels.append(count)
        return SelfAttention2d.official(count)

    network = SAGANDiscriminator(64, base_channels=8, attention=factory)
    _, maps = network(torch.randn(1, 3, 64, 64), return_attention=True)
    assert channels == [32, 64]
    assert [tuple(attention.shape) for attention in maps] == [(1, 64, 16), (1, 16, 4)]
    network = SAGANDiscriminator(32, base_channels=2, attention=lambda _: nn.Identity())
    assert network(torch.randn(2, 3, 32, 32)).shape == (2,)
    assert not any(isinstance(m, SelfAttention2d) for m in network.modules())


@both_kernels
def test_gamma_changes_the_logits() -> None:
    network = SAGANDiscriminator(16, base_channels=8).eval()
    x = torch.randn(2, 3, 16, 16)
    before = network(x)
    for module in network.modules():
        if isinstance(module, SelfAttention2d):
            nn.init.constant_(module.gamma, 1.0)
    assert (network(x) - before).abs().max() > 1e-5


# --- the MNIST system, seeds, samples ------------------------------------------------------------------------------


def test_mnist_system() -> None:
    network = SAGANDiscriminator(28, image_channels=1, base_channels=8, attention_resolutions=(7,))
    logits, maps = network(torch.randn(2, 1, 28, 28), return_attention=True)
    assert logits.shape == (2,)
    assert [tuple(attention.shape) for attention in maps] == [(2, 49, 49)]


def test_one_seed_one_network() -> None:
    networks = []
    for _ in range(2):
        torch.manual_seed(7)
        networks.append(SAGANDiscriminator(16, base_channels=4).eval())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(networks[0](x), networks[1](x))
    assert torch.equal(networks[0](x), networks[0](x))
    assert not torch.equal(SAGANDiscriminator(16, base_channels=4).eval()(x), networks[0](x))


@both_kernels
def test_samples_do_not_mix() -> None:
    network = SAGANDiscriminator(16, base_channels=4).double().eval()
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(network(x), torch.cat([network(sample[None]) for sample in x]))
    assert network(x).std() > 1e-6


# --- spectral norm -------------------------------------------------------------------------------------------------


def test_normalized_by_our_own() -> None:
    network = SAGANDiscriminator(32, base_channels=4)
    assert [m.dim for m in network.modules() if isinstance(m, SpectralNorm)] == [0] * 3
    assert len(spectral_norms(network)) == 3


def test_another_spectral_norm() -> None:
    network = SAGANDiscriminator(32, base_channels=4, spectral_norm=parametrizations.spectral_norm)
    assert sum(parametrize.is_parametrized(m) for m in network.modules()) == 3
    assert not any(isinstance(m, SpectralNorm) for m in network.modules())


def test_no_spectral_norm() -> None:
    network = SAGANDiscriminator(32, base_channels=4, spectral_norm=None)
    assert not any(parametrize.is_parametrized(m) for m in network.modules())
    assert network(torch.randn(1, 3, 32, 32)).shape == (1,)


def test_sigma_stays_one_in_training() -> None:
    network = SAGANDiscriminator(16, base_channels=8)
    optimizer = torch.optim.Adam(network.parameters(), lr=4e-4, betas=(0.0, 0.9))
    start = {name: value.clone() for name, value in network.state_dict().items()}
    for _ in range(30):
        optimizer.zero_grad()
        real, fake = torch.rand(8, 3, 16, 16), torch.randn(8, 3, 16, 16)
        (network(fake).mean() - network(real).mean()).backward()
        optimizer.step()
    originals = [name for name in start if name.endswith("original")]
    assert len(originals) == 2
    assert all((network.state_dict()[name] - start[name]).norm() > 0.1 for name in originals)
    for sigma in spectral_norms(network.eval()).values():
        assert sigma == pytest.approx(1, abs=0.15)


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [50, 17, 36, 3, 0])
def test_wrong_image_size(image_size: int) -> None:
    with pytest.raises(ValueError, match=f"{image_size}") as error:
        SAGANDiscriminator(image_size)
    for part in ("4", "7", "2"):
        assert part in str(error.value)


def test_wrong_attention_resolution_lists_those_that_exist() -> None:
    with pytest.raises(ValueError, match="5") as error:
        SAGANDiscriminator(64, attention_resolutions=(5,))
    for size in ("4", "8", "16", "32"):
        assert size in str(error.value)


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (3, 16, 16), (2, 3, 32, 32), (2, 3, 16, 8), (2, 3, 256)])
def test_wrong_images(shape: tuple[int, ...]) -> None:
    network = SAGANDiscriminator(16, base_channels=4)
    with pytest.raises(ValueError, match="16") as error:
        network(torch.randn(shape))
    for size in (3, *shape):
        assert str(size) in str(error.value)


@pytest.mark.parametrize("name", ["base_channels", "image_channels"])
def test_counts_below_one(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*0"):
        SAGANDiscriminator(16, **{name: 0})


def test_unknown_architecture() -> None:
    with pytest.raises(ValueError, match="unet") as error:
        SAGANDiscriminator(16, architecture="unet")
    assert "dcgan" in str(error.value)


def test_the_default_architecture_can_be_named() -> None:
    named, default = (
        SAGANDiscriminator(16, base_channels=4, architecture="dcgan"),
        SAGANDiscriminator(16, base_channels=4),
    )
    assert str(named) == str(default)
