"""The generators that ship with the site, in `models/`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from torch_sagan import SAGANGenerator


def load(model: Path) -> tuple[SAGANGenerator, dict[str, Any]]:
    """The generator of a safetensors file, in evaluation mode, and its card."""
    card = json.loads(model.with_suffix(".json").read_text(encoding="utf-8"))
    generator = SAGANGenerator(**card["generator"]).eval()
    generator.load_state_dict(load_file(model))
    return generator, card
