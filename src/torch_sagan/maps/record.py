"""The attention maps of any model, recorded while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_sagan.attention.layer import AttentionRecord, SelfAttention2d

__all__ = ["record_attention"]


@contextmanager
def record_attention(model: nn.Module) -> Iterator[dict[str, list[AttentionRecord]]]:
    """Record the attention map of every :class:`SelfAttention2d` that runs inside the ``with`` block.

    Call the model as always. Its outputs differ by rounding at most, because the layers now materialise their attention
    maps, whose memory grows with N·M. Compiled models run uncompiled inside (with torch 2.5 they are not recorded).
    Afterwards nothing is left in the model.

    Args:
        model: any module, with layers that it was built with or that were inserted; or a
            :class:`SelfAttention2d` itself, whose path is ``""``.

    Yields:
        A dictionary from the layer's dotted path to a list of records, one for each call, oldest first. A layer that
        did not run has an empty list.

    Raises:
        ValueError: when the model has no such layer.

    >>> import torch
    >>> from torch import nn
    >>> from torch_sagan import SelfAttention2d, record_attention
    >>> model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), SelfAttention2d.official(16))
    >>> with record_attention(model) as records:
    ...     y = model(torch.randn(2, 3, 8, 12))
    >>> record = records["1"][0]
    >>> record.attention.shape, record.query_size, record.key_size
    (torch.Size([2, 96, 24]), (8, 12), (4, 6))
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, SelfAttention2d)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no SelfAttention2d to record")
    records: dict[str, list[AttentionRecord]] = {path: [] for path in layers}
    asked: dict[str, bool] = {}

    def ask(path: str, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        asked[path] = kwargs.get("return_attention", False)
        return args, kwargs | {"return_attention": True}

    def keep(path: str, layer: SelfAttention2d, args: Any, output: tuple[Tensor, Tensor]) -> Any:
        y, attention = output
        height, width = y.shape[2:]
        key_size = (height // layer.pool, width // layer.pool)
        gamma = layer.gamma.detach().clone()  # a copy, since training changes it
        records[path].append(AttentionRecord(attention.detach(), (height, width), key_size, gamma))
        return output if asked[path] else y

    handles = []
    for path, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(partial(ask, path), with_kwargs=True))
        # Before the hooks that are there, so that those receive what they always receive.
        handles.append(layer.register_forward_hook(partial(keep, path), prepend=True))
    try:
        # A compiled graph would run without hooks that it was not compiled with.
        with torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else nullcontext():
            yield records
    finally:
        for handle in handles:
            handle.remove()
