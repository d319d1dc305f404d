"""The command line: every wrong setting is one line, recipes stand for flags, and the help tells every default."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import train_celeba
from tiny_runs import TINY, checkpoint, train
from training.flags import Config
from training.script import read_arguments


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
        (["--data", "{tmp}/damaged"], r"none of the 2 images can be read, .*damaged/1\.jpg: not in a format"),
        (["--data", "{tmp}/file"], r"expected a folder of images"),
        (["--image-size", "50"], r"image_size .* got 50"),
        (["--g-attention", "5"], r"\[5\]"),
        (["--g-attention", "16,x"], r"--g-attention 16,x: expected sizes of feature maps such as 16 or 16,32"),
        (["--d-attention", ""], r"--d-attention : expected sizes"),
        (["--batch-size", "0"], r"--batch-size must be at least 1, got 0"),
        (["--batch-size", "many"], r"--batch-size: invalid int value: 'many'"),
        (["--learning-rate", "1"], r"unrecognized arguments: --learning-rate 1"),
        (["--lr-g", "nan"], r"--lr-g must be at least 0, got nan"),
        (["--data", ""], r"--data is empty: expected a name such as faces or mnist, a folder or an archive"),
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
        (["@nowhere.txt"], r"^train_celeba\.py: @nowhere\.txt: No such file or directory"),
        (["--conditioning", "latent"], r"--conditioning latent: with --classes none there is no class"),
        (
            ["--upsampling", "transposed", "--architecture", "resnet"],
            r"--upsampling transposed: --architecture resnet has nearest alone$",
        ),
        (["--g-widths", "8,x"], r"--g-widths 8,x: expected numbers of channels such as 256,256,256,256, or auto"),
        (["--d-widths", "8"], r"widths: expected 2 numbers of channels, of feature maps of the sizes 8, 4, got \(8,\)"),
        (
            ["--d-downsampling-blocks", "2"],
            r"downsampling_blocks and shortcut_after_relu are for architecture 'resnet'",
        ),
        (["--normalize-classes"], r"--normalize-classes: batch norms have no classes without --classes"),
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
def test_errors_are_one_line(
    arguments: list[str], message: str, troubles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no file is left in the folder."""
    monkeypatch.chdir(tmp_path)
    arguments = [argument.format(tmp=troubles) for argument in arguments]
    with pytest.raises(SystemExit, match=message) as error:
        train_celeba.main(arguments if "--resume" in arguments else [*TINY, "--data", "digits", *arguments])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--device cuda: .*(CUDA|NVIDIA)"):
        train(tmp_path, "--device", "cuda")


def test_help_tells_every_default(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_a_recipe_stands_for_the_flags_in_it(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.txt"
    recipe.write_text("# --seed 5\n--lr-g 0.003 --steps 9  # --seed 6\n\n--data 'my faces'\n")
    given = read_arguments(Config, ["--lr-g", "1", f"@{recipe}", "--steps", "1"], "")
    chosen = {"lr_g": 0.003, "steps": 1, "data": "my faces"}  # what is given last
    assert given == chosen | {"resume": None, "dry_run": False}
