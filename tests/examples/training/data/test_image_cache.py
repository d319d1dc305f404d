"""The cache of decoded images: the same batches as without it, built once, whole or not at all; and zip archives."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from collections import namedtuple
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader

from tiny_runs import assert_same, checkpoint, resume, train
from training.data import image_cache
from training.data.image_folder import ImageFolder, ZippedImageFolder
from training.data.sources import ArrayDataset, InfiniteBatchSampler, open_data
from training.runs.memory import readable

EXAMPLES = Path(__file__).parents[4] / "examples"
COUNT = 12
BROKEN = ("07.jpg", "08.jpg", "11.jpg")  # two neighbours, and the last, whose next one is the first


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve JPEGs of CelebA's size, three of them damaged, in two folders, beside what is not an image."""
    root = tmp_path / "photographs"
    (root / "more").mkdir(parents=True)
    photographs = load_sample_images().images
    for i in range(COUNT):
        crop = Image.fromarray(photographs[i % 2][15 * i : 15 * i + 218, 30 * i : 30 * i + 178])
        crop.save(root / ("more" if i >= 9 else ".") / f"{i:02d}.jpg", quality=90)
    for path in root.rglob("*.jpg"):
        if path.name in BROKEN:
            path.write_bytes(path.read_bytes()[:3000])
    (root / "notes.txt").write_text("not an image")
    (root / "._00.jpg").write_text("what macOS leaves")
    return root


@pytest.fixture
def archive(folder: Path) -> Path:
    return Path(shutil.make_archive(str(folder), "zip", folder))


def cached(data: Path, cache: Path, size: int = 16, crop: int = 160) -> ArrayDataset:
    source = open_data(str(data), size=size, crop=crop, cache=cache)
    assert isinstance(source, ArrayDataset)
    return source


