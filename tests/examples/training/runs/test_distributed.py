"""Several processes: disjoint shares, equal networks, one checkpoint, one voice."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
import time
import zlib
from contextlib import closing
from pathlib import Path

import pytest
import torch
from PIL import Image

import train_celeba
from processes import started
from tiny_runs import SCRIPT, TINY, checkpoint, lines, resume, train
from training.data.image_cache import CHECKSUM
from training.data.sources import InfiniteBatchSampler, digits, open_data
from training.flags import Config
from training.runs.distributed import Ranks, ShardSampler, pick_device
from training.runs.run_lock import RunLock
from training.state import TrainingState

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

# The trainer, and beside it what each process saw and held: the images of each step, all tensors at the end, and the
# threads that are left when Python is about to end.
WITNESS = """
import hashlib, os, sys
sys.path.insert(0, {examples!r})
import torch, train_celeba, training.step
from pathlib import Path
seen, out = [], {out!r} + os.environ["RANK"]
step, train = training.step.discriminator_step, train_celeba.train
def discriminator_step(gan, batch, fakes):
    seen.append([hashlib.sha256(image.numpy().tobytes()).hexdigest() for piece in batch for image in piece.real])
    return step(gan, batch, fakes)
def watched(state, *rest):
    status = train(state, *rest)
    networks = {{name: getattr(state, name).state_dict() for name in ("generator", "discriminator", "average")}}
    torch.save({{"seen": seen, "networks": networks, "random": torch.get_rng_state()}}, out + ".pt")
    return status
training.step.discriminator_step, train_celeba.train = discriminator_step, watched
status = train_celeba.main(sys.argv[1:])
threads = [thread.read_text() for thread in Path("/proc/self/task").glob("*/comm")]
Path(out + ".threads").write_text("".join(threads))
sys.exit(status)
"""


# The trainer, and beside it what each process read to verify or build a cache, and the images that it mapped.
READER = """
import os, sys, zlib
sys.path.insert(0, {examples!r})
import train_celeba
from pathlib import Path
from types import SimpleNamespace
from training.data import image_cache
checked, open_data = [], train_celeba.open_data
def crc32(data, value=0):
    checked.append(len(data))
    return zlib.crc32(data, value)
def watched(*arguments, **more):
    data = open_data(*arguments, **more)
    Path({out!r} + os.environ["RANK"]).write_text(f"{{sum(checked)}} {{zlib.crc32(data.pixels(range(9))[0])}}")
    return data
image_cache.zlib, train_celeba.open_data = SimpleNamespace(crc32=crc32), watched
sys.exit(train_celeba.main(sys.argv[1:]))
"""


def children(pid: int) -> list[int]:
    """Processes that any thread of this one has started."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def environment(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text().split("\0")


def test_shares_are_disjoint_and_together_the_batch() -> None:
    batch = list(range(12))
    for world in (1, 2, 3, 4):
        assert [i for rank in range(world) for i in Ranks(rank, world).shard(batch)] == batch
    rows = torch.arange(12)
    assert torch.equal(torch.cat([Ranks(rank, 3).shard(rows) for rank in range(3)]), rows)
    pieces = list(ShardSampler([batch, batch[::-1]], Ranks(1, 2), parts=3))
    assert pieces == [[6, 7], [8, 9], [10, 11], [5, 4], [3, 2], [1, 0]]


def test_the_order_does_not_depend_on_the_number_of_processes() -> None:
    def drawn(world: int, parts: int) -> list[set]:
        shares = [
            iter(ShardSampler(InfiniteBatchSampler(20, 12, seed=1, flip=True), Ranks(rank, world), parts))
            for rank in range(world)
        ]
        return [{item for share in shares for _ in range(parts) for item in next(share)} for _ in range(4)]

    assert drawn(1, 1) == drawn(2, 1) == drawn(3, 2)


