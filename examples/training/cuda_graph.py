"""The training step as one CUDA graph: captured once, and from then on started by a single launch.

A graph repeats the kernels that were recorded, on the same memory and with the same numbers. So each batch is copied
into the memory of the first one, and the learning rates are read from tensors. Random numbers go on: PyTorch moves the
default generator forward at each replay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

from training.step import GAN, Piece, training_step

# Steps before the capture, in which Adam allocates its moments, and cuDNN and cuBLAS choose and set up what a capture
# forbids. PyTorch's documentation takes three. They are steps of the run as all others.
WARM_UP = 3


class GraphedStep:
    """`training_step` for batches of one shape, on the current CUDA device.

    New networks or optimizer states (as from `load_state_dict`) need a new one, since the graph has the old memory.
    """

    def __init__(self, gan: GAN, *, d_steps: int = 1) -> None:
        self.gan, self.d_steps = gan, d_steps
        self.stream = torch.cuda.Stream()  # of the warm-up and of the capture, which the default stream does not allow
        self.warm_up = WARM_UP
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batches: Iterator[Sequence[Piece]]) -> Tensor:
        """One step. Returns the last losses of D and G (2,)."""
        drawn = [next(batches) for _ in range(self.d_steps)]
        if self.warm_up:
            self.warm_up -= 1
            return self._eager(drawn)
        if self.graph is None:
            self._capture(drawn)  # runs nothing
        assert self.graph is not None
        for kept, new in zip(_tensors(self.inputs), _tensors(drawn), strict=True):
            kept.copy_(new, non_blocking=True)
        for optimizer, rate in self.rates.items():
            rate.fill_(optimizer.param_groups[0]["lr"])
        self.graph.replay()
        return self.losses.clone()  # the next replay overwrites them

    def _eager(self, drawn: Sequence[Sequence[Piece]]) -> Tensor:
        before = torch.cuda.current_stream()
        self.stream.wait_stream(before)
        with torch.cuda.stream(self.stream):
            losses = training_step(self.gan, iter(drawn), d_steps=self.d_steps)
        before.wait_stream(self.stream)
        return losses

    def _capture(self, drawn: Sequence[Sequence[Piece]]) -> None:
        optimizers = (self.gan.discriminator_optimizer, self.gan.generator_optimizer)
        for optimizer in optimizers:
            optimizer.zero_grad()  # so that gradients are allocated in the graph's memory
        self.inputs = [[_copy(piece) for piece in batch] for batch in drawn]
        self.graph = torch.cuda.CUDAGraph()
        with ExitStack() as stack:
            self.rates = {optimizer: stack.enter_context(_capturable(optimizer)) for optimizer in optimizers}
            # thread_local: the loader's thread may pin memory meanwhile, which concerns no kernel of the graph.
            stack.enter_context(torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"))
            self.losses = training_step(self.gan, iter(self.inputs), d_steps=self.d_steps)


@contextmanager
def _capturable(optimizer: Optimizer) -> Iterator[Tensor]:
    """Inside, Adam reads its learning rate from this tensor. (A number would stay in the graph as it is now.)

    Outside the setting is a number again, so schedules and checkpoints are those of a run without a graph.
    """
    (group,) = optimizer.param_groups
    before = {name: group[name] for name in ("lr", "capturable")}
    rate = torch.tensor(group["lr"], dtype=torch.float32, device=group["params"][0].device)
    group.update(lr=rate, capturable=True)
    try:
        yield rate
    finally:
        group.update(before)


def _copy(piece: Piece) -> Piece:
    return Piece(piece.real.clone(), piece.z.clone(), None if piece.labels is None else piece.labels.clone())


def _tensors(batches: Sequence[Sequence[Piece]]) -> Iterator[Tensor]:
    return (part for batch in batches for piece in batch for part in piece if part is not None)
