"""The classifiers that say how often a generator draws the class that was requested."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from evaluation import class_agreement as module
from evaluation.class_agreement import ClassAgreement, class_agreement, kernel_classifier, linear_classifier
from training.data.labels import Labels
from training.data.sources import ArrayDataset, digits, procedural_faces


class Recorder:
    """A classifier that predicts class 1 for bright images, and keeps its inputs."""

    def __init__(self) -> None:
        self.learned: NDArray[np.float32] = np.zeros((0, 0), np.float32)
        self.asked: list[NDArray[np.float32]] = []

    def fit(self, x: NDArray[np.float32], y: NDArray[np.int64]) -> Recorder:
        self.learned = x
        return self

    def predict(self, x: NDArray[np.float32]) -> NDArray[np.int64]:
        self.asked.append(x)
        return (x.mean(1) > 0).astype(np.int64)


def levels(count: int, size: int = 2) -> NDArray[np.uint8]:
    """Uniform images, each of another brightness."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 1, size, size)).copy()


def brightness(rows: NDArray[np.float32]) -> list[int]:
    return np.rint((rows[:, 0] + 1) * 127.5).astype(int).tolist()


def test_held_out_images_are_not_learnt_from() -> None:
    recorder = Recorder()
    ClassAgreement(recorder, levels(50), np.arange(50) // 25)
    (held_out,) = recorder.asked
    learned, tested = brightness(recorder.learned), brightness(held_out)
    assert len(tested) == 10
    assert sorted(learned + tested) == list(range(50))


def test_only_so_many_images_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ", 20)
    recorder = Recorder()
    ClassAgreement(recorder, levels(50), np.arange(50) // 25)
    assert len(recorder.learned) == 16
    assert [len(rows) for rows in recorder.asked] == [4]


def test_agreement_is_the_share_of_requested_classes() -> None:
    classes = (np.arange(200) > 127).astype(np.int64)
    agreement = ClassAgreement(Recorder(), levels(200), classes)
    assert agreement.accuracy == 1
    dark, bright = levels(1), levels(1) + 255
    images = np.concatenate([dark, dark, bright, bright])
    assert agreement.classify(images).tolist() == [0, 0, 1, 1]
    assert agreement(images, np.array([0, 1, 1, 1])) == 0.75


@pytest.mark.parametrize(("size", "seen"), [(28, 28), (32, 16), (40, 20), (64, 16), (128, 16)])
def test_large_images_are_reduced(size: int, seen: int) -> None:
    """Each pixel that the classifier is shown is the mean of a square of the image."""
    images = np.random.default_rng(0).integers(0, 256, (5, 3, size, size), dtype=np.uint8)
    recorder = Recorder()
    ClassAgreement(recorder, images, np.arange(5) % 2)
    scale = size // seen
    expected = images.reshape(5, 3, seen, scale, seen, scale).mean((3, 5)).reshape(5, -1) / 127.5 - 1
    got = np.concatenate([recorder.learned, *recorder.asked])
    order = np.lexsort(got[:, :1].T), np.lexsort(expected[:, :1].T)
    np.testing.assert_allclose(got[order[0]], expected[order[1]], atol=1e-5)  # float32 against float64


@pytest.mark.slow  # draws 4096 faces twice
@pytest.mark.parametrize("size", [32, pytest.param(64, marks=pytest.mark.exhaustive)])
def test_hair_is_recognised_on_every_real_face(size: int) -> None:
    data = procedural_faces(size)
    agreement = class_agreement("faces", data)
    assert agreement is not None
    assert data.labels is not None
    assert agreement.accuracy == 1
    assert agreement(data.images, data.labels.numbers) == 1
    new = procedural_faces(size, 500, first=10_000)
    assert new.labels is not None
    assert agreement(new.images, new.labels.numbers) == 1
    # And not because all faces have one color, or because any answer is right.
    assert min(data.labels.counts().values()) > 600
    assert agreement(new.images, (new.labels.numbers + 1) % 6) == 0


def test_digits_are_recognised() -> None:
    data = digits(28)
    agreement = class_agreement("digits", data)
    assert agreement is not None
    # Support vector machines are published with 1–2 % errors on these digits; 359 of them are held out.
    assert agreement.accuracy > 0.97


def test_no_classifier_where_pixels_do_not_tell_the_class() -> None:
    images, labels = levels(10), Labels(("a", "b"), np.arange(10) % 2)
    assert class_agreement("folder", ArrayDataset(images, labels)) is None
    assert class_agreement("digits", ArrayDataset(images, None)) is None
    agreement = class_agreement("digits", ArrayDataset(images, labels))
    assert agreement is not None
    assert type(agreement.classifier) is type(kernel_classifier())
    assert type(linear_classifier()) is not type(kernel_classifier())


def test_the_trainer_starts_without_scikit_learn() -> None:
    """Which takes as long to import as torch, and which most runs do not need."""
    examples = Path(__file__).parents[3] / "examples"
    code = f"import sys; sys.path.insert(0, {str(examples)!r}); import train_celeba; sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
