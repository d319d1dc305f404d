"""Which layers of a model spectral norm takes: by name, wildcard or function, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from normalized_layers import (
    model,
    normalized,
)
from references import (
    largest_singular_value,
)
from torch_sagan import (
    SelfAttention2d,
    apply_spectral_norm,
    insert_self_attention,
    remove_spectral_norm,
    spectral_norms,
)

WHICH: dict[str, tuple[dict[str, object], set[str]]] = {
    "by name": ({"include": "2.0"}, {"2.0"}),
    "by the name of a container": ({"include": "2"}, {"2.0"}),
    "by several names": ({"include": ["0", "4"]}, {"0", "4"}),
    "by names from a generator": ({"include": (name for name in ("0", "4"))}, {"0", "4"}),
    "by a wildcard": ({"include": "?.0"}, {"2.0"}),
    "by a wildcard that runs over dots": ({"include": "*0"}, {"0", "2.0"}),
    "by a function of the layer": ({"include": lambda _, layer: isinstance(layer, nn.Linear)}, {"4"}),
    "by a function of the name": ({"include": lambda name, _: "." in name}, {"2.0"}),
    "all but a name": ({"exclude": "4"}, {"0", "2.0"}),
    "all but several": ({"exclude": ("2", "4")}, {"0"}),
    "all but what a function names": ({"exclude": lambda _, layer: isinstance(layer, nn.Linear)}, {"0", "2.0"}),
    "all but nothing": ({"exclude": []}, {"0", "2.0", "4"}),
    "a function that happens to exclude nothing": ({"exclude": lambda *_: False}, {"0", "2.0", "4"}),
    "some but a part of them": ({"include": ["0", "2"], "exclude": "2.0"}, {"0"}),
    "excluded wins": ({"include": "*", "exclude": "[04]"}, {"2.0"}),
}


@pytest.mark.parametrize(("arguments", "expected"), WHICH.values(), ids=WHICH)
def test_include_and_exclude(arguments: dict[str, object], expected: set[str]) -> None:
    assert normalized(apply_spectral_norm(model(), **arguments)) == expected


def test_an_inserted_layer_is_not_below_the_module_it_follows() -> None:
    """It is beside the layer: the name of the container of both matches both."""

    def inserted() -> nn.Sequential:
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)))
        return insert_self_attention(network, after=["0", "2.0"], example_input=torch.randn(1, 3, 9, 9))

    def path(network: nn.Module, number: int) -> str:
        return [name for name, part in network.named_modules() if isinstance(part, SelfAttention2d)][number]

    def projections(layer: str) -> set[str]:
        return {f"{layer}.{name}.weight" for name in ("query", "key", "value")}

    network = inserted()
    first, second = path(network, 0), path(network, 1)
    own, all_projections = {"0.weight", "2.0.weight", "2.1.weight"}, projections(first) | projections(second)
    for arguments, expected in [
        ({"include": "0"}, {"0.weight"}),
        ({"include": "?"}, own | projections(second)),
        ({"include": "2"}, {"2.0.weight", "2.1.weight"} | projections(second)),
        ({"include": "2.0"}, {"2.0.weight"}),
        ({"include": ["0", first]}, {"0.weight"} | projections(first)),
        ({"include": f"{second}.query"}, {f"{second}.query.weight"}),
        ({"include": "*"}, own | all_projections),
        ({}, own | all_projections),
        ({"exclude": "0"}, own - {"0.weight"} | all_projections),
        ({"exclude": [first, second]}, own),
    ]:
        assert set(spectral_norms(apply_spectral_norm(inserted(), **arguments))) == expected, arguments


def test_a_child_that_only_has_the_name_of_an_inserted_layer() -> None:
    """A model may have a child of this name; it is below its container like any other."""
    block = nn.Sequential(nn.Conv2d(3, 8, 3))
    block.add_module("inserted_attention", nn.Conv2d(8, 8, 1))
    network = apply_spectral_norm(nn.Sequential(block, nn.Linear(2, 2)), include="0")
    assert set(spectral_norms(network)) == {"0.0.weight", "0.inserted_attention.weight"}


class OwnConvolution(nn.Conv2d):
    """A layer of another library that uses its weight in its own way."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight.flip(3), self.bias)


def test_subclasses_of_layers() -> None:
    plain = OwnConvolution(3, 4, 2)
    layer = apply_spectral_norm(nn.Sequential(copy.deepcopy(plain))).eval()[0]
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
    x = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(layer(x), plain(x))
    assert isinstance(layer, OwnConvolution)
    assert 0.99 < largest_singular_value(plain.weight) < 1.4


@pytest.mark.parametrize("training", [True, False])
def test_attention_and_recurrent_layers(training: bool) -> None:
    """The output projection and the feed-forward layers are linear; the input projection and LSTM weights no layers."""
    network = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), nn.LSTM(8, 4))
    plain = copy.deepcopy(network)
    apply_spectral_norm(network)
    assert set(spectral_norms(network)) == {f"0.{name}.weight" for name in ("self_attn.out_proj", "linear1", "linear2")}
    for layer, other in zip(network.modules(), plain.modules(), strict=False):
        layer.train(training), other.train(training)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():  # in evaluation, this is what PyTorch's fast path asks for
        actual = network(x)[0]
        network.eval()
        for name in spectral_norms(network):
            layer = plain.get_submodule(name.removesuffix(".weight"))
            layer.weight.copy_(network.get_submodule(name.removesuffix(".weight")).weight)
        torch.testing.assert_close(actual, plain.train(training)(x)[0], rtol=1e-5, atol=1e-5)


