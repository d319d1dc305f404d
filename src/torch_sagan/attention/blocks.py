"""Functions of queries and keys in blocks of queries, with their derivatives of every order and in either mode.

Each query attends on its own. So attention can take a block of queries with all keys, then the next block. The results
for queries are concatenated, and those for keys, such as their gradients, are summed over the blocks. The derivatives
of such a function have the same form: a gradient is of a query or of a key, and so is a tangent. Each derivative
computes each block again, so nothing of the size of the attention matrix is kept, whatever the order and the mode:
``torch.autograd``, forward mode, ``torch.func`` and what is composed of them.

Kernels are faster. This is for what they do not have: some derivatives, masks, devices and dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from torch_sagan._torch import no_autocast, tangent

__all__ = ["Block", "Blockwise", "block_size"]

# On the CPU, chosen by measuring: fewer cost call overhead, more fall out of the cache.
BLOCK_QUERIES = 64
# Elsewhere launches are what costs, so a block is as large as memory allows: about ten matrices of (B, n, M) are alive
# at once, each of at most this many entries (128 MiB in float32).
BLOCK_ENTRIES = 2**25


def block_size(query: Tensor, key: Tensor) -> int:
    """How many queries (…, D, N) a block has, beside keys (…, D, M)."""
    if query.device.type == "cpu":
        return BLOCK_QUERIES
    return max(BLOCK_QUERIES, BLOCK_ENTRIES // (math.prod(query.shape[:-2]) * key.shape[-1]))


@dataclass(frozen=True)
class Block:
    """What computes one block, and its derivatives by hand where they take less than those that autograd makes.

    Attributes:
        function: ``function(start, *arguments)`` returns a tuple, where ``start`` is the position of the block's first
            query. It has to be differentiable.
        backward: ``(start, *arguments, *gradients of the results)`` to the gradients of all arguments.
        tangent: ``(start, *arguments, *tangents of all of them)`` to the tangents of the results.
    """

    function: Callable[..., tuple[Tensor, ...]]
    backward: Block | None = None
    tangent: Block | None = None

    def chosen(self, of: Sequence[bool]) -> Block:
        """The same of the chosen results alone."""

        def function(start: int, *arguments: Tensor) -> tuple[Tensor, ...]:
            return tuple(compress(self.function(start, *arguments), of))

        return Block(function, tangent=self.tangent and self.tangent.chosen(of))


@dataclass(frozen=True)
class Blockwise:
    """A function of tensors whose last dimension is that of positions, block by block of its queries.

    Attributes:
        block: computes one block.
        of_queries: of each argument, whether it has a position for each query, and the function gets a block of them.
            The others are passed whole. There has to be at least one query.
        per_query: of each result, whether it has a position for each query. The others are summed over the blocks.
        size: how many queries a block has.
    """

    block: Block
    of_queries: tuple[bool, ...]
    per_query: tuple[bool, ...]
    size: int

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """The results of all blocks together."""
        results: tuple[Tensor, ...] = _Blocks.apply(self, *arguments)  # type: ignore[no-untyped-call]
        return results

    def gradients(self, of: Sequence[bool]) -> Blockwise:
        """The function of all arguments, then of the results' gradients, that returns the gradients of the chosen."""
        count = len(self.of_queries)

        def differentiate(start: int, *given: Tensor) -> tuple[Tensor, ...]:
            function, chosen = _of_chosen(self.block.function, start, given[:count], of)
            pull_back = torch.func.vjp(function, *chosen)[1]
            gradients: tuple[Tensor, ...] = pull_back(given[count:])
            return gradients

        return replace(
            self,
            block=self.block.backward.chosen(of) if self.block.backward else Block(differentiate),
            of_queries=self.of_queries + self.per_query,
            per_query=tuple(compress(self.of_queries, of)),
        )

    def tangents(self, of: Sequence[bool]) -> Blockwise:
        """The function of all arguments, then of tangents of the chosen, that returns the tangents of the results."""
        count = len(self.of_queries)

        def differentiate(start: int, *given: Tensor) -> tuple[Tensor, ...]:
            function, chosen = _of_chosen(self.block.function, start, given[:count], of)
            return tangent(function, tuple(chosen), given[count:])

        by_hand = self.block.tangent if all(of) else None
        of_queries = (*self.of_queries, *compress(self.of_queries, of))
        return replace(self, block=by_hand or Block(differentiate), of_queries=of_queries)


def _of_chosen(
    function: Callable[..., tuple[Tensor, ...]], start: int, arguments: Sequence[Tensor], of: Sequence[bool]
) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The function with all but the chosen arguments fixed, and the chosen ones."""

    def partial(*chosen: Tensor) -> tuple[Tensor, ...]:
        values = iter(chosen)
        return function(start, *(next(values) if is_chosen else x for x, is_chosen in zip(arguments, of, strict=True)))

    return partial, list(compress(arguments, of))


class _Blocks(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(blockwise: Blockwise, *arguments: Tensor) -> tuple[Tensor, ...]:
        split = [
            argument.split(blockwise.size, dim=-1) if of_queries else None
            for argument, of_queries in zip(arguments, blockwise.of_queries, strict=True)
        ]
        n = next(x.shape[-1] for x, of_queries in zip(arguments, blockwise.of_queries, strict=True) if of_queries)
        # Allocated once: small results that are kept between the large tensors of blocks would fragment the memory.
        totals: list[Tensor] = []
        with no_autocast(arguments[0].device.type):
            for i, start in enumerate(range(0, n, blockwise.size)):
                block = (parts[i] if parts else whole for whole, parts in zip(arguments, split, strict=True))
                results = blockwise.block.function(start, *block)
                totals = totals or [
                    result.new_empty(*result.shape[:-1], n) if per_query else torch.zeros_like(result)
                    for result, per_query in zip(results, blockwise.per_query, strict=True)
                ]
                for total, result, per_query in zip(totals, results, blockwise.per_query, strict=True):
                    if per_query:
                        total.narrow(-1, start, result.shape[-1]).copy_(result)
                    else:
                        total.add_(result)
        return tuple(totals)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.blockwise, *arguments = inputs
        ctx.save_for_backward(*arguments)
        ctx.save_for_forward(*arguments)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        results = iter(ctx.blockwise.gradients(needed)(*ctx.saved_tensors, *gradients))
        return None, *(next(results) if is_needed else None for is_needed in needed)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        given = [tangent is not None for tangent in tangents]
        return ctx.blockwise.tangents(given)(*ctx.saved_tensors, *compress(tangents, given))
