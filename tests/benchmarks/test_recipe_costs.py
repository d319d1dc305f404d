"""What the recipes are estimated to cost: as they state it, as by hand, and what counts it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import recipe_costs
from measurement.operators import OperatorCounter
from recipe_costs import DATA, RECIPES, estimate, read_recipe
from training.flags import Config

NAMES = sorted(path.stem for path in RECIPES.glob("*.txt"))
OFTEN = ("celeba64", "digits", "faces-cpu")  # each has an architecture of its own


def test_every_recipe_has_its_costs() -> None:
    assert sorted(DATA) == NAMES
    assert {"biggan-schedule", "celeba64", "cifar10", "digits", "faces-cpu", "paper128", "small-dataset"} <= set(NAMES)


# Others may compute the same by other operators, and so in other memory.
PINNED = next(pin for pin in (RECIPES.parents[1] / "constraints.txt").read_text().split() if pin.startswith("torch=="))


@pytest.mark.skipif(not torch.__version__.startswith(PINNED.removeprefix("torch==")), reason=f"counted with {PINNED}")
@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.exhaustive) for name in NAMES]
)
def test_the_costs_are_those_of_the_networks(name: str) -> None:
    """Without them written by hand: the lines in the file are what the script computes today."""
    text = (RECIPES / f"{name}.txt").read_text(encoding="utf-8")
    lines = list(estimate(read_recipe(RECIPES / f"{name}.txt"), DATA[name]))
    assert recipe_costs.with_estimate(text, lines) == text
    assert text.startswith("# ")
    assert "# Source: " in text
    assert "# Measured: " in text


def test_operations_are_counted_as_by_hand() -> None:
    """D sees 2 images for each one of the batch, forward and backward, then 1 for G; G draws each once and learns."""
    config = Config(image_size=16, architecture="resnet", base_channels=4, batch_size=4, z_dim=8)
    one, other = (recipe_costs.costs(config, DATA["faces-cpu"]._replace(images=images)) for images in (4096, 1))
    assert one.operations == other.operations
    assert other.cache == 0
    g, d = recipe_costs.build_networks(config, 3, 6)
    weights = [sum(p.numel() for p in network.parameters()) for network in (g, d)]
    assert one.gradients == 4 * sum(weights)
    # Weights, average and Adam's two means of G, the same without an average of D, in float32.
    assert one.state == 4 * (4 * weights[0] + 3 * weights[1])


class Shapes(TorchDispatchMode):
    """The shapes of all results of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        results = operator(*args, **(kwargs or {}))
        self.seen |= {tuple(leaf.shape) for leaf in tree_leaves(results) if isinstance(leaf, Tensor)}
        return results


@pytest.mark.exhaustive
def test_no_attention_matrix_is_counted() -> None:
    """As on CUDA, where none is made: N = 64², of which the keys are pooled to M = 32²."""
    with Shapes() as shapes:
        config = replace(read_recipe(RECIPES / "biggan-schedule.txt"), batch_size=8)
        recipe_costs.costs(config, DATA["biggan-schedule"])
    sizes = {math.prod(shape) for shape in shapes.seen}
    assert {(8, 64, 4096), (16, 64, 4096)} & shapes.seen, "no attention at 64 pixels"
    assert not [shape for shape in shapes.seen if shape[-2:] in ((4096, 1024), (1024, 4096))]
    assert max(sizes) < 8 * 4096 * 1024, "a matrix in another form"


def test_the_peak_has_both_graphs() -> None:
    """What D keeps of 2B images for its backward, while G's graph of B images waits for its own."""
    config, data = read_recipe(RECIPES / "celeba64.txt"), DATA["celeba64"]
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.device("meta"):
        networks = recipe_costs.build_networks(config, data.channels, None)
        weights = 0
        for network in networks:
            network.to(memory_format=torch.channels_last)
            weights += sum(p.numel() for p in network.parameters())
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            fake = networks[0](torch.zeros(config.batch_size, config.z_dim))
            logits = networks[1](torch.zeros(2 * config.batch_size, 3, 64, 64).to(memory_format=torch.channels_last))
    del fake, logits
    # Among the kept tensors are the weights themselves, and at the peak are gradients and what an operator makes.
    activations = sum(kept.values()) - 4 * weights
    peak = recipe_costs.costs(config, data).peak
    assert activations < peak < 1.5 * activations, (activations, peak)


def test_the_longer_bound_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 10 images of 9.36 GFLOP takes 2 ms on 30 % of 156 TFLOP/s; 100 launches take 1 ms, on any number."""
    given = recipe_costs.Costs(9.36e9, 100, 2**20, 2**21, 2**22, 0)
    monkeypatch.setattr(recipe_costs, "costs", lambda config, data: given)
    monkeypatch.setattr(recipe_costs, "LAUNCH", 10e-6)
    config = Config(batch_size=10, steps=1_800_000)  # of which a millisecond each is half an hour
    text = "\n".join(estimate(config, DATA["celeba64"]))
    assert "time: 1 h (arithmetic) on one GPU, 30 min (launches) on eight" in text
    assert "30 min on any number: 100 operators in a step, 10 µs each" in text
    half = "\n".join(estimate(replace(config, precision="bf16"), DATA["celeba64"]))  # 312 TFLOP/s
    assert "arithmetic, 30 min on a GPU of 312 TFLOP/s (bf16)" in half
    assert "memory: 2 MiB for networks, average and Adam, 4 MiB more in a step (float32; bf16 about half)" in half


@pytest.mark.parametrize(("seconds", "text"), [(7200, "2 h"), (3599, "60 min"), (61, "1 min"), (0.123, "0.12 s")])
def test_durations(seconds: float, text: str) -> None:
    assert recipe_costs.duration(seconds) == text


# --- what counts them ------------------------------------------------------------------------------------------------


def test_operators_and_memory_are_counted_as_by_hand() -> None:
    x = torch.zeros(100)  # 400 bytes from before, which do not count
    with OperatorCounter() as counter:
        a = x.exp()  # 400
        b = a.view(10, 10).t()[:5]  # views
        c = b + 1  # 50 numbers: 600
        a = a.double()  # 1400; the old memory lives on in b
        del b  # 1000
        c.add_(1)  # in place
        d = torch.empty(25)  # 1100, without a kernel
        del a, c  # 100
    assert (counter.launches, counter.peak, counter.alive) == (4, 1400, 100)
    del d
    assert counter.alive == 0


def test_a_backward_pass_frees_what_it_has_used() -> None:
    x = torch.zeros(100, requires_grad=True)
    with OperatorCounter() as counter:
        y = x.exp().exp().sum()
        assert counter.alive == 400 + 400 + 4
        y.backward()
        del y
    assert counter.alive == 400  # the gradient
