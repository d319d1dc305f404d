"""The trainer, on tiny networks: what it reads, what it writes, and that nothing is lost on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, get_worker_info

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import safekeeping  # noqa: E402
import train_celeba  # noqa: E402
from sources import Folder, Shuffle, digits  # noqa: E402

TINY = ["--image-size", "16", "--base-channels", "4", "--batch-size", "4", "--z-dim", "8", "--device", "cpu"]
GOOD = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real JPEGs of CelebA's size at several depths, two smaller pictures, a cut-off JPEG and a text file."""
    root = tmp_path_factory.mktemp("images")
    (root / "a" / "b").mkdir(parents=True)
    photographs = load_sample_images().images
    for i in range(GOOD - 2):
        x, y = 50 * i, 20 * i
        crop = Image.fromarray(photographs[i % 2][y : y + 218, x : x + 178])
        crop.save(root / ("a/b" if i % 3 else "a" if i % 2 else ".") / f"{i:03d}.jpg", quality=90)
    Image.fromarray(photographs[0][:90, :120]).convert("L").save(root / "grey.png")
    Image.fromarray(photographs[1][:200, :100]).save(root / "a" / "narrow.JPEG")
    whole = (root / "000.jpg").read_bytes()
    (root / "a" / "cut-off.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "notes.txt").write_text("not a picture")
    return root


def train(out: Path, *arguments: str) -> int:
    return train_celeba.main([*TINY, "--data", "digits", "--out", str(out), *arguments])


def checkpoint(out: Path) -> dict:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def leaves(tree: object, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{path}/{key}")
    else:
        yield path, tree


def assert_same(one: dict, other: dict, *, apart_from: tuple[str, ...]) -> None:
    one_leaves, other_leaves = dict(leaves(one)), dict(leaves(other))
    assert one_leaves.keys() == other_leaves.keys()
    for path, value in one_leaves.items():
        if path not in apart_from:
            equal = torch.equal(value, other_leaves[path]) if isinstance(value, torch.Tensor) else None
            assert equal if equal is not None else value == other_leaves[path], path


# ------------------------------------------------------------------------------------------------------- reading


def test_a_folder_with_broken_files_names_them_and_goes_on(folder, tmp_path, capsys):
    steps = 6  # of 4 images: twice through the folder
    assert train(tmp_path, "--data", str(folder), "--workers", "2", "--steps", str(steps), "--log-every", "2") == 0
    out, err = capsys.readouterr()
    assert err.count("cut-off.jpg") == 1
    assert err.count("notes.txt") == 1
    for line in ("samples-000006.png", "attention-000006.png", "checkpoint.pt", "log.jsonl"):
        assert str(tmp_path / line) in out
        assert (tmp_path / line).stat().st_size > 0
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["images"]) for line in lines] == [(2, 8), (4, 16), (6, 24)]
    assert set(lines[0]["gamma"]) >= {"G.attention.8", "D.attention.8"}
    with Image.open(tmp_path / "samples-000006.png") as picture:
        assert picture.width > 8 * 16


@pytest.mark.parametrize("workers", [0, 2])
def test_no_image_is_lost_to_a_broken_neighbour(folder, workers):
    source = Folder(folder, size=16, crop=160)
    order = Shuffle(len(source), 3, seed=0, flip=False)
    batches = iter(DataLoader(source, sampler=order, batch_size=None, num_workers=workers))
    drawn = [next(batches) for _ in range(4)]  # 12 images: a whole epoch of the 11 files and one more
    assert all(len(images) == 3 for images, _ in drawn)
    seen = {image.numpy().tobytes() for images, _ in drawn for image in images}
    readable = [source._decode(path) for path in source.paths if "cut-off" not in path]
    assert len(readable) == GOOD
    assert seen == {image.numpy().tobytes() for image in readable}
    assert {Path(path).name for _, broken in drawn for path in broken} == {"cut-off.jpg"}


def test_the_centre_is_cropped(tmp_path):
    picture = np.zeros((218, 178, 3), np.uint8)
    picture[29:189, 9:169] = (200, 100, 50)
    Image.fromarray(picture).save(tmp_path / "face.png")
    (image, _) = Folder(tmp_path, size=32, crop=160).read(0)
    torch.testing.assert_close(image.flatten(1).T.unique(dim=0).tolist(), [[200, 100, 50]])
    (image, _) = Folder(tmp_path, size=32, crop=0).read(0)  # the largest centred square: all of the width
    assert (image[:, :, 0] == 0).all()