@pytest.mark.exhaustive
@pytest.mark.slow  # torchrun, and two processes that import torch
@pytest.mark.parametrize(
    "settings",
    [
        ["--loss", "wgan-gp", "--d-steps", "2"],
        ["--grad-accum-steps", "2", "--channels-last", "yes"],
    ],
    ids=" ".join,
)
def test_two_processes(settings: list[str], tmp_path: Path) -> None:
    steps = 20 if "--grad-accum-steps" in settings else 4
    witness = tmp_path / "witness.py"
    examples = str(Path(train_celeba.__file__).parent)
    witness.write_text(WITNESS.format(examples=examples, out=str(tmp_path / "rank")))
    command = [*TORCHRUN, str(witness), *TINY, "--no-tensorboard", "--data", "digits", "--out", str(tmp_path / "run")]
    command += [*settings, "--batch-size", "8", "--steps", str(steps), "--lr-g", "0.01", "--lr-d", "0.01"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert done.stdout.count("processes 2, each with 4 images of a batch") == 1
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))

    for name, state in one["networks"].items():
        for key, tensor in state.items():
            assert torch.equal(tensor, two["networks"][name][key]), f"{name}.{key}"
    assert not torch.equal(one["random"], two["random"])
    config = Config(image_size=16, base_channels=4, z_dim=8, device="cpu")
    state = TrainingState(config, image_channels=1, device=torch.device("cpu"))
    untrained = state.generator.named_parameters()
    assert not any(torch.equal(one["networks"]["generator"][name], weight) for name, weight in untrained)

    # A thread of gloo that holds a tensor while Python ends aborts the process.
    for rank in (0, 1):
        threads = (tmp_path / f"rank{rank}.threads").read_text().split()
        assert threads or sys.platform != "linux"
        assert not [name for name in threads if "gloo" in name]

    # Together they saw the images of one order, each once.
    source, order = digits(16), iter(InfiniteBatchSampler(1797, 8, seed=0, flip=False))
    for ours, theirs in zip(one["seen"], two["seen"], strict=True):
        assert len(ours) == len(theirs) == 4
        batch = state.to_device(source[next(order)].images)
        assert ours + theirs == [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in batch]

    # And one process continues.
    assert resume(tmp_path / "run", "--steps", str(steps + 2)) == 0
    d_steps = 2 if "--d-steps" in settings else 1
    assert checkpoint(tmp_path / "run")["images"] == (steps + 2) * 8 * d_steps
    assert [line["step"] for line in lines(tmp_path / "run")] == [steps, steps + 2]


@pytest.mark.slow  # torchrun, and two processes that import torch
@pytest.mark.exhaustive
@pytest.mark.parametrize("damaged", [False, True])
def test_one_process_of_a_machine_verifies_the_cache_for_the_others(damaged: bool, tmp_path: Path) -> None:
    images, cache = tmp_path / "images", tmp_path / "cache"
    images.mkdir()
    for i in range(9):
        Image.new("RGB", (20, 20), (28 * i, 0, 0)).save(images / f"{i}.png")
    data = open_data(str(images), size=16, cache=cache)
    expected = zlib.crc32(data.pixels(range(9))[0])
    (path,) = cache.glob("*.npy")
    if damaged:
        content = bytearray(path.read_bytes())
        content[1000] ^= 1
        path.write_bytes(content)
    reader = tmp_path / "reader.py"
    reader.write_text(READER.format(examples=str(Path(train_celeba.__file__).parent), out=str(tmp_path / "rank")))
    command = [*TORCHRUN, str(reader), *TINY, "--no-tensorboard", "--data", str(images), "--out", str(tmp_path / "run")]
    done = subprocess.run([*command, "--steps", "1"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("damaged, decoded again") == damaged
    (first, mapped), (second, seen) = ((tmp_path / f"rank{rank}").read_text().split() for rank in (0, 1))
    assert int(first) == path.stat().st_size - CHECKSUM or damaged
    assert int(second) == 0
    assert int(mapped) == int(seen) == expected


@pytest.mark.exhaustive  # half a minute of two cores
@pytest.mark.slow  # torchrun, and two processes that import torch
def test_two_processes_go_on_from_one_and_stop_at_the_same_step(tmp_path: Path) -> None:
    train(tmp_path, "--steps", "2", "--batch-size", "8")
    command = [*TORCHRUN, SCRIPT[0], "--resume", str(tmp_path), "--steps", "100000", "--log-every", "1"]
    with started(command) as process:
        deadline = time.monotonic() + 120
        while len((tmp_path / "log.jsonl").read_text().splitlines()) < 5:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGTERM)  # torchrun passes it on
        out, err = process.communicate(timeout=60)
    assert out.count("stopped at step") == 1, err
    state = checkpoint(tmp_path)
    assert state["step"] >= 5
    assert f"checkpoint-{state['step']:06d}.pt" in out
    assert "rank1" not in err  # where torch begins the lines of a traceback


@pytest.mark.exhaustive  # what they agree on is tested below, without processes
@pytest.mark.slow  # torchrun, and two processes that import torch
def test_one_of_the_processes_tells_what_is_wrong(tmp_path: Path) -> None:
    command = [*TORCHRUN, *SCRIPT, "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("nowhere: no such folder") == 1
    assert "rank0" not in done.stderr
    assert done.stdout == ""


@pytest.mark.exhaustive
@pytest.mark.slow  # torchrun, and two processes that import torch
def test_where_torchrun_is_killed_its_processes_end_and_the_next_run_goes_on(tmp_path: Path) -> None:
    command = [*TORCHRUN, *SCRIPT, "--data", "digits", "--out", str(tmp_path), "--log-every", "1"]
    with started(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "log.jsonl").exists() or len((tmp_path / "log.jsonl").read_text().splitlines()) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.kill()
        with closing(RunLock(tmp_path)) as lock:
            lock.acquire()  # the processes hold it until they have saved
    state = checkpoint(tmp_path)
    assert resume(tmp_path, "--steps", str(state["step"] + 1)) == 0
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, state["step"] + 2))


