"""The branch of attention for CUDA, by kernels that are emulated on the CPU: what it reads, keeps and repeats."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import emulated_kernels
from attention_paths import inputs, packed
from torch_sagan import SAGANDiscriminator
from torch_sagan.attention import cuda
from torch_sagan.attention.layer import SelfAttention2d

fused = cuda.fused_attention


def test_every_tensor_is_kept_once_for_the_backward() -> None:
    """Query, key, value, the result, and one number for each query, padded to a multiple of 32."""
    b, d, e, n, m = 2, 8, 16, 64, 32
    tensors = inputs(b, d, e, n, m, dtype=torch.float32)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        fused(*tensors)
    assert sum(kept.values()) == 4 * b * (d * n + d * m + e * m + e * n + n)


def test_aligned_rows_are_read_in_place() -> None:
    """Channels-last query, key and value, slices of the result of one convolution, are not copied for the forward."""
    for part in packed([torch.randn(2, c, 9) for c in (8, 8, 64)], 0):
        rows = cuda._rows(part)
        assert (rows.data_ptr(), rows.shape, rows.stride(2)) == (part.data_ptr(), (2, 1, 9, part.shape[1]), 80)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_region_once(monkeypatch: pytest.MonkeyPatch, use_reentrant: bool) -> None:
    """Two passes in all, whatever the number of attention layers; the gradients are those without checkpointing."""
    emulated_kernels.emulate(monkeypatch)
    layers = torch.nn.Sequential(SelfAttention2d(8), torch.nn.Conv2d(8, 8, 1), SelfAttention2d.official(8))
    for layer in (layers[0], layers[2]):
        torch.nn.init.constant_(layer.gamma, 0.5)
    passes = []
    layers[1].register_forward_hook(lambda *_: passes.append(1))
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    leaves = [x, *layers.parameters()]
    expected = torch.autograd.grad(layers(x).square().sum(), leaves)
    passes.clear()
    checkpoint(layers, x, use_reentrant=use_reentrant).square().sum().backward()
    assert len(passes) == 2
    for leaf, other in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, other)


def test_the_documented_checkpointing_makes_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block of docs/ecosystem.md, through the branch of CUDA."""
    emulated_kernels.emulate(monkeypatch)
    passes = []
    forward = SAGANDiscriminator.forward
    monkeypatch.setattr(SAGANDiscriminator, "forward", lambda *a, **k: (passes.append(1), forward(*a, **k))[1])
    page = (Path(__file__).parents[2] / "docs" / "ecosystem.md").read_text(encoding="utf-8")
    (block,) = (part for part in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "iteration_stopped" in part)
    names: dict[str, Any] = {"torch": torch}
    exec(block, names)
    assert len(passes) == 2
    for name, parameter in names["discriminator"].named_parameters():
        assert parameter.grad is not None, name
