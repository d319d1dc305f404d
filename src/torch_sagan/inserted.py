"""How a layer that was inserted into an existing model is told from the model's own."""

__all__ = ["MARK", "NAME"]

NAME = "inserted_attention"  # of the layer, as a child of the module that it follows
MARK = "_is_inserted_attention"  # an attribute of the layer, since models may have children of that name themselves
