"""The pixels of image files in every form: bit depths, transparency, color spaces, orientation."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from training.data.decoding import upright_rgb, upright_size
from training.data.image_folder import ImageFolder

SIZE = 8
RAMP = np.linspace(0, 1, SIZE * SIZE).reshape(SIZE, SIZE)  # every gray from black to white
BYTES = np.rint(255 * RAMP).astype(np.uint8)


def read(path: Path) -> np.ndarray:
    """The pixels (SIZE, SIZE, 3) of an image that has this size already, so that nothing is resampled."""
    folder = ImageFolder(path.parent, SIZE)
    images, unreadable = folder.pixels([folder.paths.index(str(path))])
    assert not unreadable
    return images[0].transpose(1, 2, 0)


def gray(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[:, :, None], 3, axis=2)


def why(path: Path) -> str:
    """The reason for leaving out an image of a folder that also has a valid one."""
    Image.new("RGB", (SIZE, SIZE)).save(path.parent / "zzz.png")
    folder = ImageFolder(path.parent, SIZE)
    if str(path) in folder.others:
        return folder.others[str(path)]
    return folder.pixels([folder.paths.index(str(path))])[1][str(path)]


def png(bits: int, color: int, row: bytes, transparent: bytes) -> bytes:
    """A PNG of 2×1 pixels with a transparent color, which Pillow writes for few kinds only."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, bits, color, 0, 0, 0)) + chunk(b"tRNS", transparent)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm", "jp2"])
def test_16_bit_grays_are_scaled(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    options = {"irreversible": False} if suffix == "jp2" else {}
    Image.fromarray(np.rint(65535 * RAMP).astype(np.uint16)).save(path, **options)
    np.testing.assert_array_equal(read(path), gray(BYTES))


def test_16_bit_grays_of_the_other_byte_order_are_scaled(tmp_path: Path) -> None:
    image = Image.frombytes("I;16B", (SIZE, SIZE), np.rint(65535 * RAMP).astype(">u2").tobytes())
    image.save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read(tmp_path / "a.tif"), gray(BYTES))


def test_floating_point_from_0_to_1_is_scaled(tmp_path: Path) -> None:
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read(tmp_path / "a.tif"), gray(BYTES))


@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_a_tiff_whose_zero_is_white_is_inverted(kind: type, tmp_path: Path) -> None:
    values = (RAMP * (65535 if kind is np.uint16 else 1)).round(5).astype(kind)
    tag = {int(ExifTags.Base.PhotometricInterpretation): 0}
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo=tag)
    with Image.open(tmp_path / "a.tif") as file:
        assert file.tag_v2[ExifTags.Base.PhotometricInterpretation] == 0
    # The file holds rounded values, so its grays may be one off.
    np.testing.assert_allclose(read(tmp_path / "a.tif"), gray(255 - BYTES), atol=1)


def test_a_tiff_of_12_bits_is_scaled_by_its_own_white(tmp_path: Path) -> None:
    samples = [0, 4095, 2048, 1024]
    bits = "".join(f"{sample:012b}" for sample in samples)
    data = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    tags = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, len(data))]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    start = 8 + len(data)
    (tmp_path / "a.tif").write_bytes(
        struct.pack("<2sHI", b"II", 42, start) + data + struct.pack("<H", len(tags)) + directory + bytes(4)
    )
    with Image.open(tmp_path / "a.tif") as file:
        pixels = np.asarray(upright_rgb(file))
    np.testing.assert_array_equal(pixels[0, :, 0], np.rint([0, 255, 2048 * 255 / 4095, 1024 * 255 / 4095]))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (1000 * RAMP.astype(np.float32), "gray values from 0 to 1000, expected 0 to 1"),
        (RAMP.astype(np.float32) - 0.5, "gray values from -0.5 to 0.5, expected 0 to 1"),
        (np.full((SIZE, SIZE), np.nan, np.float32), "gray values from nan to nan, expected 0 to 1"),
        (BYTES.astype(np.int32), "gray values of TIFF mode I, for which no value is known to be white"),
    ],
    ids=["large", "negative", "nan", "integers"],
)
def test_values_of_unknown_range_are_left_out(values: np.ndarray, reason: str, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert why(tmp_path / "a.tif") == reason


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "gif"])
def test_transparent_pixels_are_white(suffix: str, tmp_path: Path) -> None:
    pixels = np.zeros((SIZE, SIZE, 4), np.uint8)
    pixels[:, :, 0] = 255
    pixels[:4, :, 3] = 255  # red above, and below red that nobody sees
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    image = read(tmp_path / f"a.{suffix}")
    assert (image[:4] == (255, 0, 0)).all()
    assert (image[4:] == 255).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P with alphas", "P with one color"])
