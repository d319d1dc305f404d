"""The cache of decoded images: the same batches as without it, built once, whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import zipfile
import zlib
from collections import namedtuple
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from refused_calls import refuse_fsync
from tiny_runs import assert_same, checkpoint, resume, train
from training.data import image_cache
from training.data.cropping import PAD
from training.data.dataset import ImageSet, SourceLost
from training.data.image_cache import CachedFolder
from training.data.image_folder import ImageFolder
from training.data.loading import read_batches
from training.data.sources import InfiniteBatchSampler, open_data
from training.runs.memory import readable

COUNT = 12  # images in `folder`
BROKEN = ("07.jpg", "08.jpg", "11.jpg")  # those that are damaged


@pytest.fixture
def archive(folder: Path) -> Path:
    return Path(shutil.make_archive(str(folder), "zip", folder))


def cached(data: Path, cache: Path, size: int = 16, crop: int = 160, **more: str) -> CachedFolder:
    source = open_data(str(data), size=size, crop=crop, cache=cache, **more)
    assert isinstance(source, CachedFolder)
    return source


def pixels(source: ImageSet) -> np.ndarray:
    """All images of a data set, in their order."""
    return source.pixels(range(len(source)))[0]


def caches(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.npy"))


def batches(source: ImageSet, count: int, workers: int = 0) -> list[torch.Tensor]:
    order = InfiniteBatchSampler(len(source), 5, seed=3, flip=True)
    with closing(read_batches(source, order, workers=workers)) as read:
        return [batch.images for batch in islice(read, count)]


def assert_equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    for one, other in zip(some, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ what is in it


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_bitwise_those_of_decoding(
    zipped: bool, workers: int, folder: Path, archive: Path, tmp_path: Path
) -> None:
    data = archive if zipped else folder
    decoded = open_data(str(data), size=16, crop=160)
    expected = batches(decoded, 8, workers)  # more than three epochs
    assert len({image.numpy().tobytes() for batch in expected for image in batch}) > COUNT  # with their mirror images
    assert_equal(batches(cached(data, tmp_path / "cache"), 8), expected)


def test_rows_are_the_images_in_their_order(folder: Path, tmp_path: Path) -> None:
    images = pixels(cached(folder, tmp_path / "cache"))
    assert images.shape == (COUNT, 3, 16, 16)
    for row in set(range(COUNT)) - {7, 8, 11}:
        with Image.open(folder / ("more" if row >= 9 else "") / f"{row:02d}.jpg") as file:
            square = file.crop((9, 29, 169, 189)).resize((16, 16), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(images[row], np.asarray(square).transpose(2, 0, 1))


def test_the_cache_is_an_npy_file(folder: Path, tmp_path: Path) -> None:
    images = pixels(cached(folder, tmp_path / "cache"))
    (path,) = caches(tmp_path / "cache")
    stored = np.load(path)
    for row in range(COUNT):
        np.testing.assert_array_equal(stored[row], 0 if row in (7, 8, 11) else images[row])


def test_a_cache_that_is_truncated_while_it_is_read_is_one_line(folder: Path, tmp_path: Path) -> None:
    """Mapped, its pages would be gone, and access to them would kill the process by SIGBUS."""
    source = cached(folder, tmp_path / "cache")
    (path,) = caches(tmp_path / "cache")
    os.truncate(path, 128 + 4 * 3 * 16 * 16 + 5)
    np.testing.assert_array_equal(source.pixels([3])[0], ImageFolder(folder, 16, 160).pixels([3])[0])
    with pytest.raises(SourceLost, match=r"\.npy was cut off while it was read; the next start decodes .* again$"):
        source.pixels([4])


def test_what_is_left_out_is_named_once(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cached(folder, tmp_path / "cache")
    (out, err) = capsys.readouterr()
    for name in (*BROKEN, "notes.txt"):
        assert err.count(f"{name}\n") == 1
    assert err.count("left out") == 4
    assert "decoding photographs" in err
    cached(folder, tmp_path / "cache")
    assert capsys.readouterr() == (out, "")


# ---------------------------------------------------------------------------------------------- when it is built


def test_it_is_built_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cached(folder, tmp_path / "cache")
    monkeypatch.setattr(image_cache, "_build", lambda *arguments: pytest.fail("built again"))
    monkeypatch.chdir(folder)
    for data in (folder, Path("."), Path("../photographs")):  # however the folder is called
        assert_equal(batches(cached(data, tmp_path / "cache"), 2), batches(first, 2))


def test_each_crop_and_size_has_its_own(folder: Path, tmp_path: Path) -> None:
    for size, crop in ((16, 160), (16, 0), (32, 160), (16, PAD)):
        assert pixels(cached(folder, tmp_path / "cache", size, crop)).shape[2] == size
    assert len(caches(tmp_path / "cache")) == 4


def test_runs_with_and_without_classes_share_one(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images without a class are in it too, or each run would find the other's out of date and delete it."""
    everything = pixels(cached(folder, tmp_path / "cache"))
    monkeypatch.setattr(image_cache, "_build", lambda *arguments: pytest.fail("built again"))
    table = tmp_path / "attributes.txt"
    table.write_text("3\nMale\n02.jpg 1\n09.jpg -1\n05.jpg 1\n")
    source = cached(folder, tmp_path / "cache", classes="attributes:Male", attributes=str(table))
    assert [Path(path).name for path in source.folder.paths] == ["02.jpg", "05.jpg", "09.jpg"]
    assert source.labels is not None
    assert source.labels.numbers.tolist() == [1, 1, 0]
    np.testing.assert_array_equal(pixels(source), everything[[2, 5, 9]])


