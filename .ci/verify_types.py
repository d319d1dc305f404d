"""Whether the public types of an installed wheel are complete, as pyright sees them from outside.

    python .ci/verify_types.py FOLDER    # the folder that `pip install --target` has put the wheel into

An annotation that is missing there is guessed by the checkers of whoever uses the package, each in its own way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

# Pyright is written for Node.js. Its package for Python fetches it when it is first called, which needs a network.
FETCHING = 120  # seconds


def run_pyright(*arguments: str, timeout: float | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pyright", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | environment,
    )


def main(folder: Path) -> int:
    try:
        available = run_pyright("--version", timeout=FETCHING).returncode == 0
    except subprocess.TimeoutExpired:
        available = False
    if not available:
        print("public types: not verified, because pyright is not installed and cannot be fetched")
        return 1 if "GITHUB_ACTIONS" in os.environ else 0
    # Pyright asks the first `python` that it finds where packages are.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    result = run_pyright(
        "--ignoreexternal", "--outputjson", "--verifytypes", "torch_sagan", PYTHONPATH=str(folder.resolve()), PATH=path
    )
    completeness = json.loads(result.stdout)["typeCompleteness"]
    verified = completeness["packageRootDirectory"]
    if Path(verified).resolve() != folder.resolve() / "torch_sagan":
        print(f"pyright looked at {verified} instead of the wheel in {folder}")
        return 1
    for symbol in completeness["symbols"]:
        if symbol["isExported"] and (not symbol["isTypeKnown"] or symbol["isTypeAmbiguous"]):
            print(f"{symbol['name']}: its type is not declared")
    print(f"public types: {completeness['completenessScore']:.0%} complete, {len(completeness['symbols'])} symbols")
    return result.returncode


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