def test_order_and_flips_are_a_function_of_seed_and_position():
    def take(count: int, **more: int) -> list:
        batches = iter(Shuffle(10, 4, flip=True, **more))
        return [next(batches) for _ in range(count)]

    drawn = take(12, seed=1)
    assert take(7, seed=1, position=20) == drawn[5:]
    assert take(12, seed=2) != drawn
    flat = [index for batch in drawn for index, _ in batch]
    assert all(sorted(flat[start : start + 10]) == list(range(10)) for start in (0, 10, 20, 30))
    assert flat[:10] != flat[10:20]
    assert {flip for batch in drawn for _, flip in batch} == {False, True}
    assert len(take(1, seed=0)[0]) == len(next(iter(Shuffle(3, 8, seed=0, flip=False)))) // 2  # a batch of many epochs


def test_flips_mirror_the_image(folder):
    for source in (digits(16), Folder(folder, size=16, crop=160)):
        (images, _) = source[[(1, False), (1, True)]]
        torch.testing.assert_close(images[0].flip(-1), images[1], rtol=0, atol=0)
        assert not torch.equal(images[0], images[1])


# ------------------------------------------------------------------------------------------------------ training


def test_fakes_do_not_reach_the_generator_nor_gradients_the_discriminator():
    run = train_celeba.Run(train_celeba.Config(image_size=16, base_channels=4, batch_size=4), 1, torch.device("cpu"))
    fake = run.generator(run.sample_latents())
    train_celeba.discriminator_step(run, torch.rand(4, 1, 16, 16), fake)
    assert all(weight.grad is None for weight in run.generator.parameters())
    before = {name: weight.grad.clone() for name, weight in run.discriminator.named_parameters()}
    train_celeba.generator_step(run, fake)
    assert all(weight.grad is not None for weight in run.generator.parameters())
    assert all(weight.requires_grad for weight in run.discriminator.parameters())
    for name, weight in run.discriminator.named_parameters():
        torch.testing.assert_close(weight.grad, before[name], rtol=0, atol=0)


def test_the_average_averages_weights_and_copies_buffers():
    config = train_celeba.Config(image_size=16, base_channels=4, batch_size=4, lr_g=0.01, ema_decay=0.2)
    run = train_celeba.Run(config, 1, torch.device("cpu"))
    expected = None
    for step in range(4):
        train_celeba.generator_step(run, run.generator(run.sample_latents()))
        weights = [weight.detach().double().clone() for weight in run.generator.parameters()]
        decay = min(0.2, (1 + step) / (10 + step))
        old = weights if expected is None else expected
        expected = [decay * a + (1 - decay) * b for a, b in zip(old, weights, strict=True)]
        run.step += 1
    averaged = list(run.average.module.parameters())
    for a, b in zip(averaged, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-7)
    assert not torch.equal(averaged[0], next(run.generator.parameters()))
    buffers = dict(run.generator.named_buffers())
    assert {name.rsplit(".")[-1] for name in buffers} >= {"_u", "_v", "running_mean", "running_var"}
    for name, buffer in run.average.module.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=0, atol=0)


def test_discriminator_steps(tmp_path):
    train(tmp_path, "--steps", "2", "--d-steps", "3")
    assert checkpoint(tmp_path)["images"] == 2 * 3 * 4
    steps = {state["step"].item() for state in checkpoint(tmp_path)["discriminator_optimizer"]["state"].values()}
    assert steps == {6}


@pytest.mark.parametrize(("loss", "normalised"), [("hinge", True), ("wgan-gp", False)])
def test_losses(loss, normalised, tmp_path, capsys):
    train(tmp_path, "--loss", loss, "--steps", "2")
    assert ("without spectral norm" in capsys.readouterr().out) is not normalised
    state = checkpoint(tmp_path)
    assert any("parametrizations" in name for name in state["discriminator"]) is normalised
    assert any("parametrizations" in name for name in state["generator"])


def test_digits_have_one_channel_and_are_not_mirrored(tmp_path, monkeypatch):
    flips = []
    shuffle = train_celeba.Shuffle
    monkeypatch.setattr(
        train_celeba, "Shuffle", lambda *args, flip, **more: flips.append(flip) or shuffle(*args, flip=flip, **more)
    )
    train(tmp_path, "--image-size", "28", "--steps", "1")
    assert flips == [False]
    assert checkpoint(tmp_path)["generator"]["to_image.weight"].shape[1] == 1


def test_dry_run_writes_everything(tmp_path, capsys):
    assert train(tmp_path, "--dry-run") == 0
    made = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[-4:]]
    assert all(Path(path).exists() for path in made)
    assert checkpoint(tmp_path)["step"] == 3