def test_a_layer_with_two_names() -> None:
    """One layer, normalized once; either of its names matches it."""
    shared = nn.Linear(3, 3)
    network = nn.ModuleDict({"first": shared, "between": nn.Linear(3, 3), "second": nn.Sequential(shared)})
    for name in ("first", "second.0"):
        assert set(spectral_norms(apply_spectral_norm(copy.deepcopy(network), include=name))) == {"first.weight"}
        assert set(spectral_norms(apply_spectral_norm(copy.deepcopy(network), exclude=name))) == {"between.weight"}
    apply_spectral_norm(network)
    assert len(shared.parametrizations.weight) == 1
    assert network["second"][0] is network["first"]
    remove_spectral_norm(network)
    assert normalized(network) == set()


def with_lazy() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.LazyConv2d(4, 3)))


def with_pruned() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), prune.random_unstructured(nn.Linear(3, 4), "weight", amount=2))


def with_integers() -> nn.Module:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(3, 4))
    network[1].weight = nn.Parameter(torch.ones(4, 3, dtype=torch.int8), requires_grad=False)
    return network


WRONG: dict[str, tuple[Callable[[], nn.Module], dict[str, object], type[Exception], str]] = {
    "no layers": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), {}, ValueError, "Sequential has no convolution"),
    "a name that is not there": (model, {"include": "2.1"}, ValueError, r"include: '2\.1' matches .*nearest: '2\.0'"),
    "the end of a name": (
        lambda: nn.ModuleDict({"generator": nn.ModuleDict({"convolution": nn.Conv2d(3, 4, 3)})}),
        {"include": "convolution"}, ValueError, r"nearest: 'generator\.convolution'$",
    ),
    "one of several": (model, {"exclude": ["0", "5"]}, ValueError, "exclude: '5' matches .* of Sequential; nearest: "),
    "a name of another module": (model, {"exclude": "1"}, ValueError, "exclude: '1' matches no convolution"),
    "a pattern": (model, {"exclude": "features.*"}, ValueError, r"exclude: 'features\.\*' matches no"),
    "the empty name": (model, {"include": ""}, ValueError, "include: '' matches no"),
    "the name of a weight": (model, {"include": "0.weight"}, ValueError, r"'0\.weight' matches no .*nearest: .*'0'"),
    "no names": (model, {"include": []}, ValueError, "leave none of the 3 layers of Sequential"),
    "a function that matches none": (model, {"include": lambda *_: False}, ValueError, "leave none of the 3 layers"),
    "all excluded": (model, {"exclude": "*"}, ValueError, "leave none of the 3 layers of Sequential to normalize"),
    "a class": (model, {"exclude": nn.Linear}, TypeError, "exclude takes dotted names, or a function .* got type"),
    "a number": (model, {"exclude": 4}, TypeError, "got int"),
    "a layer": (model, {"exclude": nn.Linear(2, 2)}, TypeError, "got Linear"),
    "layers": (model, {"include": ["0", nn.Linear(2, 2)]}, TypeError, "include takes dotted names.* got Linear"),
    "iterations": (model, {"n_power_iterations": 0}, ValueError, "^n_power_iterations must be at least 1, got 0"),
    "implementation": (model, {"implementation": "jax"}, ValueError, "^implementation must be .*'jax'"),
    "a lazy layer": (with_lazy, {}, ValueError, r"^1\.0: .*LazyConv2d has no shape yet.*exclude='1\.0'"),
    "a pruned layer": (with_pruned, {}, ValueError, "^1: 'weight' of Linear is not a parameter.*exclude='1'"),
    "a weight of integers": (with_integers, {}, TypeError, r"^1: expected .*floating-point.*int8.*exclude='1'"),
}  # fmt: skip


@pytest.mark.parametrize(("build", "arguments", "kind", "message"), WRONG.values(), ids=WRONG)
def test_errors_leave_the_model_as_it_was(
    build: Callable[[], nn.Module], arguments: dict[str, object], kind: type[Exception], message: str
) -> None:
    network = build()
    before = [(name, type(module), dict(module._parameters)) for name, module in network.named_modules()]
    with pytest.raises(kind, match=message):
        apply_spectral_norm(network, **arguments)
    after = [(name, type(module), dict(module._parameters)) for name, module in network.named_modules()]
    assert after == before
    assert spectral_norms(network) == {}


@pytest.mark.parametrize("build", [with_lazy, with_pruned, with_integers])
def test_exclude_is_the_way_out(build: Callable[[], nn.Module]) -> None:
    assert set(spectral_norms(apply_spectral_norm(build(), exclude="1"))) == {"0.weight"}
