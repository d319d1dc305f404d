"""How to tell a layer that was inserted into an existing model from the model's own."""

from __future__ import annotations

from torch import nn

__all__ = ["MARK", "NAME", "inserted_layer"]

NAME = "inserted_attention"  # of the layer among the children of the module after which it was inserted
MARK = "_is_inserted_attention"  # an attribute of the layer, since models may have children of that name themselves


def inserted_layer(module: object) -> nn.Module | None:
    """The layer that was inserted after this module, or None."""
    layer = getattr(module, NAME, None)
    return layer if hasattr(layer, MARK) else None
