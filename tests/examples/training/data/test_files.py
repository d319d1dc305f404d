"""The files that are found: what is left out with a reason, what is nobody's data, and archives of every origin."""

from __future__ import annotations

import errno
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tiny_runs import checkpoint, resume, train
from training.data import files
from training.data.dataset import SourceLost
from training.data.image_folder import ImageFolder
from training.data.sources import open_data

SIZE = 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    (root / "more").mkdir(parents=True)
    for name in ("a.png", "more/b.png"):
        Image.new("RGB", (SIZE, SIZE)).save(root / name)
    return root


@pytest.fixture
def archive(folder: Path) -> Path:
    return Path(shutil.make_archive(str(folder), "zip", folder))


def names(folder: ImageFolder) -> list[str]:
    return [os.path.relpath(path, folder.root) for path in folder.paths]


def left_out(folder: ImageFolder) -> dict[str, str]:
    return {os.path.relpath(path, folder.root): reason for path, reason in folder.others.items()}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_opened(folder: Path) -> None:
    os.mkfifo(folder / "pipe.jpg")
    os.symlink("pipe.jpg", folder / "link.jpg")
    found = ImageFolder(folder, SIZE)
    assert names(found) == ["a.png", "more/b.png"]
    assert left_out(found) == {"pipe.jpg": "not a regular file", "link.jpg": "not a regular file"}
    with pytest.raises(ValueError, match="expected a folder of images or a zip archive"):
        open_data(str(folder / "pipe.jpg"), size=SIZE)


def test_links_to_folders_are_followed_once(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (SIZE, SIZE)).save(other / "c.png")
    os.symlink(other, folder / "elsewhere")
    os.symlink(other, folder / "again")
    os.symlink(folder, other / "back")  # a circle through another folder
    os.symlink("..", folder / "more" / "up")  # and one within
    os.symlink("missing.png", folder / "nowhere.png")
    os.symlink("self.png", folder / "self.png")
    found = ImageFolder(folder, SIZE)
    assert names(found) == ["a.png", "again/c.png", "more/b.png"]
    assert left_out(found) == {
        "again/back": "a link to a folder that is read already",
        "elsewhere": "a link to a folder that is read already",
        "more/up": "a link to a folder that is read already",
        "nowhere.png": os.strerror(errno.ENOENT),
        "self.png": os.strerror(errno.ELOOP),
    }


def test_a_folder_that_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scandir(path: str) -> object:
        if path.endswith("more"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    real = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    found = ImageFolder(folder, SIZE)
    assert names(found) == ["a.png"]
    assert left_out(found) == {"more": "Permission denied"}


def test_images_and_files_that_are_too_large_are_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIZE * SIZE)
    Image.new("RGB", (2 * SIZE, SIZE)).save(folder / "large.png")  # Pillow warns, and reads it
    Image.new("RGB", (2 * SIZE, SIZE + 1)).save(folder / "larger.png")
    with open(folder / "long.png", "wb") as file:
        file.truncate(files.LARGEST_FILE + 1)  # a hole
    found = ImageFolder(folder, SIZE)
    assert left_out(found) == {"long.png": "512 MiB, at most 512 MiB are read"}
    assert names(found) == ["a.png", "large.png", "larger.png", "more/b.png"]
    _, unreadable = found.pixels(range(4))
    ((path, reason),) = unreadable.items()
    assert path == str(folder.resolve() / "larger.png")
    assert reason.startswith("Image size (144 pixels) exceeds limit of 128 pixels")


def test_a_large_member_of_an_archive_is_not_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.write(folder / "a.png", "a.png")
        file.writestr("bomb.png", bytes(2**20))
    monkeypatch.setattr(files, "LARGEST_FILE", 2**19)
    found = ImageFolder(tmp_path / "images.zip", SIZE)
    assert found.paths == ["a.png"]
    assert found.others == {"bomb.png": "1 MiB, at most 512 KiB are read"}


