"""The Inception network of published FIDs: features and logits of images, computed once for all scores that use them.

It is torch-fidelity's port of the network that the FID paper's authors released. Images are resized to 299×299 as in
that TensorFlow code (bilinear, without antialiasing), not as Pillow or torchvision resize; a tool that resizes
otherwise, or takes torchvision's own weights, gives other FIDs for the same images (Parmar et al., arXiv:2104.11222).
The weights, 90 MB, are not downloaded here: their path is given, or they are in torch.hub's folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from training.runs.memory import out_of_memory

WEIGHTS = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
LAYERS = ["2048", "logits_unbiased"]  # what FID and KID use, and what the Inception score uses


class Features(NamedTuple):
    """Inception's outputs for a set of images."""

    pooled: Tensor  # (N, F)
    logits: Tensor  # (N, K), of K classes


Extractor = Callable[[Tensor], Features]  # uint8 images (B, 3, H, W)


class InceptionUnavailable(Exception):
    """Scores that use Inception cannot be computed here; the message says why."""


def load_inception(path: Path | None, device: torch.device) -> Extractor:
    """Inception with the weights at `path`, or in torch.hub's folder.

    Raises:
        InceptionUnavailable: if a package or the weights are missing, or the file contains other weights.
    """
    import_torchmetrics()
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except Exception as error:  # it imports torchvision, which can fail with many types of errors
        raise _cannot_import("torch-fidelity", error) from None
    file = path or Path(torch.hub.get_dir(), "checkpoints", Path(WEIGHTS).name)
    if not file.is_file():
        raise InceptionUnavailable(f"there are no Inception weights at {file}; they are at {WEIGHTS}")
    try:
        torch.load(file, weights_only=True)  # torch-fidelity itself would execute code in a foreign file
        network = FeatureExtractorInceptionV3("inception-v3-compat", LAYERS, feature_extractor_weights_path=str(file))
    except Exception as error:  # whatever a damaged or foreign file makes the reader raise
        if short := out_of_memory(error):  # which says nothing about the file
            raise OSError(f"{file}: {short}") from None
        raise InceptionUnavailable(
            f"{file} does not hold torch-fidelity's Inception weights, which are at {WEIGHTS}"
        ) from None
    network = network.to(device).eval()

    def extract(images: Tensor) -> Features:
        return Features(*network(images))

    return extract


def import_torchmetrics() -> Any:
    """The module `torchmetrics.image`, with FID, KID and the Inception score."""
    try:
        import torchmetrics.image.fid
        import torchmetrics.image.inception
        import torchmetrics.image.kid
    except Exception as error:  # it loads torchvision where torch-fidelity is installed
        raise _cannot_import("torchmetrics", error) from None
    return torchmetrics.image


class Precomputed(nn.Module):
    """Replaces torchmetrics' network: the "images" that it receives are already the features."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.num_features = length

    def forward(self, features: Tensor) -> Tensor:
        return features


def _cannot_import(package: str, error: Exception) -> InceptionUnavailable:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    installs = "pip install -r examples/evaluation/requirements.txt installs it"
    return InceptionUnavailable(f"{package} cannot be imported ({reason}); {installs}")
