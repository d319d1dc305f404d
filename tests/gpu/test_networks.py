"""Whole networks on the device: spectral norm, and classes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from numerics import HAS_GPU, captured, error
from torch_sagan import SAGANDiscriminator, SAGANGenerator, SpectralNorm, functional, recalibrate, spectral_norms

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "G": lambda: SAGANGenerator(32, base_channels=8),
    "D": lambda: SAGANDiscriminator(32, base_channels=8),
    "G, classes": lambda: SAGANGenerator(32, base_channels=8, architecture="resnet", num_classes=5),
    "D, classes": lambda: SAGANDiscriminator(32, base_channels=8, architecture="resnet", num_classes=5),
}
of_each_network = pytest.mark.parametrize("kind", NETWORKS)


def inputs(kind: str, device: torch.device, count: int = 4) -> tuple[Tensor, ...]:
    x = torch.randn((count, 128) if kind.startswith("G") else (count, 3, 32, 32), device=device)
    return (x, torch.arange(count, device=device) % 5) if "classes" in kind else (x,)


def normalized(network: nn.Module) -> list[tuple[SpectralNorm, Tensor]]:
    """Every spectral norm with its weight (h, w), in float64 on the CPU."""
    chains = [module for module in network.modules() if isinstance(module, parametrize.ParametrizationList)]
    return [(chain[0], chain.original.detach().double().cpu().movedim(chain[0].dim, 0).flatten(1)) for chain in chains]


def vectors(norm: SpectralNorm) -> tuple[Tensor, Tensor]:
    return norm._u.double().cpu(), norm._v.double().cpu()


@of_each_network
@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16], ids=["float32", "bf16", "f16"])
@pytest.mark.parametrize("matmul", ["highest", "high"])
def test_power_iterations_are_in_float32(
    kind: str, precision: torch.dtype | None, matmul: str, device: torch.device
) -> None:
    """Those of all weights of a network, together, equal each one's in float64. Autocast and TF32 do not reach them."""
    network, arguments = NETWORKS[kind]().to(device), inputs(kind, device)
    expected = [functional.power_iteration(weight, *vectors(norm))[:2] for norm, weight in normalized(network)]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul)
    try:
        with torch.no_grad(), torch.autocast(device.type, precision or torch.bfloat16, enabled=precision is not None):
            network(*arguments)
    finally:
        torch.set_float32_matmul_precision(before)
    for (norm, _), exact in zip(normalized(network), expected, strict=True):
        for ours, theirs in zip(vectors(norm), exact, strict=True):  # of norm 1; TF32 would make it 3e-4, bfloat16 2e-3
            assert error(ours, theirs) < 1e-5


@of_each_network
def test_sigmas_are_one_on_the_device(kind: str, device: torch.device) -> None:
    """Exactly, once u and v are the first singular vectors."""
    network = NETWORKS[kind]().to(device)
    recalibrate(network, [inputs(kind, device)] if kind.startswith("G") else None)
    sigmas = torch.tensor(list(spectral_norms(network).values()))
    assert len(sigmas) >= 3
    torch.testing.assert_close(sigmas, torch.ones_like(sigmas), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("kind", [SAGANGenerator, SAGANDiscriminator])
def test_a_cuda_graph_takes_other_labels(kind: type[nn.Module], device: torch.device) -> None:
    """Capture raises an error where the host reads a value of the device."""
    network = kind(8, base_channels=2, num_classes=5).to(device).eval()
    x = torch.randn((2, 128) if kind is SAGANGenerator else (2, 3, 8, 8), device=device)
    labels = torch.tensor([4, 0], device=device)
    with torch.no_grad():
        y, graph = captured(lambda: network(x, labels))
        labels.copy_(torch.tensor([1, 3]))
        graph.replay()
        torch.testing.assert_close(y, network(x, labels))


@pytest.mark.skipif(not HAS_GPU, reason="an assertion of the device; test_conditional.py has those of the CPU")
def test_labels_out_of_range_are_asserted_on_cuda() -> None:
    """In a process of its own, whose use of CUDA ends with the assertion."""
    code = (
        "import torch, torch_sagan\n"
        "generator = torch_sagan.SAGANGenerator(8, base_channels=2, num_classes=5).cuda()\n"
        "generator(torch.randn(2, 128).cuda(), torch.tensor([0, 5]).cuda())\n"
        "torch.cuda.synchronize()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "device-side assert" in result.stderr
