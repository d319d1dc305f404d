"""Data parallel and sharded training in two processes equal training in one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.parallel import DistributedDataParallel

from subjects import NORMALIZED, REPRESENTATIVE, SUBJECTS, assert_close, build, inputs, score
from torch_sagan import hinge_discriminator_loss, hinge_generator_loss, spectral_norms

pytestmark = pytest.mark.slow  # starting two processes takes seconds

PARALLEL = [name for name in SUBJECTS if name not in ("attention", "attention in tiles", "discriminator with classes")]
# What takes the processes seconds to import; optimizers and parallel networks import the compiler.
SHARED = ["torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "subjects"]
FULLY_SHARD = hasattr(torch.distributed.fsdp, "fully_shard")


@pytest.fixture(scope="module", params=["representative", pytest.param("others", marks=pytest.mark.exhaustive)])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have left a file for each kind of training that went well, and the error of one that did not.

    Starting them takes seconds, so that they do all there is to do, after a process has imported for both.
    """
    folder = tmp_path_factory.mktemp("two_processes")
    names = [name for name in PARALLEL if (name in REPRESENTATIVE) == (request.param == "representative")]
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(["torch._dynamo", *SHARED])
    try:
        torch.multiprocessing.start_processes(_in_a_group, (names, folder), nprocs=2, start_method="forkserver")
    except torch.multiprocessing.ProcessRaisedException as error:
        (folder / "error").write_text(str(error))
    return folder


def _in_a_group(rank: int, names: list[str], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    for work in (_train_in_parallel, _train_in_shards):
        if work is _train_in_shards and not FULLY_SHARD:
            continue
        work(rank, names)
        if rank == 0:
            (folder / work.__name__).touch()
    dist.destroy_process_group()


def assert_went_well(folder: Path, work: str) -> None:
    error = folder / "error"
    assert (folder / work).exists(), error.read_text() if error.exists() else "the processes ended early"


def _train_in_parallel(rank: int, names: list[str]) -> None:
    for subject in names:
        torch.manual_seed(0)
        alone = build(subject)
        module = copy.deepcopy(alone)
        parallel = DistributedDataParallel(module)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (alone, parallel)]
        for _ in range(3):
            real, fake = inputs(subject, 4), inputs(subject, 4)
            shares = [[t[rank::2] for t in batch] for batch in (real, fake)]
            for m, batches, optimizer in zip((alone, parallel), ((real, fake), shares), optimizers, strict=True):
                optimizer.zero_grad()
                if "generator" in subject:  # one pass a step; batch norm of older torch bears no second one
                    hinge_generator_loss(score(m(*batches[0]))).backward()
                else:
                    hinge_discriminator_loss(*(score(m(*batch)) for batch in batches)).backward()
                optimizer.step()
        if "generator" not in subject:  # batch statistics are each process's own
            assert_close(module.state_dict(), alone.state_dict())
        _assert_equal_on_both_ranks(
            {name: value for name, value in module.state_dict().items() if "running" not in name}
        )
        parallel.eval()(*shares[0])  # a pass in evaluation brings the running statistics in line as well
        _assert_equal_on_both_ranks(module.state_dict())


def _assert_equal_on_both_ranks(state: dict[str, Tensor]) -> None:
    states: list[dict[str, Tensor]] = [{}, {}]
    dist.all_gather_object(states, state)
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_distributed_data_parallel(folder: Path) -> None:
    """A discriminator's steps, real and fake in passes of their own, equal those of one process on the whole batch."""
    assert_went_well(folder, "_train_in_parallel")


def _train_in_shards(rank: int, names: list[str]) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (2,))
    for subject in names:
        torch.manual_seed(0)
        alone = build(subject)
        module = copy.deepcopy(alone)
        for layer in [*getattr(module, "blocks", []), *getattr(module, "attention", nn.ModuleDict()).values()]:
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
        assert all(isinstance(parameter, dist.tensor.DTensor) for parameter in module.parameters())
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (alone, module)]
        for _ in range(3):
            real, fake = inputs(subject, 4), inputs(subject, 4)
            for m, optimizer in zip((alone, module), optimizers, strict=True):
                optimizer.zero_grad()
                hinge_discriminator_loss(score(m(*real)), score(m(*fake))).backward()
                optimizer.step()
        state = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))
        if rank == 0:
            assert_close(state, alone.state_dict())
        if subject in NORMALIZED:
            module(*inputs(subject, 4))
            alone(*inputs(subject, 4))
            for part in module.modules():  # outside of a pass, whole weights are there when they are asked for
                if hasattr(part, "unshard"):
                    part.unshard()
            assert spectral_norms(module) == pytest.approx(spectral_norms(alone))


def test_fully_sharded_data_parallel(folder: Path) -> None:
    if not FULLY_SHARD:
        pytest.skip("fully_shard is public from torch 2.6 on")
    assert_went_well(folder, "_train_in_shards")
