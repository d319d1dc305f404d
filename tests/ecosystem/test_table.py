"""The table of docs/ecosystem.md names the test of each row, and every test of this folder has a row."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "ecosystem.md"
# What every row takes for granted.
OTHERS = {"test_table.py", "test_device_and_dtype.py"}


def test_the_table_names_every_test() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    named = [name for row in rows for name in re.findall(r"`(test_\w+)`", row)]
    files = [path for path in FOLDER.glob("test_*.py") if path.name not in OTHERS]
    tests = [name for path in files for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M)]
    assert len(tests) > 30
    assert sorted(named) == sorted(tests)
    assert all(re.search(r"\| `test_\w+` \|$", row) for row in rows[1:] if "---" not in row)
    assert len({row.count("|") for row in rows}) == 1
