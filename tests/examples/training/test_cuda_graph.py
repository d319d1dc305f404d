"""The step as a CUDA graph does what the step does; the graph is emulated by one of the CPU's operators."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from emulated_cuda import CUDAGraph, emulate_graphs
from tiny_runs import assert_same
from training import cuda_graph
from training.cuda_graph import WARM_UP
from training.data.dataset import Batch
from training.flags import Config, check
from training.state import TrainingState

STEPS = WARM_UP + 3  # so that the graph is replayed more than once
CLASSES = {"even": 5, "odd": 5}

# What varies in a step. The rates and their decay are powers of two, which float32, the graph's type for them, holds as
# float64 does: everything is compared bitwise.
SETTINGS = {
    "hinge": {"lr_decay": "linear", "precision": "bf16"},
    "wgan-gp": {"d_steps": 2, "grad_accum_steps": 2, "lr_decay": "linear", "decay_from": 4},
    "relativistic": {"augment": "color,translation,cutout", "noise": 0.1, "classes": "own", "beta1": 0.5},
}


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[CUDAGraph]:
    """The graphs that the test has captured."""
    return emulate_graphs(monkeypatch)


def state_of(loss: str, *, graph: bool, **settings: object) -> TrainingState:
    tiny = {"image_size": 16, "base_channels": 4, "batch_size": 4, "z_dim": 8, "steps": 16}
    rates = {"lr_g": 2**-8, "lr_d": 2**-7}
    config = Config(loss=loss, cuda_graph=graph, **(tiny | rates | SETTINGS[loss] | settings))
    classes = CLASSES if config.classes == "own" else {}
    return TrainingState(config, image_channels=1, classes=classes, device=torch.device("cpu"))


def batches(state: TrainingState) -> Iterator:
    """Batches from the place that the run is at."""
    size = state.config.batch_size // state.config.grad_accum_steps

    def data() -> Iterator[Batch]:
        while True:
            rng = torch.Generator().manual_seed(state.images)
            for _ in range(state.config.grad_accum_steps):
                images = torch.randint(256, (size, 1, 16, 16), dtype=torch.uint8, generator=rng)
                labels = torch.randint(len(CLASSES), (size,), generator=rng) if state.classes else None
                yield Batch(images, labels)

    return state.batches(data())


def advance(state: TrainingState, steps: int) -> list[Tensor]:
    drawn = batches(state)
    return [state.advance(drawn) for _ in range(steps)]


@pytest.mark.parametrize("loss", SETTINGS)
def test_steps_of_the_graph_are_the_steps(
    loss: str, captured: list[CUDAGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = state_of(loss, graph=False)
    expected, after = advance(state, STEPS), copy.deepcopy(state.state_dict())
    called, step = [], cuda_graph.training_step
    monkeypatch.setattr(cuda_graph, "training_step", lambda *a, **more: called.append(1) or step(*a, **more))
    state = state_of(loss, graph=True)  # which seeds all random numbers
    losses = advance(state, STEPS)
    assert len(called) == WARM_UP + 1  # the rest is replayed
    assert [graph.replays for graph in captured] == [STEPS - WARM_UP]
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert len({tuple(pair.tolist()) for pair in losses}) == STEPS  # kept, not overwritten by the next replay
    assert_same(after, state.state_dict(), apart_from=("/config/cuda_graph",))


@pytest.mark.parametrize(
    "loss", [loss if loss == "hinge" else pytest.param(loss, marks=pytest.mark.exhaustive) for loss in SETTINGS]
)
@pytest.mark.parametrize("first", [True, False], ids=["graph first", "graph second"])
def test_a_run_goes_on_with_or_without_a_graph(loss: str, first: bool, captured: list[CUDAGraph]) -> None:
    whole = state_of(loss, graph=False)
    advance(whole, 2 * STEPS)
    whole = copy.deepcopy(whole.state_dict())
    half = state_of(loss, graph=first)
    advance(half, STEPS)
    half = copy.deepcopy(half.state_dict())
    state = state_of(loss, graph=not first)
    state.load_state_dict(half)
    advance(state, STEPS)
    assert len(captured) == 1
    assert_same(whole, state.state_dict(), apart_from=("/config/cuda_graph",))


def test_a_loaded_checkpoint_is_captured_anew(captured: list[CUDAGraph]) -> None:
    state = state_of("hinge", graph=True)
    start = copy.deepcopy(state.state_dict())
    first = advance(state, STEPS)
    state.load_state_dict(start)
    assert torch.equal(torch.stack(advance(state, STEPS)), torch.stack(first))
    assert len(captured) == 2


def test_what_a_capture_forbids_is_an_error(captured: list[CUDAGraph]) -> None:
    """Of the stand-in: otherwise it would prove nothing."""
    x = torch.ones(2)
    for forbidden in (
        lambda: x.sum().item(),
        lambda: x.nonzero(),
        lambda: x[x > 0],
        lambda: x + torch.tensor([1.0, 2.0]),
        lambda: torch.randn(2, generator=torch.Generator()),
    ):
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match=r"capturing|not registered"), torch.cuda.graph(graph):
            forbidden()


def test_a_graph_keeps_numbers_and_memory(captured: list[CUDAGraph]) -> None:
    """As a real one does: a capture runs nothing, and what Python changes later does not reach the graph."""
    weight, scale, graph = torch.ones(3, requires_grad=True), 2.0, torch.cuda.CUDAGraph()
    x = torch.ones(3)
    with torch.cuda.graph(graph):
        (scale * weight * x).square().sum().backward()
        with torch.no_grad():
            weight += torch.rand(3).sign()
        loss = weight.sum()
    assert weight.tolist() == [1, 1, 1]
    assert loss.isnan()
    scale = 3.0
    x.fill_(2)
    for n in (1, 2):
        graph.replay()
        assert loss == 3 + 3 * n
        assert weight.grad.tolist() == [2 * 2**2 * 2**2 * n] * 3


@pytest.mark.parametrize(
    ("settings", "processes", "message"),
    [
        ({}, 2, r"--cuda-graph: .* got 2"),
        ({"compile": True}, 1, r"--cuda-graph with --compile .*: give one of the two$"),
    ],
)
def test_what_has_no_graph_is_one_line(settings: dict[str, bool], processes: int, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        check(Config(cuda_graph=True, **settings), processes)
