"""The recipes: that they parse, and run on data of the form that they are for."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mnist_files
import train_celeba
from evaluation import classifier
from recipe_costs import DATA, RECIPES, read_recipe
from training.flags import check
from training.output.model_card import open_generator

NAMES = sorted(path.stem for path in RECIPES.glob("*.txt"))
# Networks a fraction as wide, so that a step takes a second; nothing else of the recipe changes.
SMALL = ["--base-channels", "2", "--steps", "2", "--batch-size", "4", "--device", "cpu", "--precision", "float32"]
SMALL += ["--eval-samples", "8", "--no-tensorboard"]
NARROW = {"cifar10": ["--g-widths", "2,2,2,2", "--d-widths", "2,2,2,2"]}  # where a recipe gives its widths one by one


@pytest.mark.parametrize("name", NAMES)
def test_the_settings_go_together(name: str) -> None:
    check(read_recipe(RECIPES / f"{name}.txt"), processes=8 if name in ("paper128", "biggan-schedule") else 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Stand-ins of the right form: class folders, CelebA's size, a CIFAR archive, a small folder."""
    rng, tmp_path = np.random.default_rng(0), tmp_path_factory.mktemp("data")

    def image(path: Path, width: int, height: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)

    for label in range(1000):  # ImageNet's number of classes
        image(tmp_path / "imagenet" / f"n{label:08d}" / "0.png", 20, 16)
    for number in range(6):
        image(tmp_path / "celeba" / f"{number:06d}.png", 178, 218)
        image(tmp_path / "small" / f"{number}.png", 70, 80)
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as tar:
        records = b"".join(bytes([label]) + rng.bytes(3072) for label in range(10))
        for name, content in (("data_batch_1.bin", records), ("batches.meta.txt", b"a b c d e f g h i j")):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    labels = np.arange(20, dtype=np.uint8) % 10
    clothes = mnist_files.idx(rng.integers(0, 256, (20, 28, 28), dtype=np.uint8))
    (tmp_path / "clothes").mkdir()
    for part in ("train", "t10k"):
        mnist_files.write(tmp_path / "clothes", clothes, mnist_files.idx(labels), part=part)
    imagenet, celeba = str(tmp_path / "imagenet"), str(tmp_path / "celeba")
    small, cifar = str(tmp_path / "small"), str(tmp_path / "cifar-10-binary.tar.gz")
    return {
        "paper128": imagenet,
        "biggan-schedule": imagenet,
        "celeba64": celeba,
        "small-dataset": small,
        "cifar10": cifar,
        "fashion-mnist": str(tmp_path / "clothes"),
    }


# The others differ from these in settings that have tests of their own, or have the networks of 128 pixels, which take
# seconds even when they are narrow.
OFTEN = ("digits",)


@pytest.mark.slow  # a training of each
@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.exhaustive) for name in NAMES]
)
def test_recipes_run(name: str, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "STEPS", 2)  # of the classifier that judges the run at its end
    given = ["--data", data[name]] if name in data else []
    out = tmp_path / "run"
    if "--decay-from" in (RECIPES / f"{name}.txt").read_text(encoding="utf-8"):
        given += ["--decay-from", "1"]  # a step of the short run
    arguments = [
        f"@{RECIPES / name}.txt",
        *given,
        *SMALL,
        *NARROW.get(name, []),
        "--out",
        str(out),
        "--num-workers",
        "0",
    ]
    assert train_celeba.main(arguments) == 0
    generator, card = open_generator(out)
    assert generator.num_classes == (DATA[name].classes or None)
    assert card["steps"] == 2
