"""Scores of a generator against real images: sliced Wasserstein distance, and FID and KID where Inception is at hand.

    judge = Judge(real_images(source, 2000), samples=2000, device=device)    # the real images' part is computed once
    judge(generator, z_dim)                                                  # {"fid": 48.1, "kid": 39.0, "swd": 31.2}

FID (Heusel et al., arXiv:1706.08500) and KID (Bińkowski et al., arXiv:1801.01401; here times 1000) come from
torchmetrics, on the features of torch-fidelity's Inception, the network of the published numbers. Its weights are 90 MB
that nothing here downloads: their path is given, or they lie where torch.hub keeps what it downloads. Without them, or
without the extra `judging`, there is only the sliced Wasserstein distance, and `Judge.note` says why. All three
depend on the number of images: compare like with like; published FIDs use 50 000.

Judging changes nothing: the generator keeps its mode, its buffers and the random state that training goes on from.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sliced_wasserstein import distances, slices
from tensor_files import read

SLICED = 2048  # images for the sliced Wasserstein distance at most, whose patches are kept
WEIGHTS = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"

Features = Callable[[Tensor], Tensor]  # uint8 images (B, 3, H, W) -> (B, F)
Sampler = Callable[[int, torch.Generator], Sequence[Tensor]]  # how many, from what chance -> the generator's arguments


class Source(Protocol):
    """Images by number, as sources.py has them."""

    def __len__(self) -> int: ...
    def __getitem__(self, batch: list[tuple[int, bool]], /) -> tuple[Tensor, dict[str, str]]: ...


class Judge:
    """Scores generators against one set of real images.

    Args:
        real: batches of uint8 images (B, 1 or 3, H, W) in [0, 255]; the first `samples` images are taken.
        samples: images of each kind. Where `real` has fewer, as many generated ones as that.
        batch_size: images that the generator and Inception see at a time.
        device: where both run.
        inception: path of torch-fidelity's Inception weights, None to look in torch.hub's folder, or a network of your
            own that takes uint8 images (B, 3, H, W) to features (B, F).

    Attributes:
        note: why there is no FID and no KID, one line; empty when there are.

    Raises:
        ValueError: for images of another shape or type or fewer than two, and for weights whose path is given and
            which cannot be used.
    """

    def __init__(
        self,
        real: Iterable[Tensor],
        *,
        samples: int,
        batch_size: int = 64,
        device: torch.device | str = "cpu",
        inception: Path | Features | None = None,
    ) -> None:
        self.batch_size, self.device = batch_size, torch.device(device)
        self.note = ""
        self.features: Features | None = None
        try:
            self.features = inception if callable(inception) else load_inception(inception, self.device)
            self.inception_scores = InceptionScores()
        except NoInception as error:
            if inception is not None:
                raise ValueError(str(error)) from None
            self.note = f"without FID and KID: {error}"
        kept, self.samples = self._look(_first(real, samples), real=True)
        if self.samples < 2:
            raise ValueError(f"expected two real images or more to judge with, got {self.samples}")
        self.slices = slices(kept, device=self.device)

    def __call__(self, generator: nn.Module, inputs: int | Sampler, *, seed: int = 0) -> dict[str, float]:
        """The scores of what `generator` makes, smaller is better; the first one is the one to go by.

        Args:
            generator: makes images (B, C, H, W) in [-1, 1]; it is judged in evaluation mode.
            inputs: the length of its latent vector; or, for one that takes more than that, a function that draws the
                tuple of its arguments for so many images from a `torch.Generator` on the CPU.
            seed: fixes what is drawn, so that one generator always gets the same scores.
        """
        draw = inputs if callable(inputs) else lambda count, random: (torch.randn(count, inputs, generator=random),)
        random = torch.Generator().manual_seed(seed)
        wanted = self.samples if self.features else min(self.samples, SLICED)

        def generated() -> Iterator[Tensor]:
            for start in range(0, wanted, self.batch_size):
                given = draw(min(self.batch_size, wanted - start), random)
                images = generator(*(argument.to(self.device) for argument in given))
                yield (images.float() * 127.5 + 127.5).round().clamp(0, 255).byte()

        with torch.no_grad(), evaluation(generator), same_chance(self.device, seed):
            kept, _ = self._look(generated(), real=False)
            scores = self.inception_scores.compute() if self.features else {}
            return scores | {"swd": distances(self.slices, slices(kept, like=self.slices, device=self.device))["mean"]}

    @torch.no_grad()
    def _look(self, batches: Iterable[Tensor], *, real: bool) -> tuple[Tensor, int]:
        """Take the features of all images; return the first of them, and how many there were."""
        kept: list[Tensor] = []
        count = 0
        for images in batches:
            if images.ndim != 4 or images.shape[1] not in (1, 3) or images.dtype != torch.uint8:
                raise ValueError(f"expected uint8 images (B, 1 or 3, H, W), got {images.dtype} {tuple(images.shape)}")
            if count < SLICED:
                kept.append(images[: SLICED - count].cpu())
            count += len(images)
            if self.features:
                for part in images.split(self.batch_size):
                    colour = part.expand(-1, 3, -1, -1).to(self.device)  # (B, 3, H, W)
                    self.inception_scores.update(self.features(colour), real=real)
        return torch.cat(kept) if kept else torch.empty(0, 3, 0, 0, dtype=torch.uint8), count


class InceptionScores:
    """FID and KID of torchmetrics, both from the same features. The real ones stay from one score to the next."""

    def __init__(self) -> None:
        _import_torchmetrics()
        self.metrics: list[Any] = []

    def update(self, features: Tensor, *, real: bool) -> None:
        features = features.float().cpu()  # (B, F); FID sums and multiplies them in float64, which not every device has
        if not self.metrics:
            self.metrics = self._metrics(features.shape[1])
        for metric in self.metrics:
            metric.update(features, real=real)

    def compute(self) -> dict[str, float]:
        fid, kid = self.metrics
        smaller = min(sum(map(len, kid.real_features)), sum(map(len, kid.fake_features)))
        kid.subset_size = min(1000, smaller)
        scores = {"fid": float(fid.compute()), "kid": 1000 * float(kid.compute()[0])}
        for metric in self.metrics:
            metric.reset()
        return scores

    @staticmethod
    def _metrics(length: int) -> list[Any]:
        fid, kid = _import_torchmetrics()
        # Judging may happen in one process of many, and the others would not answer.
        settings: dict[str, Any] = {"reset_real_features": False, "sync_on_compute": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # KID tells each time that it keeps the features
            return [metric(feature=Precomputed(length), **settings) for metric in (fid, kid)]


class Precomputed(nn.Module):
    """Stands in the place of the network: the features are there already, so that FID and KID share them."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.num_features = length

    def forward(self, features: Tensor) -> Tensor:
        return features


