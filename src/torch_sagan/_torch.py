"""What is private in PyTorch, or differs by its version or by device: each thing once, with its reason."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch._library.custom_ops import CustomOpDef  # what torch.library.custom_op returns, without a public name
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # the base class, also of other libraries' batch norms
from torch.nn.utils.parametrizations import _SpectralNorm as TorchSpectralNorm  # what spectral_norm registers there
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = [
    "BatchNorm",
    "CustomOpDef",
    "TorchSpectralNorm",
    "is_autocast",
    "is_exporting",
    "is_recorded",
    "is_traced",
    "is_transformed",
    "no_autocast",
    "on_device",
    "only_plain_operations",
    "plain_tensor",
    "runs_custom_operations",
    "tangent",
]

# Before PyTorch 2.7 exporting cannot be told from compiling: there, both materialize the attention matrix.
is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on."""
    return _has_autocast(device_type) and torch.is_autocast_enabled(device_type)


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast is off inside."""
    # Only where it is on: an exported program should hold plain operations, and no context that changes nothing.
    return torch.autocast(device_type, enabled=False) if is_autocast(device_type) else nullcontext()


def _has_autocast(device_type: str) -> bool:
    # Some devices have none, the meta device among them, and torch refuses to be asked about them. A compiler may not
    # ask at all (torch 2.5 cannot trace it).
    if torch.compiler.is_compiling():
        return device_type != "meta"
    return torch.amp.is_autocast_available(device_type)


def on_device(device: torch.device | str | int | None) -> AbstractContextManager[object]:
    """Inside, tensors are made on this device; on the default one for None."""
    return nullcontext() if device is None else torch.device(device)


# Without a public form up to torch 2.13.
def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` (``vmap``, ``grad``, ``jvp``) is active."""
    return torch._C._are_functorch_transforms_active()


def is_recorded() -> bool:
    """Whether a mode such as ``FakeTensorMode`` or ``make_fx`` sees every operation, whose tensors have no values."""
    return is_in_torch_dispatch_mode()


def is_traced() -> bool:
    """Whether ``torch.jit.trace`` records the operations."""
    return torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def runs_custom_operations() -> bool:
    """Whether operations run as they are called, by the CPU or a GPU: not in a compiler, a transform or a trace."""
    return not (torch.compiler.is_compiling() or only_plain_operations())


def only_plain_operations(*tensors: Tensor) -> bool:
    """Whether the operations of a transform, a trace or forward mode are wanted, and none of our own."""
    # A custom autograd.Function has no vmap and no forward mode here, and a trace that contains one cannot be saved.
    if torch.compiler.is_compiling():
        return False
    if is_transformed() or is_traced():
        return True
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def tangent(
    function: Callable[..., tuple[Tensor, ...]], arguments: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The second result of ``torch.func.jvp``, also inside of ``torch.autograd.forward_ad.dual_level``."""
    results: tuple[Tensor, ...]
    if forward_ad._current_level < 0 or eager_transforms.JVP_NESTING:
        results = torch.func.jvp(function, arguments, tangents)[1]
        return results
    # There torch.func.jvp refuses to work. But gradients are linear in the gradient that they start from, and their
    # derivative with respect to that one, in reverse mode, is the tangent.
    outputs, pull_back = torch.func.vjp(function, *arguments)[:2]
    push_forward = torch.func.vjp(lambda *starts: pull_back(starts), *map(torch.zeros_like, outputs))[1]
    results = push_forward(tangents)
    return results


def plain_tensor(tensor: Tensor) -> Tensor:
    """The same tensor without a subclass that wraps functions alone, as MONAI's MetaTensor and fastai's TensorImage do.

    Methods of such a class may take other arguments than PyTorch's. One that takes part in dispatch, as DTensor, stays.
    """
    kind = type(tensor)
    if kind is Tensor or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return tensor
    return tensor.as_subclass(Tensor)
