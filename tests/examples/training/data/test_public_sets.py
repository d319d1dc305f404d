"""Public data sets by their names: found where people have them, or downloaded, here from a server on this machine, or
one line says what to put where."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cifar10_files
import train_digits
from file_server import FileServer, broken, refused, slow, whole
from mnist_files import idx
from tiny_runs import TINY, checkpoint, train
from training.data import public_sets
from training.data.download import RemoteFile
from training.data.public_sets import CELEBA_PLACES, LIKE_MNIST, SETS, class_names, public_files
from training.data.sources import open_data, open_held_out

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
TABLE = SETS.copy()  # with its own addresses
PATIENCE = 120  # seconds until a process must have answered, on a busy machine
LABELS = np.arange(20) % 10


def images(seed: int, count: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 28, 28), dtype=np.uint8)


MNIST = {
    "train-images-idx3-ubyte": idx(images(0)),
    "train-labels-idx1-ubyte": idx(LABELS.astype(np.uint8)),
    "t10k-images-idx3-ubyte": idx(images(1, 3)),
    "t10k-labels-idx1-ubyte": idx(np.array([0, 9, 9], np.uint8)),
}
PACKED = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in MNIST.items()}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, on a machine without Debian's packages."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(public_sets, "SYSTEM", tmp_path / "system")
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "work"


@pytest.fixture(autouse=True)
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """It has the files of all sets; those in MNIST's format are the same."""
    cifar10 = tmp_path / "cifar-10-binary.tar.gz"
    learned, tested = (cifar10_files.records([0, 1, 2, 0, 1][:count], count)[0] for count in (5, 3))
    files = {"data_batch_1.bin": learned, "test_batch.bin": tested, "batches.meta.txt": cifar10_files.META}
    content = PACKED | {cifar10.name: cifar10_files.archive(cifar10, files).read_bytes()}
    started = FileServer(content)
    for name, known in SETS.items():
        names = (file.address.rpartition("/")[2] for file in known.files)
        here = (RemoteFile(started.address + n, len(content[n]), digest(content[n])) for n in names)
        monkeypatch.setitem(SETS, name, known._replace(files=tuple(here)))
    yield started
    started.close()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def put(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


# -------------------------------------------------------------------------------------------------------- downloaded


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_downloaded_once(name: str, server: FileServer, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        data, held_out = (opened(name, size=28, classes="own") for opened in (open_data, open_held_out))
        assert held_out is not None
        assert (len(data), len(held_out)) == ((20, 3) if name in LIKE_MNIST else (5, 3))
        assert list(held_out.counts()) == list(data.counts())
    names = [file.address.removeprefix(server.address) for file in SETS[name].files]
    assert [asked for asked, _ in server.requests] == names
    assert {path.name for path in Path("data", name).iterdir()} == {*names, "download.lock"}
    said = capsys.readouterr().err
    assert said.count(f"into {Path('data', name).resolve()}; {SETS[name].terms}\n") == 1


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("mnist", [str(number) for number in range(10)]),
        (
            "fashion-mnist",
            ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"],
        ),
        ("kmnist", ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"]),
        ("cifar10", cifar10_files.CLASSES),
    ],
)
def test_classes_have_their_names_in_the_order_of_the_labels(name: str, classes: list[str]) -> None:
    data = open_data(name, size=28, classes="own")
    assert data.labels is not None
    assert list(data.labels.classes) == classes
    assert data.labels.numbers.tolist() == (LABELS.tolist() if name in LIKE_MNIST else [0, 1, 2, 0, 1])


def test_files_that_are_there_are_kept(server: FileServer) -> None:
    there = {"train-images-idx3-ubyte": MNIST["train-images-idx3-ubyte"], "t10k-images-idx3-ubyte.gz": b"mine"}
    put(Path("data/mnist"), there)
    assert public_files("mnist") == Path("data/mnist")
    assert [asked for asked, _ in server.requests] == ["train-labels-idx1-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]
    assert Path("data/mnist/t10k-images-idx3-ubyte.gz").read_bytes() == b"mine"


@pytest.mark.usefixtures("no_drawing")
def test_a_name_trains(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(run, "--data", "fashion-mnist", "--classes", "own", "--steps", "1") == 0
    assert list(checkpoint(run)["classes"]) == list(SETS["fashion-mnist"].classes)
    assert json.loads((run / "config.json").read_text())["data"] == "fashion-mnist"


def test_the_digits_example_takes_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(train_digits, "ask", asked.append)
    quick = ["--steps", "1", "--base-channels", "4", "--batch-size", "4", "--device", "cpu", "--no-tensorboard"]
    assert train_digits.main([*quick, "--data", "kmnist", "--out", str(tmp_path / "run")]) == 0
    assert asked == [tmp_path / "run"]
    with pytest.raises(SystemExit, match="--data cifar10: expected digits, mnist"):
        train_digits.main([*quick, "--data", "cifar10"])


# ---------------------------------------------------------------------------------------------- where they lie already


@pytest.mark.parametrize("files", [PACKED, MNIST], ids=["packed", "unpacked"])
@pytest.mark.parametrize(
    "place",
    ["data/fashion-mnist", "data/fashion-mnist/FashionMNIST/raw", "data/FashionMNIST/raw", "../system/fashion-mnist"],
)
def test_files_are_used_where_they_lie(place: str, files: dict[str, bytes], server: FileServer) -> None:
    put(Path(place), files)
    data = open_data("fashion-mnist", size=28, classes="own")
    np.testing.assert_array_equal(data.images[:, 0], images(0))
    assert list(data.counts()) == list(SETS["fashion-mnist"].classes)
    assert server.requests == []


@pytest.mark.parametrize("place", ["data/cifar10", "data", "../system/cifar10"])
def test_an_archive_is_used_where_it_lies(place: str, server: FileServer) -> None:
    put(Path(place), {"cifar-10-binary.tar.gz": server.files["cifar-10-binary.tar.gz"]})
    assert open_data("cifar10", size=32, classes="own").counts() == {"airplane": 2, "cat": 2, "truck": 1}
    assert server.requests == []


def test_your_own_files_come_before_those_of_the_system(server: FileServer) -> None:
    put(Path("../system/mnist"), PACKED)
    put(Path("data/mnist"), PACKED | {"train-images-idx3-ubyte.gz": gzip.compress(idx(images(7)))})
    np.testing.assert_array_equal(open_data("mnist", size=28).images[:, 0], images(7))


def test_a_place_with_some_of_the_files_is_not_taken_for_all(server: FileServer) -> None:
    put(Path("../system/mnist"), {name: PACKED[name] for name in PACKED if name.startswith("train")})
    assert public_files("mnist") == Path("data/mnist")
    assert len(server.requests) == 4


@pytest.mark.skipif(not DEBIAN.exists(), reason="needs Debian's package dataset-fashion-mnist")
def test_debians_package_is_enough(monkeypatch: pytest.MonkeyPatch, server: FileServer) -> None:
    monkeypatch.setattr(public_sets, "SYSTEM", DEBIAN.parent)
    assert open_data("fashion-mnist", size=28, classes="own").counts() == dict.fromkeys(
        SETS["fashion-mnist"].classes, 6000
    )
    held_out = open_held_out("fashion-mnist", size=28, classes="own")
    assert held_out is not None
    assert held_out.counts() == dict.fromkeys(SETS["fashion-mnist"].classes, 1000)
    assert not server.requests
    assert not Path("data").exists()


def test_what_has_the_same_name_here_is_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    put(Path("mnist"), {name: content for name, content in PACKED.items() if name.startswith("train")})
    assert open_held_out("mnist", size=28) is not None
    assert "--data mnist is the public data set; for what is here, give ./mnist\n" in capsys.readouterr().err
    assert open_held_out("./mnist", size=28) is None


# ------------------------------------------------------------------------------------------------------------- CelebA


@pytest.mark.parametrize("place", CELEBA_PLACES)
def test_celeba_is_used_where_it_lies(place: str, tmp_path: Path) -> None:
    image = tmp_path / "000001.jpg"
    Image.new("RGB", (178, 218)).save(image)
    target = Path("data/celeba", place)
    target.parent.mkdir(parents=True)
    if place.endswith(".zip"):
        with zipfile.ZipFile(target, "w") as archive:
            for name in ("000001.jpg", "000002.jpg"):
                archive.write(image, f"img_align_celeba/{name}")
    else:
        put(target, dict.fromkeys(("000001.jpg", "000002.jpg"), image.read_bytes()))
    table = "2\nMale \n000001.jpg 1\n000002.jpg -1\n"
    (Path("data/celeba/list_attr_celeba.txt")).write_text(table)
    assert open_data("celeba", size=16, classes="attributes:Male").counts() == {"not-Male": 1, "Male": 1}
    assert open_held_out("celeba", size=16) is None


def test_an_archive_of_celeba_that_is_still_being_copied() -> None:
    put(Path("data/celeba"), {"img_align_celeba.zip": b"PK\3\4 and no directory at the end"})
    with pytest.raises(ValueError, match=r"--data celeba, data/celeba/img_align_celeba\.zip: expected .* incomplete"):
        open_data("celeba", size=16)


def test_celeba_says_what_to_get_and_where_to_put_it() -> None:
    with pytest.raises(ValueError, match="--data celeba: its place is a shared drive") as error:
        open_data("celeba", size=16)
    for part in (
        "img_align_celeba.zip (1,443,490,838 bytes)",
        public_sets.CELEBA_PAGE,
        str(Path("data/celeba").resolve()),
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------- classes of other folders


def test_a_folder_of_a_public_set_has_the_names_of_its_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    put(Path("mine"), MNIST)
    assert list(open_data("mine", size=28, classes="own").counts()) == [str(number) for number in range(10)]
    unpacked = digest(MNIST["train-labels-idx1-ubyte"])
    monkeypatch.setitem(SETS, "fashion-mnist", SETS["fashion-mnist"]._replace(files=(), other_labels=(unpacked,)))
    assert list(open_data("mine", size=28, classes="own").counts()) == list(SETS["fashion-mnist"].classes)
    held_out = open_held_out("mine", size=28, classes="own")
    assert held_out is not None
    assert list(held_out.counts()) == list(SETS["fashion-mnist"].classes)


def test_labels_beyond_the_classes() -> None:
    put(Path("data/kmnist"), MNIST | {"train-labels-idx1-ubyte": idx(np.arange(20, dtype=np.uint8))})
    with pytest.raises(ValueError, match=r"expected 10 classes \(o, ki, .*, wo\), the labels have 20"):
        open_data("kmnist", size=28)


# ---------------------------------------------------------------------------------------------- it cannot be downloaded


def test_without_a_network_it_says_which_files_to_put_where(server: FileServer) -> None:
    put(Path("data/fashion-mnist"), {"train-labels-idx1-ubyte.gz": PACKED["train-labels-idx1-ubyte.gz"]})
    server.close()
    with pytest.raises(ValueError, match=r"--data fashion-mnist: .*t10k-labels.*: Connection refused") as error:
        open_data("fashion-mnist", size=28)
    advice = str(error.value).partition(". If it cannot be reached from here, ")[2]
    folder = Path("data/fashion-mnist").resolve()
    named = [f"{name} ({len(PACKED[name]):,} bytes)" for name in (
        "t10k-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz", "train-images-idx3-ubyte.gz"
    )]  # fmt: skip
    assert advice == (
        f"put {', '.join(named)} from {server.address} into {folder} "
        "(or install Debian's package dataset-fashion-mnist)"
    )


def test_a_failure_leaves_what_is_whole_and_the_next_start_gets_the_rest(server: FileServer) -> None:
    server.answers = [whole, whole, broken(100), refused(503)]
    with pytest.raises(ValueError, match=r"--data mnist: .*HTTP 503"):
        open_data("mnist", size=28)
    names = [file.address.removeprefix(server.address) for file in SETS["mnist"].files]
    assert {path.name for path in Path("data/mnist").iterdir()} == {*names[:2], f"{names[2]}.part", "download.lock"}
    server.requests.clear()
    assert len(open_data("mnist", size=28)) == 20
    assert server.requests == [(names[2], "bytes=100-"), (names[3], None)]


def test_a_folder_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("data").write_text("a file")
    with pytest.raises(OSError, match=r"--data mnist: cannot write into .*/work/data/mnist: Not a directory"):
        open_data("mnist", size=28)
    if Path("/proc/self").exists():
        monkeypatch.chdir("/proc")
        with pytest.raises(OSError, match="--data mnist: cannot write into /proc/data/mnist: "):
            open_data("mnist", size=28)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    Path("data").mkdir(mode=0o500)
    with pytest.raises(OSError, match=r"--data mnist: cannot write into .*: Permission denied"):
        open_data("mnist", size=28)


def test_a_file_system_without_locks(monkeypatch: pytest.MonkeyPatch, server: FileServer) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    server.answers = [broken(9), refused(503)]
    with pytest.raises(ValueError, match="HTTP 503"):
        open_data("mnist", size=28)
    part = next(Path("data/mnist").glob("*.part"))
    assert str(os.getpid()) in part.name  # its own: another process may write there, too
    assert len(open_data("mnist", size=28)) == 20


# --------------------------------------------------------------------------------------------------- several processes

PROGRAM = """
import json, sys
from training.data import public_sets
from training.data.download import RemoteFile
from training.script import script
files = tuple(RemoteFile(*file) for file in json.loads(sys.argv.pop(1)))
public_sets.SETS["mnist"] = public_sets.SETS["mnist"]._replace(files=files)
if sys.argv[1:]:
    import train_celeba
    script(train_celeba.main)
print(public_sets.public_files("mnist"))
"""


def begin(*trainer: str) -> subprocess.Popen[str]:
    """A process that has to download MNIST: the trainer with these arguments, or one that does nothing else."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(SETS["mnist"].files), *trainer]
    env = os.environ | {"PYTHONPATH": str(Path(train_digits.__file__).parent)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow  # starts processes, which import torch
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.exhaustive),
        pytest.param(signal.SIGKILL, marks=pytest.mark.exhaustive),
    ],
)
def test_a_run_that_is_ended_while_it_downloads(number: signal.Signals, server: FileServer, tmp_path: Path) -> None:
    server.answers = [whole, whole, server.stalled(100)]
    name = SETS["mnist"].files[2].address.removeprefix(server.address)
    part = Path("data/mnist", f"{name}.part")
    with begin(*TINY, "--data", "mnist", "--out", str(tmp_path / "run")) as process:
        try:
            wait_for(lambda: part.exists() and part.stat().st_size == 100, process)
            process.send_signal(number)
            _, complaints = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in complaints
    assert not Path("data/mnist", name).exists()
    server.requests.clear()
    assert len(open_data("mnist", size=28)) == 20
    assert server.requests[0] == (name, "bytes=100-")


@pytest.mark.exhaustive  # as long as two starts of Python with torch beside each other
@pytest.mark.slow  # starts processes, which import torch
def test_processes_that_start_together_download_once(server: FileServer) -> None:
    server.answers = [slow(20, 0.5)]  # until both are there
    with begin() as one, begin() as other:
        try:
            ends = [process.communicate(timeout=PATIENCE) for process in (one, other)]
        finally:
            one.kill()
            other.kill()
    assert [one.returncode, other.returncode] == [0, 0], ends
    assert len(server.requests) == 4
    waited = [
        complaints
        for _, complaints in ends
        if re.search(r"waiting for process \d+ on .*, which downloads MNIST", complaints)
    ]
    assert len(waited) == 1
    assert not list(Path("data/mnist").glob("*.part"))


@pytest.mark.exhaustive
@pytest.mark.slow  # torchrun, and two processes that import torch
def test_the_processes_of_a_run_download_once(server: FileServer, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    command += [json.dumps(SETS["mnist"].files), *TINY, "--no-tensorboard", "--data", "mnist", "--steps", "1"]
    env = os.environ | {"PYTHONPATH": str(Path(train_digits.__file__).parent), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, "--out", str(tmp_path / "run")], env=env, capture_output=True, text=True, timeout=3 * PATIENCE
    )
    assert run.returncode == 0, run.stderr
    assert len(server.requests) == 4
    assert checkpoint(tmp_path / "run")["step"] == 1
    assert "waiting for" not in run.stderr  # the second one begins when the files are there


# ----------------------------------------------------------------------------------------------------------- the table


def test_the_table_names_one_folder_for_each_set() -> None:
    for name, known in TABLE.items():
        assert len({file.address.rpartition("/")[0] for file in known.files}) == 1, name
        assert all(re.fullmatch("[0-9a-f]{64}", file.sha256) for file in known.files), name


@pytest.mark.skipif(not DEBIAN.exists(), reason="needs Debian's package dataset-fashion-mnist")
def test_sizes_and_checksums_of_fashion_mnist() -> None:
    """Debian's files are the official ones without the name and the time in their headers (RFC 1952)."""
    for file in TABLE["fashion-mnist"].files:
        name = file.address.rpartition("/")[2]
        packed = (DEBIAN / name).read_bytes()
        packed_at = 1504176627 if name.startswith("t10k") else 1504176606
        official = (
            b"\x1f\x8b\x08\x08" + struct.pack("<I", packed_at) + packed[8:10] + name[:-3].encode() + b"\0" + packed[10:]
        )
        assert (len(official), digest(official)) == (file.size, file.sha256), name
    assert class_names(DEBIAN) == TABLE["fashion-mnist"].classes


@pytest.mark.skipif(not DEBIAN.exists(), reason="needs Debian's package dataset-fashion-mnist")
def test_unpacked_files_of_fashion_mnist_are_recognized() -> None:
    put(
        Path("mine"), {"train-labels-idx1-ubyte": gzip.decompress((DEBIAN / "train-labels-idx1-ubyte.gz").read_bytes())}
    )
    assert class_names(Path("mine")) == TABLE["fashion-mnist"].classes
    assert class_names(Path("nowhere")) == ()
