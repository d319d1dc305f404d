"""The notebook as a page, with what its cells show: they run when the site is built, without Jupyter."""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import pprint
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image
from sphinx.application import Sphinx

from torch_sagan import AttentionExplorer

Cell = Mapping[str, Any]

HEADER = """
:::{{index}} ! colab, ! Google Colab, ! notebook, ! Jupyter
:::

You can also {{download}}`download it <{name}>`. Below each cell stands what it showed when these pages were built.
"""
WIDTH = 88  # of a line of output, in characters


def run(cells: Sequence[Cell]) -> Iterator[tuple[Cell, str, object]]:
    """Cell after cell, in one namespace: the cell, what it printed, and what its last line is worth, as in Jupyter.

    Text and the commands of Jupyter are passed through.
    """
    namespace: dict[str, Any] = {"__name__": "notebook"}
    for cell in cells:
        source = "".join(cell["source"])
        printed, value = io.StringIO(), None
        if cell["cell_type"] == "code" and not source.startswith("%"):
            body = ast.parse(source).body
            last = body.pop() if isinstance(body[-1], ast.Expr) else None
            with redirect_stdout(printed):
                exec(compile(ast.Module(body, []), cell["id"], "exec"), namespace)
                if isinstance(last, ast.Expr):
                    value = eval(compile(ast.Expression(last.value), cell["id"], "eval"), namespace)
        yield cell, printed.getvalue(), value


@contextmanager
def beside_the_models(models: Path) -> Iterator[None]:
    """A working folder with the models where the notebook finds them, so that it downloads nothing."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(models, Path(folder, "models"))
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def shown(cell: Cell, value: object, site: Path) -> str:
    """The value of a cell as Markdown. An explorer becomes a file of the site."""
    if value is None:
        return ""
    alternative = escape(cell["metadata"].get("alt", ""))
    if isinstance(value, Image.Image):
        file = io.BytesIO()
        value.save(file, "PNG")
        data = base64.b64encode(file.getvalue()).decode("ascii")
        return f'```{{raw}} html\n<img class="output" src="data:image/png;base64,{data}" alt="{alternative}">\n```\n'
    if isinstance(value, AttentionExplorer):
        name = f"explorer-{cell['id']}.html"
        site.mkdir(parents=True, exist_ok=True)
        value.save(site / name)
        view = escape(cell["metadata"].get("view", ""))
        frame = f'<iframe class="explorer" src="{name}{view}" loading="lazy" title="{alternative}"></iframe>'
        return f"```{{raw}} html\n{frame}\n```\n"
    return f"```text\n{pprint.pformat(value, width=WIDTH, sort_dicts=False)}\n```\n"


def page(notebook: Path, site: Path) -> str:
    """The notebook as Markdown, with what its cells show."""
    parts = []
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    with beside_the_models(notebook.parent / "models"):
        for cell, printed, value in run(cells):
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                parts.append(source + "\n")
            else:
                parts.append(f"```{'text' if source.startswith('%') else 'python'}\n{source}\n```\n")
            if printed:
                parts.append(f"```text\n{printed}```\n")
            parts.append(shown(cell, value, site))
    parts.insert(1, HEADER.format(name=notebook.name))
    return "\n".join(parts)


def convert(app: Sphinx, name: str, source: list[str]) -> None:
    path = Path(app.env.doc2path(name))
    if path.suffix == ".ipynb":
        source[0] = page(path, Path(app.outdir))


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_source_suffix(".ipynb", "markdown")
    app.connect("source-read", convert)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
