"""Tracers and fake tensors: graphs that equal the module they were made of, and shapes without values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from subjects import NETWORKS, SUBJECTS, assert_close, build, inputs, subjects
from torch_sagan import SAGANDiscriminator, SAGANGenerator

# Parts of torch that its compiler, exporters and forward mode use themselves, and that it has deprecated.
jit_is_deprecated = pytest.mark.filterwarnings("ignore:`torch.jit")


@subjects(tiles=True)
def test_make_fx(subject: str) -> None:
    """A trace of plain operators, of a pass with other values, and labels, than it is called with."""
    module = build(subject).eval()
    traced = make_fx(module)(*inputs(subject, 2))
    x = inputs(subject, 2)
    assert_close(traced(*x), module(*x))


@subjects()
@pytest.mark.parametrize(
    "training", [True, pytest.param(False, marks=pytest.mark.exhaustive)], ids=["training", "evaluation"]
)
def test_fake_tensors(subject: str, training: bool) -> None:
    """Shapes without values. (Made under the mode, since torch cannot convert a module of fake tensors by ``to``.)"""

    def shape() -> torch.Size:
        y: Tensor = SUBJECTS[subject].make().train(training)(*inputs(subject, 3, torch.float32))
        return y.shape

    expected = shape()
    with FakeTensorMode():
        assert shape() == expected


@jit_is_deprecated
@subjects()
def test_script_fails(subject: str) -> None:
    """With an error of torch's own: the checks of arguments and parametrizations are no TorchScript."""
    errors = torch.jit.frontend.NotSupportedError, RuntimeError, ValueError
    with pytest.raises(errors, match=r"cannot be used as a value|Unknown type annotation|not supported"):
        torch.jit.script(build(subject))


class SaganLeaves(torch.fx.Tracer):
    """The tracer of the page."""

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return isinstance(module, (SAGANGenerator, SAGANDiscriminator)) or super().is_leaf_module(module, path)


class Holder(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        y: Tensor = self.module(x) if labels is None else self.module(x, labels)
        return 2 * y


@subjects()
def test_symbolic_trace(subject: str) -> None:
    """Layers are traced; networks, which look at labels and sizes, are leaves."""
    module = build(subject).eval()
    if subject in NETWORKS:
        with pytest.raises(torch.fx.proxy.TraceError, match="control flow"):
            torch.fx.symbolic_trace(module)
        module = Holder(module)
        traced = torch.fx.GraphModule(module, SaganLeaves().trace(module))
    else:
        traced = torch.fx.symbolic_trace(module)
    for size in (1, 5):
        x = inputs(subject, size)
        assert_close(traced(*x), module(*x))  # a trace calls three projections where the layer makes one convolution
