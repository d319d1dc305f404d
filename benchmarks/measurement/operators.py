"""What the operators of a computation launch and keep in memory.

On the meta device, where tensors have shapes but no values, this counts what a GPU would do.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Beside views these start no kernel.
IDLE = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty"}


class OperatorCounter(TorchDispatchMode):
    """Counts inside a `with` block.

    Attributes:
        launches: operators that start at least one kernel, which views do not.
        alive: bytes of tensors that were made in the block and still exist.
        peak: the most of them at once. What operators use internally is not counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches = self.alive = self.peak = 0
        self._known: set[int] = set()  # storages that were made in the block

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = operator(*args, **(kwargs or {}))
        before = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(results):
            if storage._cdata not in before | self._known:
                self._follow(storage)
        if not operator.is_view and operator.overloadpacket.__name__ not in IDLE:
            self.launches += 1
        return results

    def _follow(self, storage: UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        self._known.add(address)
        self.alive += size
        self.peak = max(self.peak, self.alive)

        def forget() -> None:
            self._known.discard(address)
            self.alive -= size

        weakref.finalize(storage, forget)


def _storages(tree: Any) -> list[UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
