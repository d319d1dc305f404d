"""Runs in processes of their own that fail or are killed: they end in one line, and go on as if nothing had been."""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from processes import started
from tiny_runs import SCRIPT, assert_same, checkpoint, lines, train


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    photograph = load_sample_images().images[0]
    for i in range(10):
        (root / "ab"[i % 2]).mkdir(exist_ok=True)  # two classes, for a run that wants classes
        Image.fromarray(photograph[20 * i : 20 * i + 180, 40 * i : 40 * i + 180]).save(root / "ab"[i % 2] / f"{i}.png")
    return root


def images(out: Path) -> dict[str, bytes]:
    """The images of a run, and its attention explorer."""
    return {path.name: path.read_bytes() for path in out.glob("*.*") if path.suffix in (".png", ".html")}


def names(out: Path, pattern: str = "checkpoint-*.pt") -> list[str]:
    return sorted(path.name for path in out.glob(pattern))


# A run in a process of its own imports torch, which takes seconds.


def start(out: Path, image_folder: Path, *arguments: str) -> AbstractContextManager[subprocess.Popen[str]]:
    command = [sys.executable, *SCRIPT, "--data", str(image_folder), "--out", str(out), "--num-workers", "1"]
    return started([*command, *arguments])


def wait_for_a_line(out: Path, process: subprocess.Popen[str], more_than: int = 0) -> None:
    deadline = time.monotonic() + 120
    log = out / "log.jsonl"
    while not (log.exists() and log.stat().st_size > more_than):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


SETUPS = {
    "cache": ["--eval-every", "20", "--eval-samples", "16"],
    "workers": ["--no-cache", "--num-workers", "2"],
    "wgan-gp": ["--loss", "wgan-gp", "--grad-accum-steps", "2", "--d-steps", "2"],
    "classes": ["--architecture", "resnet", "--classes", "own", "--augment", "color,translation,cutout"],
}


@pytest.mark.exhaustive  # of such ends, `make test` has the one with a worker that is suspended, in test_loading.py
@pytest.mark.slow  # starts a process
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and prlimit")
@pytest.mark.parametrize("fault", ["full disk", "worker killed", "images gone"])
def test_whatever_fails_beside_workers_the_process_ends_with_one_line(
    fault: str, image_folder: Path, tmp_path: Path
) -> None:
    images, out = tmp_path / "images", tmp_path / "run"
    shutil.copytree(image_folder, images)
    with start(out, images, "--no-cache", "--log-every", "1", "--save-every", "3") as process:
        wait_for_a_line(out, process)
        if fault == "full disk":  # or as good as full: a checkpoint has more than 100 kB
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
        elif fault == "worker killed":
            (worker,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(worker), signal.SIGKILL)
        else:
            shutil.rmtree(images)
        _, err = process.communicate(timeout=60)  # it takes seconds; it once took for ever
    assert process.returncode == 1
    assert "Traceback" not in err
    told = {
        "full disk": r"cannot save .*checkpoint-\d+\.pt: .*File too large",
        "worker killed": r"train_celeba\.py: step \d+: no more images: \S",
        "images gone": r"train_celeba\.py: step \d+: no more images: none of the 10 images can be read",
    }
    assert re.search(rf"^{told[fault]}.*\n\Z", err, re.MULTILINE)


@pytest.mark.exhaustive
@pytest.mark.slow  # starts a process for each interruption
@pytest.mark.parametrize("setup", SETUPS)
def test_interrupted_at_random_moments_a_run_ends_as_if_it_never_was(
    setup: str, image_folder: Path, tmp_path: Path
) -> None:
    """Two kills of one setup, Ctrl-C and SIGTERM; with SAGAN_KILLS in the environment that many kills of each setup."""
    if setup != "cache" and "SAGAN_KILLS" not in os.environ:
        pytest.skip("only with SAGAN_KILLS")
    rng = random.Random(int(os.environ.get("SAGAN_KILLS_SEED", "0")))
    kills = int(os.environ.get("SAGAN_KILLS", "2"))
    interruptions = [signal.SIGKILL] * kills + [signal.SIGINT, signal.SIGTERM]
    rng.shuffle(interruptions)
    settings = ["--num-workers", "1", *SETUPS[setup], "--steps", str(60 * (len(interruptions) + 1)), "--keep-last", "2"]
    settings += ["--save-every", "6", "--log-every", "4", "--sample-every", "10"]
    out, log = tmp_path / "interrupted", tmp_path / "interrupted" / "log.jsonl"
    stopped = []
    for number in interruptions:
        with start(out, image_folder, "--resume", "auto", *settings) as process:
            if number != signal.SIGKILL or rng.random() < 0.8:  # while it trains
                for _ in range(4):  # RunLog writes the log anew; then come three lines, and with them a checkpoint
                    wait_for_a_line(out, process, more_than=log.stat().st_size if log.exists() else 0)
                time.sleep(rng.uniform(0, 0.4))
            else:  # while it starts
                time.sleep(rng.uniform(0, 8))
            os.killpg(process.pid, number)  # as a terminal, torchrun and schedulers do it: to the workers too
            printed, err = process.communicate(timeout=60)
        if number == signal.SIGKILL:
            assert process.returncode == -number, err
        else:
            assert process.returncode == 128 + number, err
            assert "Traceback" not in err
            (step,) = re.findall(r"stopped at step (\d+)", printed)
            stopped.append(int(step))
            assert checkpoint(out)["step"] == int(step)
        print(f"{number.name}, {len(names(out))} checkpoints, {names(out)[-1:]}")
    assert train(out, "--data", str(image_folder), "--resume", "auto", *settings) == 0
    assert train(tmp_path / "whole", "--data", str(image_folder), *settings) == 0
    for name in ["checkpoint.pt", "best.pt"] if setup == "cache" else ["checkpoint.pt"]:
        assert_same(checkpoint(out, name), checkpoint(tmp_path / "whole", name), apart_from=("/config/out",))
    logs = [[{**line, "images_per_second": 0} for line in lines(folder)] for folder in (out, tmp_path / "whole")]
    assert logs[0] == logs[1]
    extra = {f"{kind}-{step:06d}.png" for kind in ("samples", "attention") for step in stopped}
    drawn, expected = images(out), images(tmp_path / "whole")
    assert {name: drawn[name] for name in expected} == expected
    assert set(drawn) - set(expected) <= extra
    assert not list(out.glob("*.new"))
