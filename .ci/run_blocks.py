"""Run the Python blocks of Markdown pages, page by page, as a reader would who has installed the package from an index.

python .ci/run_blocks.py README.md
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch_sagan

for page in map(Path, sys.argv[1:]):
    namespace: dict[str, object] = {"__name__": "page"}
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks, f"{page} has no block of Python"
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)
    print(f"{page}: {len(blocks)} blocks run with {torch_sagan.__file__}")

assert "site-packages" in torch_sagan.__file__, "that is a checkout, not the installed package"
