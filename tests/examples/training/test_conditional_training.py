"""Training with classes: where they come from, that they reach every file of a run, and what is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import generate
from tiny_runs import assert_same, checkpoint, leave_out_images, lines, resume, train
from torch_sagan import SAGANDiscriminator, SpectralNorm, operator_norms, spectral_norms
from training import state as state_module
from training.augmentation import POLICIES
from training.flags import Config, check
from training.objectives import LOSSES
from training.output.model_card import load
from training.script import read_arguments, resolve_config
from training.state import TrainingState
from training.step import Piece

RESNET = ["--architecture", "resnet", "--base-channels", "2", "--g-attention", "8", "--d-attention", "8"]
COUNTS = {"blue": 5, "green": 3, "red": 4}
COLORS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    """Images of one color, in a folder named after it; one beside the folders; one that is cut off."""
    root = tmp_path / "images"
    for name, count in COUNTS.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (16, 16), COLORS[name]).save(root / name / f"{i}.png")
    Image.new("RGB", (16, 16)).save(root / "stray.png")
    return root


@pytest.fixture
def celeba(tmp_path: Path) -> Path:
    """A folder with CelebA's table in it, which has no row for one of its images."""
    root = tmp_path / "celeba"
    root.mkdir()
    rows = []
    for i in range(8):
        Image.new("RGB", (16, 16), (30 * i, 0, 0)).save(root / f"{i:06d}.png")
        rows.append(f"{i:06d}.png {1 if i % 2 else -1} -1 {1 if i >= 6 else -1}")
    (root / "list_attr_celeba.txt").write_text("\n".join(["8", "Smiling Bald Male", *rows]) + "\n")
    Image.new("RGB", (16, 16)).save(root / "new.png")
    return root


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_images(monkeypatch)


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


# ------------------------------------------------------------------------------------------------- classes of folders