def caches(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.npy"))


def batches(source: ArrayDataset | ImageFolder, count: int, workers: int = 0) -> list[torch.Tensor]:
    order = InfiniteBatchSampler(len(source), 5, seed=3, flip=True)
    loader = DataLoader(source, sampler=order, batch_size=None, num_workers=workers)
    return [batch.images for batch in islice(loader, count)]


def assert_equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    for one, other in zip(some, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ what is in it


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_bitwise_those_of_decoding(zipped, workers, folder, archive, tmp_path):
    data = archive if zipped else folder
    decoded = open_data(str(data), size=16, crop=160)
    assert type(decoded) is (ZippedImageFolder if zipped else ImageFolder)
    expected = batches(decoded, 8, workers)  # more than three epochs
    assert len({image.numpy().tobytes() for batch in expected for image in batch}) > COUNT  # with their mirror images
    assert_equal(batches(cached(data, tmp_path / "cache"), 8), expected)


def test_rows_are_the_images_in_their_order(folder, tmp_path):
    images = cached(folder, tmp_path / "cache").images
    assert images.shape == (COUNT, 3, 16, 16)
    names = [f"{row:02d}" for row in range(7)] + ["more/09"] * 3 + ["more/10", "00"]
    for row, name in enumerate(names):
        with Image.open(folder / f"{name}.jpg") as file:
            square = file.crop((9, 29, 169, 189)).resize((16, 16), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(images[row], np.asarray(square).transpose(2, 0, 1))


def test_the_cache_is_an_npy_file_that_is_mapped(folder, tmp_path):
    images = cached(folder, tmp_path / "cache").images
    (path,) = caches(tmp_path / "cache")
    assert isinstance(images, np.memmap)
    np.testing.assert_array_equal(np.load(path), images)


def test_what_is_left_out_is_named_once(folder, tmp_path, capsys):
    cached(folder, tmp_path / "cache")
    (out, err) = capsys.readouterr()
    for name in (*BROKEN, "notes.txt", "._00.jpg"):
        assert err.count(f"{name}\n") == 1
    assert err.count("left out") == 5
    assert "decoding photographs" in err
    cached(folder, tmp_path / "cache")
    assert capsys.readouterr() == (out, "")


def test_thousands_of_unreadable_neighbors_are_tried_once_each(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "3000.png")
    for i in range(3000):  # as a full disk leaves them when an archive is unpacked
        (tmp_path / f"{i:04d}.png").touch()
    tried = []
    decode = ImageFolder._decode
    monkeypatch.setattr(ImageFolder, "_decode", lambda self, path: tried.append(path) or decode(self, path))
    folder = ImageFolder(tmp_path, size=4, crop=0)
    (images, _, unreadable) = folder[[(i, False) for i in range(3001)]]
    assert images.shape == (3001, 3, 4, 4)
    assert len(unreadable) == len(set(unreadable)) == 3000
    assert len(tried) == 2 * 3001 - 1


# ---------------------------------------------------------------------------------------------- when it is built


def test_it_is_built_once(folder, tmp_path, monkeypatch):
    first = cached(folder, tmp_path / "cache")
    monkeypatch.setattr(image_cache, "_build", lambda *arguments: pytest.fail("built again"))
    monkeypatch.chdir(folder)
    for data in (folder, Path("."), Path("../photographs")):  # however the folder is called
        assert_equal(batches(cached(data, tmp_path / "cache"), 2), batches(first, 2))


def test_each_crop_and_size_has_its_own(folder, tmp_path):
    for size, crop in ((16, 160), (16, 0), (32, 160)):
        assert cached(folder, tmp_path / "cache", size, crop).images.shape[2] == size
    assert len(caches(tmp_path / "cache")) == 3


def add(folder: Path) -> None:
    shutil.copy(folder / "00.jpg", folder / "new.jpg")


def remove(folder: Path) -> None:
    (folder / "05.jpg").unlink()


def rename(folder: Path) -> None:
    (folder / "00.jpg").rename(folder / "06a.jpg")


def touch(folder: Path) -> None:  # the same size and name, other pixels
    os.utime(folder / "05.jpg", ns=(1, 1))


def resize(folder: Path) -> None:
    Image.new("RGB", (178, 218)).save(folder / "05.jpg")


def repair(folder: Path) -> None:
    shutil.copy(folder / "00.jpg", folder / "07.jpg")


@pytest.mark.parametrize("change", [add, remove, rename, touch, resize, repair])
def test_it_is_built_again_when_the_folder_has_changed(change, folder, tmp_path):
    cached(folder, tmp_path / "cache")
    cached(folder, tmp_path / "cache", size=32)
    before = caches(tmp_path / "cache")
    change(folder)
    source = cached(folder, tmp_path / "cache")
    assert_equal(batches(source, 4), batches(ImageFolder(folder, 16, 160), 4))
    after = caches(tmp_path / "cache")
    assert len(set(after) - set(before)) == 1
    assert len(after) == 2  # the one that is out of date is gone, that of the other size is not


def test_it_is_built_again_when_the_archive_has_changed(archive, tmp_path, monkeypatch):
    cached(archive, tmp_path / "cache")
    (before,) = caches(tmp_path / "cache")
    with zipfile.ZipFile(archive, "a") as file:
        file.write(archive.parent / "photographs" / "00.jpg", "another.jpg")
    assert len(cached(archive, tmp_path / "cache")) == COUNT + 1
    (after,) = caches(tmp_path / "cache")
    assert after != before
    os.utime(archive)  # the checksums say that nothing has changed
    monkeypatch.setattr(image_cache, "_build", lambda *arguments: pytest.fail("built again"))
    cached(archive, tmp_path / "cache")


@pytest.mark.parametrize("left", [0, 40, 2000], ids=["empty", "within the header", "within the images"])
def test_a_file_that_was_cut_off_is_not_used(left, folder, tmp_path):
    expected = cached(folder, tmp_path / "cache").images.copy()
    (path,) = caches(tmp_path / "cache")
    os.truncate(path, left)
    np.testing.assert_array_equal(cached(folder, tmp_path / "cache").images, expected)


def flip(path: Path, offset: int) -> None:
    """Change one bit, counted from the end if `offset` is negative."""
    with open(path, "r+b") as file:
        file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("offset", [0, 20, 90, 128, 5000, -5, -1])
def test_a_file_of_which_a_bit_has_changed_is_built_again(offset, folder, tmp_path, capsys):
    expected = cached(folder, tmp_path / "cache").images.copy()
    (path,) = caches(tmp_path / "cache")
    flip(path, offset)
    capsys.readouterr()
    np.testing.assert_array_equal(cached(folder, tmp_path / "cache").images, expected)
    assert capsys.readouterr().err.count(f"damaged, decoded again: {path}\n") == 1
    np.testing.assert_array_equal(np.load(path), expected)


def test_a_disk_that_cannot_read_the_file_is_no_reason_to_stop(folder, tmp_path, monkeypatch):
    expected = cached(folder, tmp_path / "cache").images.copy()
    errors = [OSError(5, "Input/output error")] * 2  # when it is opened, and once more when nobody else can build it

    def crc32(data: bytes, value: int = 0) -> int:  # fails for the read before it
        if errors:
            raise errors.pop()
        return zlib.crc32(data, value)

    monkeypatch.setattr(image_cache, "zlib", SimpleNamespace(crc32=crc32))
    np.testing.assert_array_equal(cached(folder, tmp_path / "cache").images, expected)


def test_a_disk_that_does_not_keep_what_is_written_is_an_error(folder, tmp_path, monkeypatch):
    def replace(part: Path, path: Path) -> None:
        flip(part, 1000)
        os.rename(part, path)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match=r"photographs-.*\.npy differs from what was just written: .* --cache-dir"):
        cached(folder, tmp_path / "cache")


def test_beside_a_process_that_has_verified_it_nothing_is_read_again(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    expected = cached(folder, cache).images.copy()
    (path,) = caches(cache)
    with monkeypatch.context() as patch:
        patch.setattr(image_cache, "zlib", SimpleNamespace(crc32=lambda *_: pytest.fail("verified again")))
        source = open_data(str(folder), size=16, crop=160, cache=cache, verify=False)
    np.testing.assert_array_equal(source.images, expected)
    for spoil in (lambda: os.truncate(path, 5000), lambda: path.unlink()):  # no process of this machine has verified it
        spoil()
        source = open_data(str(folder), size=16, crop=160, cache=cache, verify=False)
        np.testing.assert_array_equal(source.images, expected)
        np.testing.assert_array_equal(np.load(path), expected)


def test_the_classes_of_an_unverified_cache_are_those_of_its_rows(folder, tmp_path):
    for path in folder.glob("*.jpg"):
        (folder / "some").mkdir(exist_ok=True)
        path.rename(folder / "some" / path.name)
    first, second = (
        open_data(str(folder), size=16, cache=tmp_path / "cache", verify=verify, classes="own")
        for verify in (True, False)
    )
    assert first.labels.classes == second.labels.classes == ("more", "some")
    np.testing.assert_array_equal(first.labels.numbers, second.labels.numbers)


def test_the_random_state_does_not_know_of_it(folder, tmp_path):
    before = torch.get_rng_state()
    cached(folder, tmp_path / "cache")
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------- what can come between

SLOW = """
import sys, time
sys.path.insert(0, sys.argv[1])
from training.data import sources as data
decode = data.ImageFolder._decode
def slow(self, path):
    time.sleep(float(sys.argv[4]))
    return decode(self, path)
data.ImageFolder._decode = slow
print("ready", flush=True)
sys.stdin.readline()
images = data.open_data(sys.argv[2], size=16, crop=160, cache=data.Path(sys.argv[3])).images
print(images.sum(dtype=int))
"""


class Builder(subprocess.Popen):
    """A process that opens the cache once it is told to, and decodes an image in `pause` seconds."""

    def __init__(self, folder: Path, cache: Path, pause: float) -> None:
        command = [sys.executable, "-c", SLOW, str(EXAMPLES), str(folder), str(cache), str(pause)]
        super().__init__(command, stdin=-1, stdout=-1, stderr=-1, text=True)

    def go(self) -> None:
        assert self.stdout.readline() == "ready\n"
        self.stdin.write("go\n")
        self.stdin.flush()


@pytest.mark.slow  # starts two processes, which import torch
def test_two_processes_that_start_together_build_it_once(folder, tmp_path):
    with Builder(folder, tmp_path / "cache", 0.1) as one, Builder(folder, tmp_path / "cache", 0.1) as other:
        one.go()
        other.go()
        (said, errors) = zip(*(process.communicate(timeout=120) for process in (one, other)), strict=True)
    assert one.returncode == other.returncode == 0, errors
    assert sorted("waiting for another process" in text for text in errors) == [False, True]
    assert sorted("notes.txt" in text for text in errors) == [False, True]
    assert said[0] == said[1] == f"{cached(folder, tmp_path / 'cache').images.sum(dtype=int)}\n"
    assert len(caches(tmp_path / "cache")) == 1


@pytest.mark.slow  # starts two processes, which import torch
def test_a_builder_that_is_killed_leaves_neither_a_lock_nor_half_a_cache(folder, tmp_path):
    cache = tmp_path / "cache"
    with Builder(folder, cache, 2.0) as killed, Builder(folder, cache, 0.0) as waiting:
        killed.go()
        deadline = time.monotonic() + 120
        while not list(cache.glob("*.part")):
            assert killed.poll() is None, killed.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        waiting.go()
        assert "waiting for another process" in waiting.stderr.readline()
        assert not caches(cache)
        killed.kill()
        (said, errors) = waiting.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert waiting.returncode == 0, errors
    assert not list(cache.glob("*.part"))
    source = cached(folder, cache)
    assert said == f"{source.images.sum(dtype=int)}\n"
    assert_equal(batches(source, 4), batches(ImageFolder(folder, 16, 160), 4))


@pytest.mark.slow  # starts two processes, which import torch
def test_a_damaged_header_is_replaced_once_while_another_process_waits(folder, tmp_path):
    expected = cached(folder, tmp_path / "cache").images.sum(dtype=int)
    (path,) = caches(tmp_path / "cache")
    with open(path, "r+b") as file:
        file.write(b"\x93NUMPY\1\0\xff\xff")  # a header that claims to be 64 KiB long
    with Builder(folder, tmp_path / "cache", 0.1) as one, Builder(folder, tmp_path / "cache", 0.1) as other:
        one.go()
        other.go()
        (said, errors) = zip(*(process.communicate(timeout=120) for process in (one, other)), strict=True)
    assert one.returncode == other.returncode == 0, errors
    assert said == (f"{expected}\n", f"{expected}\n")
    assert sorted("damaged, decoded again" in text for text in errors) == [False, True]
    assert sorted("waiting for another process" in text for text in errors) == [False, True]


def test_the_file_is_on_the_disk_before_it_takes_the_name(folder, tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    cached(folder, tmp_path / "cache")
    assert calls == ["fsync", "replace"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_a_build_that_fails_leaves_nothing(error, folder, tmp_path, monkeypatch):
    def fail(descriptor: int) -> None:
        (part,) = (tmp_path / "cache").glob("*.part")
        assert part.stat().st_size > COUNT * 3 * 16 * 16
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as raised:
        train(tmp_path / "run", "--data", str(folder))
    if isinstance(error, OSError):
        assert "cannot write" in str(raised.value)
        assert str(raised.value).endswith("No space left on device")
        assert "\n" not in str(raised.value)
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"]


def test_sizes_have_a_unit_in_which_they_are_not_zero():
    sizes = [0, 1023, 1024, 1536, 2**20 - 1, 9 * 2**30 + 2**29, 2**50]
    assert [readable(size) for size in sizes] == [
        "0 bytes", "1023 bytes", "1 KiB", "1.5 KiB", "1024 KiB", "9.5 GiB", "1 PiB",
    ]  # fmt: skip


def test_too_little_space_is_known_beforehand(folder, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    need = 128 + COUNT * (3 * 16 * 16 + 8) + image_cache.CHECKSUM  # header, rows and their sources
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, need - 1))
    monkeypatch.setattr(image_cache, "_decoded", lambda folder: pytest.fail("decoding has begun"))
    with pytest.raises(OSError, match=r"need 9\.223 KiB in .*cache, 1 bytes more than are free: .*--no-cache"):
        cached(folder, tmp_path / "cache")


# ------------------------------------------------------------------------------------------------------ archives


def test_an_archive_gives_what_its_folder_gives(folder, archive):
    unpacked, zipped = ImageFolder(folder, 16, 160), ZippedImageFolder(archive, 16, 160)
    assert [str(Path(path).relative_to(folder.resolve())) for path in unpacked.paths] == zipped.paths
    assert_equal(batches(zipped, 8), batches(unpacked, 8))
    assert sorted(folder.parent.iterdir()) == [folder, archive]  # nothing was unpacked


def test_a_member_whose_checksum_is_wrong_is_named(archive):
    data = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as file:
        begin = file.getinfo("03.jpg").header_offset
    data[begin + 4000] ^= 1
    archive.write_bytes(data)
    (*_, unreadable) = ZippedImageFolder(archive, 16, 160).read(3)
    assert list(unreadable) == ["03.jpg"]
    assert "Bad CRC-32" in unreadable["03.jpg"]


def test_an_archive_can_go_to_a_process_that_shares_no_memory(archive):
    source = ZippedImageFolder(archive, 16, 160)
    assert_equal(batches(pickle.loads(pickle.dumps(source)), 3), batches(source, 3))


def write_archive(path: Path, name: str) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(name, "not an image, and longer than the end of an archive")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda path: os.truncate(path, path.stat().st_size // 2),
            r"photographs\.zip: .*zip archive.*it is incomplete",
        ),
        (lambda path: path.write_bytes(b"PK"), r"photographs\.zip: .*zip archive"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"PK\1\2", b"PK\0\0")), r"a damaged zip archive"),
        (lambda path: zipfile.ZipFile(path, "w").close(), r"photographs\.zip"),
        (lambda path: write_archive(path, "notes.txt"), r"no images in this archive"),
        (lambda path: path.unlink(), r"no such folder or zip archive"),
    ],
    ids=["cut off", "too short", "damaged", "empty", "no images", "missing"],
)
def test_wrong_archives_are_one_line(spoil, message, archive):
    spoil(archive)
    with pytest.raises(ValueError, match=message) as error:
        open_data(str(archive), size=16, crop=160)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------- training


