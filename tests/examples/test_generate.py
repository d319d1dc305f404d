"""Images from a trained generator, and the generator alone: one command gives the same bytes, and errors are clear."""

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

import average_drift
import generate
import train_celeba
from tiny_runs import train
from torch_sagan import SAGANGenerator, spectral_norms
from training.average import recalibrated
from training.latents import draw_latents, slerp, walk
from training.output import model_card, sampling
from training.output.image_io import save_grid
from training.runs import checkpointing

ANIMALS = {"cat": 20, "dog": 30, "3": 50}  # the last class has a number for a name
TINY = {"image_size": 16, "z_dim": 8, "base_channels": 4, "attention_resolutions": [4, 8]}


def shaken(**more: object) -> SAGANGenerator:
    """A generator with gammas, statistics and norms that differ from the initial ones."""
    torch.manual_seed(1)
    generator = SAGANGenerator(**(TINY | more))
    for _ in range(3):
        labels = None if generator.num_classes is None else torch.arange(8) % generator.num_classes
        generator(torch.randn(8, 8), labels)
    with torch.no_grad():
        for layer in generator.attention.values():
            layer.gamma.fill_(0.7)
        for name, table in generator.named_parameters():
            if name.startswith("blocks.") and name.endswith((".gamma", ".beta")):
                table.normal_(0.5)  # new classes are all alike
        for weight in generator.to_image.parameters():
            weight.mul_(5)  # untrained images are nearly grey
    return generator


