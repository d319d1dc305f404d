"""State dicts, copies and pickles of models with inserted layers, and checkpoints from before the insertion."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from existing_models import inserted, unet, wake
from torch_sagan import (
    SelfAttention2d,
    apply_spectral_norm,
    insert_self_attention,
    remove_self_attention,
    spectral_norms,
)

IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).sin().view(2, 3, 8, 8)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1))


def normalized(channels: int) -> nn.Module:
    return apply_spectral_norm(SelfAttention2d(channels))


class Scaled(nn.Module):
    """Attention of somebody else, which cannot draw its weights again, and counts in a buffer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def spoil(model: nn.Module) -> None:
    """What training, or uninitialized memory, may have left in the inserted layers."""
    for name, tensor in model.state_dict().items():
        if "inserted_attention" in name:
            tensor.fill_(torch.nan if tensor.is_floating_point() else -1)


def test_a_checkpoint_from_before_the_insertion_loads(case: tuple[nn.Module, list[str], Tensor]) -> None:
    model, after, x = case
    trained = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.1)
    insert_self_attention(model, after, example_input=x)
    new = copy.deepcopy([layer.state_dict() for layer in inserted(model)])
    spoil(model)
    checkpoint = trained.state_dict()
    keys = list(checkpoint)
    model.load_state_dict(checkpoint)  # strict
    assert list(checkpoint) == keys
    assert torch.equal(model.eval()(x.clone()), trained.eval()(x.clone()))
    for layer, values in zip(inserted(model), new, strict=True):
        assert all(torch.equal(layer.state_dict()[name], value) for name, value in values.items())


def test_a_checkpoint_from_after_the_insertion_loads() -> None:
    x = torch.randn(2, 3, 32, 32)
    first, second = (insert_self_attention(unet(), "model.1", example_input=x).eval() for _ in range(2))
    wake(first)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))
    partly = {key: value for key, value in first.state_dict().items() if not key.endswith("query.weight")}
    with pytest.raises(
        RuntimeError, match=r'Missing key\(s\) in state_dict: "model.1.inserted_attention.query.weight"'
    ):
        second.load_state_dict(partly)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*inserted_attention"):
        unet().load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_have_layers_of_their_own(how: Callable[[nn.Module], nn.Module]) -> None:
    x = torch.randn(2, 3, 32, 32)
    model = wake(insert_self_attention(unet(), ["model.0", "model.1"], example_input=x)).eval()
    twin = how(model)
    assert torch.equal(twin(x), model(x))
    for layer in inserted(twin):
        nn.init.zeros_(layer.gamma)
    assert not torch.allclose(twin(x), model(x))
    original = twin(x)
    remove_self_attention(twin)
    assert torch.equal(twin(x), original)
    assert len(inserted(model)) == 2


@pytest.mark.parametrize("attention", [SelfAttention2d, SelfAttention2d.official, normalized, Scaled])
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("context", [True, False], ids=["made on meta", "moved to meta"])
def test_an_old_checkpoint_completes_a_model_from_the_meta_device(
    attention: Callable[[int], nn.Module], assign: bool, context: bool
) -> None:
    """Whose layers have no values of their own, and after ``to_empty`` what was in the memory before."""
    old = network().eval()
    if context:
        with torch.device("meta"):
            model = insert_self_attention(network(), ["0", "2"], attention=attention, example_input=IMAGES.to("meta"))
    else:
        model = insert_self_attention(network(), ["0", "2"], attention=attention, example_input=IMAGES).to("meta")
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    if not assign:
        model.to_empty(device="cpu")
        spoil(model)
    model.load_state_dict(old.state_dict(), assign=assign)
    assert torch.equal(model.eval()(IMAGES), old(IMAGES))
    for layer in (model[0].inserted_attention, model[2].inserted_attention):
        assert all(tensor.isfinite().all() and not tensor.is_meta for tensor in layer.state_dict().values())
        if attention is Scaled:
            assert layer.count == 0
        else:
            assert all(module.weight.std() > 0 for module in layer.modules() if isinstance(module, nn.Conv2d))
    if attention is normalized:  # u and v belong to the weights
        assert all(sigma == pytest.approx(1, rel=0.02) for sigma in spectral_norms(model).values())


@pytest.mark.parametrize("empty", [False, True])
def test_a_layer_that_was_normalized_later_is_new_too(empty: bool) -> None:
    old = apply_spectral_norm(network()).eval()
    model = insert_self_attention(network(), "1", example_input=IMAGES)
    expected = copy.deepcopy(model[1].inserted_attention.state_dict())
    apply_spectral_norm(model)
    spoil(model)
    if empty:
        model.to("meta").to_empty(device="cpu")
        spoil(model)
    model.load_state_dict(old.state_dict())
    layer = model[1].inserted_attention
    assert torch.equal(model.eval()(IMAGES), old(IMAGES))
    assert torch.equal(layer.query.parametrizations.weight.original, expected["query.weight"])
    assert spectral_norms(layer)["query.weight"] == pytest.approx(1, rel=0.02)


def test_a_layer_of_another_structure_is_reported_as_missing() -> None:
    old, model = network(), insert_self_attention(network(), "1", example_input=IMAGES)
    model[1].inserted_attention.query = nn.Identity()
    model[1].inserted_attention.more = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*inserted_attention\.more\.weight"):
        model.load_state_dict(old.state_dict())


def test_a_part_of_a_checkpoint_leaves_trained_layers_alone() -> None:
    model = wake(insert_self_attention(network(), "2", example_input=IMAGES))
    trained = copy.deepcopy(model.state_dict())
    missing, unexpected = model.load_state_dict({"3.bias": torch.ones(4)}, strict=False)
    assert "2.inserted_attention.gamma" in missing
    assert not unexpected
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items() if name != "3.bias")
    # All of an old one, into a trained model: its layers are kept by giving their weights along.
    old = network().state_dict()
    model.load_state_dict(trained | old)
    assert torch.equal(model[2].inserted_attention.gamma, torch.ones(1))
    model.load_state_dict(old)
    assert torch.equal(model[2].inserted_attention.gamma, torch.zeros(1))


def test_an_old_checkpoint_keeps_device_and_dtype_of_the_layer() -> None:
    model = insert_self_attention(network(), "0", example_input=IMAGES).to(torch.bfloat16)
    model.load_state_dict(network().to(torch.bfloat16).state_dict(), assign=True)
    assert {tensor.dtype for tensor in model[0].inserted_attention.state_dict().values()} == {torch.bfloat16}


def test_layers_within_layers_are_new_too() -> None:
    old, model = network().eval(), insert_self_attention(network(), "0", example_input=IMAGES)
    insert_self_attention(model, "0.inserted_attention.value")
    spoil(model)
    model.load_state_dict(old.state_dict())
    assert torch.equal(model.eval()(IMAGES), old(IMAGES))


def test_copies_load_old_checkpoints_of_their_own() -> None:
    model = insert_self_attention(network(), "1", example_input=IMAGES)
    for twin in copy.deepcopy(model), pickle.loads(pickle.dumps(model)):
        wake(twin)
        twin.load_state_dict(network().state_dict())
        assert twin[1].inserted_attention.gamma == 0
    model[1].inserted_attention.gamma.data.fill_(2)
    assert twin[1].inserted_attention.gamma == 0


def test_a_layer_without_values_is_reported_as_missing() -> None:
    """A lazy one has none before it has run, so an old checkpoint cannot make it new again."""
    model = insert_self_attention(network(), "0", attention=lambda channels: nn.LazyConv2d(channels, 1))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*inserted_attention\.weight"):
        model.load_state_dict(network().state_dict())
