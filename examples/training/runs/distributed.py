"""Several processes that train one model, started by `torchrun` on one machine or on many.

Every process has the same networks and takes its share of each batch; DistributedDataParallel averages the gradients.
Objects such as messages are exchanged by gloo on the CPU, so that no process waits for its GPU; tensors on a GPU are
exchanged by NCCL. Without `torchrun` there is one process, and nothing is exchanged.
"""

from __future__ import annotations

import atexit
import gc
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler

from training.runs.memory import out_of_memory
from training.script import fail, line

Rows = TypeVar("Rows", Tensor, list[Any])

# What gloo and NCCL report when another process has ended.
LOST = re.compile(r"onnection closed by peer|onnection reset by peer|roken pipe|remote process exited")

# The first process of each machine decodes the images, and the very first saves, draws and evaluates, while the others
# wait.
TIMEOUT = timedelta(days=1)


@dataclass(frozen=True)
class Ranks:
    """The number `rank` of this process among `world` processes, and its number on this machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    launcher: int | None = None  # the process that started it

    @property
    def abandoned(self) -> bool:
        """Whether `torchrun` was killed, which sends no signal: its processes would continue beside a new run."""
        return self.launcher not in (None, os.getppid())

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def shard(self, batch: Rows) -> Rows:
        """This process's rows of a batch that every process has."""
        size = len(batch) // self.world
        share: Rows = batch[self.rank * size : (self.rank + 1) * size]
        return share

    def gather(self, thing: Any) -> list[Any]:
        """One object from each process, in the order of ranks."""
        things = [thing] * self.world
        if self.world > 1:
            dist.all_gather_object(things, thing)
        return things

    def broadcast(self, thing: Any) -> Any:
        """The object of the first process, on all of them, without a common disk."""
        things = [thing]
        if self.world > 1:
            dist.broadcast_object_list(things)
        return things[0]

    def all_reduce_max(self, number: int) -> int:
        """The largest of one number from each process."""
        numbers = torch.tensor(number)
        if self.world > 1:
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over processes, on the tensor's own device."""
        if self.world > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
            tensor /= self.world
        return tensor

    @contextmanager
    def agreeing(self, *errors: type[Exception]) -> Iterator[None]:
        """End all processes with one line if one raises SystemExit, OSError, out of memory, or one of `errors`."""
        message = None
        try:
            yield
        except (SystemExit, Exception) as stop:
            if isinstance(stop, SystemExit) and isinstance(stop.code, str):
                message = stop.code
            elif isinstance(stop, (OSError, *errors)):
                message = line(stop)
            elif short := out_of_memory(stop):
                message = line(short)
            else:
                raise
        if self.world == 1 and message:
            raise SystemExit(message)
        messages = [text for text in self.gather(message) if text]
        if messages:
            if self.first:
                print(messages[0], file=sys.stderr, flush=True)
            self.gather(None)  # until the line is printed: torchrun ends all processes as soon as one has ended
            raise SystemExit(1)

    @contextmanager
    def noticing_losses(self) -> Iterator[None]:
        """End with one line when another process has ended.

        It is printed at once: `torchrun` has seen that too, and its SIGTERM may come before anything is cleaned up.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or not LOST.search(str(error)):
                raise
            print(line(f"rank {self.rank} lost another process"), file=sys.stderr, flush=True)
            raise SystemExit(1) from None

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model to call in training: a backward pass through it averages the gradients over processes."""
        if self.world == 1:
            return model
        # A weight with a dimension of size one has several equivalent strides, of which DDP warns.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        device = next(model.parameters()).device
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    def synchronized_batch_norm(self, model: nn.Module) -> nn.Module:
        """Batch norm over the images of all processes, which PyTorch has on CUDA alone."""
        if self.world > 1 and next(model.parameters()).is_cuda:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return model

    def average_statistics(self, model: nn.Module) -> None:
        """Average the running statistics of batch norms that saw only this process's images."""
        if self.world == 1:
            return
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]  # SyncBatchNorm is not one
        statistics = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]
        if statistics:
            means = self.mean(torch.cat([tensor for tensor in statistics if tensor is not None]))
            for tensor in statistics:
                assert tensor is not None
                mean, means = means[: len(tensor)], means[len(tensor) :]
                tensor.copy_(mean)


SINGLE_PROCESS = Ranks()


def no_sync_unless(model: nn.Module, when: bool) -> AbstractContextManager[object]:
    """Unless `when`, gradients of forward passes inside are added up on this process and not averaged over all."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not when else nullcontext()


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, without the wrapper that `Ranks.parallel` gives it."""
    module: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    return module


class ShardSampler(Sampler[list[Any]]):
    """This process's share of each batch, in `parts` pieces, one after another."""

    def __init__(self, batches: Iterable[list[Any]], ranks: Ranks, parts: int) -> None:
        self.batches, self.ranks, self.parts = batches, ranks, parts

    def __iter__(self) -> Iterator[list[Any]]:
        for batch in self.batches:
            share: Sequence[Any] = self.ranks.shard(batch)
            size = len(share) // self.parts
            for part in range(self.parts):
                yield list(share[part * size : (part + 1) * size])


@contextmanager
def processes() -> Iterator[Ranks]:
    """Join the process group inside the block; only the first process prints.

    Objects that refer to the group, such as a model from `Ranks.parallel`, must be out of scope when the block ends.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Ranks()
        return
    launcher = os.getppid()
    # DistributedDataParallel imports this later, and its functions would then keep a reference to the group.
    import torch.distributed.nn.functional

    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")), launcher)
    try:
        with (
            open(os.devnull, "w", errors="backslashreplace") as nowhere,
            nullcontext() if ranks.first else redirect_stdout(nowhere),
            ranks.noticing_losses(),
        ):
            yield ranks
            ranks.gather(None)  # a process that left earlier could not answer those that still read its last message
    except BaseException as error:
        # The others may be waiting for this process, which would wait for them if it left the group in order.
        status = error.code if isinstance(error, SystemExit) else 1
        atexit.register(_leave_at_once, status if isinstance(status, int) else 1)
        raise
    # Gloo's threads end with the last reference to the group. A thread that still frees a tensor when Python ends
    # aborts the process. DistributedDataParallel refers to the group and is part of reference cycles, so collect them.
    gc.collect()
    dist.destroy_process_group()


def _leave_at_once(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def pick_device(name: str, ranks: Ranks) -> torch.device:
    """The device that `--device` names; on CUDA each process of a machine takes its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cpu" if name == "mps" and ranks.world > 1 else name
    if ranks.world > 1 and name not in ("cpu", "cuda"):
        fail(f"--device {name}: several processes cannot share it, give cuda (each takes its own) or cpu")
    try:
        device = torch.device("cuda", ranks.local_rank) if name == "cuda" else torch.device(name)
        torch.empty(0, device=device)
        torch.Generator(device)  # latent vectors will be drawn on it
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]  # torch's advice can fill a page
        if "invalid device ordinal" in reason:
            reason = f"expected a GPU below cuda:{torch.cuda.device_count()}, got {device}"
            reason += f" for one of {ranks.world} processes, which take each its own" if ranks.world > 1 else ""
        fail(f"--device {name}: {reason}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32: 10-bit products summed in float32, several times faster
        torch.backends.cudnn.benchmark = True  # every step has the same sizes: the fastest algorithms are found once
    return device
