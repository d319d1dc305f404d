"""The generator that ships with the site, and a page to explore what it attends to, made when the site is built."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from sphinx.application import Sphinx

from models import load
from torch_sagan import explore_attention, record_attention

IMAGES = 8


def write_explorer(app: Sphinx, exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html":
        return
    models = Path(app.srcdir) / "models"
    shutil.copytree(models, Path(app.outdir) / "models", dirs_exist_ok=True)
    generator, _ = load(models / "faces.safetensors")
    z = torch.randn(IMAGES, generator.z_dim, generator=torch.Generator().manual_seed(0))
    labels = () if generator.num_classes is None else (torch.arange(IMAGES) % generator.num_classes,)
    with record_attention(generator) as records, torch.no_grad():
        images = generator(z, *labels)
    explore_attention(images, records).save(Path(app.outdir) / "explorer.html")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("build-finished", write_explorer)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
