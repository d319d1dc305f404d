"""The attention maps of any model, recorded while it runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_sagan.attention.layer import AttentionRecord, SelfAttention

__all__ = ["record_attention"]

# The blocks that are open in this thread or task.
_open: ContextVar[frozenset[object]] = ContextVar("open", default=frozenset())


@contextmanager
def record_attention(model: nn.Module) -> Iterator[dict[str, list[AttentionRecord]]]:
    """Record the attention map of every attention layer that runs inside the ``with`` block.

    That is every :class:`SelfAttention1d`, :class:`SelfAttention2d` and :class:`SelfAttention3d`.

    Call the model as always. Its outputs differ by rounding at most, because the layers now materialize their attention
    maps, whose memory grows with N·M. Afterwards nothing is left in the model.

    A block records the calls of its own thread (or asyncio task), and those of other threads run as always. Replicas of
    ``DataParallel`` run in threads of their own, as does on a GPU what activation checkpointing computes again: record
    its ``module``, and without checkpointing. While any block is open, compiled models run uncompiled, in all threads
    (with torch 2.5 they run compiled, and are not recorded).

    Args:
        model: any module, with layers that it was built with or that were inserted; or a layer itself, whose path is
            ``""``.

    Yields:
        A dictionary from the layer's dotted path to a list of records, one for each call, oldest first. A layer that
        did not run has an empty list.

    Raises:
        ValueError: when the model has no such layer, or contains a ``DataParallel`` for several devices.

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
    layers = {path: module for path, module in model.named_modules() if isinstance(module, SelfAttention)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no self-attention layer to record")
    if any(isinstance(module, nn.DataParallel) and len(module.device_ids) > 1 for module in model.modules()):
        raise ValueError("DataParallel runs its replicas in threads, which are not recorded: record its .module")
    records: dict[str, list[AttentionRecord]] = {path: [] for path in layers}
    asked: dict[str, bool] = {}
    block = object()

    def ask(path: str, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if block not in _open.get():
            return None
        asked[path] = kwargs.get("return_attention", False)
        return args, kwargs | {"return_attention": True}

    def keep(path: str, layer: SelfAttention, args: Any, output: tuple[Tensor, Tensor]) -> Any:
        if block not in _open.get():
            return None
        y, attention = output
        query_size = tuple(y.shape[2:])
        key_size = tuple(size // layer.pool for size in query_size)
        gamma = layer.gamma.detach().clone()  # a copy, since training changes it
        records[path].append(AttentionRecord(attention.detach(), query_size, key_size, gamma))
        return output if asked[path] else y

    handles = []
    for path, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(partial(ask, path), with_kwargs=True))
        # Before the hooks that are there, so that those receive what they always receive.
        handles.append(layer.register_forward_hook(partial(keep, path), prepend=True))
    _open.set(_open.get() | {block})
    try:
        with _uncompiled():
            yield records
    finally:
        _open.set(_open.get() - {block})
        for handle in handles:
            handle.remove()


_lock = threading.Lock()
_stance = ExitStack()
_blocks = 0


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Compiled models run uncompiled, because their graphs would run without hooks that came later.

    The compiler's stance is one for the process. The first block sets it, and the last one, perhaps of another thread,
    puts back what was there before.
    """
    global _blocks
    with _lock:
        if not _blocks and hasattr(torch.compiler, "set_stance"):
            _stance.enter_context(torch.compiler.set_stance("force_eager"))
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if not _blocks:
                _stance.close()
