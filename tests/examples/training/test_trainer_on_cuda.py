"""The trainer on a machine with GPUs, emulated: devices and functions are those of CUDA, memory is that of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from emulated_cuda import OnTheCPU, emulate_cuda, emulate_graphs
from tiny_runs import lines, train
from training.cuda_graph import WARM_UP
from training.runs import distributed
from training.runs.distributed import Ranks, pick_device

NAMES = ("auto", "cuda", "cuda:0")

pytestmark = pytest.mark.usefixtures("small_figures")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[OnTheCPU]:
    """A machine with one GPU."""
    with emulate_cuda(monkeypatch) as machine:
        yield machine


def one_process_of_torchrun() -> Ranks:
    return Ranks(rank=0, world=1, local_rank=0, launcher=1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [Ranks(), one_process_of_torchrun()], ids=["alone", "torchrun"])
def test_a_device_has_its_number(name: str, ranks: Ranks, gpu: OnTheCPU) -> None:
    assert pick_device(name, ranks) == torch.device("cuda:0")
    assert gpu.current == [0]
    assert torch.backends.cudnn.benchmark
    assert torch.get_float32_matmul_precision() == "high"


def test_each_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with emulate_cuda(monkeypatch, gpus=2) as machine:
        for name in ("auto", "cuda"):
            assert pick_device(name, Ranks(rank=3, world=4, local_rank=1)) == torch.device("cuda:1")
        assert machine.current == [1, 1]


@pytest.mark.parametrize(
    ("name", "ranks", "gpus", "message"),
    [
        ("cuda:7", Ranks(), 1, r"--device cuda:7: expected a GPU below cuda:1, got cuda:7$"),
        ("cuda", Ranks(2, 3, 2), 2, r"--device cuda: .* below cuda:2, got cuda:2 for one of 3 processes"),
        ("cuda:x", Ranks(), 1, r"--device cuda:x: Invalid device string"),
    ],
)
def test_a_gpu_that_is_not_there_is_one_line(
    name: str, ranks: Ranks, gpus: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with emulate_cuda(monkeypatch, gpus), pytest.raises(SystemExit, match=message) as error:
        pick_device(name, ranks)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["auto", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in NAMES[1:])])
def test_a_run_on_a_gpu(name: str, gpu: OnTheCPU, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It trains, draws, scores, saves and goes on; what the device's own functions are asked for is there."""
    settings = ["--device", name, "--noise", "0.1", "--eval-every", "2", "--eval-samples", "8", "--log-every", "1"]
    assert train(tmp_path, *settings, "--steps", "2") == 0
    assert "on cuda:0\n" in capsys.readouterr().out
    assert gpu.pinned >= 2  # a batch for each step
    assert train(tmp_path, *settings, "--steps", "3", "--resume", "auto") == 0
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_a_run_as_a_cuda_graph(
    gpu: OnTheCPU, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    captured, steps = emulate_graphs(monkeypatch), WARM_UP + 2
    settings = ["--steps", str(steps), "--log-every", "1", "--device", "cuda"]
    assert train(tmp_path, *settings, "--cuda-graph") == 0
    assert "in a CUDA graph\n" in capsys.readouterr().out
    assert [graph.replays for graph in captured] == [2]
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, steps + 1))


def test_a_graph_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--cuda-graph: expected a CUDA device, got cpu$"):
        train(tmp_path, "--cuda-graph")
    assert not list(tmp_path.iterdir())


def test_a_run_moves_between_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, "--steps", "1")
    with emulate_cuda(monkeypatch):
        assert train(tmp_path, "--resume", "auto", "--steps", "2", "--device", "cuda") == 0
    monkeypatch.undo()
    assert train(tmp_path, "--resume", "auto", "--steps", "3") == 0
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_networks_of_several_processes_are_wrapped_for_their_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake tensors, which have CUDA's device and no memory."""
    wrapped = []
    monkeypatch.setattr(distributed, "DistributedDataParallel", lambda model, device_ids: wrapped.append(device_ids))
    with FakeTensorMode():
        ranks = Ranks(rank=3, world=4, local_rank=1)
        for device, norm in (("cpu", nn.BatchNorm2d), ("cuda:1", nn.SyncBatchNorm)):
            network = nn.Sequential(nn.BatchNorm2d(4, device=device))
            ranks.parallel(network)
            assert type(ranks.synchronized_batch_norm(network)[0]) is norm
    assert wrapped == [None, [torch.device("cuda:1")]]
