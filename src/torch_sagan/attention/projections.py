"""The projections of an attention layer: 1×1 convolutions, three of them as one, and how they are made new."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrize

__all__ = ["pointwise_convolution", "project", "reset"]

# By the number of spatial dimensions.
CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

# What a call of a convolution runs. PyTorch has no public names for hooks.
METHODS = ("__call__", "_call_impl", "forward", "_conv_forward")
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")

WARM_UP_READS = 15  # of a weight under spectral norm; so many iterations a new one starts with


def pointwise_convolution(spatial_dims: int, bias: bool) -> Callable[[int, int], nn.Module]:
    """What makes the layer's own projections: convolutions whose kernels are 1 in every direction."""
    return partial(CONVOLUTIONS[spatial_dims], kernel_size=1, bias=bias)


def project(x: Any, *projections: Any) -> list[Tensor]:
    """The results of all projections of x: by one convolution if all are plain 1×1 convolutions (faster)."""
    # torch.fx traces with a Proxy for x, and its graph should name the modules.
    together = isinstance(x, Tensor) and all(_is_plain_1x1_convolution(each, x.ndim - 2) for each in projections)
    if not together or len({projection.bias is None for projection in projections}) > 1:
        return [projection(x) for projection in projections]
    # Each weight is read once, because reading it may run a power iteration.
    weights = [projection.weight for projection in projections]
    bias = None if projections[0].bias is None else torch.cat([projection.bias for projection in projections])
    projected = CONVOLVE[x.ndim - 2](x, torch.cat(weights), bias)  # (B, sum of all channels, …)
    return list(projected.split([len(weight) for weight in weights], dim=1))


def _is_plain_1x1_convolution(module: nn.Module, spatial_dims: int) -> bool:
    """Whether calling the module computes a 1×1 convolution and nothing else. Its weight may be parametrized."""
    kind, one, zero = CONVOLUTIONS[spatial_dims], (1,) * spatial_dims, (0,) * spatial_dims
    return (
        isinstance(module, kind)
        and (module.kernel_size, module.stride, module.padding, module.groups) == (one, one, zero, 1)
        # No methods of the instance, of a subclass, or that somebody has put into PyTorch's classes.
        and all(getattr(getattr(module, name), "__func__", None) is ORIGINAL[kind, name] for name in METHODS)
        and not any(getattr(module, hooks) or getattr(module_hooks, f"_global{hooks}") for hooks in HOOKS)
        # A quantized or sharded weight may have no concatenation.
        and (parametrize.is_parametrized(module) or type(module.weight) in (nn.Parameter, Tensor))
    )


ORIGINAL: dict[tuple[type[nn.Module], str], object] = {
    (kind, name): getattr(kind, name) for kind in CONVOLUTIONS.values() for name in METHODS
}


def reset(module: Any) -> None:
    """Its ``reset_parameters``, also where weights are parametrized, which that method cannot write to.

    Raises:
        ValueError: for a weight that a hook computes, such as PyTorch's older ``spectral_norm``.
    """
    if not parametrize.is_parametrized(module):
        if isinstance(getattr(module, "weight", None), Tensor) and "weight" not in module._parameters:
            raise ValueError(f"a hook computes the weight of {module}: call reset_parameters before it is registered")
        module.reset_parameters()
        return
    plain = copy.deepcopy(module)
    plain.__class__ = type(module).__base__  # that before PyTorch gave the module a class with properties
    del plain.parametrizations
    for name in module.parametrizations:
        plain.register_parameter(name, nn.Parameter(torch.empty_like(getattr(module, name))))
    plain.reset_parameters()
    for name, chain in module.parametrizations.items():
        for path, vector in chain.named_buffers():
            if path.endswith(("._u", "._v")):  # of a spectral norm, ours or PyTorch's
                vector.normal_()
        setattr(module, name, getattr(plain, name).detach())
        training = chain.training
        chain.train()
        for _ in range(WARM_UP_READS):  # each runs a power iteration
            getattr(module, name)
        chain.train(training)
    for name, parameter in module.named_parameters(recurse=False):
        parameter.copy_(getattr(plain, name))
