"""The description in a wheel's metadata, which a package index shows, has no link that works in the repository alone.

python .ci/verify_description.py dist/*.whl
"""

from __future__ import annotations

import re
import sys
from zipfile import ZipFile

for path in sys.argv[1:]:
    with ZipFile(path) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        text = wheel.read(name).decode()
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(targets) > 20, f"{path}: its description has only {len(targets)} links"
    relative = [target for target in targets if not target.startswith(("https://", "#"))]
    if relative:
        sys.exit(f"{path}: links of its description that lead nowhere on an index: {', '.join(relative)}")
