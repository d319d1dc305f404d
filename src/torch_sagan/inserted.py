"""How to tell a layer that was inserted into an existing model from the model's own."""

__all__ = ["MARK", "NAME"]

NAME = "inserted_attention"  # of the layer among the children of the module after which it was inserted
MARK = "_is_inserted_attention"  # an attribute of the layer, since models may have children of that name themselves
