"""Weights of other implementations give the outputs of those implementations."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as legacy_spectral_norm

from references import (
    assert_all_close,
    attention_shapes,
    discriminator_shapes,
    filled,
    generator_shapes,
    official_attention_shapes,
    rand,
    with_after,
)
from torch_sagan import (
    SAGANDiscriminator,
    SAGANGenerator,
    SelfAttention2d,
    SpectralNorm,
    apply_spectral_norm,
    convert_legacy_spectral_norm,
    load_published,
    load_reference_state_dict,
    spectral_norm,
)

Arrays = Mapping[str, Tensor]

# The reference unfolds every weight along dimension 0, transposed convolutions too.
along_zero = functools.partial(spectral_norm, dim=0)


def generator() -> SAGANGenerator:
    return SAGANGenerator(64, spectral_norm=along_zero)


def discriminator() -> SAGANDiscriminator:
    return SAGANDiscriminator(64, spectral_norm=along_zero)


@pytest.fixture(scope="module")
def generator_weights() -> dict[str, Tensor]:
    return filled(generator_shapes())


@pytest.fixture(scope="module")
def discriminator_weights() -> dict[str, Tensor]:
    return filled(discriminator_shapes())


def check_generator(network: SAGANGenerator, arrays: Arrays, atol: float = 1e-6) -> None:
    images, maps = network(rand(3, 2, 128).to(next(network.parameters()).dtype), return_attention=True)
    assert_all_close(
        [
            ("images", images, arrays["generator/images"]),
            ("map1", maps[0][:, ::32], arrays["generator/map1_rows"]),
            ("map2", maps[1][:, ::128], arrays["generator/map2_rows"]),
        ],
        atol=atol,
    )


def check_discriminator(network: SAGANDiscriminator, arrays: Arrays) -> None:
    logits, maps = network(rand(4, 2, 3, 64, 64).clamp(-1, 1), return_attention=True)
    assert_all_close([("logits", logits, arrays["discriminator/logits"])], atol=1e-10)
    assert_all_close(
        [("map1", maps[0], arrays["discriminator/map1"]), ("map2", maps[1], arrays["discriminator/map2"])], atol=1e-6
    )


def iterate_in_evaluation(network: nn.Module) -> list[SpectralNorm]:
    """What the reference does: batch norm in evaluation, yet u and v move. In the order of the layers."""
    network.eval()
    norms = [module for module in network.modules() if isinstance(module, SpectralNorm)]
    for norm in norms:
        norm.train()
    return norms


def check_u_and_v(norms: list[SpectralNorm], arrays: Arrays, network: str) -> None:
    assert len(norms) == 4
    for index, norm in enumerate(norms, start=1):
        prefix = f"{network}/after/l{index}.0.module.weight"
        assert_all_close([("u", norm._u, arrays[f"{prefix}_u"]), ("v", norm._v, arrays[f"{prefix}_v"])], atol=1e-10)


# --- same numbers --------------------------------------------------------------------------------------------------


def test_generator(arrays: Arrays, generator_weights: dict[str, Tensor]) -> None:
    network = generator().double()
    load_published(with_after(generator_weights, arrays, "generator"), network)
    check_generator(network.eval(), arrays)
    for module in network.modules():
        if isinstance(module, SelfAttention2d):
            assert module.gamma.item() == 0.5


def test_networks_that_are_built_for_the_weights(
    arrays: Arrays, generator_weights: dict[str, Tensor], discriminator_weights: dict[str, Tensor]
) -> None:
    g = load_published(with_after(generator_weights, arrays, "generator"))
    assert (g.arguments["widths"], g.arguments["attention_resolutions"]) == ([512, 256, 128, 64], [16, 32])
    check_generator(g, arrays)
    d = load_published(with_after(discriminator_weights, arrays, "discriminator"), network="discriminator")
    check_discriminator(d, arrays)


def test_generator_iterates_as_the_reference(arrays: Arrays, generator_weights: dict[str, Tensor]) -> None:
    network = generator().double()
    load_published(generator_weights, network)
    norms = iterate_in_evaluation(network)
    check_generator(network, arrays)
    check_u_and_v(norms, arrays, "generator")


def test_discriminator(arrays: Arrays, discriminator_weights: dict[str, Tensor]) -> None:
    network = discriminator().double()
    load_published(with_after(discriminator_weights, arrays, "discriminator"), network)
    check_discriminator(network.eval(), arrays)


def test_discriminator_iterates_as_the_reference(arrays: Arrays, discriminator_weights: dict[str, Tensor]) -> None:
    network = discriminator().double()
    load_published(discriminator_weights, network)
    norms = iterate_in_evaluation(network)
    check_discriminator(network, arrays)
    check_u_and_v(norms, arrays, "discriminator")


def test_into_float32(arrays: Arrays, generator_weights: dict[str, Tensor]) -> None:
    network = generator()
    load_published(with_after(generator_weights, arrays, "generator"), network)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    check_generator(network.eval(), arrays, atol=1e-4)


def test_attention(arrays: Arrays) -> None:
    layer = SelfAttention2d(64).double()
    load_published(filled(attention_shapes(64)), layer)
    y, attention = layer(rand(1, 2, 64, 6, 5), return_attention=True)
    assert_all_close([("y", y, arrays["attention/y"]), ("map", attention, arrays["attention/map"])], atol=1e-10)


def test_official_attention(arrays: Arrays) -> None:
    """Its gamma is a scalar, ours has one entry."""
    layer = SelfAttention2d.official(64).double()
    load_published(filled(official_attention_shapes(64)), layer)
    assert layer.gamma.shape == (1,)
    y = layer(rand(5, 2, 64, 8, 6))
    assert_all_close([("y", y, arrays["official_attention/y"])], atol=1e-10)


def biggan_block(*, u_scale: float = 1.0) -> tuple[dict[str, Tensor], dict[str, float]]:
    """BigGAN-PyTorch's attention block with the buffers of its spectral norm, and the sigmas of its evaluation."""
    state, sigmas = filled(official_attention_shapes(64)), {}
    for name in ("theta", "phi", "g", "o"):
        matrix = state[f"{name}.weight"].flatten(1)
        u = u_scale * torch.randn(1, len(matrix), dtype=torch.float64)
        state[f"{name}.u0"], state[f"{name}.sv0"] = u, torch.ones(1)
        # v = uW / |uW|, u' = vWᵀ / |vWᵀ|, sigma = vWᵀu'ᵀ, as its layers.py has it
        v = u @ matrix / torch.linalg.norm(u @ matrix)
        new_u = v @ matrix.T / torch.linalg.norm(v @ matrix.T)
        sigmas[name] = float(v @ matrix.T @ new_u.T)
    return state, sigmas


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("u_scale", [1.0, 7.0])
def test_official_attention_with_the_buffers_of_its_spectral_norm(normalized: bool, u_scale: float) -> None:
    """Whether our projections are normalized or plain, the output is that of weights divided by those sigmas."""
    state, sigmas = biggan_block(u_scale=u_scale)
    layer = SelfAttention2d.official(64).double()
    expected = copy.deepcopy(layer)
    if normalized:
        apply_spectral_norm(layer)
    load_published(state, layer)
    divided = {f"{name}.weight": state[f"{name}.weight"] / sigma for name, sigma in sigmas.items()}
    load_published(divided | {"gamma": state["gamma"]}, expected)
    x = rand(5, 2, 64, 8, 6)
    torch.testing.assert_close(layer.eval()(x), expected.eval()(x), rtol=0, atol=1e-10)


