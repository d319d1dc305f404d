"""Images from a trained generator: one command gives the same bytes, and errors are clear."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import generate
import train_celeba
from evaluation import classifier, evaluator
from generators import ANIMALS, checkpoint, shaken
from tiny_runs import leave_out_images, train
from training.average import recalibrated
from training.latents import draw_latents
from training.output import model_card, sampling
from training.output.image_io import row_names, save_grid
from training.state import TrainingState


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of the trainer."""
    out = tmp_path_factory.mktemp("run")
    assert train(out, "--classes", "own", "--steps", "1", "--eval-every", "0") == 0
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model") / "run" / "checkpoint.pt", shaken())


def run(model: Path, out: Path, *arguments: str) -> dict[str, bytes]:
    assert generate.main([str(model), "--out", str(out), *arguments]) == 0
    return {path.name: path.read_bytes() for path in out.glob("*.*")}


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def pixels(path: Path) -> torch.Tensor:
    """An image as the generator makes it, (3, H, W) in [-1, 1], but for the rounding to bytes."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def difference(one: Path, other: Path) -> int:
    """The largest difference between the pixels of two images of the same size."""
    with Image.open(one) as a, Image.open(other) as b:
        assert a.size == b.size
        return int(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max())


def assert_shows(folder: Path, images: torch.Tensor) -> None:
    for i, image in enumerate(images):
        # Half a gray value of 255 by rounding, and half again, because another batch size may round otherwise.
        torch.testing.assert_close(pixels(folder / f"{i:06d}.png"), image.expand(3, -1, -1), rtol=0, atol=1 / 127.5)


# --- images ----------------------------------------------------------------------------------------------------------

EVERYTHING = ["--grid", "--images", "--interpolate", "--video", "gif", "--count", "5", "--frames", "3"]


def test_the_same_command_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    first = run(model, tmp_path / "a", *EVERYTHING, "--seed", "3", "--truncation", "0.8")
    torch.rand(5)
    assert run(model, tmp_path / "b", *EVERYTHING, "--seed", "3", "--truncation", "0.8") == first
    assert set(first) == {"grid.png", "interpolation.png", "walk.gif"} | {f"{i:06d}.png" for i in range(5)}
    for other in (["--seed", "4", "--truncation", "0.8"], ["--seed", "3", "--truncation", "0.3"]):
        different = run(model, tmp_path / "c", *EVERYTHING, *other)
        assert all(different[name] != first[name] for name in first)


def test_images_are_those_of_the_averaged_generator_recalibrated(tmp_path: Path) -> None:
    average = shaken()
    with torch.no_grad():
        average.to_image.bias.add_(0.5)
        average.blocks[0].conv.weight.add_(0.1)  # its sigma and batch statistics are now those of other weights
    path = checkpoint(tmp_path / "checkpoint.pt", shaken(), average)
    z = draw_latents(3, 8, torch.Generator().manual_seed(0))
    run(path, tmp_path / "average", "--images", "--count", "3")
    assert_shows(tmp_path / "average", recalibrated(average).eval()(z))
    run(path, tmp_path / "last", "--images", "--count", "3", "--no-ema")
    assert_shows(tmp_path / "last", shaken().eval()(z))
    # The test would see it if nothing were recalibrated.
    assert (recalibrated(average).eval()(z) - average.eval()(z)).abs().max() > 0.05


def test_the_generator_that_is_opened_is_the_one_that_the_trainer_draws_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn_with: list[dict[str, torch.Tensor]] = []

    def spy(state: TrainingState, out: Path) -> dict[str, Path]:
        drawn_with.append(recalibrated(state.average, list(state.classes.values())).state_dict())
        return draw(state, out)

    draw = sampling.draw
    monkeypatch.setattr(train_celeba, "draw", spy)
    train(tmp_path, "--classes", "own", "--steps", "2", "--lr-g", "0.01", "--sigma-eps", "1e-8", "--eval-every", "0")
    generator, _ = model_card.open_generator(tmp_path)
    assert not generator.training
    for name, tensor in generator.state_dict().items():
        torch.testing.assert_close(tensor, drawn_with[-1][name], rtol=0, atol=0)
    # And so are the samples: a row per class, the same latent vectors in each.
    z = torch.randn(64, 8, generator=torch.Generator().manual_seed(2))[:8]
    images = generator(z.repeat(10, 1), torch.arange(10).repeat_interleave(8))  # (80, 1, 16, 16)
    save_grid(tmp_path / "expected.png", images.detach(), columns=8, rows=list("0123456789"))
    assert difference(tmp_path / "expected.png", tmp_path / "samples-000002.png") <= 1  # other batches round otherwise


def test_a_grid_when_nothing_else_is_asked_for(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(run(model, tmp_path / "out", "--count", "4", "--columns", "2")) == {"grid.png"}
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "grid.png")
    width, height = size(tmp_path / "out" / "grid.png")
    assert width == height == 2 * 128 + 3 * 2


@pytest.mark.parametrize("name", ["", "checkpoint.pt", "checkpoint-000012.pt", "best.pt"])
def test_images_of_a_run_go_into_its_folder(name: str, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "faces" / (name or "checkpoint.pt"), shaken())
    assert model_card.output_folder(model if name else model.parent) == tmp_path / "faces" / "generated"


def test_a_damaged_checkpoint_is_passed_over_as_by_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The newest that can be read; where none can, the error names the oldest."""
    old, new = (checkpoint(tmp_path / "run" / f"checkpoint-{step:06d}.pt", shaken()) for step in (9, 1000))
    new.write_bytes(new.read_bytes()[:1000])
    assert generate.main([str(tmp_path / "run"), "--count", "1"]) == 0
    assert f"{new}: it cannot be read as a checkpoint; trying the one before" in capsys.readouterr().err
    old.write_bytes(b"")
    with pytest.raises(SystemExit, match=rf"generate\.py: {re.escape(str(old))}: it cannot be read as a checkpoint"):
        generate.main([str(tmp_path / "run"), "--count", "1"])


