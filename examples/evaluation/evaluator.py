"""Scores of a generator against real images, all from one set of generated ones.

    evaluator = Evaluator(real_images(source, 2000), samples=2000, device=device)   # reads the real images once
    evaluator(generator, z_dim)                                                     # {"fid": 48.1, …, "swd": 31.2}

With Inception (inception.py): FID, KID, Inception score, precision, recall, and FID of each class. Without it
only the sliced Wasserstein distance, and `Evaluator.note` gives the reason. All but KID depend on the number of images:
compare only scores of equal numbers.

Evaluation does not affect training: the generator keeps its mode and buffers, and the random state is restored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.class_agreement import ClassAgreement
from evaluation.fid import fid, fid_per_class
from evaluation.inception import Extractor, Features, InceptionUnavailable, load_inception
from evaluation.inception_score import inception_score
from evaluation.kid import kid
from evaluation.precision_recall import NEIGHBOR, precision_recall
from evaluation.sliced_wasserstein import distances, slices
from training.data.dataset import Batch, ImageSet

SLICED = 2048  # at most so many images for the sliced Wasserstein distance, since their patches are kept

Sampler = Callable[[int, torch.Generator], Sequence[Tensor]]  # how many, random numbers -> z, or z and labels


class Seen(NamedTuple):
    """The data that are kept of a set of images."""

    images: Tensor  # uint8 (at most SLICED, C, H, W)
    features: Features | None
    labels: Tensor | None  # (N,)
    size: int


class Evaluator:
    """Scores generators against one set of real images.

    Args:
        real: batches of real images; the first `samples` images are taken.
        samples: images of each kind; fewer if `real` has fewer.
        batch_size: images that the generator and Inception see at a time.
        device: where both run.
        inception: path of torch-fidelity's Inception weights, None to look in torch.hub's folder, or an extractor of
            your own.
        agreement: a classifier of real images; adds `agreement`, the share of samples of the requested class.
        per_class: also give the FID of each class that has images, as `fid_class_3`.

    Attributes:
        note: why there is no FID, in one line; empty if there is one.

    Raises:
        ValueError: for images of another shape or type, for fewer than two, and for a path of weights that cannot be
            used.
    """

    def __init__(
        self,
        real: Iterable[Batch],
        *,
        samples: int,
        batch_size: int = 64,
        device: torch.device | str = "cpu",
        inception: Path | Extractor | None = None,
        agreement: ClassAgreement | None = None,
        per_class: bool = False,
    ) -> None:
        self.batch_size, self.device = batch_size, torch.device(device)
        self.agreement, self.per_class = agreement, per_class
        self.note = ""
        self.extract: Extractor | None = None
        try:
            self.extract = inception if callable(inception) else load_inception(inception, self.device)
        except InceptionUnavailable as error:
            if inception is not None:
                raise ValueError(str(error)) from None
            self.note = f"without FID: {error}"
        self.real = self._look(_first(real, samples))
        self.samples = self.real.size
        if self.samples < 2:
            raise ValueError(f"expected two real images or more, got {self.samples}")
        self.slices = slices(self.real.images, device=self.device)

    def __call__(self, generator: nn.Module, inputs: int | Sampler, *, seed: int = 0) -> dict[str, float]:
        """The scores of the generator's images. Select by the first one; smaller is better.

        Args:
            generator: makes images (B, C, H, W) in [-1, 1]; it is evaluated in evaluation mode.
            inputs: the length of its latent vector; or, for a generator with classes, a function that draws latent
                vectors and labels for so many images from a `torch.Generator` on the CPU.
            seed: fixes the inputs, so that one generator always gets the same scores.
        """
        draw = inputs if callable(inputs) else lambda count, rng: (torch.randn(count, inputs, generator=rng),)
        rng = torch.Generator().manual_seed(seed)
        wanted = self.samples if self.extract else min(self.samples, SLICED)

        def generated() -> Iterator[Batch]:
            for start in range(0, wanted, self.batch_size):
                z, *labels = draw(min(self.batch_size, wanted - start), rng)
                images = generator(z.to(self.device), *(y.to(self.device) for y in labels))
                yield Batch((images.float() * 127.5 + 127.5).round().clamp(0, 255).byte(), *labels)

        with torch.no_grad(), evaluation_mode(generator), seeded(self.device, seed):
            fake = self._look(generated())
            scores = self._inception_scores(fake)
            scores["swd"] = distances(self.slices, slices(fake.images, like=self.slices, device=self.device))["mean"]
            if self.agreement and fake.labels is not None:
                labels = fake.labels[: len(fake.images)].numpy()
                scores["agreement"] = self.agreement(fake.images.numpy(), labels)
        return scores

    def _inception_scores(self, fake: Seen) -> dict[str, float]:
        real = self.real
        if real.features is None or fake.features is None:
            return {}
        ours, theirs = real.features.pooled, fake.features.pooled
        scores = {"fid": fid(ours, theirs), "kid": kid(ours, theirs)}
        scores["inception_score"] = inception_score(fake.features.logits)
        if min(len(ours), len(theirs)) > NEIGHBOR:
            scores["precision"], scores["recall"] = precision_recall(ours, theirs)
        if self.per_class and real.labels is not None and fake.labels is not None:
            by_class = fid_per_class(ours, real.labels, theirs, fake.labels)
            scores |= {f"fid_class_{label}": value for label, value in by_class.items()}
        return scores

    @torch.no_grad()
    def _look(self, batches: Iterable[Batch]) -> Seen:
        images, features, labels, count = [], [], [], 0
        for batch, classes in batches:
            if batch.ndim != 4 or batch.shape[1] not in (1, 3) or batch.dtype != torch.uint8:
                raise ValueError(f"expected uint8 images (B, 1 or 3, H, W), got {batch.dtype} {tuple(batch.shape)}")
            if count < SLICED:
                images.append(batch[: SLICED - count].cpu())
            count += len(batch)
            if classes is not None:
                labels.append(classes.cpu())
            if self.extract:
                for part in batch.split(self.batch_size):
                    # FID sums and multiplies them in float64, which not every device has: on the CPU.
                    features.append([f.float().cpu() for f in self.extract(part.expand(-1, 3, -1, -1).to(self.device))])
        return Seen(
            torch.cat(images) if images else torch.empty(0, 3, 0, 0, dtype=torch.uint8),
            Features(*(torch.cat(column) for column in zip(*features, strict=True))) if features else None,
            torch.cat(labels) if labels else None,
            count,
        )


def real_images(source: ImageSet, count: int, *, batch_size: int = 64, flip: bool = False) -> Iterator[Batch]:
    """`count` images of a source, always the same, or all if it has fewer; `flip` mirrors every other one."""
    chosen = np.random.default_rng(0).permutation(len(source))[:count].tolist()
    pairs = [(index, flip and i % 2 == 1) for i, index in enumerate(chosen)]
    for start in range(0, len(pairs), batch_size):
        yield source[pairs[start : start + batch_size]]


def _first(batches: Iterable[Batch], count: int) -> Iterator[Batch]:
    left = count
    for images, labels in batches:
        yield Batch(images[:left], None if labels is None else labels[:left])
        left -= len(images)
        if left <= 0:
            return


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, and each of its modules back into its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the random numbers inside (KID draws subsets), and restore their state afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the generators of all devices
        yield
