"""One pass of an example through a model: what each module returns. The model is left as it was."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from torch_sagan._modes import evaluation_mode

__all__ = ["ExampleInput", "outputs_of_a_pass"]

ExampleInput: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]


def outputs_of_a_pass(
    model: nn.Module, modules: Mapping[str, nn.Module], example_input: ExampleInput
) -> dict[str, list[Tensor | str]]:
    """Call a model once, in evaluation mode, and note what some of its modules return.

    Modes, buffers, hooks and random states are then as they were, after an error too. A graph is recorded unless the
    caller disabled gradients.

    Args:
        model: any module.
        modules: the modules to watch, by names of any kind.
        example_input: what the model is called with: a tensor, a tuple of arguments or a mapping of keyword arguments.

    Returns:
        For each name an output per call: a tensor of its shape and dtype on the meta device, or the description of
        anything else. Names are in the order in which the modules first returned; one that was not called is missing.

    Raises:
        TypeError: for an example of another type.
    """
    if isinstance(example_input, Tensor):
        example_input = (example_input,)
    if not isinstance(example_input, (tuple, Mapping)):
        raise TypeError(
            "example_input takes a tensor, a tuple of arguments or a mapping of keyword arguments, got "
            f"{type(example_input).__name__}"
        )
    args, kwargs = (example_input, {}) if isinstance(example_input, tuple) else ((), dict(example_input))
    outputs: dict[str, list[Tensor | str]] = {}

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        outputs.setdefault(name, []).append(_without_content(output))

    # Evaluation mode keeps the statistics of norms; all other changes to buffers are made to copies.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gpus = sorted({t.device.index for t in (*model.parameters(), *model.buffers()) if t.is_cuda})
    handles = [module.register_forward_hook(partial(note, name)) for name, module in modules.items()]
    try:
        with evaluation_mode(model), torch.random.fork_rng(gpus):
            torch.func.functional_call(model, buffers, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _without_content(output: Any) -> Tensor | str:
    if isinstance(output, Tensor):
        return torch.empty_like(output, device="meta", requires_grad=False)
    if isinstance(output, (tuple, list)):
        return f"a {type(output).__name__} of {len(output)}"
    return f"a {type(output).__name__}"