def test_images_of_a_generator_without_a_run_go_into_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert generate.main([str(checkpoint(Path("other.pt"), shaken())), "--count", "1"]) == 0
    assert generate.main(["other.pt", "--export", "exported.safetensors"]) == 0
    grid = Path("runs/generated/grid.png")
    grid.unlink()
    assert generate.main(["exported.safetensors", "--count", "1"]) == 0
    assert grid.exists()
    assert not Path("generated").exists()


def test_a_run_leaves_the_images_generated_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_images(monkeypatch)
    grid = tmp_path / "generated" / "grid.png"
    train(tmp_path, "--steps", "1")
    assert generate.main([str(tmp_path), "--count", "1"]) == 0
    before = grid.read_bytes()
    train(tmp_path, "--resume", "auto", "--steps", "2")
    train(tmp_path, "--steps", "1")  # moves the files of the earlier run
    assert grid.read_bytes() == before
    assert (tmp_path / "earlier-1" / "checkpoint.pt").is_symlink()
    assert not (tmp_path / "earlier-1" / "generated").exists()


def test_a_strip_has_a_row_for_each_way_and_shares_its_ends(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path, "--interpolate", "--stops", "3", "--frames", "4")
    assert size(tmp_path / "interpolation.png") == (5 * 130 + 2, 2 * 130 + 2)
    with Image.open(tmp_path / "interpolation.png") as strip:
        end, begin = strip.crop((4 * 130 + 2, 2, 5 * 130, 130)), strip.crop((2, 132, 130, 260))
        first = strip.crop((2, 2, 130, 130))
    # Rounding differs between positions in a batch.
    assert max(abs(a - b) for a, b in zip(end.tobytes(), begin.tobytes(), strict=True)) <= 1
    assert max(abs(a - b) for a, b in zip(end.tobytes(), first.tobytes(), strict=True)) > 20


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_a_video_goes_in_a_circle(kind: str, model: Path, tmp_path: Path) -> None:
    run(model, tmp_path, "--video", kind, "--stops", "3", "--frames", "4", "--fps", "10")
    with Image.open(tmp_path / f"walk.{kind}") as video:
        assert video.n_frames == 3 * 4
        assert video.size == (128, 128)
        assert video.info["loop"] == 0
        video.seek(1)
        video.load()
        assert video.info["duration"] == 100


