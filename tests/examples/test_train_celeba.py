"""The trainer, on tiny networks: what it reads, what it writes, and that no data are lost."""

from __future__ import annotations

import copy
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import train_celeba
from tiny_runs import TINY, assert_same, checkpoint, leaves, lines, resume, train
from torch_sagan import spectral_norms
from training import objectives
from training.average import update_average
from training.command_line import interpreter, read_arguments, script
from training.configuration import Config, default_out
from training.data.image_folder import Batch, ImageFolder
from training.data.sources import InfiniteBatchSampler, digits
from training.objectives import LOSSES
from training.output import model_card, sampling
from training.output.sampling import draw
from training.runs import checkpointing
from training.state import TrainingState
from training.step import Piece, discriminator_step, generate, generator_step, training_step

GOOD = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real JPEGs of CelebA's size at several depths, two smaller images, a cut-off JPEG and a text file."""
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
    (root / "notes.txt").write_text("not an image")
    return root


# ------------------------------------------------------------------------------------------------------- reading


def test_a_folder_with_broken_files_names_them_and_goes_on(folder, tmp_path, capsys):
    steps = 6  # of 4 images: twice through the folder
    reading = ["--data", str(folder), "--no-cache", "--num-workers", "2"]
    assert train(tmp_path, *reading, "--steps", str(steps), "--log-every", "2") == 0
    out, err = capsys.readouterr()
    assert err.count("cut-off.jpg") == 1
    assert err.count("notes.txt") == 1
    drawn = ("samples-000006.png", "attention-000006.png", "attention-000006.html")
    for name in (*drawn, "checkpoint-000006.pt", "log.jsonl"):
        assert str(tmp_path / name) in out
        assert (tmp_path / name).stat().st_size > 0
    assert [(line["step"], line["images"]) for line in lines(tmp_path)] == [(2, 8), (4, 16), (6, 24)]
    assert set(lines(tmp_path)[0]["gamma"]) >= {"G.attention.8", "D.attention.8"}
    with Image.open(tmp_path / "samples-000006.png") as image:
        assert image.width > 8 * 16


@pytest.mark.parametrize("workers", [0, 2])
def test_no_image_is_lost_to_a_broken_neighbor(folder, workers):
    source = ImageFolder(folder, size=16, crop=160)
    order = InfiniteBatchSampler(len(source), 3, seed=0, flip=False)
    batches = iter(DataLoader(source, sampler=order, batch_size=None, num_workers=workers))
    drawn = [next(batches) for _ in range(4)]  # 12 images: a whole epoch of the 11 files and one more
    assert all(len(batch.images) == 3 for batch in drawn)
    seen = {image.numpy().tobytes() for batch in drawn for image in batch.images}
    readable = [source._decode(path) for path in source.paths if "cut-off" not in path]
    assert len(readable) == GOOD
    assert seen == {image.numpy().tobytes() for image in readable}
    assert {Path(path).name for batch in drawn for path in batch.unreadable} == {"cut-off.jpg"}


def test_the_center_is_cropped(tmp_path):
    image = np.zeros((218, 178, 3), np.uint8)
    image[29:189, 9:169] = (200, 100, 50)
    Image.fromarray(image).save(tmp_path / "face.png")
    image, *_ = ImageFolder(tmp_path, size=32, crop=160).read(0)
    assert image.flatten(1).T.unique(dim=0).tolist() == [[200, 100, 50]]
    image, *_ = ImageFolder(tmp_path, size=32, crop=0).read(0)  # the largest centred square: all of the width
    assert (image[:, :, 0] == 0).all()


def test_order_and_flips_are_a_function_of_seed_and_position():
    def take(count: int, **more: int) -> list:
        batches = iter(InfiniteBatchSampler(10, 4, flip=True, **more))
        return [next(batches) for _ in range(count)]

    drawn = take(12, seed=1)
    assert take(7, seed=1, position=20) == drawn[5:]
    assert take(12, seed=2) != drawn
    flat = [index for batch in drawn for index, _ in batch]
    assert all(sorted(flat[start : start + 10]) == list(range(10)) for start in (0, 10, 20, 30))
    assert flat[:10] != flat[10:20]
    assert {flip for batch in drawn for _, flip in batch} == {False, True}
    of_many_epochs = next(iter(InfiniteBatchSampler(3, 8, seed=0, flip=False)))
    assert sorted(index for index, _ in of_many_epochs[:6]) == [0, 0, 1, 1, 2, 2]
    assert len(of_many_epochs) == 8


def test_flips_mirror_the_image(folder):
    for source in (digits(16), ImageFolder(folder, size=16, crop=160)):
        images = source[[(1, False), (1, True)]].images
        torch.testing.assert_close(images[0].flip(-1), images[1], rtol=0, atol=0)
        assert not torch.equal(images[0], images[1])


# ------------------------------------------------------------------------------------------------------ training


def tiny_state(**settings: object) -> TrainingState:
    config = Config(**({"image_size": 16, "base_channels": 4, "batch_size": 4, "z_dim": 8} | settings))
    return TrainingState(config, image_channels=1, device=torch.device("cpu"))


