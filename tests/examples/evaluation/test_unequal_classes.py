"""Classes of very different sizes: the average is recalibrated, and scored, on the mix of the real images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import train_celeba
from evaluation import classifier
from torch_sagan import SAGANGenerator
from training.average import recalibrated
from training.data.sources import DataSource, open_data
from training.flags import Config

COUNTS = {"rare": 5, "usual": 2261}
SIZE = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSource:
    """Bright noise in one class, dark noise in the other."""
    folder, rng = tmp_path_factory.mktemp("unequal"), np.random.default_rng(0)
    for name, low in (("rare", 128), ("usual", 0)):
        (folder / name).mkdir()
        for number in range(COUNTS[name]):
            pixels = rng.integers(low, low + 128, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.bmp")
    return open_data(str(folder), size=SIZE, crop=None, cache=None, classes="own")


class Perfect(nn.Module):
    """Real images of the requested classes."""

    def __init__(self, data: DataSource, rng: np.random.Generator) -> None:
        super().__init__()
        assert data.labels is not None
        self.data, self.rng, self.numbers = data, rng, data.labels.numbers

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        chosen = [int(self.rng.choice(np.flatnonzero(self.numbers == label))) for label in labels.tolist()]
        return self.data[[(index, False) for index in chosen]].images.float() / 127.5 - 1


def test_a_perfect_generator_scores_as_well_as_real_images(data: DataSource, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(Config(), image_size=SIZE, z_dim=2, eval_samples=len(data), data="unequal")
    monkeypatch.setattr(classifier, "STEPS", 20)
    evaluate = train_celeba.open_evaluator(config, data, torch.device("cpu"), None)
    assert evaluate is not None
    scores = evaluate(Perfect(data, np.random.default_rng(1)), 0)

    class Real(Perfect):
        """Real images, whatever is requested."""

        def forward(self, z: Tensor, labels: Tensor) -> Tensor:
            chosen = self.rng.choice(len(self.data), len(z))
            return self.data[[(int(index), False) for index in chosen]].images.float() / 127.5 - 1

    real = evaluate(Real(data, np.random.default_rng(2)), 0)
    # All are draws from one distribution. With labels of equal shares a score is more than ten times as large.
    for name in ("classifier_distance", "swd"):
        assert scores[name] < 2 * real[name]
        assert scores[name] < 2 * scores[f"{name}_real"]


def test_batch_statistics_are_those_of_the_mix() -> None:
    torch.manual_seed(0)
    generator = SAGANGenerator(SIZE, z_dim=4, base_channels=4, num_classes=2, attention_resolutions=())
    table = next(weight for name, weight in generator.named_parameters() if weight.ndim == 2 and weight.shape[0] == 2)
    with torch.no_grad():
        table[0].add_(5.0)  # the rare class has other features

    def features(counts: list[int]) -> Tensor:
        buffers = recalibrated(generator, counts).named_buffers()
        return torch.cat([buffer for name, buffer in buffers if name.endswith("running_mean")])

    alone, mixed, equal = features([0, 1]), features(list(COUNTS.values())), features([])
    # The rare class is 0.2 % of the mix, of which about a thousand samples have two.
    assert (mixed - alone).norm() < 0.05 * (equal - alone).norm()
