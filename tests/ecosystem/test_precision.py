"""Autocast, half and double precision, and the channels-last format."""

from __future__ import annotations

import copy

import pytest
import torch

from subjects import assert_close, buffers, build, channels_last, gradients, inputs, score, subjects

# Relative to the largest output, after up to a dozen layers: some roundings of 2**-8 and of 2**-11.
roundings = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.06), (torch.float16, 0.008)])


@roundings
@subjects(tiles=True)
def test_autocast(subject: str, dtype: torch.dtype, tolerance: float) -> None:
    module = build(subject, torch.float32)
    twin = copy.deepcopy(module)
    x = inputs(subject, 3, torch.float32)
    expected = twin(*x)
    with torch.autocast("cpu", dtype=dtype):
        y = module(*x)
    assert (y.float() - expected).abs().max() <= tolerance * expected.abs().max()
    assert not torch.equal(y.float(), expected)
    for name, gradient in gradients(module, score(y.float()).sum()).items():
        assert gradient.dtype == torch.float32, name
        assert gradient.isfinite().all(), name
    for name, buffer in buffers(module).items():
        if name.endswith(("_u", "_v")) and "torch" not in subject:  # the iteration is outside of autocast
            assert torch.equal(buffer, buffers(twin)[name]), name


@roundings
@subjects(tiles=True)
def test_half_precision(subject: str, dtype: torch.dtype, tolerance: float) -> None:
    module = build(subject, torch.float32)
    x = inputs(subject, 3, torch.float32)
    expected = copy.deepcopy(module)(*x)
    low = [t.to(dtype) if t.is_floating_point() else t for t in x]
    y = module.to(dtype)(*low)
    assert y.dtype == dtype
    assert (y.float() - expected).abs().max() <= tolerance * expected.abs().max()
    for name, gradient in gradients(module, score(y).sum()).items():
        assert gradient.dtype == dtype, name
        assert gradient.isfinite().all(), name


@subjects()
def test_double(subject: str) -> None:
    module = build(subject, torch.float32)
    x = inputs(subject, 3)
    expected = copy.deepcopy(module)(x[0].float(), *x[1:])
    y = module.double()(*x)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y.float(), expected, rtol=1e-4, atol=1e-5)  # float32 over a dozen layers
    assert all(gradient.dtype == torch.float64 for gradient in gradients(module, score(y).sum()).values())


@subjects()
def test_channels_last(subject: str) -> None:
    """Same results, and images stay in the format."""
    module = build(subject)
    layout = channels_last(subject)
    twin = copy.deepcopy(module).to(memory_format=layout)
    x = inputs(subject, 3)
    y, expected = twin(*(t.to(memory_format=layout) if t.ndim > 3 else t for t in x)), module(*x)
    assert_close(y, expected)
    assert_close(gradients(twin, score(y).sum()), gradients(module, score(expected).sum()))
    assert y.ndim < 4 or y.is_contiguous(memory_format=layout)
