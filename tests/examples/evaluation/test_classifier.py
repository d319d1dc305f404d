"""The classifier of real images: what it learns from, what it is tested on, and that data and seed decide every bit."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from barred_images import CLASSES, barred, same, short_training
from evaluation import classifier as module
from evaluation.classifier import Classifier, Network, train
from training.data.dataset import Batch
from training.data.labels import Labels
from training.data.sources import ArrayDataset


class Recorder(ArrayDataset):
    """Images that note which of them are read, in batches of how many, and which ones mirrored."""

    def __init__(self, data: ArrayDataset) -> None:
        super().__init__(data.images, data.labels, flip=data.flip)
        self.asked: list[tuple[int, bool]] = []
        self.largest = 0

    def __getitem__(self, indices: list[tuple[int, bool]]) -> Batch:
        self.asked += indices
        self.largest = max(self.largest, len(indices))
        return super().__getitem__(indices)


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    """A sixth of the steps is enough for three bars."""
    with short_training(steps=25, batch=32):
        yield


@pytest.fixture(scope="module")
def learned() -> Classifier:
    return train(barred((100, 100, 100)), barred((30, 40, 50), seed=1))


def test_it_learns_the_classes(learned: Classifier) -> None:
    new = barred((40, 50, 60), seed=2)
    features, classes = learned(torch.from_numpy(new.images))
    assert new.labels is not None
    assert (classes.numpy() == new.labels.numbers).mean() > 0.95
    assert learned.accuracy > 0.95
    assert learned.tested == 120
    assert learned.about == f"{100 * learned.accuracy:.1f} % right on 120 real images that it did not learn from"
    assert features.shape == (150, 64)
    assert classes.shape == (150,)
    # The total variance over real images is 1000. Of 150 others it is that to 20 %: its deviation is about √(2 / 150).
    assert features.double().var(0).sum().item() == pytest.approx(1000, rel=0.2)


def test_data_and_seed_alone_decide_about_every_bit(learned: Classifier) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        torch.rand(3)
        drawn = torch.get_rng_state()
        again = train(barred((100, 100, 100)), barred((30, 40, 50), seed=1))
        assert torch.equal(torch.get_rng_state(), drawn)
        assert torch.get_num_threads() == (2 if threads == 1 else 1)
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
    assert same(again, learned)
    other = train(barred((100, 100, 100)), barred((30, 40, 50), seed=1), seed=1)
    assert not same(other, learned)


def test_with_held_out_images_it_learns_from_all_others() -> None:
    data, held_out = Recorder(barred((40, 40, 40))), Recorder(barred((20, 20, 0), seed=1))
    classifier = train(data, held_out)
    assert {number for number, _ in data.asked} == set(range(120))
    assert sorted(held_out.asked) == [(number, False) for number in range(40)]  # each once, as they are
    assert classifier.tested == 40
    assert math.isnan(classifier.recalls[2])  # no image of this class
    assert classifier.accuracy == pytest.approx(np.mean(classifier.recalls[:2]))
    assert data.largest <= 32


def test_without_them_it_learns_from_four_fifths(monkeypatch: pytest.MonkeyPatch) -> None:
    learned: list[int] = []
    fit = module._fit
    monkeypatch.setattr(
        module, "_fit", lambda net, data, numbers, seed: learned.extend(numbers) or fit(net, data, numbers, seed)
    )
    data = Recorder(barred((40, 40, 40)))
    classifier = train(data)
    tested = set(range(120)) - set(learned)
    assert len(set(learned)) == len(learned) == 96
    assert classifier.tested == len(tested) == 24
    assert tested <= {number for number, _ in data.asked}


def test_only_so_many_images_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ", 50)
    monkeypatch.setattr(module, "TESTED", 8)
    data, held_out = Recorder(barred((40, 40, 40))), Recorder(barred((20, 20, 20), seed=1))
    assert train(data, held_out).tested == 8
    assert len({number for number, _ in data.asked} - {0}) in (49, 50)  # the first one is read for its size
    assert len(held_out.asked) == 8


@pytest.mark.parametrize("flip", [True, False])
def test_images_are_mirrored_where_a_mirrored_one_could_be_in_the_data(flip: bool) -> None:
    data = Recorder(barred((40, 40, 40), flip=flip))
    train(data, barred((20, 20, 20), seed=1))
    mirrored = np.mean([mirrored for _, mirrored in data.asked])
    assert 0.3 < mirrored < 0.6 if flip else mirrored == 0  # half of those learned from; not those of the scale


@pytest.mark.parametrize(("size", "side"), [(16, 2), (28, 3), (32, 4), (39, 4), (40, 2), (64, 4), (96, 3), (128, 4)])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_every_size_have_64_features(size: int, side: int, channels: int) -> None:
    network = Network(size, channels, 5).eval()
    assert network.to_features.in_features == 64 * side**2
    features, logits = network(torch.randn(2, channels, size, size))
    assert features.shape == (2, 64)
    assert logits.shape == (2, 5)


def test_other_images_are_refused(learned: Classifier) -> None:
    for wrong in (torch.zeros(2, 3, 16, 16).byte(), torch.zeros(2, 1, 32, 32).byte(), torch.zeros(2, 1, 16, 16)):
        with pytest.raises(ValueError, match=r"expected uint8 images \(N, 1, 16, 16\), got torch\.\w+ \(2, "):
            learned(wrong)


def test_what_cannot_be_learned_is_named() -> None:
    data = barred((10, 10))
    unlabeled = ArrayDataset(data.images, None)
    for one in (unlabeled, ArrayDataset(data.images, Labels(("a",), np.zeros(20, np.int64)))):
        with pytest.raises(ValueError, match="expected images of two classes or more"):
            train(one)
    with pytest.raises(
        ValueError, match="expected held-out images of the classes left, middle, got left, middle, right"
    ):
        train(data, barred((5, 5, 5)))
    with pytest.raises(ValueError, match="of the classes left, middle, got none"):
        train(data, unlabeled)
    assert CLASSES[:2] == ("left", "middle")


def test_few_images_are_enough() -> None:
    """Of four no fifth can be spared."""
    classifier = train(barred((2, 2)))
    assert classifier.tested == 0
    assert math.isnan(classifier.accuracy)
    assert classifier.about == "not tested: there are too few real images"
    assert all(math.isnan(recall) for recall in classifier.recalls)
