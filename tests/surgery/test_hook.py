"""The process-wide hook that keeps inserted attention through conversions: there when it is needed, and not before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from torch_sagan import insert_self_attention

COUNT = "len(torch.nn.modules.module._global_module_registration_hooks)"


def run(code: str) -> str:
    """What Python prints for this code, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_comes_with_the_first_insertion() -> None:
    code = f"""
import torch, torch_sagan
from torch import nn
counts = [{COUNT}]
torch_sagan.insertion_points(nn.Sequential(nn.Conv2d(3, 4, 1)), torch.zeros(1, 3, 8, 8))
torch_sagan.apply_spectral_norm(nn.Sequential(nn.Conv2d(3, 4, 1)))
counts.append({COUNT})
for _ in range(2):
    torch_sagan.insert_self_attention(nn.Sequential(nn.Conv2d(3, 4, 1)), "0")
    counts.append({COUNT})
print(counts)
"""
    assert run(code) == "[0, 0, 1, 1]"


@pytest.mark.parametrize("after", ["1", "2"], ids=["batch norm", "Sequential"])
def test_it_comes_with_a_model_that_is_unpickled(after: str, tmp_path: Path) -> None:
    """A conversion in a process that inserted nothing keeps the layer, or says that it would be lost."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)))
    insert_self_attention(model, after)
    layer = model.get_submodule(f"{after}.inserted_attention")
    nn.init.constant_(layer.gamma, 0.5)
    model.eval()
    x = torch.randn(2, 3, 6, 6)
    torch.save(model, tmp_path / "model.pt")
    torch.save([x, model(x).detach()], tmp_path / "pass.pt")
    code = f"""
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
x, y = torch.load({str(tmp_path / "pass.pt")!r})
assert {COUNT} == 1
converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
torch.testing.assert_close(converted(x), y)
try:
    model[{after}] = torch.nn.Identity()
except RuntimeError as error:
    print(error)
"""
    assert "has inserted attention, which its replacement (Identity) lacks" in run(code)
