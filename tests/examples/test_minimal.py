"""The trainer in one file, run as a user runs it: a folder of images in, a grid and a checkpoint out."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import minimal
from emulated_cuda import emulate_cuda
from refused_calls import refuse_fsync

TINY = ["--image-size", "16", "--base-channels", "2", "--batch-size", "4", "--save-every", "2"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Six images of several shapes and kinds, one of them in a folder below, and a file that is not an image."""
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    (folder / "below").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.jpg", "c.PNG", "d.webp", "e.bmp", "below/f.png")):
        pixels = rng.integers(0, 256, (20 + number, 30 - number, 3), dtype=np.uint8)
        Image.fromarray(pixels if number else pixels[..., 0]).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, out: Path, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["minimal.py", str(folder), "--out", str(out), *TINY, *arguments])
    loader = minimal.DataLoader  # in this process: others would take longer to start than the training takes
    monkeypatch.setattr(minimal, "DataLoader", lambda *args, **more: loader(*args, **more | {"num_workers": 0}))
    minimal.main()


def test_trains_and_resumes(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(monkeypatch, images, out, "--steps", "2")
    assert {path.name for path in out.iterdir()} == {"checkpoint.pt", "samples-000002.png"}
    with Image.open(out / "samples-000002.png") as grid:
        assert grid.size == (8 * 16, 8 * 16)
        assert np.asarray(grid).std() > 1  # images, not a flat sheet
    first = torch.load(out / "checkpoint.pt", weights_only=True)
    assert first["step"] == 2
    assert "resumed" not in capsys.readouterr().out

    run(monkeypatch, images, out, "--steps", "3")
    assert "resumed at step 2\n" in capsys.readouterr().out
    assert (out / "samples-000003.png").exists()
    last = torch.load(out / "checkpoint.pt", weights_only=True)
    assert last["step"] == 3
    for name in ("generator", "discriminator"):
        steps = {int(state["step"]) for state in last[f"{name[0]}_optimizer"]["state"].values()}
        assert steps == {3}, "the optimizers went on, and did not begin anew"
        moved = [not torch.equal(value, first[name][key]) for key, value in last[name].items()]
        assert sum(moved) > len(moved) / 2


def test_what_is_resumed_goes_where_it_belongs(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam's counters to the CPU, wherever the weights are; and the rates are those of the command line."""
    run(monkeypatch, images, tmp_path / "out", "--steps", "1")
    asked, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *file, **more: asked.append(more["map_location"]) or load(*file, **more))
    with emulate_cuda(monkeypatch):
        run(monkeypatch, images, tmp_path / "out", "--steps", "2", "--lr-g", "0.5", "--lr-d", "0.25")
    assert asked == ["cpu"]
    last = load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    assert [last[f"{name}_optimizer"]["param_groups"][0]["lr"] for name in "gd"] == [0.5, 0.25]


def test_the_average_is_that_of_the_weights(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After step 1 at d = 1/11 and step 2 at 2/12: a₂ = 1/6 a₁ + 5/6 w₂."""
    averages, weights = {}, {}
    for steps in (1, 2):
        out = tmp_path / str(steps)
        run(monkeypatch, images, out, "--steps", str(steps))
        state = torch.load(out / "checkpoint.pt", weights_only=True)
        averages[steps], weights[steps] = state["average"], state["generator"]
    parameters = [name for name in weights[2] if name.endswith("original")]
    assert parameters
    for name in parameters:
        expected = averages[1][name] / 6 + weights[2][name] * 5 / 6
        torch.testing.assert_close(averages[2][name], expected, rtol=1e-5, atol=1e-6)  # float32


def test_images_are_cropped_to_their_center_square(tmp_path: Path) -> None:
    """Of a wide image with a red left, a green middle and a blue right, the middle is left, mirrored or not."""
    pixels = np.zeros((12, 36, 3), np.uint8)
    for third in range(3):
        pixels[:, 12 * third : 12 * third + 12, third] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    image = minimal.ImageFolder(tmp_path, 8, tmp_path)[0]
    assert image.shape == (3, 8, 8)
    middle = image[:, :, 2:6]  # Lanczos reaches over the edges, a pixel or so
    assert middle[1].min() > 0.9
    assert middle[[0, 2]].max() < -0.9


def test_images_are_mirrored_half_of_the_time(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4] = 255
    Image.fromarray(pixels).save(tmp_path / "half.png")
    data = minimal.ImageFolder(tmp_path, 8, tmp_path)
    left = sum(bool(data[0][0, 0, 0] > 0) for _ in range(200))
    assert 60 < left < 140  # 100 ± 7: more than five deviations


def test_a_folder_without_images_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, tmp_path, tmp_path / "out")
    assert str(error.value) == f"minimal.py: no images in {tmp_path}"
    with pytest.raises(SystemExit, match=r"^minimal\.py: no images in .*nowhere$"):
        run(monkeypatch, tmp_path / "nowhere", tmp_path / "out")


def test_its_own_grids_are_no_data(images: Path, tmp_path: Path) -> None:
    """Also where its folder is below the images, or is that of the images."""
    for out in (images / "runs" / "minimal", images):
        out.mkdir(parents=True, exist_ok=True)
        grid = out / "samples-000002.png"
        grid.write_bytes((images / "a.png").read_bytes())
        assert len(minimal.ImageFolder(images, 8, out)) == 6
        assert len(minimal.ImageFolder(images, 8, tmp_path / "elsewhere")) == 7
        grid.unlink()


def test_a_file_that_cannot_be_read_is_named_and_replaced(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photograph = Image.effect_noise((64, 64), 50)
    photograph.save(images / "b.jpg")
    (images / "b.jpg").write_bytes((images / "b.jpg").read_bytes()[:-500])
    data = minimal.ImageFolder(images, 8, images)
    assert [path.name for path in data.paths[:2]] == ["a.png", "b.jpg"]
    drawn, following = data[1], data[2]
    assert torch.equal(drawn, following) or torch.equal(drawn.flip(-1), following)
    assert capsys.readouterr().err.startswith(f"left out {images / 'b.jpg'}: image file is truncated")


def test_a_folder_of_damaged_images_is_an_error_of_one_line(images: Path) -> None:
    for path in (path for path in images.rglob("*") if path.suffix.lower() in minimal.SUFFIXES):
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(OSError, match="none of the images can be read"):
        minimal.ImageFolder(images, 8, images)[1]


@pytest.mark.parametrize("what", ["weight", "moment"])
def test_numbers_that_are_not_finite_are_not_saved(
    what: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, step = tmp_path / "out", torch.optim.Adam.step
    run(monkeypatch, images, out, "--steps", "2")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def diverging(optimizer: torch.optim.Adam) -> None:
        step(optimizer)
        weight = optimizer.param_groups[0]["params"][0]
        broken = weight.data if what == "weight" else optimizer.state[weight]["exp_avg_sq"]
        broken.view(-1)[0] = float("inf")

    monkeypatch.setattr(torch.optim.Adam, "step", diverging)
    with pytest.raises(SystemExit, match=r"^minimal\.py: step 4: the training is no longer finite; .* is older$"):
        run(monkeypatch, images, out, "--steps", "9")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_the_checkpoint_is_there_before_its_grid(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minimal, "save_grid", lambda *_: sys.exit("killed"))
    with pytest.raises(SystemExit, match="killed"):
        run(monkeypatch, images, tmp_path / "out", "--steps", "2")
    assert torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["step"] == 2


def test_a_file_system_without_fsync_and_a_disk_that_loses_what_was_written(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "out" / "checkpoint.pt"
    refuse_fsync(monkeypatch, errno.EINVAL)
    run(monkeypatch, images, tmp_path / "out", "--steps", "1")
    before = checkpoint.read_bytes()
    refuse_fsync(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        run(monkeypatch, images, tmp_path / "out", "--steps", "2")
    assert checkpoint.read_bytes() == before


@pytest.mark.exhaustive  # that it names torch, Pillow and the package alone is tested with the architecture
@pytest.mark.slow  # starts processes that import torch
def test_it_needs_no_numpy(images: Path, tmp_path: Path) -> None:
    """In a process in which NumPy cannot be imported, with workers as users have them."""
    command = "import runpy, sys; sys.modules['numpy'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], "
    flags = [str(images), "--out", str(tmp_path / "out"), *TINY, "--steps", "1"]
    done = subprocess.run(
        [sys.executable, "-c", command + "run_name='__main__')", str(Path(minimal.__file__)), *flags],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "samples-000001.png").exists()