def test_normalized_projections_need_the_buffers() -> None:
    layer = apply_spectral_norm(SelfAttention2d.official(64))
    with pytest.raises(ValueError, match=r"missing: theta\.u0, phi\.u0, g\.u0, o\.u0$"):
        load_published(filled(official_attention_shapes(64)), layer)


def test_a_lost_buffer_is_named() -> None:
    state, _ = biggan_block()
    del state["g.u0"]
    layer = apply_spectral_norm(SelfAttention2d.official(64).double())
    with pytest.raises(ValueError, match=r"missing: g\.u0$"):
        load_published(state, layer)


def test_a_lost_buffer_of_a_plain_projection_is_named() -> None:
    """Without its u0 the weight cannot be divided by the sigma that the file's network had."""
    state, _ = biggan_block()
    del state["g.u0"]
    with pytest.raises(ValueError, match=r"1 key differs, unexpected: g\.sv0$"):
        load_published(state, SelfAttention2d.official(64).double())


def test_saved_from_data_parallel(
    arrays: Arrays, generator_weights: dict[str, Tensor], discriminator_weights: dict[str, Tensor]
) -> None:
    """The prefix of the wrapper goes, the reference's own ``module`` inside the names stays."""

    def wrapped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"module.{name}": value for name, value in weights.items()}

    g, d, layer = generator().double(), discriminator().double(), SelfAttention2d(64).double()
    load_published(wrapped(with_after(generator_weights, arrays, "generator")), g)
    load_published(wrapped(with_after(discriminator_weights, arrays, "discriminator")), d)
    load_published(wrapped(filled(attention_shapes(64))), layer)
    check_generator(g.eval(), arrays)
    check_discriminator(d.eval(), arrays)
    assert_all_close([("y", layer(rand(1, 2, 64, 6, 5)), arrays["attention/y"])], atol=1e-10)


