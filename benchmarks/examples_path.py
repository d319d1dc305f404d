"""Makes what `examples/` holds importable: every script here imports this first."""

from __future__ import annotations

import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

if str(EXAMPLES) not in sys.path:
    sys.path.insert(1, str(EXAMPLES))  # after the folder of the script that runs
