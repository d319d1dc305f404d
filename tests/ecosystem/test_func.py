"""``torch.func``: functional calls, gradients of each sample, ensembles and forward mode."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

from subjects import LAYERS, assert_close, buffers, build, gradients, inputs, score, subjects

modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
# Parts of torch that its compiler, exporters and forward mode use themselves, and that it has deprecated.
jit_is_deprecated = pytest.mark.filterwarnings("ignore:`torch.jit")


def states(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return {name: value.detach() for name, value in module.named_parameters()}, buffers(module)


@modes
@subjects(tiles=True)
def test_functional_call_and_grad(subject: str, training: bool) -> None:
    """The buffers are an argument, since training writes to them; they come out as those of a plain pass."""
    module = build(subject).train(training)
    twin = copy.deepcopy(module)
    x = inputs(subject, 3)

    def loss(parameters: dict[str, Tensor], moved: dict[str, Tensor]) -> Tensor:
        return score(functional_call(module, (parameters, moved), x)).sum()

    parameters, moved = states(module)
    assert_close(grad(loss)(parameters, moved), gradients(twin, score(twin(*x)).sum()))
    assert_close(moved, buffers(twin))


@subjects(tiles=True)
def test_vmap_of_grad(subject: str) -> None:
    """A gradient for each sample."""
    module = build(subject).eval()
    x = inputs(subject, 3)

    def loss(parameters: dict[str, Tensor], *sample: Tensor) -> Tensor:
        return score(functional_call(module, parameters, tuple(t[None] for t in sample))).sum()

    each = vmap(grad(loss), in_dims=(None, *(0 for _ in x)))(states(module)[0], *x)
    for i in range(3):
        expected = gradients(module, score(module(*(t[i : i + 1] for t in x))).sum())
        assert_close({name: value[i] for name, value in each.items()}, expected)


@subjects()
def test_vmap_over_an_ensemble(subject: str) -> None:
    modules = [build(subject).eval() for _ in range(3)]
    x = inputs(subject, 2)
    if subject in LAYERS:  # each parametrized layer has a class of its own, which torch wants to be one
        with pytest.raises(RuntimeError, match="same class"):
            stack_module_state(modules)
        modules = [nn.Sequential(module) for module in modules]
    parameters, moved = stack_module_state(modules)
    base = copy.deepcopy(modules[0]).to("meta")
    together = vmap(lambda p, b: functional_call(base, (p, b), x))(parameters, moved)
    assert_close(together, torch.stack([module(*x) for module in modules]))


@jit_is_deprecated
@pytest.mark.parametrize("way", ["torch.func.jvp", "dual tensors"])
@subjects(tiles=True)
def test_forward_mode(subject: str, way: str) -> None:
    """Along a direction of input and parameters at once, against reverse mode taken twice."""
    module = build(subject).eval()
    x, *labels = inputs(subject, 2)
    names, values = zip(*states(module)[0].items(), strict=True)

    def call(image: Tensor, *parameters: Tensor) -> Tensor:
        y: Tensor = functional_call(module, dict(zip(names, parameters, strict=True)), (image, *labels))
        return y

    point = (x, *values)
    direction = tuple(torch.randn_like(value) for value in point)
    if way == "torch.func.jvp":
        _, derivative = jvp(call, point, direction)
    else:
        with forward_ad.dual_level():
            y = call(*(forward_ad.make_dual(*pair) for pair in zip(point, direction, strict=True)))
            derivative = forward_ad.unpack_dual(y).tangent
    assert_close(derivative, torch.autograd.functional.jvp(call, point, direction)[1])
