"""Signatures as a reader needs them, where autodoc shows more or less than that."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

# The type variable of functions that return the module that they get.
MODULE = re.compile(r"~torch_sagan(?:\.\w+)+\.M\b")
# That of class methods that return an instance of their class.
SELF = re.compile(r"~torch_sagan(?:\.\w+)+\.Self\b")


def readable(
    app: Sphinx, what: str, name: str, object_: Any, options: Any, arguments: str | None, result: str | None
) -> tuple[str | None, str | None]:
    """Replace type variables by what they stand for, and the iterator inside a context manager by the manager."""
    if arguments is not None:
        arguments = MODULE.sub("~torch.nn.modules.module.Module", arguments)
        arguments = arguments.replace("[[...], ", "[..., ")  # autodoc's form of Callable[..., X]
    if result is not None:
        result = SELF.sub("Self", MODULE.sub("~torch.nn.modules.module.Module", result))
        if hasattr(object_, "__wrapped__"):  # by contextlib.contextmanager
            result = result.replace("~collections.abc.Iterator[", "~contextlib.AbstractContextManager[", 1)
    return arguments, result


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-signature", readable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
