"""The trainer on the device: that it starts, trains in each way, goes on elsewhere, and waits for nothing."""

from __future__ import annotations

import math
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from numerics import HAS_GPU
from tiny_runs import SCRIPT, checkpoint, lines, train
from training.cuda_graph import WARM_UP
from training.data.dataset import Batch
from training.flags import Config
from training.runs.distributed import processes
from training.state import TrainingState
from training.step import GAN, training_step

needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="without a GPU test_trainer_on_cuda.py does it with an emulated one")
CUDA = ["--device", "cuda", "--log-every", "1"]


def assert_trained(out: Path, steps: int) -> None:
    written = lines(out)
    assert [line["step"] for line in written] == list(range(1, steps + 1))
    assert all(math.isfinite(line[loss]) for line in written for loss in ("loss_d", "loss_g"))


# ------------------------------------------------------------------------------------------------------- starting


@needs_gpu
@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--standalone"]], ids=["alone", "torchrun"])
def test_starts(name: str, launcher: list[str], tmp_path: Path) -> None:
    """In a process of its own; under torchrun in a group, which it joins and leaves over NCCL."""
    command = [sys.executable, *launcher, *SCRIPT, "--data", "digits", "--steps", "2", "--log-every", "1"]
    command += ["--device", name, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "on cuda:0\n" in done.stdout
    assert_trained(tmp_path, 2)


WAYS = {
    "bf16": ["--precision", "bf16"],
    "residual network, classes": ["--architecture", "resnet", "--classes", "own", "--precision", "bf16"],
    "wgan-gp": ["--loss", "wgan-gp", "--d-steps", "2"],
    "relativistic": ["--loss", "relativistic", "--precision", "bf16", "--noise", "0.1"],
    "augment, accumulate, evaluate": [
        *(
            "--augment",
            "color,translation,cutout",
            "--grad-accum-steps",
            "2",
            "--eval-every",
            "2",
            "--eval-samples",
            "8",
        )
    ],
    "CUDA graph": ["--cuda-graph", "--precision", "bf16"],
    "CUDA graph, wgan-gp": ["--cuda-graph", "--loss", "wgan-gp", "--grad-accum-steps", "2"],
}


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    "way", [way if way == "CUDA graph" else pytest.param(way, marks=pytest.mark.exhaustive) for way in WAYS]
)
def test_trains(way: str, tmp_path: Path) -> None:
    steps = WARM_UP + 2 if "graph" in way else 2
    assert train(tmp_path, *CUDA, *WAYS[way], "--steps", str(steps)) == 0
    assert_trained(tmp_path, steps)


@pytest.mark.slow  # it compiles both networks
@pytest.mark.skipif(not HAS_GPU, reason="test_training.py of the trainer traces the compiled networks on the CPU")
@pytest.mark.usefixtures("machine")
def test_trains_compiled(tmp_path: Path) -> None:
    assert train(tmp_path, *CUDA, "--compile", "--precision", "bf16", "--steps", "2") == 0
    assert_trained(tmp_path, 2)


# ------------------------------------------------------------------------------------------------------- resuming


def weights(out: Path, name: str = "checkpoint.pt") -> Tensor:
    """All of both networks, as one vector."""
    state = checkpoint(out, name)
    networks = (state[network] for network in ("generator", "discriminator"))
    return torch.cat([tensor.double().cpu().flatten() for network in networks for tensor in network.values()])


def apart(one: Tensor, other: Tensor, start: Tensor) -> float:
    """How far apart two ends are, in terms of the way from the start to one of them.

    On a GPU it is not 0: sums are in no fixed order, and the fastest convolutions differ from run to run, in TF32. Adam
    takes whole steps for gradients that are 0 but for rounding. Moments that are lost, or in another layout than their
    weights, make it about 1.
    """
    return float((one - other).norm() / (one - start).norm())


CLOSE = 0.2 if HAS_GPU else 1e-4


@pytest.mark.exhaustive
@pytest.mark.usefixtures("machine")
def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    """From its checkpoint, with the same images and latent vectors, to where the uninterrupted run ends."""
    saved = [*CUDA, "--save-every", "3"]
    assert train(tmp_path / "straight", *saved, "--steps", "6") == 0
    assert train(tmp_path / "parts", *saved, "--steps", "3") == 0
    assert train(tmp_path / "parts", *saved, "--steps", "6", "--resume", "auto") == 0
    assert checkpoint(tmp_path / "straight")["images"] == checkpoint(tmp_path / "parts")["images"]
    start = weights(tmp_path / "parts", "checkpoint-000003.pt")
    assert apart(weights(tmp_path / "parts"), weights(tmp_path / "straight"), start) < CLOSE


@pytest.mark.exhaustive
@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(("first", "second"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_moves_to_another_device(first: str, second: str, tmp_path: Path) -> None:
    """Whatever layout weights have there, the next step is the same: Adam's moments have the layout of the weights."""
    ends = []
    for channels_last in ("yes", "no"):
        out = tmp_path / channels_last
        settings = ["--save-every", "3", "--beta1", "0.5", "--beta2", "0.999"]
        assert train(out, *settings, "--steps", "3", "--device", first, "--channels-last", "yes") == 0
        more = ["--steps", "4", "--device", second, "--channels-last", channels_last, "--resume", "auto"]
        assert train(out, *settings, *more) == 0
        ends.append(weights(out))
    assert apart(*ends, weights(tmp_path / "yes", "checkpoint-000003.pt")) < CLOSE


# ------------------------------------------------------------------------------------------ a step, several processes


def batches(state: TrainingState, count: int) -> Iterator[list]:
    size = state.config.image_size
    images = [torch.randint(256, (state.config.batch_size, 3, size, size), dtype=torch.uint8) for _ in range(count)]
    images = [part.pin_memory() for part in images] if state.device.type == "cuda" else images
    return state.batches(Batch(part, None) for part in images)


@pytest.mark.skipif(not HAS_GPU, reason="test_state.py counts the readings of a step on the CPU")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("loss", ["hinge", "wgan-gp"])
def test_a_step_never_waits_for_the_gpu(loss: str, precision: str, device: torch.device) -> None:
    config = Config(image_size=32, base_channels=8, batch_size=8, loss=loss, precision=precision)
    state = TrainingState(config, device=device)
    coming = batches(state, 4)
    state.advance(coming)  # the first one allocates and chooses kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            state.advance(coming)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow  # a process group comes and goes
def test_several_processes_over_nccl(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a group of one: the step of networks as several processes have them is the step. On the CPU over gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    with processes():
        compare_steps(device)  # what refers to the group is gone when it ends


def compare_steps(device: torch.device) -> None:
    losses, ends = [], []
    for wrapped in (False, True):
        state = TrainingState(Config(image_size=16, base_channels=4, batch_size=4, z_dim=8), device=device)
        networks: list[nn.Module] = [state.generator, state.discriminator]
        start = as_vector(networks)
        if wrapped:
            if HAS_GPU:  # the CPU has no synchronized batch norm
                networks[0] = nn.SyncBatchNorm.convert_sync_batchnorm(networks[0])
            networks = [DistributedDataParallel(network, [0] if HAS_GPU else None) for network in networks]
        gan = GAN(*networks, state.generator_optimizer, state.discriminator_optimizer, state.gan.objective)
        torch.manual_seed(0)
        losses.append(training_step(gan, batches(state, 1)))
        ends.append(as_vector(networks))
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)
    assert apart(*ends, start) < CLOSE


def as_vector(networks: list[nn.Module]) -> Tensor:
    return torch.cat([p.detach().flatten().double() for network in networks for p in network.parameters()])
