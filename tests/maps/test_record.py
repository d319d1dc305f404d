"""Recorded maps are those that the layers return, of the block's own thread, and recording leaves no trace."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from existing_models import MODELS, wake
from torch_sagan import (
    SAGANGenerator,
    SelfAttention1d,
    SelfAttention2d,
    SelfAttention3d,
    insert_self_attention,
    record_attention,
)
from torch_sagan.attention.layer import SelfAttention


@pytest.mark.parametrize("name", MODELS)
def test_maps_are_those_that_the_layer_returns(name: str) -> None:
    make, after, shape = MODELS[name]
    model, x = make().eval(), torch.randn(2, *shape)
    wake(insert_self_attention(model, after, example_input=x))
    inputs: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
        for name, layer in model.named_modules()
        if isinstance(layer, SelfAttention)
    ]
    expected = model(x.clone())
    for handle in handles:
        handle.remove()
    with record_attention(model) as records:
        output = model(x.clone())
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)  # the held map sums in another order
    assert set(records) == set(inputs)
    for name, calls in records.items():
        (record,) = calls
        _, attention = model.get_submodule(name)(inputs[name], return_attention=True)
        torch.testing.assert_close(record.attention, attention)
        assert record.query_size == tuple(inputs[name].shape[2:])
        assert not record.attention.requires_grad


@given(size=st.lists(st.integers(2, 6), min_size=1, max_size=3), pool=st.integers(1, 2))
def test_sizes_of_queries_and_keys(size: list[int], pool: int) -> None:
    layer = {1: SelfAttention1d, 2: SelfAttention2d, 3: SelfAttention3d}[len(size)](4, pool=pool)
    with record_attention(nn.Sequential(layer)) as records:
        layer(torch.randn(1, 4, *size))
    (record,) = records["0"]
    assert record.query_size == tuple(size)
    assert record.key_size == tuple(length // pool for length in size)
    assert record.attention.shape == (1, math.prod(size), math.prod(record.key_size))


def test_the_gamma_is_that_of_the_call() -> None:
    layer = SelfAttention2d(4)
    with record_attention(layer) as records:
        for gamma in (-0.5, 0.25):
            nn.init.constant_(layer.gamma, gamma)
            layer(torch.randn(1, 4, 3, 3))
    gammas = [record.gamma for record in records[""]]
    assert [gamma.tolist() for gamma in gammas] == [[-0.5], [0.25]]
    assert not any(gamma.requires_grad for gamma in gammas)


def test_recording_leaves_no_trace() -> None:
    model = SAGANGenerator(16, base_channels=4)
    seen = []
    layer = model.attention["8"]
    layer.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    z = torch.randn(2, 128)
    with contextlib.suppress(KeyError), record_attention(model) as records:
        model(z)
        model(z)
        raise KeyError
    assert [len(calls) for calls in records.values()] == [2]
    assert len(layer._forward_hooks) == 1
    assert not layer._forward_pre_hooks
    model(z)
    assert len(records["attention.8"]) == 2
    assert seen == [Tensor] * 3  # the model's own hooks see what they always see


def test_recording_gives_the_map_to_those_who_ask_for_it() -> None:
    model = SAGANGenerator(16, base_channels=4).eval()
    z = torch.randn(2, 128)
    with record_attention(model) as outer, record_attention(model) as inner:
        _, (asked,) = model(z, return_attention=True)
        model(z)
    for records in (outer, inner):
        first, second = records["attention.8"]
        assert torch.equal(first.attention, asked)
        assert torch.equal(second.attention, asked)


def test_layers_that_do_not_run_have_no_records() -> None:
    model = nn.ModuleDict({"a": SelfAttention2d(4), "b": SelfAttention2d(4)})
    with record_attention(model) as records:
        model["b"](torch.randn(1, 4, 3, 3))
    assert {path: len(calls) for path, calls in records.items()} == {"a": 0, "b": 1}
    with pytest.raises(ValueError, match="Linear has no self-attention layer"), record_attention(nn.Linear(1, 1)):
        pass


# --- threads -------------------------------------------------------------------------------------------------------


def in_threads(*functions: Callable[[], None]) -> None:
    """Run them at the same time, and raise the first error."""
    errors: list[BaseException] = []

    def run(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


barrier = threading.Barrier(2, timeout=60)


@pytest.fixture(autouse=True)
def _mend_the_barrier() -> None:
    barrier.reset()


def test_another_thread_is_neither_recorded_nor_disturbed() -> None:
    layer, seen = SelfAttention2d(4), []

    def record() -> None:
        with record_attention(layer) as records:
            barrier.wait()
            layer(torch.randn(1, 4, 3, 3))
            barrier.wait()
        assert [record.query_size for record in records[""]] == [(3, 3)]

    def call() -> None:
        barrier.wait()
        seen.append(layer(torch.randn(1, 4, 5, 5)))
        seen.append(layer(torch.randn(1, 4, 5, 5), return_attention=True))
        barrier.wait()

    in_threads(record, call)
    assert [type(output) for output in seen] == [Tensor, tuple]


def test_a_block_that_begins_or_ends_while_another_thread_is_in_the_layer() -> None:
    """Whose hooks before the layer and after it are then not the same."""

    class Waiting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if threading.current_thread() is not threading.main_thread() and waits:
                waits.pop()
                barrier.wait()
                barrier.wait()
            return x

    layer = SelfAttention2d(
        4, projection=lambda inside, outside: nn.Sequential(Waiting(), nn.Conv2d(inside, outside, 1))
    )
    for before in (True, False):
        waits, outputs = [1], []
        thread = threading.Thread(target=lambda: outputs.append(layer(torch.randn(1, 4, 3, 3))))  # noqa: B023
        if before:
            thread.start()
            barrier.wait()
            with record_attention(layer) as records:
                barrier.wait()
                thread.join()
        else:
            with record_attention(layer) as records:
                thread.start()
                barrier.wait()
            barrier.wait()
            thread.join()
        assert [type(output) for output in outputs] == [Tensor]
        assert records == {"": []}


@pytest.mark.parametrize("shared", [True, False], ids=["one model", "two models"])
def test_blocks_in_parallel_have_their_own_records(shared: bool) -> None:
    layers = [SelfAttention2d(4)] * 2 if shared else [SelfAttention2d(4), SelfAttention2d(4)]

    def record(number: int) -> None:
        both = nn.ModuleList(layers)  # each block is on both
        with record_attention(both) as records:
            barrier.wait()
            for _ in range(number):
                y = layers[number - 1](torch.randn(1, 4, number, number))
                assert isinstance(y, Tensor)
            barrier.wait()
        sizes = [record.query_size for calls in records.values() for record in calls]
        assert sizes == [(number, number)] * number

    in_threads(lambda: record(1), lambda: record(2))
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def test_tasks_are_recorded_apart() -> None:
    layer = SelfAttention2d(4)

    async def record(size: int) -> list[tuple[int, int]]:
        with record_attention(layer) as records:
            await asyncio.sleep(0)
            layer(torch.randn(1, 4, size, size))
            await asyncio.sleep(0)
        return [record.query_size for record in records[""]]

    async def both() -> list[list[tuple[int, int]]]:
        return await asyncio.gather(record(2), record(3))

    assert asyncio.run(both()) == [[(2, 2)], [(3, 3)]]


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch 2.5 runs compiled models compiled")
def test_overlapping_blocks_leave_the_compiler_as_it_was() -> None:
    """Entered as first and second, left in the same order."""
    layer, compiled = SelfAttention2d(4), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        def run(*args: Tensor) -> object:
            compiled.append(1)
            return graph.forward(*args)

        return run

    torch.compiler.reset()
    function = torch.compile(lambda x: x + 1, backend=backend)
    x = torch.ones(2)
    first, second = record_attention(layer), record_attention(layer)
    first.__enter__()
    second.__enter__()
    function(x)
    first.__exit__(None, None, None)
    function(x)
    assert compiled == []
    second.__exit__(None, None, None)
    function(x)
    assert compiled == [1]


def test_replicas_in_threads_are_an_error() -> None:
    """Where there are devices for several; on the CPU there is one, in the thread itself."""
    model = nn.DataParallel(SelfAttention2d(4))
    with record_attention(model) as records:
        model(torch.randn(2, 4, 3, 3))
    assert [len(calls) for calls in records.values()] == [1]
    model.device_ids = [0, 1]  # stands in for two devices
    with pytest.raises(ValueError, match=r"DataParallel runs its replicas in threads, .* record its \.module"):
        record_attention(model).__enter__()
