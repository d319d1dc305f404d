"""The digits example, on tiny networks: what a run writes and prints, that labels matter, and its attention."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import generate
import train_digits
from evaluation import classifier
from mnist_files import idx, write
from tiny_runs import assert_same, checkpoint
from torch_sagan import spectral_norms
from training.flags import Config
from training.output.model_card import open_generator
from training.script import read_arguments, resolve_config
from training.state import build_networks

TINY = ["--steps", "2", "--base-channels", "4", "--batch-size", "4", "--device", "cpu", "--no-tensorboard"]
TINY += ["--eval-every", "0"]  # or the shortest run would be evaluated at its end


def config(*arguments: str) -> Config:
    given = read_arguments(Config, [f"@{train_digits.RECIPE}", *arguments], "")
    del given["resume"], given["dry_run"]
    return resolve_config(Config, given, None)


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    """A third of the steps is enough for a classifier that is right on nine of ten digits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "STEPS", 50)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with the recipe's settings, of which nothing was asked."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_digits, "ask", lambda run: None)
        train_digits.main([*TINY, "--out", str(out)])
    return out


@pytest.mark.parametrize("classes", ["own", pytest.param("none", marks=pytest.mark.exhaustive)])
def test_a_run_writes_what_it_names_and_asks(classes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a" / "b"
    assert train_digits.main([*TINY, "--classes", classes, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    named = re.findall(r"^(?:samples|attention|checkpoint|log) +(\S+)$", printed, re.MULTILINE)
    assert len(named) == 4
    assert {Path(file) for file in named} <= set(out.iterdir())

    right = re.findall(
        r"^classifier (.+) % right on 359 real images that it did not learn from$", printed, re.MULTILINE
    )
    assert float(right[0]) > 90
    agreement = re.search(r"^agreement with the requested class: (\d+\.\d) % of 1000 samples$", printed, re.MULTILINE)
    counts = re.search(r"^predictions for 1000 samples: (.+)$", printed, re.MULTILINE)
    assert (agreement is not None) is (classes == "own")
    assert (counts is not None) is (classes == "none")
    if agreement:
        assert float(agreement[1]) < 50  # noise is not taken for the digit that was requested
    if counts:
        assert sum(int(pair.split(": ")[1]) for pair in counts[1].split(", ")) == 1000

    # generate.py opens the checkpoint: a row of the grid for each digit.
    flags = ["--labels", "7,3", "--columns", "4"] if classes == "own" else ["--count", "8", "--columns", "4"]
    assert generate.main([str(out), "--out", str(tmp_path), "--grid", *flags]) == 0
    with Image.open(tmp_path / "grid.png") as grid:
        width, height = 4 * (5 * 28 + 2) + 2, 2 * (5 * 28 + 2) + 2  # tiles of 128 pixels or more
        assert grid.height == height
        assert grid.width > width if classes == "own" else grid.width == width  # rows of classes have names
        assert np.asarray(grid)[3:100, 3:100].std() > 1


def test_the_settings_are_those_of_the_recipe(trained: Path) -> None:
    stored = json.loads((trained / "config.json").read_text())
    assert {"data": "digits", "classes": "own", "architecture": "mnist", "image_size": 28, "noise": 0.3}.items() <= (
        stored.items()
    )
    generator, card = open_generator(trained)
    assert (card["generator"]["architecture"], card["generator"]["image_channels"]) == ("mnist", 1)
    assert isinstance(generator.attention["7"].query[2], nn.BatchNorm2d)
    assert generator.num_classes == 10


@pytest.mark.parametrize(
    "resume",
    ["auto", *(pytest.param(f"runs/earlier{file}", marks=pytest.mark.exhaustive) for file in ("", "/checkpoint.pt"))],
)
def test_a_resumed_run_stays_in_its_folder(resume: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(train_digits, "ask", asked.append)
    monkeypatch.chdir(tmp_path)
    train_digits.main([*TINY, *(() if resume == "auto" else ("--out", "runs/earlier"))])
    folder = asked.pop()
    train_digits.main([*TINY, "--steps", "3", "--resume", resume])
    assert asked == [folder]
    assert checkpoint(folder)["step"] == 3
    assert [path.name for path in Path("runs").iterdir()] == [folder.name]


@pytest.mark.exhaustive  # several runs
def test_nothing_is_asked_of_a_dry_run_or_a_run_that_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_digits, "ask", lambda run: pytest.fail("asked"))
    train_digits.main([*TINY, "--out", str(tmp_path), "--dry-run"])
    (tmp_path / "checkpoint.pt").write_bytes((tmp_path / "dry-run" / "checkpoint.pt").read_bytes())  # an earlier run's
    train_digits.main([*TINY, "--out", str(tmp_path), "--dry-run"])
    monkeypatch.setattr(train_digits.train_celeba, "main", lambda arguments: 130)
    assert train_digits.main([*TINY, "--out", str(tmp_path)]) == 130


def test_mnists_own_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Digit d is a stripe in row 2 d, which a classifier learns from a few images."""
    labels = np.arange(60, dtype=np.uint8) % 10
    images = np.zeros((60, 28, 28), np.uint8)
    images[np.arange(60), 2 * labels] = 255
    folder = tmp_path / "mnist"
    folder.mkdir()
    write(folder, idx(images), idx(labels), pack=True)
    train_digits.main([*TINY, "--data", str(folder), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "classifier 100.0 % right on 12 real images" in printed
    assert "digit" not in printed.replace("digits.txt", "")  # of Fashion-MNIST, whose files have the same names
    assert "agreement with the requested class" in printed
    assert checkpoint(tmp_path / "out")["classes"] == {str(digit): 6 for digit in range(10)}


def test_other_images_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (28, 28)).save(tmp_path / "images" / name / "0.png")
    for data in (str(tmp_path / "images"), "faces"):
        with pytest.raises(SystemExit, match=r"^train_digits\.py: --data .*: expected digits, mnist, .*") as ended:
            train_digits.main([*TINY, "--data", data, "--out", str(tmp_path / "out")])
        assert "\n" not in str(ended.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.exhaustive  # several runs
def test_the_checkpoint_and_the_grid_depend_on_the_seed_alone(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_digits, "ask", lambda run: None)
    for seed in "01":
        train_digits.main([*TINY, "--seed", seed, "--out", str(tmp_path / seed)])
    first, again, other = (out / "samples-000002.png" for out in (trained, tmp_path / "0", tmp_path / "1"))
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()
    assert_same(checkpoint(trained), checkpoint(tmp_path / "0"), apart_from=("/config/out",))


def test_labels_change_the_images() -> None:
    generator, _ = build_networks(config("--base-channels", "4"), image_channels=1, num_classes=10)
    for name, parameter in generator.named_parameters():
        if name.endswith(("norm.gamma", "norm.beta")):
            nn.init.normal_(parameter)  # they start alike for all classes
    generator.eval()
    z = torch.randn(200, generator.z_dim)
    with torch.no_grad():
        threes, again, eights = (generator(z, torch.full((200,), label)) for label in (3, 3, 8))
    assert threes.shape == (200, 1, 28, 28)
    assert torch.equal(threes, again)
    assert (threes - eights).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_training_makes_the_labels_matter(trained: Path) -> None:
    norms = [p for name, p in checkpoint(trained)["generator"].items() if name.endswith("norm.gamma")]
    assert len(norms) == 2
    for gamma in norms:
        assert (gamma - 1).abs().amax(dim=1).count_nonzero() > 1  # classes went their own ways from 1
        assert len(gamma.unique(dim=0)) > 2


@pytest.mark.parametrize("network", [0, 1])
def test_attention_is_the_tutorials(network: int) -> None:
    """128 channels at 7×7, projections of a 4×4 convolution and ReLU in both networks, and batch norm between in G."""
    model = build_networks(config(), image_channels=1, num_classes=10)[network].eval()
    assert list(model.attention) == ["7"]
    layer = model.attention["7"]
    assert layer.channels == 128
    for projection, width in ((layer.query, 16), (layer.key, 16), (layer.value, 128)):
        pad, convolution, *norm, relu = projection
        assert convolution.weight.shape == (width, 128, 4, 4)
        assert [type(layer) for layer in norm] == [nn.BatchNorm2d] * (network == 0)
        assert isinstance(relu, nn.ReLU)
        x = torch.randn(2, 128, 7, 7)
        assert projection(x).shape == (2, width, 7, 7)
        # "same" with an even kernel: one row and column before, two after.
        corner = torch.einsum("bcij,ocij->bo", x[:, :, :3, :3], convolution.weight[:, :, 1:, 1:])
        torch.testing.assert_close(convolution(pad(x))[:, :, 0, 0], corner, atol=1e-4, rtol=1e-4)
    normalized = {name for name in spectral_norms(model) if "attention" in name}
    assert len(normalized) == (0 if network == 0 else 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--data", "nowhere"],
            "--data nowhere: expected digits, mnist, fashion-mnist, kmnist or a folder with MNIST's files",
        ),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--noise", "-1"], "--noise must be at least 0, got -1"),
        (["--noise", "inf"], "--noise must be finite, got inf"),
        (["--lr-g", "nan"], "--lr-g must be at least 0, got nan"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=re.escape(message)) as ended:
        train_digits.main([*TINY, *arguments, "--out", str(tmp_path / "out")])
    assert "\n" not in str(ended.value)
    assert not (tmp_path / "out").exists()