@pytest.mark.parametrize("kind", ["gif", "webp"])
@pytest.mark.parametrize(("fps", "milliseconds"), [("0.01", 100_000), ("100", 10)])
def test_the_slowest_and_the_fastest_video(fps: str, milliseconds: int, kind: str, model: Path, tmp_path: Path) -> None:
    run(model, tmp_path, "--video", kind, "--stops", "2", "--frames", "1", "--fps", fps)
    with Image.open(tmp_path / f"walk.{kind}") as video:
        video.seek(1)
        video.load()
        assert video.info["duration"] == milliseconds


def test_an_image_that_cannot_be_finished_leaves_the_old_one(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run(model, tmp_path, "--video", "webp", "--grid", "--images", "--count", "2", "--frames", "1")

    def half(image: Image.Image, file: object, **_: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        sys.exit("killed")

    monkeypatch.setattr(Image.Image, "save", half)
    for flag in (["--video", "webp"], ["--grid"], ["--images"]):
        with pytest.raises(SystemExit, match=r"^killed$"):
            generate.main([str(model), "--out", str(tmp_path), *flag, "--seed", "1"])
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*")} == before


def test_gray_images(trained: Path, tmp_path: Path) -> None:
    files = run(trained, tmp_path, *EVERYTHING)
    assert len(files) == 3 + 5
    with Image.open(tmp_path / "000000.png") as image:
        red, green, blue = image.split()
        assert red.tobytes() == green.tobytes() == blue.tobytes()


# --- classes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def animals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("animals") / "checkpoint.pt", shaken(num_classes=3))


@pytest.mark.parametrize(
    ("flags", "classes"),
    [([], [0, 1, 2, 0]), (["--labels", "3,dog"], [2, 1, 2, 1]), (["--labels", "Dog,0"], [1, 0, 1, 0])],
)
def test_labels_are_names_or_numbers_and_taken_in_turn(
    flags: list[str], classes: list[int], animals: Path, tmp_path: Path
) -> None:
    run(animals, tmp_path / "out", "--images", "--count", "4", *flags)
    generator = recalibrated(shaken(num_classes=3), list(ANIMALS.values())).eval()
    assert_shows(
        tmp_path / "out", generator(draw_latents(4, 8, torch.Generator().manual_seed(0)), torch.tensor(classes))
    )


def test_a_grid_has_a_row_for_each_class_with_its_name_and_a_column_for_each_latent_vector(
    animals: Path, tmp_path: Path
) -> None:
    generator = recalibrated(shaken(num_classes=3), list(ANIMALS.values())).eval()
    z = draw_latents(4, 8, torch.Generator().manual_seed(0))
    names = list(ANIMALS)
    for flags, rows in (([], [0, 1, 2]), (["--labels", "dog,cat"], [1, 0])):
        run(animals, tmp_path, "--grid", "--columns", "4", *flags)
        images = generator(z.repeat(len(rows), 1), torch.tensor(rows).repeat_interleave(4)).detach()
        save_grid(tmp_path / "expected.png", images, columns=4, rows=[names[row] for row in rows])
        assert row_names(tmp_path / "grid.png") == [names[row] for row in rows]
        assert size(tmp_path / "grid.png")[1] == len(rows) * 130 + 2
        assert difference(tmp_path / "expected.png", tmp_path / "grid.png") <= 1  # other batches may round otherwise


def test_a_grid_of_many_classes_shows_some_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "ROWS", 2)
    animals = checkpoint(tmp_path / "checkpoint.pt", shaken(num_classes=3))
    run(animals, tmp_path, "--grid", "--columns", "4")
    assert row_names(tmp_path / "grid.png") == ["cat", "3"]
    run(animals, tmp_path, "--grid", "--columns", "4", "--labels", "0,1,2")  # those named are all there
    assert row_names(tmp_path / "grid.png") == ["cat", "dog", "3"]


def test_a_walk_stays_in_the_first_class(animals: Path, tmp_path: Path) -> None:
    flags = ["--interpolate", "--video", "gif", "--frames", "2"]
    one, other, both = (run(animals, tmp_path / labels, *flags, "--labels", labels) for labels in ("0", "1", "0,1"))
    assert one == both
    assert all(one[name] != other[name] for name in ("interpolation.png", "walk.gif"))


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "crop"), [([], 40), (["--crop", "0"], 0), (["--crop", "auto"], None)])
def test_real_images_are_cropped_as_those_of_the_run_unless_told_otherwise(
    flags: list[str], crop: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def open_data(*_: object, **settings: object) -> None:
        asked.append(settings["crop"])
        raise ValueError("seen")

    monkeypatch.setattr(generate, "open_data", open_data)
    path = checkpoint(tmp_path / "checkpoint.pt", shaken(), crop="40")
    with pytest.raises(SystemExit, match="seen"):
        run(path, tmp_path, "--score", "images", *flags)
    assert asked == [crop]


def test_scores_go_into_the_card(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifier, "STEPS", 4)
    flags = ["--score", "digits", "--samples", "20", "--export", str(tmp_path / "digits.safetensors")]
    generate.main([str(trained), "--out", str(tmp_path), *flags])
    scores = json.loads((tmp_path / "digits.json").read_text())["scores"]
    assert scores["data"] == "digits"
    assert scores["images"] == 20
    assert scores["swd"] > 0
    assert 0 <= scores["agreement"] <= 1
    printed = capsys.readouterr().out
    for name in ("classifier_distance", "classifier_precision", "classifier_recall", "agreement", "swd"):
        assert f"{name} {scores[name]} (real {scores[name + '_real']})" in printed
    assert "agreement_class_3" in scores
    assert "scored    20 images of each kind, against training images" in printed
    assert "% right on 359 real images that it did not learn from" in printed
    # Beside the folder of the run, where the trainer keeps such files too.
    assert [path.name.partition("-")[0] for path in (trained.parent / "cache").iterdir()] == ["classifier"]


@pytest.mark.parametrize(
    ("model", "folder"),
    [("runs/faces", "runs/cache"), ("runs/faces/checkpoint.pt", "runs/cache"), ("x/faces.safetensors", "runs/cache"),
     ("/far/faces", "/far/cache"), (".", "../cache")],
)  # fmt: skip
def test_classifiers_are_kept_beside_the_run(
    model: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "faces").mkdir(parents=True)
    model_folder = Path(model)
    if model == "/far/faces":
        model_folder, folder = tmp_path / "far" / "faces", str(tmp_path / "far" / "cache")
        model_folder.mkdir(parents=True)
    assert generate.cache_folder(model_folder) == Path(folder).resolve()


def test_agreement_is_with_the_classes_that_are_requested(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each class of this generator is a uniform gray, and this classifier knows the gray of each."""
    _, card = model_card.open_generator(trained)
    requested: list[int] = []

    class Grays(torch.nn.Module):
        z_dim, num_classes = 8, 10

        def forward(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            requested.extend(labels.tolist())
            return (labels / 10 - 0.5).view(-1, 1, 1, 1).expand(-1, 1, 16, 16)

    class Knows(classifier.Classifier):
        def __init__(self) -> None:
            super().__init__(classifier.Network(16, 1, 10), 1.0, 1.0, 9, [1.0] * 10)

        def __call__(self, images: torch.Tensor) -> classifier.Classified:
            grays = images[:, 0, 0, 0].float()
            return classifier.Classified(grays[:, None].expand(-1, 2), ((grays / 127.5 - 0.5) * 10).round().long())

    monkeypatch.setattr(generate, "open_generator", lambda *_, **__: (Grays(), card))
    monkeypatch.setattr(evaluator, "open_classifier", lambda *_: Knows())
    flags = ["--out", str(tmp_path), "--score", "digits", "--samples", "30", "--labels", "7,3"]
    score = generate.score
    scores: list[model_card.Card] = []
    monkeypatch.setattr(generate, "score", lambda *args: scores.append(score(*args)) or scores[-1])
    generate.main([str(trained), *flags])
    assert scores[0]["agreement"] == 1
    assert set(requested) == {3, 7}
    requested.clear()
    generate.main([str(trained), *flags, "--classes", "none"])
    assert "agreement" not in scores[1]


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the cases below name."""
    tmp = tmp_path_factory.mktemp("made")
    for folder in ("empty", "device"):
        (tmp / folder).mkdir()
    (tmp / "device" / "grid.png").symlink_to("/dev/null")
    (tmp / "file").write_text("hello")
    torch.save({"weights": torch.zeros(1)}, tmp / "other.pt")
    broken = shaken()
    torch.nn.init.constant_(broken.to_image.bias, math.nan)
    made = {
        "model": checkpoint(tmp / "run" / "checkpoint.pt", shaken()),
        "classes": checkpoint(tmp / "classes.pt", shaken(num_classes=3)),
        "diverged": checkpoint(tmp / "diverged.pt", broken),
        "good": tmp / "good.safetensors",
        "tmp": tmp,
    }
    model_card.save(*model_card.from_checkpoint(made["model"]), made["good"])
    return made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.pt"], r"nowhere\.pt: no such file"),
        (["nowhere.safetensors"], r"nowhere\.safetensors: no such file"),
        (["{tmp}/empty"], r"empty: no checkpoint in this folder"),
        (["{tmp}/file"], r"file: it cannot be read as a checkpoint"),
        (["{tmp}/other.pt"], r"other\.pt: it is not a checkpoint of this trainer"),
        (["{diverged}"], r"the generator's images hold infinities or NaN: its training has diverged"),
        (["{model}", "--export", "{tmp}/model.pt"], r"model\.pt: expected a name that ends in \.safetensors"),
        (["{model}", "--count", "0"], r"--count must be at least 1, got 0"),
        (["{model}", "--interpolate", "--stops", "1"], r"--stops must be at least 2, got 1"),
        (["{model}", "--truncation", "0"], r"--truncation must be above 0, got 0"),
        (["{model}", "--crop", "-1"], r"--crop -1: expected auto, pad, or a number of pixels"),
        (["{model}", "--seed", str(2**63)], r"--seed must be from 0 .*got 9223372036854775808"),
        (["{model}", "--truncation", "nan"], r"--truncation must be above 0, got nan"),
        (["{model}", "--video", "webp", "--fps", "1e-9"], r"--fps must be from 0\.01 to 100, got 1e-09"),
        (["{model}", "--video", "gif", "--fps", "nan"], r"--fps must be from 0\.01 to 100, got nan"),
        (["{model}", "--labels", "1"], r"--labels: this generator has no classes"),
        (["{model}", "--labels", ""], r"--labels: this generator has no classes"),
        (
            ["{classes}", "--labels", "1,4"],
            r"--labels 1,4: expected classes \(cat, dog, 3; or numbers from 0 to 2\), got '4'",
        ),
        (["{classes}", "--labels", "horse"], r"--labels horse: expected classes .*got 'horse'"),
        (["{model}", "--classes", "own"], r"--classes, --attributes, --crop and --against: without --score"),
        (["{model}", "--crop", "0"], r"--crop and --against: without --score"),
        (["{model}", "--against", "training"], r"--crop and --against: without --score"),
        (["{model}", "--score", "digits", "--classes", "own"], r"--classes own: this generator has no classes"),
        (["{classes}", "--score", "digits"], r"--score digits: its classes \(0, 1, .*\) are not .*\(cat, dog, 3\)"),
        (["{model}", "--attention"], r"unrecognized arguments: --attention"),
        (["{model}", "--device", "toaster"], r"toaster"),
        (["{model}", "--score", "nowhere"], r"--score nowhere: no such folder"),
        (["{model}", "--colour"], r"unrecognized arguments: --colour"),
        (["{good}", "--no-ema"], r"--no-ema: an exported generator has only the weights that were exported"),
        (["{model}", "--out", "{tmp}/file/pictures"], r"file"),
        (["{model}", "--count", "1", "--out", "{tmp}/device"], r"cannot save .*grid\.png: .*found a character device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line(arguments: list[str], message: str, made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message) as error:
        generate.main(["--out", str(tmp_path / "out"), *(argument.format(**made) for argument in arguments)])
    assert "\n" not in str(error.value)
    assert error.value.code not in (0, None)


def test_help_is_in_groups_and_says_what_classes_are_called(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        generate.main(["--help"])
    text = capsys.readouterr().out
    for part in ("generator:", "what is generated:", "what is written:", "scores:", "(default: 64)", "cat,dog or 0,3"):
        assert part in text
