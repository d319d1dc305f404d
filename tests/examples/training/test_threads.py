"""How threads wait: the settings are in the environment before torch, which reads them once, is imported."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples"
# minimal.py imports nothing of ours but the package; examples_path makes training importable.
SCRIPTS = sorted(
    path
    for path in [*EXAMPLES.glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    if path.stem not in ("minimal", "examples_path")
)
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("PASSIVE", "1000")),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ("ACTIVE", "1000")),
        ({"GOMP_SPINCOUNT": "7"}, ("PASSIVE", "7")),
    ],
)
def test_the_environment_has_precedence(given: dict[str, str], expected: tuple[str, str]) -> None:
    code = "import os, sys, training.threads; assert 'torch' not in sys.modules; " + "; ".join(
        f"print(os.environ[{name!r}])" for name in SETTINGS
    )
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment | given, cwd=EXAMPLES, capture_output=True, text=True, check=True
    )
    assert tuple(said.stdout.split()) == expected


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_imports_it_first(script: Path) -> None:
    """Before torch, and before NumPy and scikit-learn, which may load the same OpenMP."""
    body = ast.parse(script.read_text(encoding="utf-8")).body
    imported = [ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    found = ["import examples_path"] if script.parent != EXAMPLES else []
    first = ["from __future__ import annotations", *found, "import training.threads"]
    assert imported[: len(first)] == first