def encrypt(path: Path, names: set[str]) -> None:
    """Set the flag of encryption, in both headers of members (zipfile cannot write encrypted ones)."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        central = file.start_dir
        for member in file.infolist():
            if member.filename in names:
                data[member.header_offset + 6] |= 1
                data[central + 8] |= 1
            central += 46 + len(member.filename) + len(member.extra) + len(member.comment)
    path.write_bytes(data)


def test_encrypted_members_are_named_as_such(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name in ("a.png", "more/b.png"):
            file.write(folder / name, name)
    encrypt(path, {"more/b.png"})
    found = ImageFolder(path, SIZE)
    assert (found.paths, found.others) == (["a.png"], {"more/b.png": "encrypted"})
    encrypt(path, {"a.png"})
    with pytest.raises(ValueError, match=r"no images in this archive; 2 files are left out, .* a\.png: encrypted$"):
        open_data(str(path), size=SIZE)


# ----------------------------------------------------------------------------------------------- nobody's data


NOBODYS = {
    ".ipynb_checkpoints/0-checkpoint.png": ".ipynb_checkpoints",  # Jupyter
    "more/.ipynb_checkpoints/b-checkpoint.png": ".ipynb_checkpoints",
    "@eaDir/a.png/SYNOPHOTO_THUMB_M.png": "@eaDir",  # Synology
    "#recycle/old.png": "#recycle",
    ".thumbnails/a.png": ".thumbnails",
    "__MACOSX/._a.png": "__MACOSX",
    "lost+found/1.png": "lost+found",
    "System Volume Information/a.png": "System Volume Information",
    "$RECYCLE.BIN/a.png": "$RECYCLE.BIN",
    "$Recycle.bin/b.png": "$Recycle.bin",
    ".git/objects/a.png": ".git",
}


@pytest.fixture
def cluttered(folder: Path) -> Path:
    """The two images, each in a class, and what other programs have left beside them."""
    (folder / "some").mkdir()
    (folder / "a.png").rename(folder / "some" / "a.png")
    for name in (*NOBODYS, "._a.png", "more/._b.png", "more/.b.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "more" / "b.png", folder / name)
    return folder


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
def test_hidden_and_system_folders_are_neither_images_nor_classes(zipped: bool, cluttered: Path) -> None:
    root = Path(shutil.make_archive(str(cluttered), "zip", cluttered)) if zipped else cluttered
    data = open_data(str(root), size=SIZE, classes="own")
    assert isinstance(data, ImageFolder)
    assert data.labels is not None
    assert data.labels.classes == ("more", "some")
    assert [Path(path).name for path in data.paths] == ["b.png", "a.png"]
    assert not data.others
    # A folder that exists twice counts twice, and is named once.
    assert re.fullmatch(
        r"3 hidden files \(.*\._a\.png.*\), 11 hidden or system folders \(.*, .*, .*, …\)", data.skipped
    ), data.skipped


def test_a_hidden_folder_that_cannot_be_read_is_no_complaint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "lost+found").mkdir()  # the administrator's
    real = os.scandir

    def scandir(path: str) -> object:
        assert not path.endswith("lost+found")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = ImageFolder(folder, SIZE)
    assert names(found) == ["a.png", "more/b.png"]
    assert not found.others
    assert found.skipped == "1 hidden or system folder (lost+found)"


def test_data_may_be_below_a_hidden_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / ".cache").mkdir()
    folder = folder.rename(tmp_path / ".cache" / "images")
    assert names(ImageFolder(folder, SIZE)) == ["a.png", "more/b.png"]


def test_a_folder_of_nothing_else_says_what_was_not_read(folder: Path) -> None:
    (folder / "a.png").unlink()
    (folder / "more").rename(folder / ".more")
    with pytest.raises(ValueError, match=r"no images in this folder or below it; not read: 1 hidden .* \(\.more\)$"):
        open_data(str(folder), size=SIZE)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, with an earlier one in it, and with what generate.py draws."""
    out = tmp_path_factory.mktemp("runs") / "mine"
    train(out, "--steps", "1")
    assert (out / "samples-000001.png").exists()
    shutil.copytree(out, out / "earlier-1")  # as a second run leaves the first one's files
    (out / "generated").mkdir()
    Image.new("RGB", (SIZE, SIZE)).save(out / "generated" / "grid.png")
    return out


@pytest.mark.parametrize("out", ["runs/mine", "deep/er/mine", "."], ids=["default", "elsewhere", "the data's folder"])
@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
def test_what_a_run_wrote_is_no_data(zipped: bool, out: str, run: Path, cluttered: Path) -> None:
    shutil.copytree(run, cluttered / out, dirs_exist_ok=True)
    root = Path(shutil.make_archive(str(cluttered), "zip", cluttered)) if zipped else cluttered
    data = open_data(str(root), size=SIZE, classes="own")
    assert data.counts() == {"more": 1, "some": 1}
    assert isinstance(data, ImageFolder)
    assert re.search(r"folders? (or files? )?of a run", data.skipped)


