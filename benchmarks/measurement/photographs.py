"""Photographs to read, made from two that scikit-learn brings."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch


def photographs(at: Path) -> tuple[Path, Path]:
    """A folder and a zip of 2000 JPEGs of the size of aligned CelebA's, cropped from scikit-learn's photographs."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    folder, archive = at / "photographs", at / "photographs.zip"
    folder.mkdir()
    originals = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    corners = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0)).tolist()
    with zipfile.ZipFile(archive, "w") as zipped:
        for number, (scale, x, y) in enumerate(corners):
            original, file = originals[number % 2], folder / f"{number:06d}.jpg"
            height = 218 + scale * (original.height - 218)
            width = height * 178 / 218
            left, top = x * (original.width - width), y * (original.height - height)
            box = (left, top, left + width, top + height)
            original.resize((178, 218), Image.Resampling.BICUBIC, box).save(file, quality=90)
            zipped.write(file, file.name)
    return folder, archive
