"""Command-line flags that a browser does not break after their dashes."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

LONGEST = 40  # characters that fit a line of a phone


def mark(app: Sphinx, document: nodes.document, page: str) -> None:
    for literal in document.findall(nodes.literal):
        words = literal.astext().split()
        if any(word.startswith("-") for word in words) and max(map(len, words)) <= LONGEST:
            literal["classes"].append("flag")  # _static/site.css


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("doctree-resolved", mark)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
