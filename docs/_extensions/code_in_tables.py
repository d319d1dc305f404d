"""Code in the cells of tables, which breaks where a reader would break it: behind its punctuation, never in a word."""

from __future__ import annotations

import re
from html import escape
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

# Not behind what a name begins with, as in `.half()` and `__init__`.
BREAK = re.compile(r"(?<=[^\s_.@][_.,(=/@])(?=\w)|(?<=\w)(?=\()")
# Names that fill a column of a phone may break between their parts.
LONG = re.compile(r"\w{18,}")
PARTS = re.compile(r"(?<=[a-z])(?=[A-Z])")


class CellCode(nodes.literal):
    """Code in a cell."""


def visit(writer: HTML5Translator, node: CellCode) -> None:
    pieces = BREAK.split(node.astext())
    text = "<wbr>".join(PARTS.sub("<wbr>", escape(piece)) if LONG.search(piece) else escape(piece) for piece in pieces)
    writer.body.append(f'<code class="docutils literal notranslate">{text}</code>')
    raise nodes.SkipNode


def mark(app: Sphinx, document: nodes.document, page: str) -> None:
    for table in document.findall(nodes.table):
        for literal in list(table.findall(nodes.literal)):
            # What links into the reference keeps its own form, and a flag does not break at all (flags.py).
            if not literal["classes"]:
                literal.replace_self(CellCode("", literal.astext()))


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_node(CellCode, html=(visit, None))
    app.connect("doctree-resolved", mark, priority=600)  # after flags.py
    return {"parallel_read_safe": True, "parallel_write_safe": True}