def noise(state: TrainingState) -> Iterator[list[Piece]]:
    """Batches without end, in the state's pieces."""
    size = state.config.batch_size // state.config.grad_accum_steps
    rng = torch.Generator().manual_seed(0)

    def data() -> Iterator[Batch]:
        while True:
            yield Batch(torch.randint(256, (size, 1, 16, 16), dtype=torch.uint8, generator=rng), None, {})

    return state.batches(data())


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def test_fakes_do_not_reach_the_generator_nor_gradients_the_discriminator():
    state = tiny_state()
    batch = next(noise(state))
    fakes = list(generate(state.gan, batch, learn=True))
    discriminator_step(state.gan, batch, fakes)
    assert all(weight.grad is None for weight in state.generator.parameters())
    before = gradients(state.discriminator)
    generator_step(state.gan, batch, fakes)
    assert all(weight.grad is not None for weight in state.generator.parameters())
    assert all(weight.requires_grad for weight in state.discriminator.parameters())
    for name, gradient in gradients(state.discriminator).items():
        torch.testing.assert_close(gradient, before[name], rtol=0, atol=0)


def test_the_average_averages_weights_and_copies_buffers():
    state = tiny_state(lr_g=0.01, ema_decay=0.2)
    expected = [weight.double().clone() for weight in state.average.parameters()]
    batches = noise(state)
    for step in range(4):
        state.advance(batches)
        weights = [weight.detach().double() for weight in state.generator.parameters()]
        decay = min(0.2, (1 + step) / (10 + step))
        expected = [decay * a + (1 - decay) * b for a, b in zip(expected, weights, strict=True)]
    averaged = list(state.average.parameters())
    for a, b in zip(averaged, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-7)  # four roundings in float32
    assert not torch.equal(averaged[0], next(state.generator.parameters()))
    buffers = dict(state.generator.named_buffers())
    assert {name.rsplit(".")[-1] for name in buffers} >= {"_u", "_v", "running_mean", "running_var"}
    for name, buffer in state.average.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=0, atol=0)
    assert not state.average.training


def test_buffers_of_the_average_are_copied_at_once(monkeypatch):
    """One operator for each type of number, not one for each buffer; and what is copied is equal, integers too."""
    state = tiny_state(architecture="resnet")
    training_step(state.gan, noise(state))
    copied, copy_all = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *tensors: copied.append(tensors[0]) or copy_all(*tensors))
    update_average(state.average, state.generator, decay=0.5, steps=0)
    assert {len({tensor.dtype for tensor in tensors}) for tensors in copied} == {1}
    assert sorted(str(tensors[0].dtype) for tensors in copied) == ["torch.float32", "torch.int64"]
    buffers = dict(state.generator.named_buffers())
    assert any(name.endswith("num_batches_tracked") and count == 1 for name, count in buffers.items())
    for name, buffer in state.average.named_buffers():
        assert torch.equal(buffer, buffers[name])