def checkpoint(
    path: Path,
    generator: SAGANGenerator,
    average: SAGANGenerator | None = None,
    *,
    architecture: str = "dcgan",
    crop: str = "auto",
) -> Path:
    """A checkpoint as far as the trainer's has to do with its generator."""
    config = {"image_size": 16, "z_dim": 8, "base_channels": 4, "data": "/home/somebody/faces", "g_attention": "auto"}
    state = {
        "config": config | {"architecture": architecture, "crop": crop},
        "classes": {} if generator.num_classes is None else ANIMALS,
        "scores": {"swd": 12.34567},
        "generator": generator.state_dict(),
        "average": (average or generator).state_dict(),
        "step": 12,
        "images": 48,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of the trainer."""
    out = tmp_path_factory.mktemp("run")
    assert train(out, "--classes", "own", "--steps", "2", "--lr-g", "0.01", "--eval-every", "0") == 0
    return out


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "run" / "checkpoint.pt", shaken())


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


def assert_shows(folder: Path, images: torch.Tensor) -> None:
    for i, image in enumerate(images):
        # Half a grey value of 255 by rounding, and half again, because another batch size may round otherwise.
        torch.testing.assert_close(pixels(folder / f"{i:06d}.png"), image.expand(3, -1, -1), rtol=0, atol=1 / 127.5)


# ------------------------------------------------------------------------------------------------------------ images


EVERYTHING = ["--grid", "--images", "--interpolate", "--video", "gif", "--count", "5", "--frames", "3"]


def test_the_same_command_gives_the_same_bytes(model, tmp_path):
    first = run(model, tmp_path / "a", *EVERYTHING, "--seed", "3", "--truncation", "0.8")
    torch.rand(5)
    assert run(model, tmp_path / "b", *EVERYTHING, "--seed", "3", "--truncation", "0.8") == first
    assert set(first) == {"grid.png", "interpolation.png", "walk.gif"} | {f"{i:06d}.png" for i in range(5)}
    for other in (["--seed", "4", "--truncation", "0.8"], ["--seed", "3"], ["--seed", "3", "--truncation", "0.3"]):
        different = run(model, tmp_path / "c", *EVERYTHING, *other)
        assert all(different[name] != first[name] for name in first)


def test_images_are_those_of_the_averaged_generator_recalibrated(tmp_path):
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


def test_the_generator_that_is_opened_is_the_one_that_the_trainer_draws_with(tmp_path, monkeypatch):
    drawn_with = []

    def spy(state, out):
        drawn_with.append(recalibrated(state.average).state_dict())
        return draw(state, out)

    draw = sampling.draw
    monkeypatch.setattr(train_celeba, "draw", spy)
    train(tmp_path, "--classes", "own", "--steps", "3", "--lr-g", "0.01", "--sigma-eps", "1e-8", "--eval-every", "0")
    generator, _ = model_card.open_generator(tmp_path)
    assert not generator.training
    for name, tensor in generator.state_dict().items():
        torch.testing.assert_close(tensor, drawn_with[-1][name], rtol=0, atol=0)
    # And so are the samples: a row per class, the same latent vectors in each.
    z = torch.randn(64, 8, generator=torch.Generator().manual_seed(2))[:8]
    images = generator(z.repeat(10, 1), torch.arange(10).repeat_interleave(8))  # (80, 1, 16, 16)
    save_grid(tmp_path / "expected.png", images.detach(), columns=8)
    with Image.open(tmp_path / "expected.png") as one, Image.open(tmp_path / "samples-000003.png") as other:
        difference = np.abs(np.asarray(one).astype(int) - np.asarray(other))
    assert difference.max() <= 1  # the trainer's batches are smaller, and round otherwise


def test_a_grid_when_nothing_else_is_asked_for(model, tmp_path, capsys):
    assert set(run(model, tmp_path / "out", "--count", "4", "--columns", "2")) == {"grid.png"}
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "grid.png")
    width, height = size(tmp_path / "out" / "grid.png")
    assert width == height == 2 * 128 + 3 * 2


@pytest.mark.parametrize("name", ["", "checkpoint.pt", "checkpoint-000012.pt", "best.pt"])
def test_images_of_a_run_go_into_its_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint(Path("faces", name or "checkpoint.pt"), shaken())
    assert generate.main([str(Path("faces", name)), "--count", "1"]) == 0
    assert Path("faces/generated/grid.png").exists()
    assert not Path("runs").exists()


def test_a_damaged_checkpoint_is_passed_over_as_by_resume(tmp_path, capsys):
    """The newest that can be read; where none can, the error names the oldest."""
    old, new = (checkpoint(tmp_path / "run" / f"checkpoint-{step:06d}.pt", shaken()) for step in (9, 1000))
    new.write_bytes(new.read_bytes()[:1000])
    assert generate.main([str(tmp_path / "run"), "--count", "1"]) == 0
    assert f"{new}: it cannot be read as a checkpoint; trying the one before" in capsys.readouterr().err
    old.write_bytes(b"")
    with pytest.raises(SystemExit, match=rf"generate\.py: {re.escape(str(old))}: it cannot be read as a checkpoint"):
        generate.main([str(tmp_path / "run"), "--count", "1"])


def test_images_of_a_generator_without_a_run_go_into_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert generate.main([str(checkpoint(Path("other.pt"), shaken())), "--count", "1"]) == 0
    assert generate.main(["other.pt", "--export", "exported.safetensors"]) == 0
    grid = Path("runs/generated/grid.png")
    grid.unlink()
    assert generate.main(["exported.safetensors", "--count", "1"]) == 0
    assert grid.exists()
    assert not Path("generated").exists()


def test_a_run_leaves_the_images_generated_from_it(tmp_path):
    grid = tmp_path / "generated" / "grid.png"
    train(tmp_path, "--steps", "1")
    assert generate.main([str(tmp_path), "--count", "1"]) == 0
    before = grid.read_bytes()
    train(tmp_path, "--resume", "auto", "--steps", "2")
    train(tmp_path, "--steps", "1")  # moves the files of the earlier run
    assert grid.read_bytes() == before
    assert (tmp_path / "earlier-1" / "checkpoint.pt").is_symlink()
    assert not (tmp_path / "earlier-1" / "generated").exists()


def test_a_strip_has_a_row_for_each_way_and_shares_its_ends(model, tmp_path):
    run(model, tmp_path, "--interpolate", "--stops", "3", "--frames", "4")
    assert size(tmp_path / "interpolation.png") == (5 * 130 + 2, 2 * 130 + 2)
    with Image.open(tmp_path / "interpolation.png") as strip:
        end, begin = strip.crop((4 * 130 + 2, 2, 5 * 130, 130)), strip.crop((2, 132, 130, 260))
        first = strip.crop((2, 2, 130, 130))
    # Rounding differs between positions in a batch.
    assert max(abs(a - b) for a, b in zip(end.tobytes(), begin.tobytes(), strict=True)) <= 1
    assert max(abs(a - b) for a, b in zip(end.tobytes(), first.tobytes(), strict=True)) > 20


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_a_video_goes_in_a_circle(kind, model, tmp_path):
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
def test_the_slowest_and_the_fastest_video(fps, milliseconds, kind, model, tmp_path):
    run(model, tmp_path, "--video", kind, "--stops", "2", "--frames", "1", "--fps", fps)
    with Image.open(tmp_path / f"walk.{kind}") as video:
        video.seek(1)
        video.load()
        assert video.info["duration"] == milliseconds


def test_an_image_that_cannot_be_finished_leaves_the_old_one(model, tmp_path, monkeypatch):
    before = run(model, tmp_path, "--video", "webp", "--grid", "--images", "--count", "2", "--frames", "1")

    def half(image: Image.Image, file: object, **_: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        sys.exit("killed")

    monkeypatch.setattr(Image.Image, "save", half)
    for flag in (["--video", "webp"], ["--grid"], ["--images"]):
        with pytest.raises(SystemExit, match=r"^killed$"):
            generate.main([str(model), "--out", str(tmp_path), *flag, "--seed", "1"])
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*")} == before


def test_gray_images(trained, tmp_path):
    files = run(trained, tmp_path, *EVERYTHING)
    assert len(files) == 3 + 5
    with Image.open(tmp_path / "000000.png") as image:
        red, green, blue = image.split()
        assert red.tobytes() == green.tobytes() == blue.tobytes()


# ----------------------------------------------------------------------------------------------------------- classes


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "animals" / "checkpoint.pt", shaken(num_classes=3))


@pytest.mark.parametrize(
    ("flags", "classes"),
    [([], [0, 1, 2, 0]), (["--labels", "3,dog"], [2, 1, 2, 1]), (["--labels", "Dog,0"], [1, 0, 1, 0])],
)
def test_labels_are_names_or_numbers_and_taken_in_turn(flags, classes, animals, tmp_path):
    run(animals, tmp_path / "out", "--images", "--count", "4", *flags)
    generator = recalibrated(shaken(num_classes=3)).eval()
    assert_shows(
        tmp_path / "out", generator(draw_latents(4, 8, torch.Generator().manual_seed(0)), torch.tensor(classes))
    )


def test_a_grid_has_a_row_for_each_class_and_a_column_for_each_latent_vector(animals, tmp_path):
    generator = recalibrated(shaken(num_classes=3)).eval()
    z = draw_latents(4, 8, torch.Generator().manual_seed(0))
    for flags, rows in (([], [0, 1, 2]), (["--labels", "dog,cat"], [1, 0])):
        run(animals, tmp_path, "--grid", "--columns", "4", *flags)
        images = generator(z.repeat(len(rows), 1), torch.tensor(rows).repeat_interleave(4)).detach()
        save_grid(tmp_path / "expected.png", images, columns=4)
        with Image.open(tmp_path / "expected.png") as one, Image.open(tmp_path / "grid.png") as other:
            assert one.size == other.size == (4 * 130 + 2, len(rows) * 130 + 2)
            difference = np.abs(np.asarray(one).astype(int) - np.asarray(other))
        assert difference.max() <= 1  # other batches may round otherwise


def test_a_grid_of_many_classes_shows_some_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "ROWS", 2)
    animals = checkpoint(tmp_path / "checkpoint.pt", shaken(num_classes=3))
    run(animals, tmp_path, "--grid", "--columns", "4")
    assert size(tmp_path / "grid.png") == (4 * 130 + 2, 2 * 130 + 2)
    run(animals, tmp_path, "--grid", "--columns", "4", "--labels", "0,1,2")  # those named are all there
    assert size(tmp_path / "grid.png") == (4 * 130 + 2, 3 * 130 + 2)


def test_a_walk_stays_in_the_first_class(animals, tmp_path):
    flags = ["--interpolate", "--video", "gif", "--frames", "2"]
    one, other, both = (run(animals, tmp_path / labels, *flags, "--labels", labels) for labels in ("0", "1", "0,1"))
    assert one == both
    assert all(one[name] != other[name] for name in ("interpolation.png", "walk.gif"))


# --------------------------------------------------------------------------------------------------- latent vectors


def test_latents_do_not_depend_on_how_many_follow():
    few, many = (draw_latents(n, 100, torch.Generator().manual_seed(5)) for n in (2, 7))
    assert torch.equal(few, many[:2])
    assert abs(draw_latents(400, 100, torch.Generator().manual_seed(0)).std() - 1) < 0.02


@pytest.mark.parametrize("bound", [0.05, 0.5, 1.5])
def test_truncation_is_the_normal_between_the_bounds(bound):
    z = draw_latents(400, 100, torch.Generator().manual_seed(0), bound)
    assert z.abs().max() <= bound
    # The variance of the truncated normal: 1 − 2 t φ(t) / (2 Φ(t) − 1), from 40 000 draws.
    density = math.exp(-(bound**2) / 2) / math.sqrt(2 * math.pi)
    variance = 1 - 2 * bound * density / math.erf(bound / math.sqrt(2))
    assert z.var().item() == pytest.approx(variance, rel=0.03)


def test_slerp_follows_the_arc():
    a, b = torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 0.0])
    share = torch.tensor([0.0, 1 / 3, 0.5, 1.0])
    expected = [[2 * math.cos(t * math.pi / 2), 2 * math.sin(t * math.pi / 2), 0] for t in share.tolist()]
    torch.testing.assert_close(slerp(a, b, share), torch.tensor(expected))
    torch.testing.assert_close(slerp(a, 3 * a, share), torch.lerp(a, 3 * a, share[:, None]))
    assert slerp(a, -a, share).isfinite().all()


def test_a_walk_begins_at_each_stop():
    stops = torch.randn(3, 8)
    assert walk(stops, 4, closed=False).shape == (2, 4, 8)
    legs = walk(stops, 4, closed=True)
    assert legs.shape == (3, 4, 8)
    torch.testing.assert_close(legs[:, 0], stops)


# --------------------------------------------------------------------------------------------- a generator on its own


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"image_channels": 1, "attention_resolutions": []},
        {"num_classes": 3, "architecture": "resnet", "attention_resolutions": [8]},
    ],
)
def test_export_and_back(arguments, tmp_path):
    generator = shaken(**arguments)
    path = checkpoint(tmp_path / "checkpoint.pt", generator, architecture=str(arguments.get("architecture", "dcgan")))
    run(path, tmp_path / "before", "--grid", "--export", str(tmp_path / "alone.safetensors"))
    rebuilt, card = model_card.load(tmp_path / "alone.safetensors")
    assert not rebuilt.training
    for name, tensor in recalibrated(generator).state_dict().items():
        torch.testing.assert_close(rebuilt.state_dict()[name], tensor, rtol=0, atol=0)
    assert rebuilt.num_classes == generator.num_classes
    assert (card["steps"], card["images"], card["data"], card["averaged"]) == (12, 48, "faces", True)
    assert card["classes"] == (ANIMALS if generator.num_classes else {})
    assert card["crop"] == "auto"
    assert card["scores"] == {"swd": 12.3457}  # of the trainer's last evaluation
    assert set(card["versions"]) == {"torch_sagan", "torch"}
    before = (tmp_path / "before" / "grid.png").read_bytes()
    assert run(tmp_path / "alone.safetensors", tmp_path / "after", "--grid")["grid.png"] == before


def test_the_trainers_own_checkpoint(trained, tmp_path):
    assert run(trained, tmp_path / "out", "--export", str(tmp_path / "digits.safetensors")) == {}
    generator, card = model_card.load(tmp_path / "digits.safetensors")
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    for name, tensor in generator.named_parameters():
        assert torch.equal(tensor, state["average"][name])
    # The average's own, rounded to float32; two steps at a rate of 0.01 have left the trainer's u and v behind.
    assert all(norm == pytest.approx(1, abs=1e-5) for norm in spectral_norms(generator).values())
    plain = model_card.build(state["average"], card)
    assert any(norm > 1.001 for norm in spectral_norms(plain).values())
    assert card["generator"]["image_channels"] == 1
    assert (card["data"], card["steps"]) == ("digits", 2)
    assert list(card["classes"]) == [str(digit) for digit in range(10)]
    assert sum(card["classes"].values()) == 1797
    before = run(trained, tmp_path / "before", "--grid", "--labels", "7,3", "--columns", "4")
    after = run(tmp_path / "digits.safetensors", tmp_path / "after", "--grid", "--labels", "7,3", "--columns", "4")
    assert before == after


def test_the_drift_of_an_average(tmp_path, capsys, monkeypatch):
    """Of buffers that belong to other weights: sigma and the gap to batch statistics, before and after."""
    average = shaken()
    with torch.no_grad():
        for parameter in average.parameters():
            if parameter.ndim == 4:
                parameter.add_(parameter.std() * torch.randn_like(parameter))
    path = checkpoint(tmp_path / "checkpoint.pt", shaken(), average)
    monkeypatch.setattr(sys, "argv", ["average_drift.py", str(path)])
    average_drift.main()
    before, after = capsys.readouterr().out.splitlines()
    assert before.startswith("before  sigma ")
    assert after.startswith("after   sigma 1.0000 to 1.0000, gap ")
    assert float(after.split()[-1]) < 0.3 * float(before.split()[-1])  # what is left is the chance of a batch


@pytest.mark.parametrize(("flags", "crop"), [([], 40), (["--crop", "0"], 0), (["--crop", "auto"], None)])
def test_real_images_are_cropped_as_those_of_the_run_unless_told_otherwise(flags, crop, tmp_path, monkeypatch):
    asked = []

    def open_data(*_: object, **settings: object) -> None:
        asked.append(settings["crop"])
        raise ValueError("seen")

    monkeypatch.setattr(generate, "open_data", open_data)
    path = checkpoint(tmp_path / "checkpoint.pt", shaken(), crop="40")
    with pytest.raises(SystemExit, match="seen"):
        run(path, tmp_path, "--score", "images", *flags)
    assert asked == [crop]


def test_scores_go_into_the_card(trained, tmp_path, capsys):
    flags = ["--score", "digits", "--samples", "20", "--export", str(tmp_path / "digits.safetensors")]
    generate.main([str(trained), "--out", str(tmp_path), *flags])
    scores = json.loads((tmp_path / "digits.json").read_text())["scores"]
    assert scores["data"] == "digits"
    assert scores["images"] == 20
    assert scores["swd"] > 0
    assert 0 <= scores["agreement"] <= 1
    printed = capsys.readouterr().out
    assert f"swd {scores['swd']}" in printed
    assert f"agreement {scores['agreement']}" in printed


def test_agreement_is_with_the_classes_that_are_requested(trained, tmp_path, monkeypatch):
    """Each class of this generator is a uniform grey, and this classifier knows the grey of each."""
    _, card = model_card.open_generator(trained)
    requested = []

    class Grays(torch.nn.Module):
        z_dim, num_classes = 8, 10

        def forward(self, z, labels):
            requested.extend(labels.tolist())
            return (labels / 10 - 0.5).view(-1, 1, 1, 1).expand(-1, 1, 16, 16)

    def agreement(images, labels):
        grays = images[:, 0, 0, 0].astype(int)
        return float((np.rint((grays / 127.5 - 0.5) * 10) == labels).mean())

    monkeypatch.setattr(generate, "open_generator", lambda *_, **__: (Grays(), card))
    monkeypatch.setattr(generate, "class_agreement", lambda name, data: agreement if data.labels else None)
    flags = ["--out", str(tmp_path), "--score", "digits", "--samples", "30", "--labels", "7,3"]
    score = generate.score
    scores = []
    monkeypatch.setattr(generate, "score", lambda *args: scores.append(score(*args)) or scores[-1])
    generate.main([str(trained), *flags])
    assert scores[0]["agreement"] == 1
    assert set(requested) == {3, 7}
    requested.clear()
    generate.main([str(trained), *flags, "--classes", "none"])
    assert "agreement" not in scores[1]


def test_the_newest_checkpoint_of_a_folder(tmp_path):
    for step in (90, 100, 1000):
        checkpoint(tmp_path / f"checkpoint-{step:06d}.pt", shaken(image_channels=1 if step == 1000 else 3))
    _, card = model_card.from_checkpoint(tmp_path)
    assert card["generator"]["image_channels"] == 1


@pytest.mark.parametrize("failing", ["alone.safetensors", "alone.json"])
def test_a_save_that_fails_leaves_the_old_files(failing, tmp_path, monkeypatch):
    weights, card = model_card.from_checkpoint(checkpoint(tmp_path / "checkpoint.pt", shaken()))
    path = tmp_path / "alone.safetensors"
    model_card.save(weights, card, path)
    before = (tmp_path / failing).read_bytes()
    replace = checkpointing.os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(target).name == failing:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(SystemExit, match=rf"cannot save .*{failing}: .*No space left"):
        model_card.save({name: tensor + 1 for name, tensor in weights.items()}, card, path)
    assert (tmp_path / failing).read_bytes() == before
    assert not list(tmp_path.glob("*.new"))


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.pt"], r"nowhere\.pt: no such file"),
        (["nowhere.safetensors"], r"nowhere\.safetensors: no such file"),
        (["{tmp}/empty"], r"empty: no checkpoint in this folder"),
        (["{tmp}/file"], r"file: it cannot be read as a checkpoint"),
        (["{tmp}/other.pt"], r"other\.pt: it is not a checkpoint of this trainer"),
        (["{tmp}/alone.safetensors"], r"alone\.json: no such file \(a generator is a \.safetensors and a \.json"),
        (["{tmp}/changed.safetensors"], r"changed\.safetensors: damaged, or not the file that changed\.json describes"),
        (["{tmp}/wrong.safetensors"], r"wrong\.json: it cannot be read as the card of a generator"),
        (["{tmp}/strange.safetensors"], r"the card does not describe a generator: .*colour"),
        (["{tmp}/larger.safetensors"], r"the weights do not fit a generator of"),
        (["{model}", "--export", "{tmp}/model.pt"], r"model\.pt: the name has to end in \.safetensors"),
        (["{model}", "--count", "0"], r"--count must be at least 1, got 0"),
        (["{model}", "--interpolate", "--stops", "1"], r"--stops must be at least 2, got 1"),
        (["{model}", "--truncation", "0"], r"--truncation must be above 0, got 0"),
        (["{model}", "--crop", "-1"], r"--crop -1: expected auto, or a number of pixels"),
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
        (["{model}", "--classes", "own"], r"--classes, --attributes and --crop: without --score"),
        (["{model}", "--crop", "0"], r"--classes, --attributes and --crop: without --score"),
        (["{model}", "--score", "digits", "--classes", "own"], r"--classes own: this generator has no classes"),
        (["{classes}", "--score", "digits"], r"--score digits: its classes \(0, 1, .*\) are not .*\(cat, dog, 3\)"),
        (["{model}", "--attention"], r"unrecognized arguments: --attention"),
        (["{model}", "--device", "toaster"], r"toaster"),
        (["{model}", "--score", "nowhere"], r"--score nowhere: no such folder"),
        (["{model}", "--colour"], r"unrecognized arguments: --colour"),
        (["{good}", "--no-ema"], r"--no-ema: an exported generator has only the weights that were exported"),
        (["{model}", "--out", "{tmp}/file/pictures"], r"file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line(arguments, message, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("hello")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    made = {
        "model": checkpoint(tmp_path / "run" / "checkpoint.pt", shaken()),
        "classes": checkpoint(tmp_path / "classes.pt", shaken(num_classes=3)),
        "good": tmp_path / "good.safetensors",
        "tmp": tmp_path,
    }
    weights, card = model_card.from_checkpoint(made["model"])
    for name in ("good", "alone", "changed", "wrong", "strange", "larger"):
        model_card.save(weights, card, tmp_path / f"{name}.safetensors")
    (tmp_path / "alone.json").unlink()
    (tmp_path / "wrong.json").write_text("{}")
    with open(tmp_path / "changed.safetensors", "ab") as file:
        file.write(b"\0")
    for name, change in (("strange", {"colour": 1}), ("larger", {"base_channels": 8})):
        stored = json.loads((tmp_path / f"{name}.json").read_text())
        stored["generator"] |= change
        (tmp_path / f"{name}.json").write_text(json.dumps(stored))
    with pytest.raises(SystemExit, match=message) as error:
        generate.main(["--out", str(tmp_path / "out"), *(argument.format(**made) for argument in arguments)])
    assert "\n" not in str(error.value)
    assert error.value.code not in (0, None)


def test_help_is_in_groups(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        generate.main(["--help"])
    text = capsys.readouterr().out
    for part in ("generator:", "what is generated:", "what is written:", "scores:", "(default: 64)"):
        assert part in text
