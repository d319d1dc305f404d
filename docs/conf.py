"""Configuration of the documentation: MyST pages, autodoc for the API, furo to show it."""

import sys
import zlib
from pathlib import Path

import torch_sagan

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_extensions"))

project = "torch-sagan"
author = "torch-sagan authors"
copyright = "torch-sagan authors"
release = version = torch_sagan.__version__

extensions = [
    "browser_generators",
    "code_in_tables",
    "flags",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "live_explorer",
    "mathml",
    "notebook_page",
    "signatures",
    "site_files",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
python_maximum_signature_line_length = 88
# `name` in a docstring is code, as it is in Markdown.
default_role = "code"
# What is only indented, a diagram or a command, is not Python.
highlight_language = "none"


def inventory(name: str) -> str:
    """The file of a project's names for intersphinx, from the list in inventories/.

    The pages build without a network, so the names that they link to are in the repository, one in a line; intersphinx
    reads compressed files.
    """
    path = HERE / "_build" / f"{name}.inv"
    path.parent.mkdir(exist_ok=True)
    header = f"# Sphinx inventory version 2\n# Project: {name}\n# Version: \n# The rest is compressed using zlib.\n"
    path.write_bytes(header.encode() + zlib.compress((HERE / "inventories" / f"{name}.txt").read_bytes()))
    return str(path)


intersphinx_mapping = {
    "python": ("https://docs.python.org/3", inventory("python")),
    "torch": ("https://docs.pytorch.org/docs/stable", inventory("torch")),
}
nitpick_ignore_regex = [
    # Of the model that a function takes and returns; it is no public name.
    (r"py:class", r"torch_sagan\..*\.M"),
    # PyTorch's documentation has no page of it.
    (r"py:class", r"torch\.utils\.flop_counter\..*"),
]

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_line_continuation_character = "\\"

html_theme = "furo"
# How found pages are ranked.
html_search_scorer = str(HERE / "_extensions" / "search.js")
html_title = f"torch-sagan {release}"
html_baseurl = "https://torch-sagan.github.io/torch-sagan/"
html_logo = html_favicon = "_static/logo.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = [("theme.js", {"defer": "defer"})]
html_theme_options = {
    "source_repository": "https://github.com/torch-sagan/torch-sagan",
    "source_branch": "main",
    "source_directory": "docs/",
}
