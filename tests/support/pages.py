"""What the README and the pages show in blocks: Python as a reader would paste it, and commands.

A block of Python that no test can run has `<!-- not run: … -->` above it, which says why.
"""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^(?:<!-- not run: (.+?) -->\n)?```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = ("bash", "console")  # languages of commands


class Fence(NamedTuple):
    """A block between fences; `why_not` is empty where it is run."""

    why_not: str
    language: str
    body: str
    line: int


def fences(page: Path) -> list[Fence]:
    text = page.read_text(encoding="utf-8")
    found = FENCE.finditer(text)
    return [Fence(match[1] or "", match[2], match[3], text[: match.start(3)].count("\n")) for match in found]


def blocks(page: Path) -> list[str]:
    """The Python, each below as many empty lines as stand above it, so that a traceback names the page's own line."""
    return [
        "\n" * fence.line + fence.body for fence in fences(page) if fence.language == "python" and not fence.why_not
    ]


def run(page: Path, block: str, namespace: dict[str, Any]) -> None:
    exec(compile(block, str(page), "exec"), namespace)


def defined(page: Path, name: str, **known: Any) -> Any:
    """A function of a page, with what it knows of the page before it; nothing else of the page runs."""
    (block,) = [block for block in blocks(page) if re.search(rf"^def {name}\b", block, re.MULTILINE)]
    (function,) = [node for node in ast.parse(block).body if isinstance(node, ast.FunctionDef) and node.name == name]
    namespace = dict(known)
    exec(compile(ast.Module([function], []), str(page), "exec"), namespace)
    return namespace[name]


def indented(page: Path) -> list[str]:
    """Blocks that are only indented, at the margin of the page."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found = re.findall(r"(?:\A|\n\n)((?: {4}.*\n(?:\n(?= {4}))?)+)", text)
    return ["\n".join(line[4:] for line in block.splitlines()) for block in found]


def is_python(block: str) -> bool:
    """Whether it is a program, rather than a command or an output that happens to be one word."""
    try:
        body = ast.parse(block).body
    except SyntaxError:
        return False
    return not all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Name | ast.Constant) for node in body)


def commands(page: Path) -> list[list[str]]:
    """The words of each command, from blocks of commands and from indented ones."""
    texts = [fence.body for fence in fences(page) if fence.language in COMMANDS] + indented(page)
    lines = [line.removeprefix("$ ") for text in texts for line in text.replace("\\\n", " ").splitlines()]
    found = []
    for line in lines:
        if re.search(r"\b(python|torchrun)\b", line):
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split, lexer.commenters = True, "#"
            try:
                found.append(list(lexer))
            except ValueError:  # a quote in prose: an output, no command
                continue
    return found
