"""The images that training reads: modes, crops, and files that are left out with a reason."""

from __future__ import annotations

import errno
import os
import re
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import train_celeba
from tiny_runs import train
from training.data import image_folder
from training.data.image_folder import ImageFolder, ZippedImageFolder
from training.data.sources import crop_setting, open_data

SIZE = 8
RAMP = np.linspace(0, 1, SIZE * SIZE).reshape(SIZE, SIZE)  # every grey from black to white
BYTES = np.rint(255 * RAMP).astype(np.uint8)


def read(path: Path) -> np.ndarray:
    """The pixels (SIZE, SIZE, 3) of an image that has this size already, so that nothing is resampled."""
    folder = ImageFolder(path.parent, SIZE)
    (image, _, unreadable) = folder.read(folder.paths.index(str(path)))
    assert not unreadable
    return image.permute(1, 2, 0).numpy()


def gray(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[:, :, None], 3, axis=2)


def why(path: Path) -> str:
    """The reason for leaving out an image of a folder that also has a valid one."""
    Image.new("RGB", (SIZE, SIZE)).save(path.parent / "zzz.png")
    folder = ImageFolder(path.parent, SIZE)
    if str(path) in folder.others:
        return folder.others[str(path)]
    *_, unreadable = folder.read(folder.paths.index(str(path)))
    return unreadable[str(path)]