def test_a_folder_of_class_folders(animals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train(out, "--data", str(animals), "--classes", "own", *RESNET, "--steps", "2") == 0
    printed, complaints = capsys.readouterr()
    assert re.search(r"^classes   3: blue 5, green 3, red 4$", printed, re.MULTILINE)
    assert re.search(r"^data .*: 12 images at 16 px", printed, re.MULTILINE)
    assert complaints.count("stray.png") == 1
    assert re.search(r"^no class, left out: .*stray\.png$", complaints, re.MULTILINE)

    assert size(out / "samples-000002.png")[1] == 3 * 130 + 2  # a row for each class
    state = checkpoint(out)
    assert state["classes"] == COUNTS
    assert list(state["classes"]) == list(COUNTS)
    assert state["config"]["architecture"] == "resnet"

    export = tmp_path / "alone.safetensors"
    assert generate.main([str(out), "--out", str(tmp_path / "a"), "--export", str(export)]) == 0
    generator, card = load(export)
    assert card["classes"] == COUNTS
    assert generator.num_classes == 3
    assert generate.main([str(export), "--out", str(tmp_path / "b"), "--labels", "RED,0", "--columns", "4"]) == 0
    assert size(tmp_path / "b" / "grid.png")[1] == 2 * 130 + 2


@pytest.mark.usefixtures("no_drawing")
def test_resuming_is_bitwise(animals: Path, tmp_path: Path) -> None:
    settings = ["--data", str(animals), "--classes", "own", *RESNET, "--log-every", "1", "--lr-g", "0.01"]
    settings += ["--loss", "relativistic", "--augment", "color,translation,cutout", "--noise", "0.1"]  # random numbers
    settings += ["--ema-start", "2"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(whole, *settings, "--steps", "3")
    train(halves, *settings, "--steps", "3", "--save-every", "2")
    (halves / "checkpoint-000003.pt").unlink()  # as if it had been killed after step 2
    assert resume(halves) == 0
    assert_same(checkpoint(whole), checkpoint(halves), apart_from=("/config/out", "/config/save_every"))
    one, other = ([line | {"images_per_second": 0} for line in lines(out)] for out in (whole, halves))
    assert one == other


@pytest.mark.usefixtures("no_drawing")
def test_other_classes_are_refused_when_resuming(animals: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(out, "--data", str(animals), "--classes", "own", "--steps", "1")
    before = {path.name for path in out.iterdir()}
    (animals / "red").rename(animals / "yellow")
    with pytest.raises(SystemExit) as ended:
        resume(out, "--steps", "2")
    message = str(ended.value)
    assert "other classes (blue, green, red) than" in message
    assert "(blue, green, yellow)" in message
    assert "\n" not in message
    assert {path.name for path in out.iterdir()} == before
    (animals / "yellow").rename(animals / "red")
    with pytest.raises(SystemExit, match=r"--classes none \(it has own\)"):
        resume(out, "--steps", "2", "--classes", "none")
    assert resume(out, "--steps", "2") == 0


@pytest.mark.usefixtures("no_drawing")
def test_more_images_of_the_same_classes_are_counted_when_resuming(animals: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(out, "--data", str(animals), "--classes", "own", "--steps", "1")
    Image.new("RGB", (16, 16), COLORS["red"]).save(animals / "red" / "new.png")
    resume(out, "--steps", "2")
    assert checkpoint(out)["classes"] == COUNTS | {"red": 5}


def test_a_sample_of_many_classes_is_drawn(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for i in range(40):
        (root / f"{i:02d}").mkdir(parents=True)
        Image.new("RGB", (16, 16), (5 * i, 0, 0)).save(root / f"{i:02d}" / "image.png")
    train(tmp_path / "run", "--data", str(root), "--classes", "own", "--steps", "1")
    assert size(tmp_path / "run" / "samples-000001.png")[1] == 16 * 130 + 2


# ---------------------------------------------------------------------------------------------- classes of attributes


def test_attributes(celeba: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    arguments = ["--data", str(celeba), "--classes", "attributes:Smiling,Male", "--steps", "1"]
    assert train(out, *arguments) == 0
    counts = {"not-Smiling+not-Male": 3, "not-Smiling+Male": 1, "Smiling+not-Male": 3, "Smiling+Male": 1}
    assert checkpoint(out)["classes"] == counts
    assert size(out / "samples-000001.png")[1] == 4 * 130 + 2
    printed, complaints = capsys.readouterr()
    assert "classes   4: not-Smiling+not-Male 3, not-Smiling+Male 1, Smiling+not-Male 3, Smiling+Male 1\n" in printed
    assert re.search(r"^no class, left out: .*new\.png$", complaints, re.MULTILINE)
    # The table may lie elsewhere. It is looked for again when the run is resumed.
    table = (celeba / "list_attr_celeba.txt").rename(tmp_path / "attributes.txt")
    with pytest.raises(SystemExit, match=r"give its path with --attributes$"):
        resume(out, "--steps", "2")
    assert resume(out, "--steps", "2", "--attributes", str(table)) == 0


def spoiled(celeba: Path, text: str) -> None:
    (celeba / "list_attr_celeba.txt").write_text(text)


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "attributes:Grinning"], r"has no attribute Grinning; it has Smiling, Bald, Male"),
        (["--classes", "attributes:Bald"], r"no image has the class Bald"),
        (["--classes", "attributes:Smiling,Smiling"], r"Smiling,Smiling: an attribute is named twice"),
        (["--classes", "attributes:"], r"--classes attributes:: expected none, own, or attributes:"),
        (["--classes", "smiling"], r"--classes smiling: expected none, own, or attributes:"),
        (["--classes", "attributes:Male", "--attributes", "nowhere.txt"], r"nowhere\.txt"),
        (["--attributes", "some.txt"], r"--attributes some\.txt: only --classes attributes:"),
        (["--classes", "own"], r"--data .*celeba: expected two classes or more, found none"),
        (["--data", "digits", "--classes", "attributes:Male"], r"digits has no attributes"),
        (["--data", "digits", "--classes", "Male"], r"--classes Male: expected none, own, or attributes:"),
    ],
)
def test_classes_that_are_not_there_are_one_line(
    arguments: list[str], message: str, celeba: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=message) as ended:
        train(tmp_path / "run", "--data", str(celeba), "--steps", "1", *arguments)
    assert "\n" not in str(ended.value)
    assert str(ended.value).startswith("train_celeba.py: ")
    assert not (tmp_path / "run").exists()


def test_a_table_of_other_images_is_one_line(celeba: Path, tmp_path: Path) -> None:
    spoiled(celeba, "2\nMale\nother-1.png 1\nother-2.png -1\n")
    with pytest.raises(SystemExit, match=r"--data .*celeba: no image has the class not-Male, Male$") as ended:
        train(tmp_path / "run", "--data", str(celeba), "--classes", "attributes:Male", "--steps", "1")
    assert "\n" not in str(ended.value)


@pytest.mark.usefixtures("no_drawing")
def test_images_and_their_labels_reach_the_networks_together(
    animals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flips, batches that reach into the next epoch, and pieces: the color of each real image says its class."""
    seen: list[Piece] = []
    step = state_module.training_step

    def look(gan, batches, **more) -> Tensor:
        def spied() -> Iterator[list[Piece]]:
            for batch in batches:
                seen.extend(batch)
                yield batch

        return step(gan, spied(), **more)

    monkeypatch.setattr(state_module, "training_step", look)
    settings = ["--batch-size", "10", "--grad-accum-steps", "2", "--d-steps", "2", "--steps", "2"]
    train(tmp_path / "run", "--data", str(animals), "--classes", "own", *settings)
    assert len(seen) == 2 * 2 * 2
    colors = torch.tensor([COLORS[name] for name in COUNTS]) / 127.5 - 1
    for piece in seen:
        assert piece.labels is not None
        assert len(piece.real) == len(piece.z) == len(piece.labels) == 5
        torch.testing.assert_close(piece.real[:, :, 8, 8], colors[piece.labels])
    assert len({int(label) for piece in seen for label in piece.labels}) == 3


def test_both_networks_are_told_the_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is requested of G are the classes of the real images, and D is told them for both halves of its batch."""
    asked: dict[str, list[Tensor]] = {"generator": [], "discriminator": []}
    run = state(classes={"a": 1, "b": 1})
    for name, labels in asked.items():
        network = getattr(run, name)
        network.register_forward_pre_hook(lambda _, arguments, labels=labels: labels.append(arguments[1]))
    labels = torch.tensor([1, 0, 0, 1])
    advance(run, labels)
    assert [told.tolist() for told in asked["generator"]] == [labels.tolist()]
    assert [told.tolist() for told in asked["discriminator"]] == [labels.tolist() * 2, labels.tolist()]


# -------------------------------------------------------------------------------------------- what settings reach


def config(*arguments: str) -> Config:
    tiny = ["--image-size", "16", "--base-channels", "2", "--z-dim", "4", "--batch-size", "4"]
    given = read_arguments(Config, [*tiny, *arguments], "")
    del given["resume"], given["dry_run"]
    return resolve_config(Config, given, None)


def state(*arguments: str, classes: dict[str, int] | None = None) -> TrainingState:
    return TrainingState(config(*arguments), classes=classes, device=torch.device("cpu"))


def advance(run: TrainingState, labels: Tensor | None = None) -> Tensor:
    """One step, on mid-gray images."""
    z = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    return run.advance(iter([[Piece(torch.zeros(4, 3, 16, 16), z, labels)]] * 9))


def images_of_d(run: TrainingState) -> list[Tensor]:
    """All images that D gets from now on."""
    seen: list[Tensor] = []
    run.discriminator.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach().clone()))
    return seen


def test_noise_reaches_all_that_d_sees() -> None:
    """In D's step, which has real (zero) and generated images, and in G's step."""
    shown = {}
    for strength in ("0", "0.5"):
        run = state("--noise", strength)
        shown[strength] = images_of_d(run)
        advance(run)
        assert [len(images) for images in shown[strength]] == [8, 4]
    (both, fake), (noisy_both, noisy_fake) = shown.values()
    assert (both[:4] == 0).all()
    for plain, noisy in ((both[:4], noisy_both[:4]), (both[4:], noisy_both[4:]), (fake, noisy_fake)):
        # The same weights and latent vectors; the deviation of 3072 normal numbers is good to 1.3 %.
        assert (noisy - plain).std().item() == pytest.approx(0.5, rel=0.06)


@pytest.mark.parametrize("loss", LOSSES)
def test_augmentation_reaches_all_that_d_sees(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "color", lambda images: images + 100)
    run = state("--augment", "color,translation,cutout", "--loss", loss)
    seen = images_of_d(run)
    advance(run)
    assert len(seen) == {"hinge": 2, "wgan-gp": 3, "relativistic": 5}[loss]
    for images in seen:
        # An eighth of both directions moved out and a quarter cut out at most: 51 % remain, at 99 or more.
        assert (images.mean((1, 2, 3)) > 50).all()
    # And each real and generated one has its square.
    assert ((seen[0] == 0).all(1).flatten(1).sum(1) >= 16).all()


def test_the_relativistic_loss_has_its_penalty() -> None:
    """D's loss is linear in γ, with the default of 1."""
    runs = [state("--loss", "relativistic", *more) for more in ([], *(["--penalty-weight", w] for w in "012"))]
    default, none, one, two = (advance(run)[0].item() for run in runs)
    assert default == one
    assert one > none
    assert two - none == pytest.approx(2 * (one - none), rel=1e-3)  # float32
    # log(1 + exp(fake − real)) of an untrained D, which sees little difference.
    assert none == pytest.approx(math.log(2), abs=0.2)


@pytest.mark.parametrize("loss", LOSSES)
def test_d_has_spectral_norm_except_for_wgan_gp(loss: str) -> None:
    run = state("--loss", loss)
    assert spectral_norms(run.generator)
    assert any(isinstance(part, SpectralNorm) for part in run.discriminator.modules()) is (loss != "wgan-gp")


def test_averaging_starts_where_it_is_told() -> None:
    run = state("--ema-start", "2", "--lr-g", "0.01")
    for step in range(4):
        before = {name: value.clone() for name, value in run.average.named_parameters()}
        advance(run)
        # Update number n of the average keeps (1 + n) / (10 + n) of it; until then it is a copy.
        kept = 0.0 if step < 2 else (1 + step - 2) / (10 + step - 2)
        for name, value in run.generator.named_parameters():
            expected = kept * before[name] + (1 - kept) * value.detach()
            torch.testing.assert_close(dict(run.average.named_parameters())[name], expected)


def test_adams_settings_reach_both_optimizers() -> None:
    run = state("--beta1", "0.5", "--beta2", "0.99", "--lr-g", "0.003", "--lr-d", "0.004")
    for optimizer, lr in ((run.generator_optimizer, 0.003), (run.discriminator_optimizer, 0.004)):
        (group,) = optimizer.param_groups
        assert (group["lr"], group["betas"]) == (lr, (0.5, 0.99))
    other = state("--beta1", "0.2")
    other.load_state_dict(run.state_dict())  # the command line has precedence over the checkpoint
    assert other.generator_optimizer.param_groups[0]["betas"] == (0.2, 0.9)


def test_eps_reaches_every_spectral_norm() -> None:
    for architecture in ("dcgan", "resnet"):
        run = state("--sigma-eps", "1e-4", "--architecture", architecture, classes={"a": 1, "b": 1})
        for network in (run.generator, run.discriminator):
            found = [module.eps for module in network.modules() if isinstance(module, SpectralNorm)]
            assert len(found) == len(spectral_norms(network)) > 0
            assert set(found) == {1e-4}


@pytest.mark.parametrize(
    "architecture", ["dcgan", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("resnet", "mnist"))]
)
def test_the_norm_of_ds_convolutions(architecture: str) -> None:
    """The weights that are normalized are the same; those of convolutions are divided by another norm."""
    classes = {"a": 1, "b": 1}
    runs = [state("--d-norm", of, "--architecture", architecture, classes=classes) for of in ("matrix", "convolution")]
    matrix, convolution = (spectral_norms(run.discriminator).keys() for run in runs)
    assert matrix == convolution
    assert len(runs[0].generator.state_dict()) == len(runs[1].generator.state_dict())
    x, labels = torch.zeros(1, 3, 16, 16), torch.zeros(1, dtype=torch.int64)
    largest = [max(row.lower for row in operator_norms(run.discriminator, (x, labels)).layers) for run in runs]
    # Attention of dcgan is not normalized, and 1×1 convolutions are matrices, warmed up by 15 iterations.
    assert largest[0] > 1.25
    for row in operator_norms(runs[1].discriminator, (x, labels)).layers:
        if row.path.startswith("blocks"):
            assert row.lower <= 1.002, row
    advance(runs[1], torch.zeros(4, dtype=torch.int64))
    other = state("--d-norm", "convolution", "--architecture", architecture, classes=classes)
    other.load_state_dict(runs[1].state_dict())
    torch.testing.assert_close(other.discriminator.state_dict(), runs[1].discriminator.state_dict(), rtol=0, atol=0)


def test_the_norm_of_ds_convolutions_needs_a_norm() -> None:
    with pytest.raises(SystemExit, match="--d-norm convolution: --loss wgan-gp builds D without spectral norm"):
        check(config("--d-norm", "convolution", "--loss", "wgan-gp"), 1)


@pytest.mark.parametrize("synchronized", [True, False])
def test_batch_norm_is_synchronised_unless_told_otherwise(synchronized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[nn.Module] = []
    ranks = type(state_module.SINGLE_PROCESS)
    monkeypatch.setattr(ranks, "synchronized_batch_norm", lambda self, network: asked.append(network) or network)
    run = state(*([] if synchronized else ["--no-sync-batch-norm"]))
    assert len(asked) == int(synchronized)
    assert isinstance(run.discriminator, SAGANDiscriminator)


@pytest.mark.usefixtures("no_drawing")
def test_config_json_has_every_setting(tmp_path: Path) -> None:
    train(tmp_path, "--steps", "1", "--classes", "own", "--beta2", "0.99")
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored == checkpoint(tmp_path)["config"]
    assert stored["beta2"] == 0.99