def test_every_entry_arrives(generator_weights: dict[str, Tensor]) -> None:
    """Nothing in the model keeps its initial value: parameters, u, v and running statistics all change."""
    network = generator().double()
    before = copy.deepcopy(network.state_dict())
    load_published(generator_weights, network)
    kept = [name for name, value in network.state_dict().items() if torch.equal(value, before[name])]
    assert all(name.endswith("num_batches_tracked") for name in kept), kept
    assert len(network.state_dict()) == len(generator_weights)


def test_the_former_name(arrays: Arrays, generator_weights: dict[str, Tensor]) -> None:
    network = generator().double()
    with pytest.warns(DeprecationWarning, match=r"write load_published\(state_dict, model\)"):
        load_reference_state_dict(network, with_after(generator_weights, arrays, "generator"))
    check_generator(network.eval(), arrays)
    with (
        pytest.warns(DeprecationWarning, match="load_published"),
        pytest.raises(TypeError, match="expected a state dict, got str"),
    ):
        load_reference_state_dict(network, "generator.pth")  # type: ignore[arg-type]


def test_the_state_dict_is_left_alone_and_not_shared() -> None:
    weights = filled(attention_shapes(16))
    names = list(weights)
    before = copy.deepcopy(weights)
    layer = SelfAttention2d(16).double()
    load_published(weights, layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1)
    assert list(weights) == names
    assert all(torch.equal(value, before[name]) for name, value in weights.items())


def test_training_goes_on_from_there(discriminator_weights: dict[str, Tensor]) -> None:
    network = discriminator()
    load_published(discriminator_weights, network)
    network.train()(torch.randn(2, 3, 64, 64)).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


# --- errors: what is wrong is named, and nothing is loaded ---------------------------------------------------------


def without(weights: Mapping[str, Tensor], *names: str) -> dict[str, Tensor]:
    assert set(names) <= set(weights)
    return {name: value for name, value in weights.items() if name not in names}


@pytest.mark.parametrize(
    ("build", "shapes", "break_", "names"),
    [
        (
            generator,
            generator_shapes,
            lambda w: without(w, "l2.0.module.weight_bar", "attn1.gamma"),
            ["l2.0.module.weight_bar", "attn1.gamma"],
        ),
        (generator, generator_shapes, lambda w: without(w, "l3.0.module.weight_v"), ["l3.0.module.weight_v"]),
        (generator, generator_shapes, lambda w: {**w, "l9.weight": torch.zeros(1)}, ["l9.weight"]),
        (
            generator,
            generator_shapes,
            lambda w: {**w, "last.0.weight": torch.zeros(64, 1, 4, 4)},
            ["last.0.weight", "64, 1, 4, 4", "64, 3, 4, 4"],
        ),
        (
            discriminator,
            discriminator_shapes,
            lambda w: {**without(w, "l1.0.module.bias"), "extra": torch.zeros(1), "last.0.bias": torch.zeros(2)},
            ["l1.0.module.bias", "extra", "last.0.bias"],
        ),
        (discriminator, generator_shapes, dict, ["l1.1.weight"]),
        (
            lambda: SelfAttention2d(16),
            lambda: attention_shapes(16),
            lambda w: without(w, "key_conv.bias"),
            ["key_conv.bias"],
        ),
        (lambda: SelfAttention2d(16), lambda: attention_shapes(32), dict, ["value_conv.weight", "32, 32, 1, 1"]),
        (
            lambda: SelfAttention2d.official(16),
            lambda: official_attention_shapes(16),
            lambda w: without(w, "theta.weight"),
            ["theta.weight"],
        ),
    ],
)
def test_wrong_entries(
    build: Callable[[], nn.Module],
    shapes: Callable[[], Mapping[str, tuple[int, ...]]],
    break_: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    names: list[str],
) -> None:
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((ValueError, KeyError)) as error:
        load_published(break_(filled(shapes())), model)
    for name in names:
        assert name in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_normalized_along_another_dimension(generator_weights: dict[str, Tensor]) -> None:
    """Our default for transposed convolutions is dim=1: its u and v have other sizes, and the message says so."""
    network = SAGANGenerator(64)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises((ValueError, KeyError), match=re.escape("l1.0.module.weight_u")):
        load_published(generator_weights, network)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("build", [lambda: nn.Linear(2, 2), lambda: nn.Sequential(SelfAttention2d(16))])
