"""Run the Python blocks of Markdown pages, page by page, as a reader would who has installed the package from an index.

python .ci/run_blocks.py README.md docs/dcgan.md
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

import torch_sagan

# Those with `<!-- not run: … -->` above them say why they are not run.
BLOCK = re.compile(r"(?<!-->\n)^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

assert "site-packages" in torch_sagan.__file__, f"{torch_sagan.__file__} is a checkout, not the installed package"
pages = [Path(name).resolve() for name in sys.argv[1:]]
with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)  # for the files that they write
    for page in pages:
        namespace: dict[str, object] = {"__name__": "page"}
        blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
        assert blocks, f"{page} has no block of Python"
        for block in blocks:
            exec(compile(block, str(page), "exec"), namespace)
        print(f"{page.name}: {len(blocks)} blocks run")
    os.chdir("/")
