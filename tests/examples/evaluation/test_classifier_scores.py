"""Scores by a classifier of real images: what perfect, repeating, wrong and lazy generators get, beside real images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from barred_images import barred
from evaluation import classifier
from evaluation.evaluator import Evaluator, listed, open_evaluator, real_images
from training.data.sources import ArrayDataset
from training.latents import draw_labels

COUNTS = (400, 400, 400)
UNEQUAL = (6, 294, 900)
SAMPLES = 300


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """All tests share the classifiers of two data sets, trained for a sixth of the steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "STEPS", 25)
        patch.setattr(classifier, "BATCH", 64)
        yield tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def evaluate(cache: Path) -> Evaluator:
    return open_evaluator(barred(COUNTS), barred(COUNTS, seed=1), samples=SAMPLES, cache=cache, per_class=True)


class FromImages(nn.Module):
    """Real images, of other random numbers than those that are compared with: a choice for the labels."""

    def __init__(self, images: ArrayDataset, choose: Callable[[np.ndarray, int, np.random.Generator], int]) -> None:
        super().__init__()
        assert images.labels is not None
        self.images, self.numbers, self.choose = images, images.labels.numbers, choose
        self.rng = np.random.default_rng(0)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        chosen = [self.choose(self.numbers, int(label), self.rng) for label in labels]
        return self.images[[(number, False) for number in chosen]].images.float() / 127.5 - 1


def one_of(numbers: np.ndarray, label: int, rng: np.random.Generator) -> int:
    return int(rng.choice(np.flatnonzero(numbers == label)))


def the_first(numbers: np.ndarray, label: int, rng: np.random.Generator) -> int:
    return int(np.flatnonzero(numbers == label)[0])


def one_of_the_next_class(numbers: np.ndarray, label: int, rng: np.random.Generator) -> int:
    return one_of(numbers, (label + 1) % 3, rng)


def inputs(counts: tuple[int, ...] = COUNTS) -> Callable[[int, torch.Generator], tuple[Tensor, Tensor]]:
    return lambda count, rng: (torch.randn(count, 2, generator=rng), draw_labels(count, counts, rng))


@pytest.fixture(scope="module")
def perfect(evaluate: Evaluator) -> dict[str, float]:
    return evaluate(FromImages(barred(COUNTS, seed=2), one_of), inputs())


def test_the_distance_comes_first_and_every_score_is_beside_that_of_real_images(perfect: dict[str, float]) -> None:
    classes = [f"agreement_class_{number}" for number in range(3)]
    names = ["classifier_distance", "classifier_precision", "classifier_recall", "agreement", *classes, "swd"]
    assert list(perfect) == [both for name in names for both in (name, name + "_real")]


def test_a_perfect_generator_scores_as_real_images_do(perfect: dict[str, float]) -> None:
    # Of 1000, the variance of real images. Two samples of one distribution are apart by about 2 · 1000 / 300 in their
    # means, and by a like amount in their covariances.
    assert perfect["classifier_distance_real"] < 30
    assert perfect["classifier_distance"] < 2 * perfect["classifier_distance_real"]
    for name in ("classifier_precision", "classifier_recall"):
        assert perfect[f"{name}_real"] > 0.7
        assert perfect[name] == pytest.approx(perfect[f"{name}_real"], abs=0.12)  # shares of 300 in two samples
    assert perfect["agreement"] > 0.95
    assert perfect["agreement_real"] > 0.95
    assert perfect["swd"] < 1.5 * perfect["swd_real"]


def test_with_unequal_classes_too(cache: Path) -> None:
    evaluate = open_evaluator(barred(UNEQUAL), barred(UNEQUAL, seed=1), samples=SAMPLES, cache=cache)
    new = FromImages(barred(UNEQUAL, seed=2), one_of)
    scores = evaluate(new, inputs(UNEQUAL))
    assert scores["classifier_distance"] < 2 * scores["classifier_distance_real"]
    assert scores["classifier_recall"] > scores["classifier_recall_real"] - 0.12
    assert scores["agreement"] > 0.95
    # And in equal shares it is not what real images are.
    assert evaluate(new, inputs())["classifier_distance"] > 5 * scores["classifier_distance"]


def test_one_image_of_each_class_has_no_recall(evaluate: Evaluator, perfect: dict[str, float]) -> None:
    scores = evaluate(FromImages(barred(COUNTS, seed=2), the_first), inputs())
    assert scores["classifier_recall"] < 0.1
    assert scores["agreement"] > 0.95  # by which alone nothing is wrong
    assert scores["classifier_distance"] > 5 * perfect["classifier_distance"]