def test_drawing_and_scoring_recalibrate_a_copy_of_the_average(tmp_path, monkeypatch):
    """With sigmas of 1, although those of the average itself are not; and no number of the run changes."""
    state = tiny_state(lr_g=0.05, ema_decay=0.5)
    batches = noise(state)
    for _ in range(3):
        state.advance(batches)
    before = copy.deepcopy(state.state_dict())
    worst = []

    def evaluate(generator: torch.nn.Module, seed: int) -> dict[str, float]:
        worst.append(max(abs(norm - 1) for norm in spectral_norms(generator).values()))
        assert not generator.training
        torch.rand(3)  # the numbers that an evaluation draws are not the training's
        return {"swd": float(generator(torch.ones(2, state.config.z_dim)).sum())}

    scores = []
    for _ in range(2):
        train_celeba.evaluate_average(state, evaluate)
        scores.append(state.scores)
    assert scores[0] == scores[1]
    assert worst[0] < 1e-5  # rounding in float32
    assert max(abs(norm - 1) for norm in spectral_norms(state.average).values()) > 1e-3
    state.best, state.scores = before["best"], before["scores"]
    drawn = [draw(state, tmp_path)["samples"].read_bytes() for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert_same(state.state_dict(), before)
    monkeypatch.setattr(sampling, "recalibrated", lambda average: average)
    assert draw(state, tmp_path)["samples"].read_bytes() != drawn[0]


def test_a_diverged_run_ends_in_one_line(tmp_path):
    state = tiny_state()
    with torch.no_grad():
        next(state.average.parameters()).fill_(float("nan"))
    for use in (
        lambda: draw(state, tmp_path),
        lambda: train_celeba.evaluate_average(state, lambda *_: pytest.fail("evaluated")),
    ):
        with pytest.raises(SystemExit, match=r"step 0: training has diverged, the averaged generator holds"):
            use()


def test_discriminator_steps(tmp_path):
    train(tmp_path, "--steps", "2", "--d-steps", "3")
    assert checkpoint(tmp_path)["images"] == 2 * 3 * 4
    steps = {state["step"].item() for state in checkpoint(tmp_path)["discriminator_optimizer"]["state"].values()}
    assert steps == {6}


@pytest.mark.parametrize(("loss", "normalized"), [("hinge", True), ("wgan-gp", False), ("relativistic", True)])
def test_losses(loss, normalized, tmp_path, capsys):
    train(tmp_path, "--loss", loss, "--steps", "2")
    assert ("without spectral norm" in capsys.readouterr().out) is not normalized
    state = checkpoint(tmp_path)
    assert any("parametrizations" in name for name in state["discriminator"]) is normalized
    assert any("parametrizations" in name for name in state["generator"])


def test_the_weight_of_a_penalty():
    assert [Config(loss=loss).penalty for loss in LOSSES] == [0.0, 10.0, 1.0]  # the papers' own
    assert Config(loss="relativistic", penalty_weight="0.05").penalty == 0.05
    assert [Config(loss=loss).has_penalty for loss in LOSSES] == [False, True, True]


def test_in_pieces_every_step_sees_the_whole_batch(tmp_path):
    train(tmp_path, "--steps", "3", "--grad-accum-steps", "2", "--d-steps", "2")
    state = checkpoint(tmp_path)
    assert state["images"] == 3 * 2 * 4
    assert {value["step"].item() for value in state["generator_optimizer"]["state"].values()} == {3}


def test_linear_decay_ends_at_zero(tmp_path):
    train(tmp_path, "--steps", "6", "--lr-decay", "linear", "--decay-from", "2", "--lr-g", "0.004", "--log-every", "1")
    rates = [0.004, 0.004, 0.003, 0.002, 0.001, 0.0]  # for the step after each line
    assert [line["lr_g"] for line in lines(tmp_path)] == pytest.approx(rates)
    (group,) = checkpoint(tmp_path)["generator_optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(0.0)
    resume(tmp_path, "--steps", "10")  # of a longer run the rates are those of its own line
    assert [line["lr_g"] for line in lines(tmp_path)][6:] == pytest.approx([0.0015, 0.001, 0.0005, 0.0])


@pytest.mark.parametrize(("loss", "penalties"), [("hinge", 0), ("wgan-gp", 2), ("relativistic", 4)])
def test_half_precision_keeps_weights_in_float32(loss, penalties, tmp_path, monkeypatch):
    seen = []

    def watch(name: str) -> None:
        penalty = getattr(objectives, name)

        def watched(discriminator: torch.nn.Module, images: torch.Tensor, *more: object, **named: object) -> object:
            seen.append((images.dtype, torch.is_autocast_enabled("cpu")))
            return penalty(discriminator, images, *more, **named)

        monkeypatch.setattr(objectives, name, watched)

    watch("gradient_penalty")
    watch("zero_centered_gradient_penalty")
    train(tmp_path, "--steps", "2", "--precision", "bf16", "--loss", loss)
    tensors = [value for _, value in leaves(checkpoint(tmp_path)) if isinstance(value, torch.Tensor)]
    assert torch.bfloat16 not in {tensor.dtype for tensor in tensors}
    assert seen == [(torch.float32, False)] * penalties
    state, dtypes = tiny_state(precision="bf16"), []
    for network in (state.generator, state.discriminator):
        network.register_forward_hook(lambda *passed: dtypes.append(passed[-1].dtype))
    state.advance(noise(state))
    assert dtypes == [torch.bfloat16] * 3  # G, D in its own step and in G's


def test_channels_last_changes_the_layout_alone():
    losses = []
    for layout in ("yes", "no"):
        state = tiny_state(channels_last=layout)
        losses.append(state.advance(noise(state)))
        wide = [weight for weight in state.discriminator.parameters() if weight.ndim == 4 and min(weight.shape[1:]) > 1]
        assert all(weight.is_contiguous(memory_format=torch.channels_last) is (layout == "yes") for weight in wide)
    torch.testing.assert_close(*losses)


@pytest.mark.slow  # tracing both networks takes many seconds; aot_eager spares the compiler, which changes no graph
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'>:DeprecationWarning")  # the tracer's own
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("loss", ["hinge", "wgan-gp"])
def test_compiled(loss, tmp_path, monkeypatch, capsys):
    compiled = []
    plain = torch.nn.Module.compile

    def compile_without_inductor(module: torch.nn.Module, **more: object) -> None:
        compiled.append(type(module).__name__)
        plain(module, backend="aot_eager", **more)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_inductor)
    torch._dynamo.reset()
    train(tmp_path / "compiled", "--steps", "3", "--compile", "--loss", loss, "--image-size", "8", "--log-every", "1")
    assert compiled == ["SAGANGenerator"] + ["SAGANDiscriminator"] * (loss == "hinge")
    assert ("D not" in capsys.readouterr().out) is (loss == "wgan-gp")
    train(tmp_path / "eager", "--steps", "3", "--loss", loss, "--image-size", "8", "--log-every", "1")
    for one, other in zip(lines(tmp_path / "compiled"), lines(tmp_path / "eager"), strict=True):
        assert (one["loss_d"], one["loss_g"]) == pytest.approx((other["loss_d"], other["loss_g"]), rel=1e-4, abs=1e-5)
    eager, traced = (checkpoint(tmp_path / out)["generator"] for out in ("eager", "compiled"))
    assert eager.keys() == traced.keys()
    torch._dynamo.reset()


def test_digits_have_one_channel_and_are_not_mirrored(tmp_path, monkeypatch):
    flips = []
    plain = InfiniteBatchSampler.__init__

    def watched(self: InfiniteBatchSampler, *args: int, flip: bool, **more: int) -> None:
        flips.append(flip)
        plain(self, *args, flip=flip, **more)

    monkeypatch.setattr(InfiniteBatchSampler, "__init__", watched)
    train(tmp_path, "--image-size", "28", "--steps", "1")
    assert flips == [False, False]  # of reals.png, and of the training
    assert checkpoint(tmp_path)["generator"]["to_image.weight"].shape[1] == 1


def test_dry_run_writes_everything(tmp_path, capsys):
    assert train(tmp_path, "--dry-run") == 0
    out, *made = [Path(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[-7:]]
    assert out == tmp_path / "dry-run"
    names = ["samples-000003.png", "attention-000003.png", "attention-000003.html", "checkpoint-000003.pt"]
    assert made == [out / name for name in [*names, "log.jsonl", "best.pt"]]
    assert all(path.exists() for path in made)
    assert checkpoint(tmp_path / "dry-run")["step"] == 3


def test_a_dry_run_leaves_nothing_that_a_run_picks_up(tmp_path, capsys):
    settings = ["--resume", "auto", "--save-every", "2"]
    train(tmp_path, *settings, "--dry-run")
    train(tmp_path, *settings, "--steps", "4")
    assert [line["step"] for line in lines(tmp_path)] == [2, 4]
    before = {path: path.read_bytes() for path in tmp_path.glob("*.*")}
    capsys.readouterr()
    train(tmp_path, *settings, "--dry-run")
    assert "training  steps 4 to 7" in capsys.readouterr().out  # from the run's own checkpoint
    assert {path: path.read_bytes() for path in tmp_path.glob("*.*")} == before
    assert checkpoint(tmp_path / "dry-run")["step"] == 7
    train(tmp_path, *settings, "--steps", "6")
    state = checkpoint(tmp_path)
    assert (state["step"], state["config"]["log_every"], state["config"]["eval_samples"]) == (6, 50, 2000)
    assert state["config"]["out"] == str(tmp_path)


def test_a_dry_run_uses_the_cache_of_the_run(folder, tmp_path):
    train(tmp_path / "run", "--data", str(folder), "--dry-run")
    assert list((tmp_path / "cache").glob("*.npy"))


@pytest.mark.parametrize(
    ("data", "out"),
    [
        ("faces", "faces"),
        ("faces:200", "faces-200"),
        ("~/celeba.zip", "celeba"),
        (".", "here"),
        ("..", "above"),
        ("/", "images"),
        ("a/..", "here"),
    ],
)
def test_the_folder_is_named_after_the_data(data, out, tmp_path, monkeypatch):
    (tmp_path / "above" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above" / "here")
    assert default_out(data) == f"runs/{out}"


def test_without_attention(tmp_path, capsys):
    train(tmp_path, "--g-attention", "none", "--d-attention", "4", "--steps", "1")
    assert "attention-" not in capsys.readouterr().out
    assert set(lines(tmp_path)[0]["gamma"]) == {"D.attention.4"}


def test_the_best_generator_is_kept(tmp_path):
    scores = iter([3.0, 2.0, 5.0, 1.0, 4.0])
    evaluated = []

    def open_evaluator(config: Config, data: object, device: torch.device) -> train_celeba.Evaluate:
        def evaluate(generator: torch.nn.Module, seed: int) -> dict[str, float]:
            torch.rand(3)  # the numbers that an evaluation draws are not the training's
            evaluated.append((generator.training, seed))
            return {"fid": next(scores), "other": 0.0}

        return evaluate

    settings = ["--eval-every", "2", "--save-every", "3", "--log-every", "100", "--seed", "5"]
    out = tmp_path / "evaluated"
    train(out, *settings, "--steps", "6", open_evaluator=open_evaluator)
    assert evaluated == [(False, 5)] * 3
    assert checkpoint(out, "best.pt")["step"] == 4
    assert [line["scores"]["fid"] for line in lines(out) if "scores" in line] == [3.0, 2.0, 5.0]
    train_celeba.main(["--resume", str(out), "--steps", "10"], open_evaluator=open_evaluator)
    assert checkpoint(out, "best.pt")["step"] == 8
    train(tmp_path / "plain", *settings, "--steps", "10", "--eval-every", "0")
    state, plain = checkpoint(out), checkpoint(tmp_path / "plain")
    assert (state.pop("best"), state.pop("scores")) == ({"fid": 1.0}, {"fid": 4.0, "other": 0.0})
    assert (plain.pop("best"), plain.pop("scores")) == ({}, {})
    assert_same(state, plain, apart_from=("/config/out", "/config/eval_every"))


def test_scores_of_another_kind_are_not_compared(tmp_path):
    """A machine without Inception has another first score, on another scale."""
    settings = ["--eval-every", "1", "--save-every", "1"]
    train(tmp_path, *settings, "--steps", "1", open_evaluator=lambda *_: lambda *_: {"swd": 7.0})
    train_celeba.main(["--resume", str(tmp_path), "--steps", "2"], open_evaluator=lambda *_: lambda *_: {"fid": 50.0})
    assert checkpoint(tmp_path, "best.pt")["step"] == 2
    train_celeba.main(["--resume", str(tmp_path), "--steps", "3"], open_evaluator=lambda *_: lambda *_: {"swd": 8.0})
    assert checkpoint(tmp_path, "best.pt")["step"] == 2
    assert checkpoint(tmp_path)["best"] == {"swd": 7.0, "fid": 50.0}


def test_a_run_is_evaluated_without_a_download(tmp_path, capsys):
    train(tmp_path, "--steps", "2", "--eval-every", "1", "--eval-samples", "16")
    assert "evaluate  16 images of each kind, every 1 steps" in capsys.readouterr().out
    assert all(line["scores"]["swd"] > 0 for line in lines(tmp_path))
    assert "best" in checkpoint(tmp_path, "best.pt")


def test_what_cannot_be_evaluated_is_said(tmp_path, capsys):
    train(tmp_path / "small", "--steps", "1", "--eval-every", "1", "--image-size", "8", "--data", "faces")
    assert "evaluate  no: it needs images of 16 pixels or more" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"train_celeba\.py: .*(torch-fidelity|Inception)"):
        train(tmp_path, "--steps", "1", "--eval-every", "1", "--inception", "/nowhere")


def test_losses_that_are_not_finite_stop_the_run_and_not_the_checkpoint(tmp_path, monkeypatch):
    hinge = objectives.hinge_discriminator_loss
    calls = []

    def diverging(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return hinge(real, fake) * (float("nan") if len(calls) > 2 else 1)

    monkeypatch.setattr(objectives, "hinge_discriminator_loss", diverging)
    with pytest.raises(SystemExit, match=r"step 4: .*no longer finite: loss of D nan, .*D's \d+ weight.* step 2, loss"):
        train(tmp_path, "--steps", "9", "--save-every", "2")
    state = checkpoint(tmp_path)
    assert state["step"] == 2
    weights = {name: value for name, value in state.items() if name != "best"}
    assert all(value.isfinite().all() for _, value in leaves(weights) if isinstance(value, torch.Tensor))


def test_the_settings_lie_beside_the_log(tmp_path):
    train(tmp_path, "--steps", "1", "--lr-g", "0.003")
    assert json.loads((tmp_path / "config.json").read_text()) == checkpoint(tmp_path)["config"]
    resume(tmp_path, "--steps", "2")
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["steps"], config["lr_g"]) == (2, 0.003)
    assert config == checkpoint(tmp_path)["config"]


def test_the_last_lines_name_the_best_checkpoint_and_the_next_commands(tmp_path, capsys):
    settings = ["--steps", "1", "--eval-every", "1"]
    train(tmp_path, *settings, open_evaluator=lambda *_: lambda *_: {"swd": 7.0})
    *_, best, generate, show, report = capsys.readouterr().out.splitlines()
    assert best.split() == ["best", str(tmp_path / "best.pt")]
    for line, name in ((generate, "generate"), (show, "show_attention"), (report, "report")):
        script = re.search(rf"python examples/({name}\.py) {re.escape(str(tmp_path))}", line)
        assert script
        assert (Path(train_celeba.__file__).parent / script[1]).exists()


def test_the_next_commands_run_without_activating_an_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    assert interpreter() == str(Path(".venv", "bin", "python"))
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3.12")
    assert interpreter() == "python"


def test_the_progress_bar_shows_the_losses_of_the_last_line(tmp_path, capsys):
    train(tmp_path, "--steps", "2")
    (line,) = lines(tmp_path)
    assert f"D {line['loss_d']:.3f} G {line['loss_g']:.3f}" in capsys.readouterr().err.splitlines()[-1]


def test_a_recipe_stands_for_the_flags_in_it(tmp_path):
    recipe = tmp_path / "recipe.txt"
    recipe.write_text("# --seed 5\n--lr-g 0.003 --steps 9  # --seed 6\n\n--data 'my faces'\n")
    given = read_arguments(Config, ["--lr-g", "1", f"@{recipe}", "--steps", "1"], "")
    chosen = {"lr_g": 0.003, "steps": 1, "data": "my faces"}  # what is given last
    assert given == chosen | {"resume": None, "dry_run": False}


# ------------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("loss", ["hinge", "wgan-gp"])
def test_a_resumed_run_equals_an_uninterrupted_one(loss, folder, tmp_path):
    settings = ["--data", str(folder), "--no-cache", "--num-workers", "1", "--loss", loss, "--lr-g", "0.01"]
    settings += ["--lr-decay", "linear", "--log-every", "1", "--tensorboard"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(whole, *settings, "--steps", "5", "--sample-every", "2")
    train(halves, *settings, "--steps", "5", "--save-every", "3")
    (halves / "checkpoint-000005.pt").unlink()  # as if it had been killed at step 3
    assert resume(halves) == 0
    assert_same(
        checkpoint(whole),
        checkpoint(halves),
        apart_from=("/config/out", "/config/sample_every", "/config/save_every"),
    )
    logs = [[{**line, "images_per_second": 0} for line in lines(out)] for out in (whole, halves)]
    assert logs[0] == logs[1]


def test_a_checkpoint_holds_everything(tmp_path):
    train(tmp_path, "--steps", "1")
    state = checkpoint(tmp_path)
    assert (state["step"], state["images"], state["classes"], state["scores"]) == (1, 4, {}, {})
    assert state["config"]["image_size"] == 16
    assert "random" not in state  # each step starts its random numbers anew
    assert state["versions"].keys() == {"python", "torch", "torch_sagan"}
    assert state["average"]["to_image.weight"].shape == state["generator"]["to_image.weight"].shape
    for network, rate in (("generator", 1e-4), ("discriminator", 4e-4)):
        (group,) = state[f"{network}_optimizer"]["param_groups"]
        assert (group["lr"], group["betas"]) == (rate, (0.0, 0.9))
        assert len(state[f"{network}_optimizer"]["state"]) == len(group["params"])
        assert state[f"{network}_scheduler"]["last_epoch"] == 1


def test_resuming_keeps_the_settings_except_those_given(tmp_path, capsys):
    train(tmp_path, "--steps", "1", "--lr-g", "0.003", "--seed", "7")
    resume(tmp_path / "checkpoint.pt", "--steps", "2", "--lr-d", "0.007", "--seed", "7")
    state = checkpoint(tmp_path)
    assert state["config"]["seed"] == 7
    assert state["generator_optimizer"]["param_groups"][0]["lr"] == 0.003
    assert state["discriminator_optimizer"]["param_groups"][0]["lr"] == 0.007
    assert "changed   --steps 2 (it has 1), --lr-d 0.007 (it has 0.0004)\n" in capsys.readouterr().out


@pytest.mark.parametrize(("before", "after"), [("no", "yes"), ("yes", "no")])
def test_moments_take_the_layout_of_their_weights(before, after):
    """The next update is bitwise that of a run that never changed its layout. (Gradients are given, since convolutions
    of another layout round differently.)"""
    first = tiny_state(channels_last=before, beta1=0.5, lr_g=0.01, lr_d=0.01)
    drawn = noise(first)
    for _ in range(2):
        first.advance(drawn)
    saved = copy.deepcopy(first.state_dict())
    updated = []
    for layout in (before, after):
        state = tiny_state(channels_last=layout, beta1=0.5, lr_g=0.01, lr_d=0.01)
        state.load_state_dict(copy.deepcopy(saved))
        rng = torch.Generator().manual_seed(1)
        for network in ("generator", "discriminator"):
            optimizer = getattr(state, f"{network}_optimizer")
            for weight in getattr(state, network).parameters():
                for moment in ("exp_avg", "exp_avg_sq"):
                    assert optimizer.state[weight][moment].stride() == weight.stride()
                weight.grad = torch.empty_like(weight).copy_(torch.randn(weight.shape, generator=rng))
            optimizer.step()
        updated.append([dict(getattr(state, network).named_parameters()) for network in ("generator", "discriminator")])
    changed = 0
    for one, other in zip(*updated, strict=True):
        for name, weight in one.items():
            assert torch.equal(weight, other[name]), name
            changed += weight.stride() != other[name].stride()
    assert changed > 2


def test_how_adam_computes_is_a_setting_of_the_run_and_not_of_the_checkpoint():
    state = tiny_state()
    state.advance(noise(state))
    saved, groups = state.state_dict(), copy.deepcopy(state.generator_optimizer.state_dict()["param_groups"])
    (group,) = saved["generator_optimizer"]["param_groups"]
    other = {
        "fused": None,
        "foreach": True,
        "capturable": True,
        "lr": torch.tensor(0.5),
        "eps": 1.0,
        "betas": (0.1, 0.2),
    }
    saved["generator_optimizer"]["param_groups"] = [group | other]
    state.load_state_dict(saved)
    assert state.generator_optimizer.state_dict()["param_groups"] == groups


def test_auto_begins_goes_on_and_ends(tmp_path, capsys):
    for steps in ("2", "4", "4"):
        assert train(tmp_path, "--resume", "auto", "--steps", steps) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"complete  {tmp_path} is at step 4 (--steps 4); a larger --steps trains on"
    assert [line["step"] for line in lines(tmp_path)] == [2, 4]
    assert not list(tmp_path.glob("earlier-*"))


def test_no_file_is_read_where_reading_is_not_safe(tmp_path, monkeypatch):
    train(tmp_path, "--steps", "1")
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.5.1+cpu"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("read"))
    message = r"^torch 2\.5\.1\+cpu can execute code .*CVE-2025-32434\): the examples need 2\.6 or newer$"
    for refused in (
        lambda: train(tmp_path / "new", "--steps", "1"),  # it could not be resumed
        lambda: checkpointing.load(tmp_path / "checkpoint.pt"),
        lambda: model_card.open_generator(tmp_path),
    ):
        with pytest.raises(SystemExit, match=message):
            refused()
    assert not (tmp_path / "new").exists()


def test_other_versions_are_told(tmp_path, capsys):
    train(tmp_path, "--steps", "1")
    state = checkpoint(tmp_path)
    state["versions"]["torch"] = "1.0"
    torch.save(state, tmp_path / "checkpoint-000001.pt")
    resume(tmp_path, "--steps", "2")
    assert "made with torch 1.0\n" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- errors


@pytest.fixture(scope="module")
def troubles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Empty and damaged folders, files that are not checkpoints, and a run of one step."""
    root = tmp_path_factory.mktemp("troubles")
    (root / "empty").mkdir()
    (root / "damaged").mkdir()
    for name in ("file", "damaged/1.jpg", "damaged/2.png"):
        (root / name).write_text("hello")
    torch.save({"weights": torch.zeros(1)}, root / "other.pt")
    train(root / "run", "--steps", "1")
    state = checkpoint(root / "run")
    torch.save(state | {"config": state["config"] | {"colour": 1}}, root / "newer.pt")
    edited = {"loss": {"loss": "foo"}, "lr": {"lr_g": None}, "steps": {"steps": 2.5}, "z": {"z_dim": 9}}
    for name, config in edited.items():
        torch.save(state | {"config": state["config"] | config}, root / f"edited-{name}.pt")
    for name in ("average", "losses", "generator_optimizer"):
        torch.save({part: value for part, value in state.items() if part != name}, root / f"without-{name}.pt")
    torch.save(state | {"generator_optimizer": {"state": None}}, root / "moments.pt")
    torch.save(state | {"step": "one"}, root / "step.pt")
    torch.save(state | {"classes": {"even": 1, "odd": 1}}, root / "classes.pt")
    return root


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere/at/all"], r"nowhere/at/all: no such folder"),
        (["--data", "{tmp}/empty"], r"empty: no images in this folder or below it"),
        (["--data", "{tmp}/damaged"], r"none of the 2 images can be read"),
        (["--data", "{tmp}/file"], r"expected a folder of images"),
        (["--image-size", "50"], r"image_size .* got 50"),
        (["--g-attention", "5"], r"\[5\]"),
        (["--g-attention", "16,x"], r"--g-attention 16,x: expected sizes of feature maps such as 16 or 16,32"),
        (["--d-attention", ""], r"--d-attention : expected sizes"),
        (["--batch-size", "0"], r"--batch-size must be at least 1, got 0"),
        (["--batch-size", "many"], r"--batch-size: invalid int value: 'many'"),
        (["--learning-rate", "1"], r"unrecognized arguments: --learning-rate 1"),
        (["--lr-g", "nan"], r"--lr-g must be at least 0, got nan"),
        (["--data", ""], r"--data is empty: expected faces, digits, a folder or an archive"),
        (["--out", __file__], r"--out .*: expected a folder, but there is a file of this name"),
        (["--seed", str(2**63)], r"--seed must be below 2\^62, got 9223372036854775808"),
        (["--device", "meta"], r"--device meta: .*META"),
        (["--penalty-weight", "5"], r"--penalty-weight 5: --loss hinge has no gradient penalty"),
        *(
            (
                ["--loss", "wgan-gp", "--penalty-weight", weight],
                rf"--penalty-weight must be auto or a number of at least 0, got {weight}$",
            )
            for weight in ("much", "-1", "nan", "inf")
        ),
        (["@nowhere.txt"], r"No such file or directory: 'nowhere\.txt'"),
        (["--decay-from", "2"], r"--decay-from 2: nothing decays without --lr-decay linear"),
        (
            ["--lr-decay", "linear", "--decay-from", "9", "--steps", "9"],
            r"--decay-from 9: the run ends at step 9",
        ),
        (
            ["--grad-accum-steps", "3"],
            r"--batch-size 4 cannot be divided evenly \(processes × --grad-accum-steps: 1 × 3\)",
        ),
        (["--ema-decay", "2"], r"--ema-decay must be between 0 and 1"),
        (["--device", "toaster"], r"--device toaster"),
        (["--resume", "nowhere.pt"], r"nowhere\.pt: no such file"),
        (["--resume", "{tmp}/empty"], r"no checkpoint in this folder"),
        (["--resume", "{tmp}/file"], r"cannot be read as a checkpoint"),
        (["--resume", "{tmp}/other.pt"], r"not a checkpoint of this trainer"),
        (
            ["--resume", "{tmp}/run", "--base-channels", "8", "--lr-g", "1", "--loss", "wgan-gp"],
            r"other settings: --base-channels 8 \(it has 4\), --loss wgan-gp \(it has hinge\)$",
        ),
        (
            ["--resume", "{tmp}/run", "--data", "faces", "--steps", "2"],
            r"its networks have image_channels=1, but the images of --data have 3$",
        ),
        (
            ["--resume", "{tmp}/classes.pt", "--steps", "2"],
            r"its networks have other classes \(even, odd\) than --data digits \(none\)$",
        ),
        (["--resume", "{tmp}/edited-z.pt", "--steps", "2"], r"its weights do not fit the networks of its settings$"),
        (["--resume", "{tmp}/run", "--steps", "1"], r"--steps 1: the checkpoint is at step 1 already"),
        (["--resume", "{tmp}/newer.pt"], r"another version, with settings that this version lacks: colour"),
        (["--resume", "{tmp}/edited-loss.pt"], r"--loss must be one of hinge, wgan-gp, relativistic, got foo"),
        (["--resume", "{tmp}/edited-lr.pt"], r"--lr-g must be of type float, got None"),
        (["--resume", "{tmp}/edited-steps.pt"], r"--steps must be of type int, got 2\.5"),
        (["--resume", "{tmp}/without-average.pt"], r"not a checkpoint of this trainer \(average\)"),
        (["--resume", "{tmp}/without-generator_optimizer.pt"], r"of this trainer \(generator_optimizer\)"),
        (["--resume", "{tmp}/without-losses.pt"], r"it is not a checkpoint of this trainer \(losses\)"),
        (["--resume", "{tmp}/step.pt"], r"it is not a checkpoint of this trainer \(step\)"),
        (["--resume", "{tmp}/moments.pt", "--steps", "2"], r"moments\.pt: the checkpoint was edited or damaged: "),
        (["--out", "{tmp}/file/run"], r"file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line(arguments, message, troubles, tmp_path, monkeypatch):
    """And no file is left in the folder."""
    monkeypatch.chdir(tmp_path)
    arguments = [argument.format(tmp=troubles) for argument in arguments]
    with pytest.raises(SystemExit, match=message) as error:
        train_celeba.main(arguments if "--resume" in arguments else [*TINY, "--data", "digits", *arguments])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"--device cuda: .*(CUDA|NVIDIA)"):
        train(tmp_path, "--device", "cuda")


TOO_LARGE = 10**15  # bytes: more than an address can name, so that no memory is used


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        (
            lambda *_: torch.empty(TOO_LARGE, dtype=torch.uint8),
            r"can't allocate memory: you tried to allocate 10{15} b",
        ),
        (lambda *_: np.empty(TOO_LARGE, np.uint8), r"Unable to allocate 909\. TiB for an array"),
    ],
    ids=["torch", "numpy"],
)
def test_out_of_memory_is_one_line(fails, message, tmp_path, monkeypatch):
    for name, told in (
        ("training.step.discriminator_step", rf"step 1: {message}.*--grad-accum-steps needs less$"),
        ("train_celeba.draw", message),
    ):
        monkeypatch.setattr(name, fails)
        with pytest.raises(SystemExit, match=rf"^train_celeba\.py: .*{told}") as error:
            train(tmp_path, "--steps", "2", "--sample-every", "1")
        assert "\n" not in str(error.value)
        monkeypatch.undo()


def test_out_of_memory_on_a_gpu_is_one_line(tmp_path, monkeypatch):
    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 2 GiB.\nSee the documentation")

    monkeypatch.setattr("training.step.discriminator_step", fails)
    with pytest.raises(SystemExit, match=r"step 1: Tried to allocate 2 GiB\. .*--grad-accum-steps") as error:
        train(tmp_path)
    assert "\n" not in str(error.value)


def test_other_errors_keep_their_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr("training.step.discriminator_step", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        train(tmp_path)


def test_no_compiler_is_one_line(tmp_path, monkeypatch):
    def fails(*_: object) -> None:
        raise torch._dynamo.exc.TorchDynamoException("No working C++ compiler found\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr("training.step.discriminator_step", fails)
    with pytest.raises(SystemExit, match=r"--compile: No working C\+\+ compiler found$"):
        train(tmp_path)


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", rb"\xe9\u5b57\udcff"), ("utf-8", "é字".encode() + rb"\udcff")]
)
def test_what_a_terminal_cannot_show_is_escaped(encoding, shown, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", terminal)
    with pytest.raises(SystemExit) as end:
        script(lambda: print("é字\udcff"))  # the last from a file name that is not UTF-8
    assert end.value.code is None
    terminal.flush()
    assert terminal.buffer.getvalue() == shown + b"\n"


def test_ctrl_c_has_its_own_status():
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match=r"^130$"):
        script(interrupted)


def test_help_tells_every_default(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        train_celeba.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "data:",
        "networks:",
        "training:",
        "speed:",
        "output:",
        "evaluation:",
        "(default: 0.0004)",
        "pixels",
        "--resume PATH",
    ):
        assert part in text


class Readings(TorchDispatchMode):
    """Counts the operations that copy a number from a tensor to Python, which would wait for the GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        packet = function.overloadpacket
        self.count += packet in (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero, torch.ops.aten.nonzero)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_step_reads_no_number_back(pieces):
    # With wgan-gp, since the gradient of D's spectral norm has a way of its own on the CPU that does.
    state = tiny_state(loss="wgan-gp", grad_accum_steps=pieces, lr_decay="linear")
    with Readings() as readings:
        state.advance(noise(state))
    assert readings.count == 0
    with Readings() as readings:
        state.numbers()
    assert readings.count == len(state.numbers()["gamma"]) > 0