def test_without_attention(tmp_path, capsys):
    train(tmp_path, "--g-attention", "none", "--d-attention", "4", "--steps", "1")
    assert "attention-" not in capsys.readouterr().out
    assert set(json.loads((tmp_path / "log.jsonl").read_text())["gamma"]) == {"D.attention.4"}


# ------------------------------------------------------------------------------------------------ nothing is lost


@pytest.mark.parametrize("loss", ["hinge", "wgan-gp"])
def test_a_resumed_run_equals_an_uninterrupted_one(loss, folder, tmp_path):
    settings = ["--data", str(folder), "--loss", loss, "--workers", "1", "--log-every", "1", "--lr-g", "0.01"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(whole, *settings, "--steps", "5", "--sample-every", "2")
    train(halves, *settings, "--steps", "3")
    assert train_celeba.main(["--resume", str(halves), "--steps", "5"]) == 0
    assert_same(
        checkpoint(whole),
        checkpoint(halves),
        apart_from=("/config/out", "/config/sample_every"),
    )
    logs = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (whole, halves)]
    keep = ("step", "images", "loss_d", "loss_g", "gamma")
    assert [[line[key] for key in keep] for line in logs[0]] == [[line[key] for key in keep] for line in logs[1]]


def test_a_checkpoint_holds_everything(tmp_path):
    train(tmp_path, "--steps", "1")
    state = checkpoint(tmp_path)
    assert state["step"] == 1
    assert state["config"]["image_size"] == 16
    assert set(state["random"]) >= {"cpu", "latents"}
    image = state["generator"]["to_image.weight"].shape
    assert state["average"]["module.to_image.weight"].shape == image
    for network, rate in (("generator", 1e-4), ("discriminator", 4e-4)):
        (group,) = state[f"{network}_optimizer"]["param_groups"]
        assert (group["lr"], group["betas"]) == (rate, (0.0, 0.9))
        assert len(state[f"{network}_optimizer"]["state"]) == len(group["params"])


def test_resuming_keeps_the_settings_except_those_given(tmp_path, capsys):
    train(tmp_path, "--steps", "1", "--lr-g", "0.003", "--seed", "7")
    train_celeba.main(["--resume", str(tmp_path / "checkpoint.pt"), "--steps", "2", "--lr-d", "0.007"])
    state = checkpoint(tmp_path)
    assert state["config"]["seed"] == 7
    assert state["generator_optimizer"]["param_groups"][0]["lr"] == 0.003
    assert state["discriminator_optimizer"]["param_groups"][0]["lr"] == 0.007


def test_lines_that_the_checkpoint_does_not_know_are_logged_once(tmp_path):
    train(tmp_path, "--steps", "2", "--log-every", "1")
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 3}\n')  # as if the run had gone on and been killed before it saved again
        file.write('{"step": 4, "ima')
    train_celeba.main(["--resume", str(tmp_path), "--steps", "4"])
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


def test_a_new_run_keeps_the_checkpoint_of_an_earlier_one(tmp_path, capsys):
    train(tmp_path, "--steps", "2")
    train(tmp_path, "--steps", "1")
    assert "checkpoint-before.pt" in capsys.readouterr().out
    assert checkpoint(tmp_path)["step"] == 1
    assert torch.load(tmp_path / "checkpoint-before.pt", weights_only=True)["step"] == 2


@pytest.mark.parametrize("failing", ["torch.save", "os.replace"])
def test_a_save_that_fails_leaves_the_old_checkpoint(failing, tmp_path, monkeypatch):
    train(tmp_path, "--steps", "1")

    def fail(*args: object, **more: object) -> None:
        if failing == "torch.save":
            args[1].write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(SystemExit, match=r"cannot save .*checkpoint\.pt: .*No space left on device"):
        train_celeba.main(["--resume", str(tmp_path), "--steps", "2"])
    assert checkpoint(tmp_path)["step"] == 1
    assert not list(tmp_path.glob("*.new"))