@pytest.mark.exhaustive
@pytest.mark.slow  # torchrun, and two processes that import torch
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_a_process_that_lost_another_ends(tmp_path: Path) -> None:
    command = [*TORCHRUN, *SCRIPT, "--data", "digits", "--out", str(tmp_path), "--log-every", "1"]
    with started(command) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "log.jsonl").exists() or len((tmp_path / "log.jsonl").read_text().splitlines()) < 3:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (second,) = (pid for pid in children(process.pid) if "RANK=1" in environment(pid))
        os.kill(second, signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert err.count("train_celeba.py: rank 0 lost another process\n") == 1, err
    assert "rank0" not in err  # where torch begins the lines of a traceback


@pytest.mark.exhaustive
@pytest.mark.slow  # torchrun, and two processes that import torch
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_where_one_process_gets_no_images_the_last_step_is_saved_and_the_cause_told(
    number: int, tmp_path: Path
) -> None:
    """Its worker is suspended, and torchrun then told to stop; or the worker is killed."""
    (tmp_path / "images").mkdir()
    for i in range(9):
        Image.new("RGB", (20, 20), (28 * i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    run = tmp_path / "run"
    command = [*TORCHRUN, *SCRIPT, "--data", str(tmp_path / "images"), "--out", str(run), "--no-cache"]
    with started([*command, "--num-workers", "1", "--log-every", "1", "--eval-every", "0"]) as process:
        deadline = time.monotonic() + 120
        while not (run / "log.jsonl").exists() or len((run / "log.jsonl").read_text().splitlines()) < 3:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (second,) = (pid for pid in children(process.pid) if "RANK=1" in environment(pid))
        (worker,) = children(second)
        os.kill(worker, number)
        if number == signal.SIGSTOP:
            time.sleep(1)  # what was made ahead is used up in milliseconds
            process.terminate()
        out, err = process.communicate(timeout=60)
    step = checkpoint(run)["step"]
    assert step >= 3
    if number == signal.SIGSTOP:
        assert out.count(f"stopped at step {step}\n") == 1
    else:
        told = f"train_celeba.py: step {step + 1}: no more images: a worker was killed by SIGKILL"
        assert err.count("train_celeba.py: step") == err.count(told) == 1, err


def test_a_lost_process_is_reported_before_a_signal_can_end_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun's SIGTERM may come while the message is printed, and also while the training cleans up after that."""
    too_early = []
    before = signal.signal(signal.SIGTERM, lambda *_: too_early.append("SIGTERM"))

    class Terminal(io.StringIO):
        def write(self, text: str) -> int:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().write(text)

    def lose(self, batches):
        raise RuntimeError("[tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711")

    config = Config(data="digits", image_size=16, base_channels=4, batch_size=4, z_dim=8, tensorboard=False)
    state = TrainingState(config, image_channels=1, device=torch.device("cpu"))
    state.ranks = Ranks(1, 2)  # the first process has a progress bar, which writes to stderr too
    monkeypatch.setattr(Ranks, "gather", lambda self, thing: [None])
    monkeypatch.setattr(TrainingState, "advance", lose)
    monkeypatch.setattr(Ranks, "all_reduce_max", lambda self, number: number)
    monkeypatch.setattr(sys, "stderr", Terminal())
    try:
        with pytest.raises(SystemExit) as stop:
            train_celeba.train(state, digits(16), tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stop.value.code == 1
    assert sys.stderr.getvalue().endswith("rank 1 lost another process\n")
    assert not too_early


def test_what_one_process_cannot_do_none_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for errors, rank in ((["train_celeba.py: no", None], 1), ([None, "train_celeba.py: no"], 0)):
        ranks = Ranks(rank, 2)
        monkeypatch.setattr(Ranks, "gather", lambda self, thing, errors=errors: errors)
        with pytest.raises(SystemExit) as stop, ranks.agreeing():
            pass
        assert stop.value.code == 1
    assert capsys.readouterr().err == "train_celeba.py: no\n"


def test_several_processes_take_each_its_own_device() -> None:
    with pytest.raises(SystemExit, match=r"--device cuda:1: several processes cannot share it"):
        pick_device("cuda:1", Ranks(0, 2))
    assert pick_device("cpu", Ranks(1, 2, 1)) == torch.device("cpu")