def png(bits: int, color: int, row: bytes, transparent: bytes) -> bytes:
    """A PNG of 2×1 pixels with a transparent colour, which Pillow writes for few kinds only."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, bits, color, 0, 0, 0)) + chunk(b"tRNS", transparent)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


# ---------------------------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm", "jp2"])
def test_16_bit_grays_are_scaled(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    options = {"irreversible": False} if suffix == "jp2" else {}
    Image.fromarray(np.rint(65535 * RAMP).astype(np.uint16)).save(path, **options)
    np.testing.assert_array_equal(read(path), gray(BYTES))


def test_16_bit_grays_of_the_other_byte_order_are_scaled(tmp_path):
    image = Image.frombytes("I;16B", (SIZE, SIZE), np.rint(65535 * RAMP).astype(">u2").tobytes())
    image.save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read(tmp_path / "a.tif"), gray(BYTES))


def test_floating_point_from_0_to_1_is_scaled(tmp_path):
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read(tmp_path / "a.tif"), gray(BYTES))


@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_a_tiff_whose_zero_is_white_is_inverted(kind, tmp_path):
    values = (RAMP * (65535 if kind is np.uint16 else 1)).round(5).astype(kind)
    tag = {int(ExifTags.Base.PhotometricInterpretation): 0}
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo=tag)
    with Image.open(tmp_path / "a.tif") as file:
        assert file.tag_v2[ExifTags.Base.PhotometricInterpretation] == 0
    # The file holds rounded values, so its greys may be one off.
    np.testing.assert_allclose(read(tmp_path / "a.tif"), gray(255 - BYTES), atol=1)


def test_a_tiff_of_12_bits_is_scaled_by_its_own_white(tmp_path):
    samples = [0, 4095, 2048, 1024]
    bits = "".join(f"{sample:012b}" for sample in samples)
    data = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    tags = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, len(data))]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    start = 8 + len(data)
    (tmp_path / "a.tif").write_bytes(
        struct.pack("<2sHI", b"II", 42, start) + data + struct.pack("<H", len(tags)) + directory + bytes(4)
    )
    with image_folder._open_image(str(tmp_path / "a.tif")) as file:
        pixels = np.asarray(image_folder.upright_rgb(file))
    np.testing.assert_array_equal(pixels[0, :, 0], np.rint([0, 255, 2048 * 255 / 4095, 1024 * 255 / 4095]))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (1000 * RAMP.astype(np.float32), "grey values from 0 to 1000, expected 0 to 1"),
        (RAMP.astype(np.float32) - 0.5, "grey values from -0.5 to 0.5, expected 0 to 1"),
        (np.full((SIZE, SIZE), np.nan, np.float32), "grey values from nan to nan, expected 0 to 1"),
        (BYTES.astype(np.int32), "grey values of TIFF mode I, for which no value is known to be white"),
    ],
    ids=["large", "negative", "nan", "integers"],
)
def test_values_of_unknown_range_are_left_out(values, reason, tmp_path):
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert why(tmp_path / "a.tif") == reason


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "gif"])
def test_transparent_pixels_are_white(suffix, tmp_path):
    pixels = np.zeros((SIZE, SIZE, 4), np.uint8)
    pixels[:, :, 0] = 255
    pixels[:4, :, 3] = 255  # red above, and below red that nobody sees
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    image = read(tmp_path / f"a.{suffix}")
    assert (image[:4] == (255, 0, 0)).all()
    assert (image[4:] == 255).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P with alphas", "P with one colour"])
def test_transparency_is_composited_over_white(mode, tmp_path):
    alpha = BYTES if mode in ("RGBA", "LA") else 255 * (RAMP > 0.5).astype(np.uint8)
    if mode == "RGBA":
        image = Image.fromarray(np.dstack([np.zeros((SIZE, SIZE, 3), np.uint8), alpha]))
    elif mode == "LA":
        image = Image.fromarray(np.dstack([np.zeros_like(alpha), alpha]))
    else:
        image = Image.fromarray(alpha // 255).convert("P")
        image.putpalette([90, 90, 90, 0, 0, 0])
        image.info["transparency"] = bytes([0, 255]) if mode == "P with alphas" else 0
    image.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as file:
        assert file.mode == mode.split()[0]
    np.testing.assert_array_equal(read(tmp_path / "a.png"), gray(255 - alpha))  # black, as dense as it is opaque


@pytest.mark.parametrize(
    ("bits", "color", "row", "transparent", "expected"),
    [
        (1, 0, b"\x40", struct.pack(">H", 0), [(255,) * 3, (255,) * 3]),
        (8, 0, b"\5\3", struct.pack(">H", 5), [(255,) * 3, (3,) * 3]),
        (16, 0, struct.pack(">HH", 257, 514), struct.pack(">H", 257), [(255,) * 3, (2,) * 3]),
        (8, 2, bytes(range(6)), struct.pack(">3H", 0, 1, 2), [(255,) * 3, (3, 4, 5)]),
    ],
    ids=["1 bit", "8 bits", "16 bits", "colour"],
)
def test_a_transparent_color_is_white(bits, color, row, transparent, expected, tmp_path):
    (tmp_path / "a.png").write_bytes(png(bits, color, row, transparent))
    with image_folder._open_image(str(tmp_path / "a.png")) as file:
        assert np.asarray(image_folder.upright_rgb(file)).tolist() == [[list(pixel) for pixel in expected]]


@pytest.mark.parametrize(
    ("bits", "color", "row", "transparent"),
    [(2, 0, b"\x90", b"\0\2"), (4, 0, b"\x53", b"\0\5"), (16, 2, bytes(range(12)), bytes(range(6)))],
    ids=["2 bits", "4 bits", "16 bits of colour"],
)
def test_a_transparent_color_that_pillow_does_not_find_is_a_reason(bits, color, row, transparent, tmp_path):
    (tmp_path / "a.png").write_bytes(png(bits, color, row, transparent))
    assert "transparent colour" in why(tmp_path / "a.png")


def test_cmyk_keeps_its_colors(tmp_path):
    # 100 % yellow is red and green light; the JPEG is Adobe's, inverted, and lossy by a few values.
    for name in ("a.tif", "a.jpg"):
        Image.new("CMYK", (SIZE, SIZE), (0, 0, 255, 0)).save(tmp_path / name)
        np.testing.assert_allclose(read(tmp_path / name), np.broadcast_to((255, 255, 0), (SIZE, SIZE, 3)), atol=3)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_images_are_turned_as_their_exif_data_say(kind, suffix, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned clockwise
    values = np.rint(RAMP * np.iinfo(kind).max).astype(kind)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}", exif=exif)
    np.testing.assert_array_equal(read(tmp_path / f"a.{suffix}"), gray(np.rot90(BYTES, -1)))


# ---------------------------------------------------------------------------------------------------------- crops


def framed(path: Path, width: int, height: int, side: int, **options: object) -> None:
    """A white image with a black centre square of `side` pixels."""
    pixels = np.full((height, width, 3), 255, np.uint8)
    top, left = (height - side) // 2, (width - side) // 2
    pixels[top : top + side, left : left + side] = 0
    Image.fromarray(pixels).save(path, **options)


@pytest.mark.parametrize(
    ("crop", "width", "height", "side"),
    [
        (None, 178, 218, 160),
        (None, 218, 178, 178),
        (None, 256, 256, 256),
        (None, 300, 200, 200),
        (160, 300, 200, 160),
        (160, 90, 120, 90),
        (0, 178, 218, 178),
    ],
)
def test_the_square_that_is_cropped(crop, width, height, side, tmp_path):
    framed(tmp_path / "exact.png", width, height, side)
    framed(tmp_path / "smaller.png", width, height, side - 2)
    folder = ImageFolder(tmp_path, 32, crop)
    assert not folder.read(0)[0].any()  # black to its edges
    assert folder.read(1)[0].any()  # one pixel more, and white would show
    assert folder.crops() == f"{side}x{side} of {width}x{height}"


def test_auto_decides_for_each_image(tmp_path):
    for i, (width, height, side) in enumerate([(178, 218, 160), (178, 218, 160), (64, 48, 48), (20, 30, 20)]):
        framed(tmp_path / f"{i}.png", width, height, side)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    framed(tmp_path / "4.jpg", 218, 178, 160, exif=exif, quality=100, subsampling=0)  # upright 178×218, as CelebA's
    (tmp_path / "5.png").write_bytes(b"damaged")
    folder = ImageFolder(tmp_path, 16)
    images, _, unreadable = folder[[(i, False) for i in range(5)]]
    assert not unreadable
    assert images.amax() < 8  # black, but for the JPEG's losses beside white
    assert folder.crops() == "160x160 of 178x218 (3), 48x48 of 64x48 (1), 20x20 of 20x30 (1)"


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_the_size_in_the_header_is_that_of_the_decoded_image(suffix, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 8
    Image.new("RGB", (30, 20)).save(tmp_path / f"a.{suffix}", exif=exif)
    folder = ImageFolder(tmp_path, 16)
    with image_folder._open_image(folder.paths[0]) as file:
        assert folder._upright_size(folder.paths[0]) == image_folder.upright_rgb(file).size == (20, 30)


def test_sizes_are_those_of_a_sample_where_there_are_many(tmp_path, monkeypatch):
    monkeypatch.setattr(image_folder, "SAMPLE", 4)
    for i in range(10):
        Image.new("L", (20 + i // 2, 30)).save(tmp_path / f"{i}.png")
    looked_at, whole = [], image_folder._open_image
    monkeypatch.setattr(ImageFolder, "_open", lambda self, path: looked_at.append(path) or whole(path))
    text = ImageFolder(tmp_path, 16).crops()
    assert [Path(path).name for path in looked_at] == ["0.png", "3.png", "6.png", "9.png"]
    expected = "20x20 of 20x30 (1), 21x21 of 21x30 (1), 23x23 of 23x30 (1), other sizes (1), in a sample of 4"
    assert text == expected


def test_the_crop_setting():
    assert [crop_setting(text) for text in ("auto", "0", "160")] == [None, 0, 160]
    for text in ("-1", "all", "1.5", ""):
        with pytest.raises(ValueError, match=rf"--crop {re.escape(text)}: expected auto, or a number of pixels"):
            crop_setting(text)


@pytest.mark.parametrize("quick", [["--no-cache", "--num-workers", "0"], []], ids=["no cache", "cache"])
def test_a_run_says_what_it_crops_and_shows_what_the_discriminator_is_shown(quick, tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    for i in range(9):
        framed(data / f"{i}.png", 64, 40, 4 * i)
    shown = []

    read_images = train_celeba.read_images

    def watched(*arguments):
        for batch in read_images(*arguments):
            shown.append(batch.images)
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_celeba, "read_images", watched)
        train(out, "--data", str(data), "--steps", "2", "--seed", "3", *quick)
    assert "crop      40x40 of 64x40\n" in capsys.readouterr().out
    with Image.open(out / "reals.png") as file:
        grid = np.asarray(file)  # 8 columns and 2 rows of 9 images, each 8 times as large, 2 pixels apart
    tiles = [grid[2 + row * 130 :, 2 + column * 130 :][:128:8, :128:8] for row in range(2) for column in range(8)]
    first = torch.cat(shown)[:8].permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(np.stack(tiles[:8]), first)


# ----------------------------------------------------------------------------------------------- what is left out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    (root / "more").mkdir(parents=True)
    for name in ("a.png", "more/b.png"):
        Image.new("RGB", (SIZE, SIZE)).save(root / name)
    return root


def names(folder: ImageFolder) -> list[str]:
    return [os.path.relpath(path, folder.root) for path in folder.paths]


def left_out(folder: ImageFolder) -> dict[str, str]:
    return {os.path.relpath(path, folder.root): reason for path, reason in folder.others.items()}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_opened(folder):
    os.mkfifo(folder / "pipe.jpg")
    os.symlink("pipe.jpg", folder / "link.jpg")
    found = ImageFolder(folder, SIZE)
    assert names(found) == ["a.png", "more/b.png"]
    assert left_out(found) == {"pipe.jpg": "not a regular file", "link.jpg": "not a regular file"}
    with pytest.raises(ValueError, match="expected a folder of images or a zip archive"):
        open_data(str(folder / "pipe.jpg"), size=SIZE)


def test_links_to_folders_are_followed_once(folder, tmp_path):
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


def test_a_folder_that_cannot_be_read_is_named(folder, monkeypatch):
    def scandir(path: str) -> object:
        if path.endswith("more"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    real = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    found = ImageFolder(folder, SIZE)
    assert names(found) == ["a.png"]
    assert left_out(found) == {"more": "Permission denied"}


def test_images_and_files_that_are_too_large_are_left_out(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIZE * SIZE)
    Image.new("RGB", (2 * SIZE, SIZE)).save(folder / "large.png")  # Pillow warns, and reads it
    Image.new("RGB", (2 * SIZE, SIZE + 1)).save(folder / "larger.png")
    with open(folder / "long.png", "wb") as file:
        file.truncate(image_folder.LARGEST_FILE + 1)  # a hole
    found = ImageFolder(folder, SIZE)
    assert left_out(found) == {"long.png": "512 MiB, at most 512 MiB are read"}
    assert names(found) == ["a.png", "large.png", "larger.png", "more/b.png"]
    *_, unreadable = found[[(i, False) for i in range(4)]]
    ((path, reason),) = unreadable.items()
    assert found.unreadable == unreadable
    assert path == str(folder.resolve() / "larger.png")
    assert reason.startswith("Image size (144 pixels) exceeds limit of 128 pixels")


def test_a_large_member_of_an_archive_is_not_read(folder, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.write(folder / "a.png", "a.png")
        file.writestr("bomb.png", bytes(2**20))
    monkeypatch.setattr(image_folder, "LARGEST_FILE", 2**19)
    found = ZippedImageFolder(tmp_path / "images.zip", SIZE)
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


def test_encrypted_members_are_named_as_such(folder, tmp_path):
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name in ("a.png", "more/b.png"):
            file.write(folder / name, name)
    encrypt(path, {"more/b.png"})
    found = ZippedImageFolder(path, SIZE)
    assert (found.paths, found.others) == (["a.png"], {"more/b.png": "encrypted"})
    encrypt(path, {"a.png"})
    with pytest.raises(ValueError, match=r"no images in this archive; 2 files are left out, .* a\.png: encrypted$"):
        open_data(str(path), size=SIZE)


def test_the_first_image_is_named_when_it_cannot_be_read(folder, tmp_path, capsys):
    (folder / "0.png").write_text("not an image")
    for arguments in ([], ["--no-cache", "--num-workers", "1"]):
        train(tmp_path / "run", "--data", str(folder), "--steps", "3", *arguments)
        assert capsys.readouterr().err.count("not in a format that can be read, left out: ") == 1


def test_a_folder_without_one_readable_image_says_why(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text("not an image")
    with pytest.raises(ValueError, match=r"none of the 2 images can be read, .*a\.png: not in a format"):
        open_data(str(tmp_path), size=SIZE)