class NoInception(Exception):
    """FID and KID cannot be computed here; the message says why."""


def _import_torchmetrics() -> tuple[Any, Any]:
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance
    except Exception as error:  # it loads torchvision, whose failures have many types, where torch-fidelity is there
        raise _cannot_import("torchmetrics", error) from None
    return FrechetInceptionDistance, KernelInceptionDistance


def load_inception(path: Path | None, device: torch.device) -> Features:
    """Inception as in the published numbers, with the weights at `path` or in torch.hub's folder."""
    _import_torchmetrics()
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except Exception as error:
        raise _cannot_import("torch-fidelity", error) from None
    file = path or Path(torch.hub.get_dir(), "checkpoints", Path(WEIGHTS).name)
    if not file.is_file():
        raise NoInception(f"there are no Inception weights at {file}; they are at {WEIGHTS}")
    try:
        read(file)  # torch-fidelity itself would execute what a foreign file says
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(file))
    except Exception:  # whatever a damaged or foreign file makes the reader raise
        raise NoInception(f"{file} does not hold torch-fidelity's Inception weights, which are at {WEIGHTS}") from None
    network = network.to(device).eval()

    def features(images: Tensor) -> Tensor:
        pooled: Tensor = network(images)[0]  # (B, 2048)
        return pooled

    return features


def _cannot_import(package: str, error: Exception) -> NoInception:
    return NoInception(f"{package} cannot be imported ({_line(error)}); pip install 'torch-sagan[judging]'")


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def real_images(source: Source, count: int, *, batch_size: int = 64, flip: bool = False) -> Iterator[Tensor]:
    """`count` images of a source, always the same, or all if it has fewer; `flip` mirrors every other one."""
    chosen = np.random.default_rng(0).permutation(len(source))[:count].tolist()
    pairs = [(index, flip and place % 2 == 1) for place, index in enumerate(chosen)]
    for start in range(0, len(pairs), batch_size):
        yield source[pairs[start : start + batch_size]][0]  # (B, C, S, S)


def _first(batches: Iterable[Tensor], count: int) -> Iterator[Tensor]:
    left = count
    for images in batches:
        yield images[:left]
        left -= len(images)
        if left <= 0:
            return


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards each of its modules in the mode that it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def same_chance(device: torch.device, seed: int) -> Iterator[None]:
    """A random state that depends on the seed alone (KID draws subsets), and afterwards the one that was there."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the generators of all devices
        yield
