"""The orders in which the page on resuming one's own loop builds, changes and loads: on the tutorial's D."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from public_networks import TutorialDiscriminator, tutorial_weights_init
from torch_sagan import apply_spectral_norm, hinge_discriminator_loss, insert_self_attention, spectral_norms

PATH = "main.4.inserted_attention"
Parts = tuple[nn.Module, torch.optim.Adam]


def discriminator() -> nn.Module:
    network = TutorialDiscriminator(4).apply(tutorial_weights_init)
    network.main[-1] = nn.Identity()
    return network


def insert(network: nn.Module) -> nn.Module:
    return insert_self_attention(network, after="main.4", example_input=torch.zeros(1, 3, 64, 64))


def adam(network: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(network.parameters(), lr=4e-4, betas=(0.0, 0.9))


def step(parts: Parts) -> None:
    images = torch.linspace(-1, 1, 2 * 4 * 3 * 64 * 64).view(8, 3, 64, 64)
    parts[1].zero_grad()
    hinge_discriminator_loss(*parts[0](images).chunk(2)).backward()
    parts[1].step()


def outputs(network: nn.Module) -> Tensor:
    was = network.training
    with torch.no_grad():
        result = network.eval()(torch.linspace(-1, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64))
    network.train(was)
    return result


def trained(network: nn.Module) -> Parts:
    parts = network, adam(network)
    for _ in range(2):
        step(parts)
    return parts


def resumed(network: nn.Module, old: Parts) -> Parts:
    parts = network, adam(network)
    network.load_state_dict(old[0].state_dict())
    parts[1].load_state_dict(copy.deepcopy(old[1].state_dict()))  # as from a file: else both would share their moments
    return parts


def add_the_layer(parts: Parts) -> None:
    parts[1].add_param_group({"params": parts[0].get_submodule(PATH).parameters(), "lr": 4e-4})


def steps(parts: Parts) -> set[int]:
    """How often the optimizer has moved each parameter of the network."""
    return {int(parts[1].state[parameter]["step"]) for parameter in parts[0].parameters()}


def test_a_checkpoint_from_before() -> None:
    """Load, insert, normalize: Adam's moments stay with their weights, and the new layer learns too."""
    old = trained(discriminator())
    parts = resumed(discriminator(), old)
    insert(parts[0])
    assert torch.equal(outputs(parts[0]), outputs(old[0]))
    apply_spectral_norm(parts[0])
    assert f"{PATH}.query.weight" in spectral_norms(parts[0])
    assert not torch.allclose(outputs(parts[0]), outputs(old[0]), rtol=0.01)
    add_the_layer(parts)
    moments = {id(state["exp_avg_sq"]) for state in parts[1].state.values()}
    step(parts)
    assert steps(parts) == {1, 3}  # the layer's, and those that were loaded
    kept = [parameter for name, parameter in parts[0].named_parameters() if PATH not in name]
    assert {id(parts[1].state[parameter]["exp_avg_sq"]) for parameter in kept} == moments
    assert parts[0].get_submodule(PATH).gamma.item() != 0


def test_a_checkpoint_from_before_the_insertion_but_with_the_norm() -> None:
    """Normalize, load, insert; or insert first, which the layers allow."""
    old = trained(apply_spectral_norm(discriminator()))
    parts = resumed(apply_spectral_norm(discriminator()), old)
    insert(parts[0])
    assert torch.equal(outputs(parts[0]), outputs(old[0]))
    add_the_layer(parts)
    step(parts)
    assert steps(parts) == {1, 3}

    other = insert(apply_spectral_norm(discriminator()))
    other.load_state_dict(old[0].state_dict())
    assert torch.equal(outputs(other), outputs(old[0]))


def test_a_checkpoint_of_the_networks_as_they_train() -> None:
    old = trained(apply_spectral_norm(insert(discriminator())))
    parts = resumed(apply_spectral_norm(insert(discriminator())), old)
    assert torch.equal(outputs(parts[0]), outputs(old[0]))
    step(parts)
    step(old)
    for name, value in old[0].state_dict().items():
        assert torch.equal(parts[0].state_dict()[name], value), name


def test_keys_tell_which_step_was_on_the_wrong_side_of_the_load() -> None:
    plain, normalized = discriminator(), apply_spectral_norm(discriminator())
    whole = apply_spectral_norm(insert(discriminator()))
    with pytest.raises(RuntimeError, match=r"Missing key.*parametrizations\.weight\.original"):
        normalized.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*parametrizations\.weight\.original"):
        plain.load_state_dict(normalized.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*inserted_attention"):
        normalized.load_state_dict(whole.state_dict())