def test_models_that_the_reference_does_not_have(build: Callable[[], nn.Module]) -> None:
    model = build()
    with pytest.raises((ValueError, TypeError), match=type(model).__name__):
        load_published(filled(attention_shapes(16)), model)


@pytest.mark.parametrize(
    ("network", "shapes"),
    [
        (SAGANGenerator(32, base_channels=8, spectral_norm=along_zero), generator_shapes),
        (SAGANGenerator(64, base_channels=8, spectral_norm=along_zero), generator_shapes),
        (SAGANGenerator(64, base_channels=8, spectral_norm=None), generator_shapes),
        (SAGANGenerator(64, base_channels=8, spectral_norm=along_zero, attention_resolutions=()), generator_shapes),
        (SAGANDiscriminator(32, base_channels=8), discriminator_shapes),
        (SAGANDiscriminator(64, base_channels=8, spectral_norm=None), discriminator_shapes),
    ],
)
def test_networks_that_the_reference_does_not_have(
    network: nn.Module, shapes: Callable[[], Mapping[str, tuple[int, ...]]]
) -> None:
    before = copy.deepcopy(network.state_dict())
    with pytest.raises((ValueError, KeyError)):
        load_published(filled(shapes()), network)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


# --- what torch.nn.utils.spectral_norm saved -------------------------------------------------------------------------


def critic(normalize: Callable[[nn.Module], nn.Module]) -> nn.Sequential:
    """A foreign model: several kinds of layers at several depths, batch norm between, one layer left plain."""
    return nn.Sequential(
        normalize(nn.Conv2d(3, 4, 3)),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.LeakyReLU(0.1), normalize(nn.ConvTranspose2d(4, 6, 3, bias=False))),
        nn.Flatten(),
        normalize(nn.Linear(6 * 8 * 8, 5)),
        nn.Linear(5, 2),
    )


def trained_legacy_critic() -> nn.Sequential:
    """After some steps, and with weights that u and v lag behind: nothing but the right u and v gives its outputs."""
    network = critic(legacy_spectral_norm)
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(4, 3, 8, 8))
        for name, parameter in network.named_parameters():
            if name.endswith("_orig"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("normalize", [spectral_norm, parametrizations.spectral_norm])
def test_legacy_spectral_norm(normalize: Callable[[nn.Module], nn.Module]) -> None:
    """Strictly loaded: the same outputs in evaluation, and the same u and v after further training."""
    theirs, ours = trained_legacy_critic(), critic(normalize)
    ours.load_state_dict(convert_legacy_spectral_norm(theirs.state_dict()), strict=True)
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=0, atol=1e-6)
    for index in (0, 4):
        torch.testing.assert_close(ours[index].weight, theirs[index].weight, rtol=1e-6, atol=0)
    if normalize is spectral_norm:  # PyTorch's parametrization turns u before v, its hook and ours v before u
        for _ in range(3):
            torch.testing.assert_close(ours.train()(x), theirs.train()(x), rtol=0, atol=1e-5)
        for name, value in convert_legacy_spectral_norm(theirs.state_dict()).items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_legacy_keys() -> None:
    """Only those of spectral norm change; order, values and what PyTorch notes about versions stay."""
    state = trained_legacy_critic().state_dict()
    before = dict(state)
    converted = convert_legacy_spectral_norm(state)
    parts = {"weight_orig": "weight.original", "weight_u": "weight.0._u", "weight_v": "weight.0._v"}
    expected = []
    for key in state:
        path, _, last = key.rpartition(".")
        expected.append(f"{path}.parametrizations.{parts[last]}" if last in parts else key)
    assert list(converted) == expected
    assert sum("parametrizations" in key for key in converted) == 9
    assert all(value is old for value, old in zip(converted.values(), before.values(), strict=True))
    assert converted._metadata == state._metadata
    assert dict(state).keys() == before.keys()
    assert convert_legacy_spectral_norm(converted) == converted


