"""One pass of an example through a model: what each module returns. The model is left as it was."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from torch_sagan._modes import evaluation_mode
from torch_sagan.surgery.feature_maps import FeatureMap, described, has_channels_second

__all__ = ["ExampleInput", "example_pass", "outputs_of_a_pass"]

ExampleInput: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]


def outputs_of_a_pass(
    model: nn.Module, modules: Mapping[str, nn.Module], example_input: ExampleInput
) -> dict[str, list[FeatureMap | str]]:
    """Call a model once, in evaluation mode, and note what some of its modules return: an output for each call.

    That is a feature map, or the description of anything else. Names are in the order in which the modules first
    returned; one that was not called is missing. The model is left as :func:`example_pass` leaves it.
    """
    outputs: dict[str, list[FeatureMap | str]] = {}

    sequence: torch.Size | None = None  # the last shape that was (B, C, L) beyond doubt

    def note_sequence(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal sequence
        if isinstance(output, Tensor) and output.ndim == 3:
            sequence = output.shape

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        outputs.setdefault(name, []).append(described(module, output, sequence))

    handles = [module.register_forward_hook(note_sequence) for module in filter(has_channels_second, model.modules())]
    handles += [module.register_forward_hook(partial(note, name)) for name, module in modules.items()]
    try:
        example_pass(model, example_input)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def example_pass(model: nn.Module, example_input: ExampleInput) -> Any:
    """What a model returns when it is called once, in evaluation mode.

    Modes, buffers and the random states of PyTorch, NumPy and Python are then as they were, after an error too. A graph
    is recorded unless the caller disabled gradients.

    Raises:
        TypeError: when ``example_input`` is neither a tensor nor a tuple or mapping of arguments.
    """
    if isinstance(example_input, Tensor):
        example_input = (example_input,)
    if not isinstance(example_input, (tuple, Mapping)):
        raise TypeError(
            "example_input takes a tensor, a tuple of arguments or a mapping of keyword arguments, got "
            f"{type(example_input).__name__}"
        )
    args, kwargs = (example_input, {}) if isinstance(example_input, tuple) else ((), dict(example_input))
    # Evaluation mode keeps the statistics of norms; all other changes to buffers are made to copies.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    with evaluation_mode(model), _random_states_kept((*tensors, *model.parameters(), *model.buffers())):
        return torch.func.functional_call(model, buffers, args, kwargs)


@contextmanager
def _random_states_kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(sorted({t.device.index for t in tensors if t.is_cuda}), device_type="cuda"):
            yield
    finally:
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])
