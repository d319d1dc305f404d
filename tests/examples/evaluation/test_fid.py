"""FID of features within classes. Of all classes it is the Fréchet distance (test_frechet.py)."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from evaluation.fid import fid, fid_per_class

needs_torchmetrics = pytest.mark.skipif(find_spec("torchmetrics") is None, reason="torchmetrics is not installed")


@needs_torchmetrics
def test_fid_of_a_class_compares_that_class_alone() -> None:
    real, fake = torch.randn(400, 3), torch.randn(300, 3)
    real_labels, fake_labels = torch.arange(400) % 2, torch.arange(300) % 2
    fake[fake_labels == 1] += 2
    scores = fid_per_class(real, real_labels, fake, fake_labels)
    assert scores == {0: fid(real[::2], fake[::2]), 1: fid(real[1::2], fake[1::2])}
    assert scores[1] == pytest.approx(12 + scores[0], abs=1.5)  # three dimensions moved by 2; 150 samples
    assert fid_per_class(real, real_labels, fake[:1], fake_labels[:1]) == {}