@pytest.mark.parametrize("prefix", ["", "module.", "netD.model.0."])
@pytest.mark.parametrize("name", ["weight", "weight_hh", "weight_u", "in_proj.odd"])
def test_legacy_keys_of_any_name(prefix: str, name: str) -> None:
    """Wrappers' prefixes, weights of other names (``weight_u`` among them), and no module path at all."""
    tensors = torch.zeros(3, 2), torch.zeros(3), torch.zeros(2)
    state = dict(zip((f"{prefix}{name}_{suffix}" for suffix in ("orig", "u", "v")), tensors, strict=True))
    path, _, last = f"{prefix}{name}".rpartition(".")
    keys = [f"{path}.parametrizations.{last}.{part}".lstrip(".") for part in ("original", "0._u", "0._v")]
    assert convert_legacy_spectral_norm(state) == dict(zip(keys, tensors, strict=True))


def test_legacy_from_a_file(tmp_path: Path) -> None:
    """As files usually are: saved from DataParallel, loaded with weights_only."""
    network = trained_legacy_critic()
    torch.save(nn.DataParallel(network).state_dict(), tmp_path / "critic.pt")
    state = convert_legacy_spectral_norm(torch.load(tmp_path / "critic.pt", weights_only=True))
    ours = apply_spectral_norm(critic(lambda layer: layer), exclude="5")
    nn.DataParallel(ours).load_state_dict(state)
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(ours.eval()(x), network.eval()(x), rtol=0, atol=1e-6)


def test_pruned_weights_are_not_taken_for_normalized_ones() -> None:
    network = nn.Sequential(prune.random_unstructured(nn.Linear(3, 4), "weight", amount=2), nn.Linear(4, 4))
    legacy_spectral_norm(network[1])
    converted = convert_legacy_spectral_norm(network.state_dict())
    assert {key for key in converted if key.startswith("0.")} == {"0.weight_orig", "0.weight_mask", "0.bias"}
    assert "1.parametrizations.weight.original" in converted


@pytest.mark.parametrize("given", [nn.Linear(2, 2), "critic.pt"])
def test_legacy_is_a_state_dict(given: Any) -> None:
    with pytest.raises(TypeError, match=rf"expected a state dict, got {type(given).__name__}"):
        convert_legacy_spectral_norm(given)


def test_legacy_without_v() -> None:
    """The first form had ``weight, weight_orig, weight_u``; PyTorch's own loader derives v, as the message says."""
    network = trained_legacy_critic()
    x = torch.randn(4, 3, 8, 8)
    expected = network.eval()(x)
    state = network.state_dict()
    for path in ("0", "2.1", "4"):
        state[f"{path}.weight"] = network.get_submodule(path).weight.detach()
        del state[f"{path}.weight_v"]
    state._metadata.clear()
    with pytest.raises(ValueError, match=r"missing: 0\.weight_v, 2\.1\.weight_v, 4\.weight_v\. PyTorch derives"):
        convert_legacy_spectral_norm(state)
    network = critic(legacy_spectral_norm)
    network.load_state_dict(state)
    ours = critic(spectral_norm)
    ours.load_state_dict(convert_legacy_spectral_norm(network.state_dict()))
    # v comes out of a pseudo-inverse in float32, so it is not the one that was left out to the last digit.
    torch.testing.assert_close(ours.eval()(x), expected, rtol=1e-3, atol=0)