def test_a_run_goes_on_in_the_folder_of_its_images(
    cluttered: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when the trainer is started there: `runs` is then below the data, with a class of its own."""
    monkeypatch.chdir(cluttered)
    out = Path("runs", "mine")
    train(out, "--data", ".", "--classes", "own", "--steps", "1", "--sample-every", "1")
    resume(out, "--steps", "2")
    assert checkpoint(out)["classes"] == {"more": 1, "some": 1}
    said, complaints = capsys.readouterr()
    assert re.search(
        r"^not read  .*folder or file of a run \(runs/mine\), 3 hidden files \(.*\), 11 h", said, re.MULTILINE
    )
    assert "left out" not in complaints


# ------------------------------------------------------------------------------------------------------ archives


def write_members(path: Path, members: list[tuple[str, tuple[int, int, int]]]) -> None:
    """Members of one color, with names as they are given."""
    with zipfile.ZipFile(path, "w") as file:
        for name, color in members:
            Image.new("RGB", (SIZE, SIZE), color).save(path.with_suffix(".png"))
            info = zipfile.ZipInfo("x")
            info.filename = name  # the constructor would change a backslash on Windows
            file.writestr(info, path.with_suffix(".png").read_bytes())


def test_backslashes_separate_folders(tmp_path: Path) -> None:
    """As in archives of .NET and PowerShell before 2016."""
    path = tmp_path / "animals.zip"
    write_members(path, [("cat\\0.png", (1, 1, 1)), ("cat\\1.png", (2, 2, 2)), ("dog\\0.png", (3, 3, 3))])
    data = open_data(str(path), size=SIZE, classes="own")
    assert data.counts() == {"cat": 2, "dog": 1}
    assert data[[(i, False) for i in range(3)]].images[:, 0, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.filterwarnings("ignore:Duplicate name")  # the module that writes the archive
@pytest.mark.parametrize("again", ["cat/0.png", "cat\\0.png"])
def test_of_two_members_of_one_name_the_later_counts(again: str, tmp_path: Path) -> None:
    """As for a program that unpacks them: the later one overwrites the earlier one."""
    path = tmp_path / "animals.zip"
    write_members(path, [("cat/0.png", (1, 1, 1)), ("dog/0.png", (2, 2, 2)), (again, (3, 3, 3))])
    found = ImageFolder(path, SIZE)
    assert found.paths == ["cat/0.png", "dog/0.png"]
    assert found.pixels([0, 1])[0][:, 0, 0, 0].tolist() == [3, 2]
    assert found.others == {"cat/0.png (an earlier member)": "the archive has a later member of this name"}


def test_an_archive_that_is_truncated_while_it_is_read_is_one_line(archive: Path, tmp_path: Path) -> None:
    """Mapped, its pages would be gone, and access to them would kill the process by SIGBUS."""
    found = ImageFolder(archive, SIZE)
    found.pixels([0])
    os.truncate(archive, 100)
    with pytest.raises(SourceLost, match=r"images\.zip was \d+ bytes long when it was opened, and was changed since$"):
        found.pixels([1])


def test_an_archive_gives_what_its_folder_gives(folder: Path, archive: Path) -> None:
    unpacked, zipped = ImageFolder(folder, SIZE), ImageFolder(archive, SIZE)
    assert names(unpacked) == zipped.paths == ["a.png", "more/b.png"]
    for one, other in zip(unpacked.pixels([0, 1]), zipped.pixels([0, 1]), strict=True):
        np.testing.assert_array_equal(one, other)
    assert sorted(folder.parent.iterdir()) == [folder, archive]  # nothing was unpacked


def test_a_member_whose_checksum_is_wrong_is_named(folder: Path, archive: Path) -> None:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        for name in ("a.png", "more/b.png"):
            file.write(folder / name, name)
    data = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as file:
        member = file.getinfo("more/b.png")
    data[member.header_offset + 30 + len(member.filename) + 40] ^= 1
    archive.write_bytes(data)
    _, unreadable = ImageFolder(archive, SIZE).pixels([1])
    assert list(unreadable) == ["more/b.png"]
    assert "Bad CRC-32" in unreadable["more/b.png"]


def test_an_archive_can_go_to_a_process_that_shares_no_memory(archive: Path) -> None:
    source = ImageFolder(archive, SIZE)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source)).pixels([0, 1])[0], source.pixels([0, 1])[0])


def write_archive(path: Path, name: str) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(name, "not an image, and longer than the end of an archive")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda path: os.truncate(path, path.stat().st_size // 2),
            r"images\.zip: .*zip archive.*it is incomplete",
        ),
        (lambda path: path.write_bytes(b"PK"), r"images\.zip: .*zip archive"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"PK\1\2", b"PK\0\0")), r"a damaged zip archive"),
        (lambda path: zipfile.ZipFile(path, "w").close(), r"images\.zip"),
        (lambda path: write_archive(path, "notes.txt"), r"no images in this archive"),
        (lambda path: path.unlink(), r"no such folder or zip archive"),
    ],
    ids=["cut off", "too short", "damaged", "empty", "no images", "missing"],
)
def test_wrong_archives_are_one_line(spoil: Callable[[Path], object], message: str, archive: Path) -> None:
    spoil(archive)
    with pytest.raises(ValueError, match=message) as error:
        open_data(str(archive), size=16, crop=160)
    assert "\n" not in str(error.value)
