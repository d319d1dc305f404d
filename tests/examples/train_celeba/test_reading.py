"""What the trainer reads: folders of images with broken ones among them, crops, order and flips."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tiny_runs import checkpoint, lines, train
from training.data.image_folder import ImageFolder
from training.data.loading import read_batches
from training.data.sources import InfiniteBatchSampler, digits

GOOD = 10  # images in the folder that can be read

pytestmark = pytest.mark.usefixtures("small_figures")


def test_a_folder_with_broken_files_names_them_and_goes_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
def test_no_image_is_lost_to_a_broken_neighbor(folder: Path, workers: int) -> None:
    source = ImageFolder(folder, size=16, crop=160)
    order = InfiniteBatchSampler(len(source), 3, seed=0, flip=False)
    with closing(read_batches(source, order, workers=workers)) as batches:
        drawn = [next(batches) for _ in range(4)]  # 12 images: a whole epoch of the 11 files and one more
    assert all(len(batch.images) == 3 for batch in drawn)
    seen = {image.numpy().tobytes() for batch in drawn for image in batch.images}
    readable = [i for i, path in enumerate(source.paths) if "cut-off" not in path]
    assert len(readable) == GOOD
    assert seen == {image.tobytes() for image in source.pixels(readable)[0]}
    assert [Path(path).name for path in source.unreadable] == ["cut-off.jpg"]


def test_the_center_is_cropped(tmp_path: Path) -> None:
    image = np.zeros((218, 178, 3), np.uint8)
    image[29:189, 9:169] = (200, 100, 50)
    Image.fromarray(image).save(tmp_path / "face.png")
    ((image,), _) = ImageFolder(tmp_path, size=32, crop=160).pixels([0])
    assert np.unique(image.reshape(3, -1).T, axis=0).tolist() == [[200, 100, 50]]
    ((image,), _) = ImageFolder(tmp_path, size=32, crop=0).pixels([0])  # the largest centerd square: all of the width
    assert (image[:, :, 0] == 0).all()


def test_order_and_flips_are_a_function_of_seed_and_position() -> None:
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


def test_flips_mirror_the_image(folder: Path) -> None:
    for source in (digits(16), ImageFolder(folder, size=16, crop=160)):
        images = source[[(1, False), (1, True)]].images
        torch.testing.assert_close(images[0].flip(-1), images[1], rtol=0, atol=0)
        assert not torch.equal(images[0], images[1])


def test_digits_have_one_channel_and_are_not_mirrored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flips = []
    plain = InfiniteBatchSampler.__init__

    def watched(self: InfiniteBatchSampler, *args: int, flip: bool, **more: int) -> None:
        flips.append(flip)
        plain(self, *args, flip=flip, **more)

    monkeypatch.setattr(InfiniteBatchSampler, "__init__", watched)
    train(tmp_path, "--image-size", "28", "--steps", "1")
    assert flips == [False, False]  # of reals.png, and of the training
    assert checkpoint(tmp_path)["generator"]["to_image.weight"].shape[1] == 1


def test_a_dry_run_uses_the_cache_of_the_run(folder: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", "--data", str(folder), "--dry-run")
    assert list((tmp_path / "cache").glob("*.npy"))
