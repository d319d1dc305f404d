"""Hooks of modules see and change what they see and change on any module."""

from __future__ import annotations

import copy

import torch

from subjects import assert_close, build, inputs, subjects


@subjects()
def test_hooks(subject: str) -> None:
    module = build(subject)
    x, *labels = inputs(subject, 3)
    seen: dict[str, object] = {}
    module.register_forward_pre_hook(lambda _, arguments: (2 * arguments[0], *arguments[1:]))
    module.register_forward_hook(lambda _, arguments, y: seen.update(x=arguments[0]) or 3 * y)
    module.register_full_backward_hook(lambda _, d_x, d_y: seen.update(d_x=d_x[0], d_y=d_y[0]))
    twin = copy.deepcopy(module)
    for name in ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks"):
        getattr(twin, name).clear()
    x.requires_grad_()
    doubled = (2 * x.detach()).requires_grad_()
    y, expected = module(x, *labels), twin(doubled, *labels)
    assert torch.equal(y, 3 * expected)
    assert torch.equal(seen["x"], doubled)
    incoming = torch.randn_like(y)
    y.backward(incoming)
    expected.backward(3 * incoming)
    assert_close(seen["d_x"], doubled.grad)
    assert_close(x.grad, 2 * doubled.grad)
    assert_close(seen["d_y"], incoming)