def test_wrong_classes_are_no_agreement(evaluate: Evaluator, perfect: dict[str, float]) -> None:
    scores = evaluate(FromImages(barred(COUNTS, seed=2), one_of_the_next_class), inputs())
    assert scores["agreement"] < 0.05
    assert all(scores[f"agreement_class_{number}"] < 0.1 for number in range(3))
    assert scores["classifier_distance"] < 2 * perfect["classifier_distance_real"]  # the images themselves are good


def test_agreement_of_each_class_is_of_its_own_images(evaluate: Evaluator) -> None:
    def last_is_wrong(numbers: np.ndarray, label: int, rng: np.random.Generator) -> int:
        return one_of(numbers, 0 if label == 2 else label, rng)

    scores = evaluate(FromImages(barred(COUNTS, seed=2), last_is_wrong), inputs())
    assert min(scores["agreement_class_0"], scores["agreement_class_1"]) > 0.95
    assert scores["agreement_class_2"] < 0.1
    only_two = evaluate(FromImages(barred(COUNTS, seed=2), one_of), inputs((1, 0, 1)))
    assert "agreement_class_1" not in only_two
    assert "agreement_class_1_real" not in only_two


def test_noise_is_far_from_real_images(evaluate: Evaluator, perfect: dict[str, float]) -> None:
    class Noise(nn.Module):
        def forward(self, z: Tensor, labels: Tensor) -> Tensor:
            return torch.rand(len(z), 1, 16, 16) * 2 - 1

    scores = evaluate(Noise(), inputs())
    assert scores["classifier_distance"] > 20 * perfect["classifier_distance"]
    assert scores["classifier_precision"] < 0.5


def test_the_real_values_are_those_of_training_images_against_held_out_ones(cache: Path, evaluate: Evaluator) -> None:
    """A generator that repeats the training images that were taken gets just these values."""
    taken = torch.cat([batch.images for batch in real_images(barred(COUNTS), SAMPLES)])

    class Repeats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = iter(taken.split(64))

        def forward(self, z: Tensor, labels: Tensor) -> Tensor:
            return next(self.parts).float() / 127.5 - 1

    scores = evaluate(Repeats(), inputs())
    for name in ("classifier_distance", "classifier_precision", "classifier_recall", "swd"):
        assert scores[name] == pytest.approx(scores[f"{name}_real"], rel=1e-4)  # other batches round differently
    assert evaluate.classifier is not None
    assert scores["agreement_real"] == evaluate.classifier.accuracy  # by images that it did not learn from
    assert evaluate.against == "held-out images"


def test_without_held_out_images_two_halves_are_compared(cache: Path) -> None:
    data = barred(COUNTS)
    halves = [torch.cat([b.images for b in real_images(data, 600, skip=skip)]) for skip in (0, 600)]
    together = torch.cat(halves).flatten(1).tolist()
    assert sorted(together) == sorted(data.images.reshape(1200, -1).tolist())
    evaluate = open_evaluator(data, samples=10_000, cache=cache)
    assert evaluate.samples == 600
    assert evaluate.against.startswith("training images")
    assert torch.equal(evaluate.real.images, halves[0])
    assert evaluate.real_scores["classifier_distance"] > 0
    assert evaluate.real_scores["swd"] > 0
    few = open_evaluator(data, barred((50, 50, 50), seed=1), samples=10_000, cache=cache)
    assert few.samples == 150  # as many of each kind as the smaller set has


def test_without_classes_there_is_no_classifier() -> None:
    data = barred((40, 40))
    data.labels = None
    evaluate = open_evaluator(data, samples=20)
    assert evaluate.classifier is None
    assert list(evaluate.real_scores) == ["swd"]


@pytest.mark.parametrize(("count", "message"), [(3, "four real images or more, got 3"), (0, "got 0")])
def test_too_few_images_are_named(count: int, message: str) -> None:
    images = ArrayDataset(np.zeros((count, 1, 16, 16), np.uint8))
    with pytest.raises(ValueError, match=message):
        open_evaluator(images, samples=20)


def test_small_images_are_named() -> None:
    with pytest.raises(ValueError, match="expected images of 16 pixels or more, got 8"):
        open_evaluator(ArrayDataset(np.zeros((9, 1, 8, 8), np.uint8)), samples=20)


def test_scores_as_text() -> None:
    scores = {"swd": 31.23456, "swd_real": 9.6, "agreement": 1.0}
    assert listed(scores) == "swd 31.2346 (real 9.6), agreement 1.0"
