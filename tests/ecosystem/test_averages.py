"""``AveragedModel``: what is averaged, what is copied, and what `recalibrate` mends."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from subjects import LAYERS, NORMALIZED, build, inputs, subjects, worst_norm
from torch_sagan import recalibrate


def averaged(subject: str, *, use_buffers: bool) -> tuple[nn.Module, AveragedModel]:
    """The subject after some steps, and the average over them, which lags behind."""
    module = build(subject)
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.95), use_buffers=use_buffers)
    optimizer = torch.optim.Adam(module.parameters(), lr=5e-3, betas=(0.0, 0.9))
    for _ in range(30):
        y = module(*inputs(subject, 4))
        optimizer.zero_grad()
        (y - torch.randn_like(y)).square().mean().backward()
        optimizer.step()
        average.update_parameters(module)
    return module, average


@subjects()
def test_averaged_model(subject: str) -> None:
    """Parameters are averaged, buffers copied; sigma of the average is near, and exact after recalibration."""
    module, average = averaged(subject, use_buffers=False)
    source, copied = dict(module.named_buffers()), dict(average.module.named_buffers())
    assert source.keys() == copied.keys()
    for name, buffer in source.items():
        assert torch.equal(buffer, copied[name])
        assert buffer is not copied[name]
    for name, parameter in average.module.named_parameters():
        assert not torch.equal(parameter, module.get_parameter(name)), name
    average.eval()
    assert average(*inputs(subject, 4)).isfinite().all()
    if subject in NORMALIZED:
        assert worst_norm(average.module) < 0.3
        recalibrate(average, [inputs(subject, 4)] if "generator" in subject else None)
        assert worst_norm(average.module) < 1e-9  # rounding in float64


@pytest.mark.parametrize("subject", LAYERS)
def test_averaged_buffers_are_wrong(subject: str) -> None:
    """The average of unit vectors is not a unit vector: ``use_buffers=True`` is not for u and v."""
    _, average = averaged(subject, use_buffers=True)
    vector = average.module.parametrizations.weight[0]._u
    assert abs(vector.norm().item() - 1) > 1e-3  # float64, where a unit vector's is below 1e-15