def test_one_of_an_earlier_version_is_used(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the row of an unreadable image holds its neighbor, and the number after the array is the neighbor's."""
    expected = pixels(cached(folder, tmp_path / "cache"))
    (path,) = caches(tmp_path / "cache")
    content = bytearray(path.read_bytes())
    row, numbers = 3 * 16 * 16, 128 + COUNT * 3 * 16 * 16
    for unreadable, neighbor in ((7, 9), (8, 9), (11, 0)):
        start, other = 128 + unreadable * row, 128 + neighbor * row
        content[start : start + row] = content[other : other + row]
        content[numbers + 8 * unreadable : numbers + 8 * unreadable + 8] = neighbor.to_bytes(8, "little")
    content[-4:] = zlib.crc32(content[:-4]).to_bytes(4, "little")
    path.write_bytes(content)
    monkeypatch.setattr(image_cache, "_build", lambda *arguments: pytest.fail("built again"))
    source = cached(folder, tmp_path / "cache")
    assert source.missing == 3
    np.testing.assert_array_equal(pixels(source), expected)


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
def test_it_is_built_again_when_the_folder_has_changed(
    change: Callable[[Path], None], folder: Path, tmp_path: Path
) -> None:
    cached(folder, tmp_path / "cache")
    cached(folder, tmp_path / "cache", size=32)
    before = caches(tmp_path / "cache")
    change(folder)
    source = cached(folder, tmp_path / "cache")
    assert_equal(batches(source, 4), batches(ImageFolder(folder, 16, 160), 4))
    after = caches(tmp_path / "cache")
    assert len(set(after) - set(before)) == 1
    assert len(after) == 2  # the one that is out of date is gone, that of the other size is not


def test_it_is_built_again_when_the_archive_has_changed(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_a_file_that_was_cut_off_is_not_used(left: int, folder: Path, tmp_path: Path) -> None:
    expected = pixels(cached(folder, tmp_path / "cache"))
    (path,) = caches(tmp_path / "cache")
    os.truncate(path, left)
    np.testing.assert_array_equal(pixels(cached(folder, tmp_path / "cache")), expected)


def flip(path: Path, offset: int) -> None:
    """Change one bit, counted from the end if `offset` is negative."""
    with open(path, "r+b") as file:
        file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize(
    "offset", [20, 128, -1, *(pytest.param(offset, marks=pytest.mark.exhaustive) for offset in (0, 90, 5000, -5))]
)
def test_a_file_of_which_a_bit_has_changed_is_built_again(
    offset: int, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = pixels(cached(folder, tmp_path / "cache"))
    (path,) = caches(tmp_path / "cache")
    flip(path, offset)
    capsys.readouterr()
    np.testing.assert_array_equal(pixels(cached(folder, tmp_path / "cache")), expected)
    assert capsys.readouterr().err.count(f"damaged, decoded again: {path}\n") == 1


def test_a_disk_that_cannot_read_the_file_is_no_reason_to_stop(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pixels(cached(folder, tmp_path / "cache"))
    errors = [OSError(5, "Input/output error")] * 2  # when it is opened, and once more when nobody else can build it

    def crc32(data: bytes, value: int = 0) -> int:  # fails for the read before it
        if errors:
            raise errors.pop()
        return zlib.crc32(data, value)

    monkeypatch.setattr(image_cache, "zlib", SimpleNamespace(crc32=crc32))
    np.testing.assert_array_equal(pixels(cached(folder, tmp_path / "cache")), expected)


def test_a_disk_that_does_not_keep_what_is_written_is_an_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(part: Path, path: Path) -> None:
        flip(part, 1000)
        os.rename(part, path)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match=r"photographs-.*\.npy differs from what was just written: .* --cache-dir"):
        cached(folder, tmp_path / "cache")


def test_beside_a_process_that_has_verified_it_nothing_is_read_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    expected = pixels(cached(folder, cache))
    (path,) = caches(cache)
    with monkeypatch.context() as patch:
        patch.setattr(image_cache, "zlib", SimpleNamespace(crc32=lambda *_: pytest.fail("verified again")))
        source = open_data(str(folder), size=16, crop=160, cache=cache, verify=False)
    np.testing.assert_array_equal(pixels(source), expected)
    for spoil in (lambda: os.truncate(path, 5000), lambda: path.unlink()):  # no process of this machine has verified it
        spoil()
        source = open_data(str(folder), size=16, crop=160, cache=cache, verify=False)
        np.testing.assert_array_equal(pixels(source), expected)


def test_the_classes_of_an_unverified_cache_are_those_of_its_rows(folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("*.jpg"):
        (folder / "some").mkdir(exist_ok=True)
        path.rename(folder / "some" / path.name)
    first, second = (
        open_data(str(folder), size=16, cache=tmp_path / "cache", verify=verify, classes="own")
        for verify in (True, False)
    )
    assert first.labels.classes == second.labels.classes == ("more", "some")
    np.testing.assert_array_equal(first.labels.numbers, second.labels.numbers)


def test_the_random_state_does_not_know_of_it(folder: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    cached(folder, tmp_path / "cache")
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------- what can come between


def test_the_file_is_on_the_disk_before_it_takes_the_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    cached(folder, tmp_path / "cache")
    assert calls == ["fsync", "replace"]


def test_a_file_system_without_fsync(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = pixels(open_data(str(folder), size=16, crop=160))
    refuse_fsync(monkeypatch, errno.EINVAL)
    np.testing.assert_array_equal(pixels(cached(folder, tmp_path / "cache")), expected)
    assert len(caches(tmp_path / "cache")) == 1
    assert f"the file system of {tmp_path}/cache cannot force files onto the disk" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_a_build_that_fails_leaves_nothing(
    error: BaseException, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_sizes_have_a_unit_in_which_they_are_not_zero() -> None:
    sizes = [0, 1023, 1024, 1536, 2**20 - 1, 9 * 2**30 + 2**29, 2**50]
    assert [readable(size) for size in sizes] == [
        "0 bytes", "1023 bytes", "1 KiB", "1.5 KiB", "1024 KiB", "9.5 GiB", "1 PiB",
    ]  # fmt: skip


def test_too_little_space_is_known_beforehand(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    need = 128 + COUNT * (3 * 16 * 16 + 8) + image_cache.CHECKSUM  # header, rows and their sources
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, need - 1))
    monkeypatch.setattr(image_cache, "_decoded", lambda folder: pytest.fail("decoding has begun"))
    with pytest.raises(OSError, match=r"need 9\.223 KiB in .*cache, 1 bytes more than are free: .*--no-cache"):
        cached(folder, tmp_path / "cache")


# ------------------------------------------------------------------------------------------------------- training


@pytest.mark.usefixtures("no_drawing")
def test_training_with_and_without_it_is_bitwise_the_same(folder: Path, tmp_path: Path) -> None:
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


@pytest.mark.usefixtures("no_drawing")
def test_a_run_is_resumed_as_if_no_bit_had_changed(folder: Path, tmp_path: Path) -> None:
    settings = ["--data", str(folder), "--steps", "4", "--save-every", "2"]
    train(tmp_path / "whole", *settings)
    train(tmp_path / "resumed", *settings)
    (tmp_path / "resumed" / "checkpoint-000004.pt").unlink()
    (path,) = caches(tmp_path / "cache")
    for row in range(COUNT):  # in every image, since four steps do not draw all of them
        flip(path, 128 + 3 * 16 * 16 * row)
    resume(tmp_path / "resumed")
    assert_same(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "resumed"), apart_from=("/config/out",))


@pytest.mark.usefixtures("no_drawing")
def test_the_cache_can_lie_elsewhere(folder: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", "--data", str(folder), "--steps", "1", "--cache-dir", str(tmp_path / "ssd"))
    assert len(caches(tmp_path / "ssd")) == 1
    assert not (tmp_path / "cache").exists()