def test_the_file_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append("fsync"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    safekeeping.save({"step": 1}, tmp_path / "checkpoint.pt")
    assert calls == ["fsync", "replace"]


def test_losses_that_are_not_finite_stop_the_run_and_not_the_checkpoint(tmp_path, monkeypatch):
    hinge, generator = train_celeba.LOSSES["hinge"]
    calls = []

    def diverging(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return hinge(real, fake) * (float("nan") if len(calls) > 2 else 1)

    monkeypatch.setitem(train_celeba.LOSSES, "hinge", (diverging, generator))
    with pytest.raises(SystemExit, match=r"step 4: .*no longer finite"):
        train(tmp_path, "--steps", "9", "--save-every", "2")
    state = checkpoint(tmp_path)
    assert state["step"] == 2
    assert all(value.isfinite().all() for _, value in leaves(state) if isinstance(value, torch.Tensor))


def test_interrupted_between_two_halves_of_a_step(tmp_path, monkeypatch, capsys):
    generator_step = train_celeba.generator_step

    def interrupted(run: train_celeba.Run, fake: torch.Tensor) -> torch.Tensor:
        if run.step == 2:
            signal.raise_signal(signal.SIGINT)
        return generator_step(run, fake)

    monkeypatch.setattr(train_celeba, "generator_step", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    assert train(tmp_path / "a", "--steps", "5") == 128 + signal.SIGINT
    assert "--resume" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.undo()
    assert checkpoint(tmp_path / "a")["step"] == 3
    train_celeba.main(["--resume", str(tmp_path / "a"), "--steps", "5"])
    train(tmp_path / "b", "--steps", "5")
    assert_same(checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b"), apart_from=("/config/out",))


class InterruptedFolder(Folder):
    """Ctrl-C as a worker sees it, while it decodes."""

    def __getitem__(self, batch: list[tuple[int, bool]]) -> tuple[torch.Tensor, list[str]]:
        assert get_worker_info() is not None
        os.kill(os.getpid(), signal.SIGINT)
        return super().__getitem__(batch)


def test_workers_go_on_after_ctrl_c(folder):
    config = train_celeba.Config(data=str(folder), batch_size=4, workers=1)
    source = InterruptedFolder(folder, size=16, crop=160)
    batches = iter(train_celeba.open_loader(source, config, position=0, device=torch.device("cpu")))
    assert [len(next(batches)[0]) for _ in range(3)] == [4, 4, 4]


@pytest.mark.slow  # starts a process of its own, which imports torch
def test_ctrl_c_leaves_a_checkpoint(folder, tmp_path):
    command = [sys.executable, str(EXAMPLES / "train_celeba.py"), *TINY, "--data", str(folder), "--out", str(tmp_path)]
    command += ["--workers", "2", "--log-every", "1"]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, start_new_session=True) as process:
        deadline = time.monotonic() + 120
        while not ((tmp_path / "log.jsonl").exists() and (tmp_path / "log.jsonl").stat().st_size):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to the workers too
        out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, err
    assert "Traceback" not in err
    assert "stopped at step" in out
    assert checkpoint(tmp_path)["step"] >= 1


# -------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere/at/all"], r"nowhere/at/all: no such folder"),
        (["--data", "{tmp}/empty"], r"empty: no images in this folder or below it"),
        (["--data", "{tmp}/damaged"], r"none of the 2 images can be read"),
        (["--data", "{tmp}/file"], r"a folder of images is needed"),
        (["--image-size", "50"], r"image_size .* got 50"),
        (["--g-attention", "5"], r"\[5\]"),
        (["--g-attention", "large"], r"large"),
        (["--batch-size", "0"], r"--batch-size must be at least 1, got 0"),
        (["--ema-decay", "2"], r"--ema-decay must be between 0 and 1"),
        (["--device", "toaster"], r"--device toaster"),
        (["--resume", "nowhere.pt"], r"nowhere\.pt: no such file"),
        (["--resume", "{tmp}/file"], r"cannot be read as a checkpoint"),
        (["--resume", "{tmp}/other.pt"], r"not a checkpoint of this trainer"),
        (["--resume", "{tmp}/run", "--base-channels", "8"], r"--base-channels 8: the checkpoint was made with 4"),
        (["--resume", "{tmp}/run", "--data", "faces", "--steps", "2"], r"do not fit the networks for --data faces"),
        (["--resume", "{tmp}/run", "--steps", "1"], r"--steps 1: the checkpoint is at step 1 already"),
        (["--out", "{tmp}/file/run"], r"file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line(arguments, message, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    for name in ("file", "damaged/1.jpg", "damaged/2.png"):
        (tmp_path / name).write_text("hello")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    train(tmp_path / "run", "--steps", "1")
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    with pytest.raises(SystemExit, match=message) as error:
        train_celeba.main(arguments if "--resume" in arguments else [*TINY, "--data", "digits", *arguments])
    assert "\n" not in str(error.value)


def test_help_tells_every_default(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        train_celeba.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in ("data:", "networks:", "training:", "output:", "(default: 0.0004)", "pixels", "--resume PATH"):
        assert part in text


def test_the_average_is_torchs_own():
    run = train_celeba.Run(train_celeba.Config(image_size=16, base_channels=4), 1, torch.device("cpu"))
    assert isinstance(run.average, AveragedModel)
    assert not run.average.training
