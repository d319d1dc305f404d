"""Scores of a generator against real images, all from one set of generated ones, each beside that of real images.

    evaluate = open_evaluator(data, held_out, samples=2000, cache=Path("runs/cache"))   # reads the real images once
    evaluate(generator, inputs)           # {"classifier_distance": 48.1, "classifier_distance_real": 1.2, …}

With Inception (inception.py): FID, KID, Inception score, precision, recall, and FID of each class. For images with
classes, by a classifier of these images (classifier.py): the Fréchet distance of its features, their precision and
recall, and the share of samples of the requested class. Always the sliced Wasserstein distance. `Evaluator.note` says
why there is no FID. All but KID and agreement depend on the number of images: compare only scores of equal numbers.

A score `x_real` is that of as many other real images in the generator's place: as good as it gets.

Evaluation does not affect training: the generator keeps its mode and buffers, and the random state is restored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.classifier import Classified, Classifier
from evaluation.classifier_cache import open_classifier
from evaluation.fid import fid, fid_per_class
from evaluation.frechet import frechet_distance
from evaluation.inception import Extractor, Features, InceptionUnavailable, load_inception
from evaluation.inception_score import inception_score
from evaluation.kid import kid
from evaluation.precision_recall import NEIGHBOR, precision_recall
from evaluation.sliced_wasserstein import COARSEST, distances, slices
from training.data.dataset import Batch, ImageSet

REAL = "_real"  # ends the names of the scores of real images
SLICED = 2048  # at most so many images for the sliced Wasserstein distance, since their patches are kept

Sampler = Callable[[int, torch.Generator], Sequence[Tensor]]  # how many, random numbers -> z, or z and labels


class Seen(NamedTuple):
    """The data that are kept of a set of images."""

    images: Tensor  # uint8 (at most SLICED, C, H, W)
    features: Features | None  # Inception's
    classified: Classified | None
    labels: Tensor | None  # (N,)
    size: int


class Evaluator:
    """Scores generators against one set of real images.

    Args:
        real: batches of real images; the first `samples` images are taken.
        others: batches of as many other real images, which are scored in the generator's place.
        samples: images of each kind; fewer if `real` has fewer.
        batch_size: images that the generator and Inception see at a time.
        device: where both run.
        inception: path of torch-fidelity's Inception weights, None to look in torch.hub's folder, or an extractor of
            your own.
        classifier: of real images; adds `classifier_distance`, the Fréchet distance of its features, their precision
            and recall, and `agreement`, the share of samples of the requested class.
        per_class: also give FID and agreement of each class that has images, as `fid_class_3`.

    Attributes:
        note: why there is no FID, in one line; empty if there is one.
        real_scores: those of the other real images.
        against: what the first set of real images is, in a few words.

    Raises:
        ValueError: for images of another shape or type, for fewer than two, and for a path of weights that cannot be
            used.
    """

    def __init__(
        self,
        real: Iterable[Batch],
        others: Iterable[Batch] | None = None,
        *,
        samples: int,
        batch_size: int = 64,
        device: torch.device | str = "cpu",
        inception: Path | Extractor | None = None,
        classifier: Classifier | None = None,
        per_class: bool = False,
    ) -> None:
        self.batch_size, self.device = batch_size, torch.device(device)
        self.classifier = classifier.to(self.device) if classifier else None
        self.per_class = per_class
        self.note, self.against = "", "real images"
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
        self.real_scores: dict[str, float] = {}
        if others is not None:
            with seeded(self.device, 0):
                scores = self._scores(self._look(_first(others, self.samples)))
            self.real_scores = {name: value for name, value in scores.items() if not name.startswith("agreement")}
            if classifier:  # with images that it has not learned from
                self.real_scores |= _agreements(classifier.accuracy, classifier.recalls if per_class else [])

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
        wanted = self.samples if self.extract or self.classifier else min(self.samples, SLICED)

        def generated() -> Iterator[Batch]:
            for start in range(0, wanted, self.batch_size):
                z, *labels = draw(min(self.batch_size, wanted - start), rng)
                images = generator(z.to(self.device), *(y.to(self.device) for y in labels))
                yield Batch((images.float() * 127.5 + 127.5).round().clamp(0, 255).byte(), *labels)

        with torch.no_grad(), evaluation_mode(generator), seeded(self.device, seed):
            scores = self._scores(self._look(generated()))
        return {name: value for own in scores for name, value in self._with_real(own, scores[own])}

    def _with_real(self, name: str, score: float) -> list[tuple[str, float]]:
        real = self.real_scores.get(name, math.nan)
        return [(name, score)] if math.isnan(real) else [(name, score), (name + REAL, real)]

    def _scores(self, fake: Seen) -> dict[str, float]:
        """The score that selects comes first."""
        swd = distances(self.slices, slices(fake.images, like=self.slices, device=self.device))["mean"]
        return self._inception_scores(fake) | self._classifier_scores(fake) | {"swd": swd}

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

    def _classifier_scores(self, fake: Seen) -> dict[str, float]:
        if self.real.classified is None or fake.classified is None:
            return {}
        ours, theirs = self.real.classified.features, fake.classified.features
        scores = {"classifier_distance": frechet_distance(ours, theirs)}
        if min(len(ours), len(theirs)) > NEIGHBOR:
            precision, recall = precision_recall(ours, theirs)
            scores |= {"classifier_precision": precision, "classifier_recall": recall}
        if fake.labels is not None:
            right = (fake.classified.classes == fake.labels).double()  # (N,)
            per_class = range(int(fake.labels.max()) + 1) if self.per_class else ()
            # NaN for classes that were not requested
            scores |= _agreements(right.mean().item(), [right[fake.labels == k].mean().item() for k in per_class])
        return scores

    @torch.no_grad()
    def _look(self, batches: Iterable[Batch]) -> Seen:
        images, features, classified, labels, count = [], [], [], [], 0
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
            if self.classifier:
                classified.append(self.classifier(batch))
        return Seen(
            torch.cat(images) if images else torch.empty(0, 3, 0, 0, dtype=torch.uint8),
            Features(*(torch.cat(column) for column in zip(*features, strict=True))) if features else None,
            Classified(*(torch.cat(column) for column in zip(*classified, strict=True))) if classified else None,
            torch.cat(labels) if labels else None,
            count,
        )


def _agreements(all_classes: float, each: Sequence[float]) -> dict[str, float]:
    """Agreement of all samples and of each class that has some."""
    named = {f"agreement_class_{number}": value for number, value in enumerate(each) if not math.isnan(value)}
    return {"agreement": all_classes} | named


def open_evaluator(
    data: ImageSet,
    held_out: ImageSet | None = None,
    *,
    samples: int,
    cache: Path | None = None,
    device: torch.device | str = "cpu",
    inception: Path | Extractor | None = None,
    per_class: bool = False,
    against_training: bool = False,
) -> Evaluator:
    """Scores against held-out images, or without any against training images, by which it is good to repeat these.

    The other real images are training images, too. There are so many of each kind as the smaller set has, or half of
    the training images, and at most `samples`. Images with classes are classified, by the classifier in the folder
    `cache`, where it is trained if necessary.

    With `against_training` the scores are against training images, as published FIDs are, up to all of them. Then the
    other real images are held-out ones; if there are too few of these, the scores of real images are left out.

    Raises:
        ValueError: as by `Evaluator`, and for fewer than four images.
    """
    if held_out is not None and not against_training:
        reference, others, most = held_out, data, min(len(held_out), len(data))
    else:
        reference, others = data, data if held_out is None else held_out
        most = len(data) if against_training else len(data) // 2
    count = min(samples, most)
    if count < 2:
        raise ValueError(f"expected four real images or more, got {len(data)}")
    size = data[[(0, False)]].images.shape[-1]
    if size < COARSEST:
        raise ValueError(f"expected images of {COARSEST} pixels or more, got {size}")
    skipped = count if others is reference else 0
    evaluator = Evaluator(
        real_images(reference, count, flip=data.flip),
        real_images(others, count, flip=data.flip, skip=skipped) if len(others) - skipped >= count else None,
        samples=count,
        device=device,
        inception=inception,
        classifier=open_classifier(data, held_out, cache) if data.labels else None,
        per_class=per_class,
    )
    evaluator.against = "held-out images"
    if reference is data:
        asked = "as published scores" if against_training else "none are held out"
        evaluator.against = f"training images ({asked}), of which copies score best"
    return evaluator


def listed(scores: Mapping[str, float]) -> str:
    """Scores as a line of text, each with that of real images: swd 31.2 (real 9.6), agreement 0.89 (real 0.92)."""
    real = {name: f" (real {round(scores[name + REAL], 4)})" for name in scores if name + REAL in scores}
    own = [name for name in scores if name.removesuffix(REAL) not in real or name in real]
    return ", ".join(f"{name} {round(scores[name], 4)}{real.get(name, '')}" for name in own)


def real_images(
    source: ImageSet, count: int, *, batch_size: int = 64, flip: bool = False, skip: int = 0
) -> Iterator[Batch]:
    """`count` images of a source, always the same, or all if it has fewer; `flip` mirrors every other one.

    With `skip` they are others than the first so many, of the same order.
    """
    chosen = np.random.default_rng(0).permutation(len(source))[skip : skip + count].tolist()
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
    """Put the model into evaluation mode, and each of its modules back into its own mode afterwards.

    The package has the same for its own use, not as a public name.
    """
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