def test_transparency_is_composited_over_white(mode: str, tmp_path: Path) -> None:
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
    ids=["1 bit", "8 bits", "16 bits", "color"],
)
def test_a_transparent_color_is_white(
    bits: int, color: int, row: bytes, transparent: bytes, expected: list, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(png(bits, color, row, transparent))
    with Image.open(tmp_path / "a.png") as file:
        assert np.asarray(upright_rgb(file)).tolist() == [[list(pixel) for pixel in expected]]


@pytest.mark.parametrize(
    ("bits", "color", "row", "transparent"),
    [(2, 0, b"\x90", b"\0\2"), (4, 0, b"\x53", b"\0\5"), (16, 2, bytes(range(12)), bytes(range(6)))],
    ids=["2 bits", "4 bits", "16 bits of color"],
)
def test_a_transparent_color_that_pillow_does_not_find_is_a_reason(
    bits: int, color: int, row: bytes, transparent: bytes, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(png(bits, color, row, transparent))
    assert "transparent color" in why(tmp_path / "a.png")


def test_cmyk_keeps_its_colors(tmp_path: Path) -> None:
    # 100 % yellow is red and green light; the JPEG is Adobe's, inverted, and lossy by a few values.
    for name in ("a.tif", "a.jpg"):
        Image.new("CMYK", (SIZE, SIZE), (0, 0, 255, 0)).save(tmp_path / name)
        np.testing.assert_allclose(read(tmp_path / name), np.broadcast_to((255, 255, 0), (SIZE, SIZE, 3)), atol=3)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_images_are_turned_as_their_exif_data_say(kind: type, suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned clockwise
    values = np.rint(RAMP * np.iinfo(kind).max).astype(kind)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}", exif=exif)
    np.testing.assert_array_equal(read(tmp_path / f"a.{suffix}"), gray(np.rot90(BYTES, -1)))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_the_size_in_the_header_is_that_of_the_decoded_image(suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 8
    Image.new("RGB", (30, 20)).save(tmp_path / f"a.{suffix}", exif=exif)
    with Image.open(tmp_path / f"a.{suffix}") as file:
        assert upright_size(file) == upright_rgb(file).size == (20, 30)


def test_damaged_exif_data_beside_good_pixels_are_no_warning(tmp_path: Path) -> None:
    """Cameras and phones write such; Pillow's warning would appear in the middle of the progress bar."""
    Image.new("RGB", (SIZE, SIZE), (200, 0, 0)).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    with pytest.warns(UserWarning, match="Corrupt EXIF data"):
        Image.open(tmp_path / "a.jpg").close()
    folder = ImageFolder(tmp_path, SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert folder.crops() == f"{SIZE}x{SIZE} of {SIZE}x{SIZE}"
        images, unreadable = folder.pixels([0])
    assert not unreadable
    assert (images[0, 0] > 190).all()


def test_one_channel_has_the_gray_values(tmp_path: Path) -> None:
    Image.fromarray(BYTES).save(tmp_path / "a.png")
    Image.fromarray(np.rint(65535 * RAMP).astype(np.uint16)).save(tmp_path / "b.png")
    Image.new("RGB", (SIZE, SIZE), (255, 0, 0)).save(tmp_path / "c.png")
    images, _ = ImageFolder(tmp_path, SIZE, channels=1).pixels([0, 1, 2])
    assert images.shape == (3, 1, SIZE, SIZE)
    np.testing.assert_array_equal(images[:2, 0], np.stack([BYTES, BYTES]))
    assert (images[2] == 76).all()  # 0.299 of 255
