"""The layers that are compared, and one pass through a layer as a function without arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from measurement.plain import PaddedSDPAttention, PlainAttention, SDPAttention
from measurement.stopwatch import Run
from torch_sagan import SelfAttention2d, SelfAttention3d

Placed = TypeVar("Placed", Tensor, nn.Module)


COMPARED: dict[str, Callable[[int], nn.Module]] = {
    "plain": PlainAttention,
    "sdpa": SDPAttention,
    "padded": PaddedSDPAttention,
    "ours": SelfAttention2d,
}
KINDS = COMPARED | {"volume": SelfAttention3d}


def attention_layers(channels: int, device: torch.device) -> dict[str, nn.Module]:
    """This library's layer and those that it is compared with, with the same weights and the same gamma."""
    return {kind: attention_layer(kind, channels, device) for kind in COMPARED}


def attention_layer(kind: str, channels: int, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    layer = in_trained_layout(KINDS[kind](channels).to(device), device, 3 if kind == "volume" else 2)
    with torch.no_grad():
        layer.gamma.fill_(0.5)  # type: ignore[operator]
    return layer


def feature_map(batch: int, channels: int, size: int, device: torch.device, spatial_dims: int = 2) -> Tensor:
    """A random input of these layers."""
    x = torch.randn(batch, channels, *spatial_dims * [size], device=device)
    return in_trained_layout(x, device, spatial_dims)


def in_trained_layout(thing: Placed, device: torch.device, spatial_dims: int = 2) -> Placed:
    """A feature map or a module in the memory format that the trainer has on this device."""
    channels_last = {2: torch.channels_last, 3: torch.channels_last_3d}[spatial_dims]
    memory_format = channels_last if device.type == "cuda" else torch.contiguous_format
    placed: Placed = thing.to(memory_format=memory_format)  # type: ignore[call-overload]
    return placed


def forward_backward(module: nn.Module, x: Tensor, gradient: Tensor) -> Run:
    """One training pass, with the gradients of the input and of all parameters."""
    x = x.clone().requires_grad_()
    inputs = [x, *(p for p in module.parameters() if p.requires_grad)]

    def run() -> None:
        torch.autograd.grad(module(x), inputs, gradient)

    return run


def gradient_penalty(module: nn.Module, x: Tensor, gradient: Tensor) -> Run:
    """The gradients of WGAN-GP's penalty: a backward pass, and the backward pass of that."""
    x = x.clone().requires_grad_()
    # The biases of value and output do not affect the gradient of the input.
    inputs = [x, *(p for p in module.parameters() if p.requires_grad)]

    def run() -> None:
        (slope,) = torch.autograd.grad(module(x), x, gradient, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        torch.autograd.grad(penalty, inputs, allow_unused=True)

    return run


def forward_only(module: nn.Module, x: Tensor) -> Run:
    """A pass that keeps nothing for a backward."""

    def run() -> None:
        with torch.no_grad():
            module(x)

    return run
