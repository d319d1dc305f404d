"""Activation checkpointing repeats the forward pass: what that changes, and what does not."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from subjects import SUBJECTS, assert_close, buffers, build, gradients, inputs, score, subjects
from torch_sagan import SpectralNorm


@subjects()
def test_activation_checkpointing_in_evaluation(subject: str) -> None:
    module = build(subject).eval()
    x = inputs(subject, 3)
    y, expected = checkpoint(module, *x, use_reentrant=False), module(*x)
    assert torch.equal(y, expected)
    assert_close(gradients(module, score(y).sum()), gradients(module, score(expected).sum()))


@subjects(tiles=True)
def test_activation_checkpointing_in_training(subject: str) -> None:
    """Checkpointing repeats the pass with all its effects: the gradient equals bitwise that of a second pass."""
    module = build(subject)
    twin = copy.deepcopy(module)
    x = inputs(subject, 3)
    y = checkpoint(module, *x, use_reentrant=False)
    first, second = twin(*x), twin(*x)
    assert torch.equal(y, first)
    incoming = torch.randn_like(y)
    actual, expected = gradients(module, (y * incoming).sum()), gradients(twin, (second * incoming).sum())
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert all(torch.equal(actual, expected) for actual, expected in zip(module.buffers(), twin.buffers(), strict=True))


@contextlib.contextmanager
def iteration_stopped(module: nn.Module) -> Iterator[None]:
    norms = [part for part in module.modules() if isinstance(part, SpectralNorm) and part.training]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


@subjects(name for name in SUBJECTS if "torch" not in name)
def test_activation_checkpointing_with_the_iteration_stopped(subject: str) -> None:
    """The workaround of the page: the repeated pass uses u and v as the first one left them."""
    module = build(subject)
    twin = copy.deepcopy(module)
    x = inputs(subject, 3)
    contexts = contextlib.nullcontext(), iteration_stopped(module)
    y, expected = checkpoint(module, *x, use_reentrant=False, context_fn=lambda: contexts), twin(*x)
    assert torch.equal(y, expected)
    assert_close(gradients(module, score(y).sum()), gradients(twin, score(expected).sum()))
    for name, buffer in buffers(module).items():
        if name.endswith(("_u", "_v")):
            assert torch.equal(buffer, buffers(twin)[name]), name
    assert all(part.training for part in module.modules())
