"""Configuration of the documentation: MyST pages, autodoc for the API, furo to show it."""

import torch_sagan

project = "torch-sagan"
author = "torch-sagan authors"
copyright = "torch-sagan authors"
release = version = torch_sagan.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
python_maximum_signature_line_length = 88
# `name` in a docstring is code, as it is in Markdown.
default_role = "code"

# The pages build without a network, so names of other projects have nothing to link to.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|collections|typing|os)\..*"),
    # The type variable of functions that return the module they get.
    (r"py:.*", r"torch_sagan\.(recalibration|spectral|surgery)\.M"),
]

html_theme = "furo"
html_title = f"torch-sagan {release}"
html_theme_options = {
    "source_repository": "https://github.com/torch-sagan/torch-sagan",
    "source_branch": "main",
    "source_directory": "docs/",
}
