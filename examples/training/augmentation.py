"""Differentiable augmentation of every image that the discriminator sees, for small data sets, and instance noise.

DiffAugment (Zhao et al., arXiv:2006.10738) is applied to real and to generated images alike, in both steps, so that the
generator does not learn to imitate the augmentation. Images are (B, C, S, S) in [-1, 1]; each one is
augmented with its own random numbers. `noise` is instance noise (Sønderby et al., arXiv:1610.04490).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

Augmentation = Callable[[Tensor], Tensor]


def color(images: Tensor) -> Tensor:
    """Change brightness by up to ±0.5, multiply saturation by 0 to 2 and contrast by 0.5 to 1.5, each uniformly."""
    brightness, saturation, contrast = torch.rand(3, len(images), 1, 1, 1, dtype=images.dtype, device=images.device)
    images = images + (brightness - 0.5)  # (B, C, S, S)
    gray = images.mean(1, keepdim=True)  # (B, 1, S, S)
    images = torch.lerp(gray, images, 2 * saturation)
    level = images.mean((1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    return torch.lerp(level, images, contrast + 0.5)


def translation(images: Tensor) -> Tensor:
    """Shift by up to an eighth of the size in each direction, by whole pixels, and fill with zero, a mid gray."""
    size = images.shape[-1]
    reach = round(size / 8)
    shift = torch.randint(-reach, reach + 1, (2, len(images), 1), device=images.device)  # rows, columns
    # Indices outside the image are clamped to a border of zeros, one pixel wide.
    rows, columns = (torch.arange(size, device=images.device) + 1 + shift).clamp(0, size + 1)  # (B, S) each
    padded = F.pad(images, (1, 1, 1, 1)).movedim(1, -1)  # (B, S + 2, S + 2, C)
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[sample, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def cutout(images: Tensor) -> Tensor:
    """Set a square of half the size to zero; its center is anywhere in the image."""
    size = images.shape[-1]
    center = torch.randint(0, size, (2, len(images), 1), device=images.device)
    offset = torch.arange(size, device=images.device) - center + size // 4  # (2, B, S)
    rows, columns = (offset >= 0) & (offset < size // 2)  # (B, S) each
    return images.masked_fill((rows[:, :, None] & columns[:, None, :]).unsqueeze(1), 0)


def noise(images: Tensor, strength: float) -> Tensor:
    """Add normal noise of this standard deviation."""
    return images + strength * torch.randn_like(images)


POLICIES: dict[str, Augmentation] = {"color": color, "translation": translation, "cutout": cutout}


def augmentation(policies: str, noise_strength: float = 0.0) -> Augmentation:
    """The policies of a list such as `color,translation`, one after the other, then noise; '' or 'none' disables them.

    Raises:
        ValueError: for a policy that does not exist or is named twice.
    """
    names = [] if policies in ("", "none") else policies.split(",")
    for name in names:
        if name not in POLICIES:
            raise ValueError(f"expected a list of {', '.join(POLICIES)}, or none, got {name!r}")
        if names.count(name) > 1:
            raise ValueError(f"{name} is named twice")
    steps = [POLICIES[name] for name in names]
    if noise_strength:
        steps.append(partial(noise, strength=noise_strength))

    def augment(images: Tensor) -> Tensor:
        for step in steps:
            images = step(images)
        return images

    return augment
