"""Pictures from a trained generator, and the generator on its own: the same bytes for the same words, clear errors."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import average_drift
import generate
import model_card
import train_celeba
from averages import recalibrated
from generate import draw_latents, slerp, walk
from torch_sagan import SAGANGenerator, spectral_norms

TINY = {"image_size": 16, "z_dim": 8, "base_channels": 4, "attention_resolutions": [4, 8]}


def shaken(**more: object) -> SAGANGenerator:
    """A generator with gammas, statistics and norms that are not those it begins with."""
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


def checkpoint(path: Path, generator: SAGANGenerator, average: SAGANGenerator | None = None) -> Path:
    """A checkpoint as far as the trainer's has to do with its generator."""
    config = {"image_size": 16, "z_dim": 8, "base_channels": 4, "data": "/home/somebody/faces", "g_attention": "auto"}
    state = {
        "config": config,
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
    size = ["--image-size", "16", "--base-channels", "4", "--batch-size", "4", "--z-dim", "8", "--device", "cpu"]
    assert train_celeba.main([*size, "--data", "digits", "--steps", "2", "--lr-g", "0.01", "--out", str(out)]) == 0
    return out


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "run" / "checkpoint.pt", shaken())


def run(model: Path, out: Path, *arguments: str) -> dict[str, bytes]:
    assert generate.main([str(model), "--out", str(out), *arguments]) == 0
    return {path.name: path.read_bytes() for path in out.glob("*.*")}


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


# ---------------------------------------------------------------------------------------------------------- pictures


EVERYTHING = ["--grid", "--images", "--strip", "--video", "gif", "--attention", "--count", "5", "--frames", "3"]


def test_the_same_words_give_the_same_bytes(model, tmp_path):
    first = run(model, tmp_path / "a", *EVERYTHING, "--seed", "3", "--truncation", "0.8")
    torch.rand(5)
    assert run(model, tmp_path / "b", *EVERYTHING, "--seed", "3", "--truncation", "0.8") == first
    assert set(first) == {"grid.png", "strip.png", "walk.gif", "attention-4.png", "attention-8.png"} | {
        f"{i:06d}.png" for i in range(5)
    }
    for other in (["--seed", "4", "--truncation", "0.8"], ["--seed", "3"], ["--seed", "3", "--truncation", "0.3"]):
        different = run(model, tmp_path / "c", *EVERYTHING, *other)
        assert all(different[name] != first[name] for name in first)


def test_pictures_show_what_the_averaged_generator_makes(tmp_path):
    average = shaken()
    with torch.no_grad():
        average.to_image.bias.add_(0.5)
    path = checkpoint(tmp_path / "checkpoint.pt", shaken(), average)
    for flags, generator in (([], recalibrated(average)), (["--current"], shaken())):
        run(path, tmp_path / "out", "--images", "--count", "3", *flags)
        z = draw_latents(3, 8, torch.Generator().manual_seed(0))
        images = generator.eval()(z)  # (3, 3, 16, 16)
        for i, image in enumerate(images):
            with Image.open(tmp_path / "out" / f"{i:06d}.png") as picture:
                pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(16, 16, 3)
            torch.testing.assert_close(pixels.permute(2, 0, 1) / 127.5 - 1, image, rtol=0, atol=1 / 127.5)


def test_a_grid_when_nothing_else_is_asked_for(model, tmp_path, capsys):
    assert set(run(model, tmp_path / "out", "--count", "4", "--columns", "2")) == {"grid.png"}
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "grid.png")
    width, height = size(tmp_path / "out" / "grid.png")
    assert width == height == 2 * 128 + 3 * 2


def test_a_strip_has_a_row_for_each_way_and_shares_its_ends(model, tmp_path):
    run(model, tmp_path, "--strip", "--stops", "3", "--frames", "4")
    assert size(tmp_path / "strip.png") == (5 * 130 + 2, 2 * 130 + 2)
    with Image.open(tmp_path / "strip.png") as strip:
        end, begin = strip.crop((4 * 130 + 2, 2, 5 * 130, 130)), strip.crop((2, 132, 130, 260))
        first = strip.crop((2, 2, 130, 130))
    # Equal but for the rounding of different places in a batch.
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


