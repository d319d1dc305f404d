"""A CUDA device without one: names of CUDA devices stand for the CPU, and graphs are recorded from its operators.

PyTorch's own functions run, down to the C++ ones that a CPU build lacks; only those are replaced here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten

# What ends a capture: it copies a number from the device to Python, has a result whose shape depends on values, or
# copies a number from Python's memory, which is not pinned.
FORBIDDEN = {
    aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten._unique2,
    aten.lift_fresh, aten.bincount,
}  # fmt: skip
INDEXING = {aten.index, aten.index_put, aten.index_put_}  # with a mask, which is turned into a list of indices


class CUDAGraph:
    """Records operators with their tensors, and repeats them on the same memory.

    A capture runs nothing. Here the operators do run, since autograd needs their results, so afterwards all memory
    from before has its old content again, and that which the graph allocated holds NaN, until the first replay.
    """

    captured: ClassVar[list[CUDAGraph]] = []

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []
        self.replays = 0

    @contextmanager
    def capture(self) -> Iterator[None]:
        random = torch.get_rng_state()
        recorder = Recorder(self)
        try:
            with recorder:
                yield
        finally:
            torch.set_rng_state(random)
            for storage, content in recorder.before.values():
                storage.copy_(content)
            for tensor in recorder.allocated.values():
                if tensor.is_floating_point():
                    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                    whole.fill_(torch.nan)
        CUDAGraph.captured.append(self)

    def replay(self) -> None:
        self.replays += 1
        # As in a recorder, without autograd, whose inputs would otherwise refuse to be written to.
        with torch._C._AutoDispatchBelowAutograd():
            for function, args, kwargs, results in self.calls:
                again = tree_leaves(function(*args, **kwargs))
                for old, new in zip(tree_leaves(results), again, strict=True):
                    if isinstance(old, Tensor) and memory(old) != memory(new):
                        old.copy_(new)


class Recorder(TorchDispatchMode):
    """Sees every operator on the CPU, where backward passes run in the same thread."""

    def __init__(self, graph: CUDAGraph) -> None:
        super().__init__()
        self.graph = graph
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.allocated: dict[int, Tensor] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        masked = function.overloadpacket in INDEXING and any(mask.dtype == torch.bool for mask in inputs)
        if masked or function.overloadpacket in FORBIDDEN:
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        if kwargs.get("generator") is not None:
            raise RuntimeError("the generator is not registered with the graph")
        for tensor in inputs:
            if memory(tensor) not in self.allocated:
                storage = tensor.untyped_storage()
                self.before.setdefault(memory(tensor), (storage, storage.clone()))
        results = function(*args, **kwargs)
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor) and memory(tensor) not in self.before:
                self.allocated.setdefault(memory(tensor), tensor)
        self.graph.calls.append((function, args, kwargs, results))
        return results


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Stream:
    """The CPU has one order of its work."""

    def wait_stream(self, other: Stream) -> None:
        pass


def emulate_graphs(monkeypatch: pytest.MonkeyPatch) -> list[CUDAGraph]:
    """Let `torch.cuda` capture and replay on the CPU. Returns the list that captured graphs are put into."""
    monkeypatch.setattr(CUDAGraph, "captured", [])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph.capture())
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    return CUDAGraph.captured


class OnTheCPU(TorchFunctionMode):
    """A machine with so many GPUs, whose memory is the CPU's: functions that are given one of them take the CPU."""

    def __init__(self, gpus: int) -> None:
        super().__init__()
        self.gpus, self.pinned = gpus, 0
        self.current: list[int] = []  # what the current device was set to

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not torch.device:  # which only names one
            args, kwargs = tree_map(self.host, (args, kwargs))
        return function(*args, **(kwargs or {}))

    def host(self, argument: Any) -> Any:
        if isinstance(argument, str) and argument.startswith("cuda"):
            return str(self.host(torch.device(argument)))
        if not (isinstance(argument, torch.device) and argument.type == "cuda"):
            return argument
        if (argument.index or 0) >= self.gpus:  # as CUDA puts it
            raise RuntimeError("CUDA error: invalid device ordinal\nCUDA kernel errors might be reported later.")
        return torch.device("cpu")

    def pin(self, tensor: Tensor) -> Tensor:
        self.pinned += 1
        return tensor.clone()


@contextmanager
def emulate_cuda(monkeypatch: pytest.MonkeyPatch, gpus: int = 1) -> Iterator[OnTheCPU]:
    """`torch.cuda` as on a machine with so many GPUs. Of PyTorch's Python functions all run that do not need one."""
    mode, generator = OnTheCPU(gpus), torch.Generator
    benchmark, precision = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()

    class Constructor(type):  # a class, since annotations name it
        def __call__(cls, device: str | torch.device = "cpu") -> torch.Generator:
            return generator(mode.host(torch.device(device)))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "_initialized", True)
    monkeypatch.setattr(torch.cuda, "default_generators", [generator() for _ in range(gpus)])
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", mode.current.append, raising=False)
    monkeypatch.setattr(torch, "Generator", Constructor("Generator", (), {}))
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor, *_: mode.pin(tensor))  # also in a thread, without the mode
    try:
        with mode:
            yield mode
    finally:
        torch.backends.cudnn.benchmark = benchmark
        torch.set_float32_matmul_precision(precision)
