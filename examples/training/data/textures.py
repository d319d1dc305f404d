"""Textures: overlapping patches of the two photographs that scikit-learn ships, a small color set without a download.

A patch is a square of 64 pixels, and its class is the photograph that it comes from. Patches lie on a grid of every
fourth pixel; those of little contrast, sky and blurred background, are left out. A vertical band of each photograph is
held out: held-out patches lie within it, and training patches beside it, so no pixel is in both.

The photographs (CC BY 2.0) are china.jpg by danielbuechele and flower.jpg by vultilion, both of flickr.com.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SIDE, STRIDE = 64, 4
CONTRAST = 25  # at least this standard deviation of the gray values, 0 … 255
BANDS = {"china": (256, 384), "flower": (320, 448)}  # columns; both cut what the photograph is of
CLASSES = tuple(BANDS)


def read_textures(*, held_out: bool = False) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The patches (N, 3, 64, 64) for training, or those held out, and the number of each one's photograph (N,)."""
    from sklearn.datasets import load_sample_image  # imported here, because only this data set needs it

    patches, labels = [], []
    for label, (name, (start, end)) in enumerate(BANDS.items()):
        photograph = load_sample_image(f"{name}.jpg").transpose(2, 0, 1)  # (3, H, W)
        gray = photograph.mean(0)  # (H, W)
        height, width = gray.shape
        for top in range(0, height - SIDE + 1, STRIDE):
            for left in range(0, width - SIDE + 1, STRIDE):
                within, beside = start <= left <= end - SIDE, left <= start - SIDE or left >= end
                window = slice(top, top + SIDE), slice(left, left + SIDE)
                if (within if held_out else beside) and gray[window].std() >= CONTRAST:
                    patches.append(photograph[(slice(None), *window)])
                    labels.append(label)
    return np.stack(patches), np.array(labels, np.int64)