def test_a_picture_that_cannot_be_finished_leaves_the_old_one(model, tmp_path, monkeypatch):
    before = run(model, tmp_path, "--video", "webp", "--grid", "--images", "--count", "2", "--frames", "1")

    def half(image: Image.Image, file: object, **_: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        sys.exit("killed")

    monkeypatch.setattr(Image.Image, "save", half)
    for flag in (["--video", "webp"], ["--grid"], ["--images"]):
        with pytest.raises(SystemExit, match=r"^killed$"):
            generate.main([str(model), "--out", str(tmp_path), *flag, "--seed", "1"])
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*")} == before


def test_attention_figures_look_from_the_given_places(model, tmp_path):
    run(model, tmp_path, "--attention", "--look-from", "0.1,0.2", "--look-from", "0.9,0.9")
    assert size(tmp_path / "attention-8.png") == (3 * 130 + 2, 6 * 130 + 2)


def test_grey_images(trained, tmp_path):
    files = run(trained, tmp_path, *EVERYTHING)
    assert len(files) == 4 + 5  # the trainer's network of 16 pixels has attention at one place
    with Image.open(tmp_path / "000000.png") as picture:
        red, green, blue = picture.split()
        assert red.tobytes() == green.tobytes() == blue.tobytes()


# ----------------------------------------------------------------------------------------------------------- classes


def test_labels(tmp_path):
    path = checkpoint(tmp_path / "checkpoint.pt", shaken(num_classes=3))
    generator = recalibrated(shaken(num_classes=3))
    for flags, classes in (([], [0, 1, 2, 0]), (["--labels", "2,1"], [2, 1, 2, 1])):
        run(path, tmp_path / "out", "--images", "--count", "4", *flags)
        images = generator(draw_latents(4, 8, torch.Generator().manual_seed(0)), torch.tensor(classes))
        for i, image in enumerate(images):
            with Image.open(tmp_path / "out" / f"{i:06d}.png") as picture:
                pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(16, 16, 3)
            torch.testing.assert_close(pixels.permute(2, 0, 1) / 127.5 - 1, image, rtol=0, atol=1 / 127.5)
    walks = [run(path, tmp_path / label, *EVERYTHING, "--labels", label) for label in ("0", "1")]
    assert all(walks[0][name] != walks[1][name] for name in walks[0])


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
    path = checkpoint(tmp_path / "checkpoint.pt", generator)
    run(path, tmp_path / "before", "--grid", "--export", str(tmp_path / "alone.safetensors"))
    rebuilt, card = model_card.load(tmp_path / "alone.safetensors")
    assert not rebuilt.training
    for name, tensor in recalibrated(generator).state_dict().items():
        torch.testing.assert_close(rebuilt.state_dict()[name], tensor, rtol=0, atol=0)
    assert rebuilt.num_classes == generator.num_classes
    assert (card["steps"], card["images"], card["data"], card["averaged"]) == (12, 48, "faces", True)
    assert set(card["versions"]) == {"torch_sagan", "torch"}
    before = (tmp_path / "before" / "grid.png").read_bytes()
    assert run(tmp_path / "alone.safetensors", tmp_path / "after", "--grid")["grid.png"] == before


def test_the_trainers_own_checkpoint(trained, tmp_path):
    assert run(trained, tmp_path / "out", "--export", str(tmp_path / "digits.safetensors")) == {}
    generator, card = model_card.load(tmp_path / "digits.safetensors")
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    for name, parameter in generator.named_parameters():
        assert torch.equal(parameter, state["average"][name])
    # The average's own, rounded to float32; two steps at a rate of 0.01 have left the trainer's u and v behind.
    assert all(norm == pytest.approx(1, abs=1e-5) for norm in spectral_norms(generator).values())
    plain = model_card.build(state["average"], card)
    assert any(norm > 1.001 for norm in spectral_norms(plain).values())
    assert card["generator"]["image_channels"] == 1
    assert (card["data"], card["steps"]) == ("digits", 2)


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


def test_scores_go_into_the_card(trained, tmp_path, capsys):
    flags = ["--score", "digits", "--samples", "20", "--export", str(tmp_path / "digits.safetensors")]
    generate.main([str(trained), "--out", str(tmp_path), *flags])
    scores = json.loads((tmp_path / "digits.json").read_text())["scores"]
    assert scores["data"] == "digits"
    assert scores["images"] == 20
    assert scores["swd"] > 0
    assert f"swd {scores['swd']}" in capsys.readouterr().out


def test_the_newest_checkpoint_of_a_folder(tmp_path):
    for step in (90, 100, 1000):
        checkpoint(tmp_path / f"checkpoint-{step}.pt", shaken(image_channels=1 if step == 1000 else 3))
    _, card = model_card.from_checkpoint(tmp_path)
    assert card["generator"]["image_channels"] == 1


@pytest.mark.parametrize("failing", ["alone.safetensors", "alone.json"])
def test_a_save_that_fails_leaves_the_old_files(failing, tmp_path, monkeypatch):
    weights, card = model_card.from_checkpoint(checkpoint(tmp_path / "checkpoint.pt", shaken()))
    path = tmp_path / "alone.safetensors"
    model_card.save(weights, card, path)
    before = (tmp_path / failing).read_bytes()
    replace = model_card.safekeeping.os.replace

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
        (["{tmp}/strange.safetensors"], r"the card does not describe a SAGANGenerator: .*colour"),
        (["{tmp}/larger.safetensors"], r"the weights do not fit SAGANGenerator"),
        (["{model}", "--export", "{tmp}/model.pt"], r"model\.pt: the name has to end in \.safetensors"),
        (["{model}", "--count", "0"], r"--count must be at least 1, got 0"),
        (["{model}", "--strip", "--stops", "1"], r"--stops must be at least 2, got 1"),
        (["{model}", "--truncation", "0"], r"--truncation must be above 0, got 0"),
        (["{model}", "--crop", "-1"], r"--crop -1: expected auto, or a number of pixels"),
        (["{model}", "--seed", str(2**63)], r"--seed must be from 0 .*got 9223372036854775808"),
        (["{model}", "--truncation", "nan"], r"--truncation must be above 0, got nan"),
        (["{model}", "--video", "webp", "--fps", "1e-9"], r"--fps must be from 0\.01 to 100, got 1e-09"),
        (["{model}", "--video", "gif", "--fps", "nan"], r"--fps must be from 0\.01 to 100, got nan"),
        (["{model}", "--labels", "1"], r"--labels: this generator has no classes"),
        (["{classes}", "--labels", "1,3"], r"--labels must be from 0 to 2, got 3"),
        (["{model}", "--labels", "one"], r"--labels.*'one'"),
        (["{model}", "--look-from", "1.5,0"], r"--look-from: expected ROW,COLUMN, two fractions .*'1\.5,0'"),
        (["{model}", "--look-from", "0.5,0.5"], r"--look-from: without --attention there is no figure"),
        (["{plain}", "--attention"], r"--attention: this generator has no attention layer"),
        (["{model}", "--device", "toaster"], r"toaster"),
        (["{model}", "--score", "nowhere"], r"--score nowhere: no such folder"),
        (["{model}", "--colour"], r"unrecognized arguments: --colour"),
        (["{good}", "--current"], r"--current: an exported generator has only the weights that were exported"),
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
        "plain": checkpoint(tmp_path / "plain.pt", shaken(attention_resolutions=[])),
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
    for part in ("generator:", "what is drawn:", "what is written:", "scores:", "(default: 64)"):
        assert part in text