def test_training_with_and_without_it_is_bitwise_the_same(folder, tmp_path):
    settings = ["--data", str(folder), "--save-every", "2"]
    with_it, without, both = tmp_path / "with", tmp_path / "without", tmp_path / "both"
    train(with_it, *settings, "--steps", "5")
    assert len(caches(tmp_path / "cache")) == 1  # beside the runs, which share it
    train(without, *settings, "--steps", "5", "--no-cache", "--num-workers", "2")
    train(both, *settings, "--steps", "5")
    (both / "checkpoint-000005.pt").unlink()
    resume(both / "checkpoint-000004.pt", "--no-cache")
    apart_from = ("/config/out", "/config/cache", "/config/num_workers")
    assert_same(checkpoint(with_it), checkpoint(without), apart_from=apart_from)
    assert_same(checkpoint(with_it), checkpoint(both), apart_from=apart_from)


def test_a_run_is_resumed_as_if_no_bit_had_changed(folder, tmp_path):
    settings = ["--data", str(folder), "--steps", "4", "--save-every", "2"]
    train(tmp_path / "whole", *settings)
    train(tmp_path / "resumed", *settings)
    (tmp_path / "resumed" / "checkpoint-000004.pt").unlink()
    (path,) = caches(tmp_path / "cache")
    for row in range(COUNT):  # in every image, since four steps do not draw all of them
        flip(path, 128 + 3 * 16 * 16 * row)
    resume(tmp_path / "resumed")
    assert_same(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "resumed"), apart_from=("/config/out",))


def test_the_cache_can_lie_elsewhere(folder, tmp_path):
    train(tmp_path / "run", "--data", str(folder), "--steps", "1", "--cache-dir", str(tmp_path / "ssd"))
    assert len(caches(tmp_path / "ssd")) == 1
    assert not (tmp_path / "cache").exists()
