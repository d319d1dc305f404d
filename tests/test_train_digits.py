"""The digits example, on tiny networks: MNIST's own files, what a run writes, and that the labels matter."""

from __future__ import annotations

import gzip
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import train_digits
from torch_sagan import spectral_norms

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TINY = ["--steps", "2", "--base-channels", "4", "--batch-size", "4"]
COUNT = 30


def idx(values: torch.Tensor) -> bytes:
    """The file format, written from its description: magic number, big-endian sizes, bytes."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.to(torch.uint8).numpy().tobytes()


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    folder = tmp_path / "mnist"
    folder.mkdir()
    pictures = torch.arange(COUNT * 28 * 28).view(COUNT, 28, 28) % 251
    (folder / IMAGES).write_bytes(idx(pictures))
    (folder / LABELS).write_bytes(idx(torch.arange(COUNT) % 10))
    return folder


def pack(path: Path) -> None:
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()


@pytest.mark.parametrize("packed", [(), (IMAGES,), (IMAGES, LABELS)])
def test_reads_the_idx_files_of_mnist(mnist, packed):
    for name in packed:
        pack(mnist / name)
    images, labels = train_digits.read_data(str(mnist))
    assert images.shape == (COUNT, 1, 28, 28)
    assert images.dtype == torch.float32
    assert labels.tolist() == [i % 10 for i in range(COUNT)]
    assert labels.dtype == torch.int64
    # Image 3, row 5, column 7 is value number 3·784 + 5·28 + 7, and 0 … 255 are -1 … 1.
    assert images[3, 0, 5, 7].item() == pytest.approx((3 * 784 + 5 * 28 + 7) % 251 / 127.5 - 1)
    assert images.min() == -1


def test_without_a_folder_the_digits_come_with_their_own_labels():
    images, labels = train_digits.read_data(None)
    assert images.shape == (1797, 1, 28, 28)
    assert labels[:10].tolist() == list(range(10))  # how scikit-learn's set begins
    assert labels.bincount().min() >= 170
    # A 0 is dark in its middle, where a 1 has its stroke.
    middle = images[:, 0, 12:16, 12:16].mean(dim=(1, 2))
    assert middle[labels == 0].mean() < -0.5 < 0.5 < middle[labels == 1].mean()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def header_only(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:6])


def unpacked_under_a_packed_name(path: Path) -> None:
    path.rename(path.with_name(path.name + ".gz"))


def cut_off_packed(path: Path) -> None:
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes())[:-9])
    path.unlink()


def damaged_inside(path: Path) -> None:
    packed = bytearray(gzip.compress(path.read_bytes()))
    packed[10:30] = b"\xff" * 20
    path.with_name(path.name + ".gz").write_bytes(packed)
    path.unlink()


def labels_instead(path: Path) -> None:
    path.write_bytes((path.parent / LABELS).read_bytes())


def rewrite(values: torch.Tensor):
    return lambda path: path.write_bytes(idx(values))


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        (IMAGES, Path.unlink, rf"neither {IMAGES} nor {IMAGES}\.gz is there"),
        (LABELS, Path.unlink, rf"neither {LABELS} nor {LABELS}\.gz is there"),
        (IMAGES, labels_instead, "starts with 00 00 08 01, not 00 00 08 03"),
        (LABELS, empty, "starts with nothing, not 00 00 08 01"),
        (IMAGES, cut, rf"states {COUNT * 784} values \({COUNT}, 28, 28\) and holds {COUNT * 784 - 1}$"),
        (LABELS, lengthen, rf"states {COUNT} values \({COUNT},\) and holds {COUNT + 1}$"),
        (LABELS, header_only, "ends within its header"),
        (IMAGES, unpacked_under_a_packed_name, r"idx3-ubyte\.gz cannot be read: Not a gzipped file"),
        (IMAGES, cut_off_packed, r"idx3-ubyte\.gz cannot be read: Compressed file ended"),
        (IMAGES, damaged_inside, r"idx3-ubyte\.gz cannot be read: Error"),
        (IMAGES, rewrite(torch.zeros(COUNT, 32, 28)), r"28 by 28 pixels are needed, these have \(32, 28\)"),
        (LABELS, rewrite(torch.zeros(COUNT - 1)), f"{COUNT} images, but {COUNT - 1} labels"),
        (LABELS, rewrite(torch.arange(COUNT) % 9), "each digit is needed as a label, and no other, got 0, .*, 7, 8$"),
        (
            LABELS,
            rewrite(torch.arange(COUNT) % 11),
            "each digit is needed as a label, and no other, got 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10$",
        ),
    ],
)
def test_wrong_files_end_the_run_with_one_line(mnist, tmp_path, name, spoil, message):
    spoil(mnist / name)
    with pytest.raises(SystemExit, match=message) as ended:
        train_digits.main([*TINY, "--data", str(mnist), "--out", str(tmp_path / "out")])
    assert str(ended.value).startswith("train_digits.py: ")
    assert "\n" not in str(ended.value)
    assert not (tmp_path / "out").exists()


def test_no_image_at_all_is_said(mnist, tmp_path):
    rewrite(torch.zeros(0, 28, 28))(mnist / IMAGES)
    rewrite(torch.zeros(0))(mnist / LABELS)
    with pytest.raises(SystemExit, match="each digit is needed as a label, and no other, got none"):
        train_digits.main([*TINY, "--data", str(mnist)])


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(SystemExit, match=re.escape(f"--data {tmp_path / 'nowhere'}: no such folder")):
        train_digits.main([*TINY, "--data", str(tmp_path / "nowhere")])


@pytest.mark.parametrize("flag", ["--steps", "--batch-size", "--base-channels"])
def test_numbers_below_one_are_refused(flag):
    with pytest.raises(SystemExit, match=f"^train_digits.py: {flag} must be at least 1, got 0"):
        train_digits.main([flag, "0"])


@pytest.mark.parametrize("flag", ["--lr-g", "--lr-d", "--noise"])
@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_rates_and_noise_are_finite_and_not_negative(flag, value):
    with pytest.raises(SystemExit, match=f"^train_digits.py: {flag} must be a finite number, at least 0"):
        train_digits.main([flag, value])


def test_an_unknown_flag_is_one_line():
    with pytest.raises(SystemExit, match=r"^train_digits\.py: unrecognized arguments: --colour .*--help.*$"):
        train_digits.main(["--colour"])


def test_a_full_disk_is_one_line(monkeypatch, tmp_path):
    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_digits, "save_grid", full)
    with pytest.raises(SystemExit, match=r"^train_digits\.py: cannot save .*grid\.png: .*No space left on device$"):
        train_digits.main([*TINY, "--out", str(tmp_path)])


@pytest.mark.parametrize("conditional", [False, True])
def test_a_run_writes_what_it_names(conditional, tmp_path, capsys):
    out = tmp_path / "a" / "b"
    train_digits.main([*TINY, "--out", str(out), *(["--conditional"] if conditional else [])])
    printed = capsys.readouterr().out
    named = {Path(line.split()[1]) for line in printed.splitlines() if line.startswith(("grid", "checkpoint"))}
    assert named == set(out.iterdir())

    with Image.open(out / "grid.png") as grid:
        assert grid.width == grid.height > 10 * 28  # ten rows of ten

    state = torch.load(out / "checkpoint.pt", weights_only=True)
    generator, discriminator = train_digits.build(4, conditional)
    fresh = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    generator.load_state_dict(state["generator"])
    discriminator.load_state_dict(state["discriminator"])
    assert any(not torch.equal(tensor, fresh[name]) for name, tensor in generator.state_dict().items())
    averaged = {name.removeprefix("module."): tensor for name, tensor in state["average"].items() if "." in name}
    generator.load_state_dict(averaged)
    assert state["config"]["conditional"] is conditional

    assert re.search(r"classifier  9[5-9]\.\d % right on real digits", printed)
    agreement = re.search(r"^agreement with the asked class: (\d+\.\d) % of 1000 samples$", printed, re.MULTILINE)
    counts = re.search(r"^what it sees in 1000 samples: (.+)$", printed, re.MULTILINE)
    assert (agreement is not None) is conditional
    assert (counts is not None) is not conditional
    if agreement:
        assert float(agreement[1]) < 50  # noise is not taken for the digit that was asked for
    if counts:
        assert sum(int(pair.split(": ")[1]) for pair in counts[1].split(", ")) == 1000


def test_the_checkpoint_and_the_grid_depend_on_the_seed_alone(tmp_path):
    seeds = (0, 0, 1)
    runs = [tmp_path / str(i) for i in range(len(seeds))]
    for run, seed in zip(runs, seeds, strict=True):
        train_digits.main([*TINY, "--conditional", "--seed", str(seed), "--out", str(run)])
    grids = [(run / "grid.png").read_bytes() for run in runs]
    assert grids[0] == grids[1] != grids[2]


def test_labels_change_the_images_and_only_of_a_conditional_network():
    generator = train_digits.build(4, conditional=True)[0].eval()
    for parameter in (p for name, p in generator.named_parameters() if name.endswith(("norm.gamma", "norm.beta"))):
        nn.init.normal_(parameter)  # they start alike for all classes
    z = torch.randn(200, train_digits.Z_DIM)
    threes, eights = torch.full((200,), 3), torch.full((200,), 8)
    images = train_digits.draw(generator, z, threes, conditional=True)
    assert images.shape == (200, 1, 28, 28)
    assert not images.requires_grad
    assert torch.equal(images, train_digits.draw(generator, z, threes, conditional=True))
    assert (images - train_digits.draw(generator, z, eights, conditional=True)).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    plain = train_digits.build(4, conditional=False)[0].eval()
    without = train_digits.draw(plain, z, threes, conditional=False)
    assert torch.equal(without, train_digits.draw(plain, z, eights, conditional=False))


def test_training_makes_the_labels_matter():
    images, labels = torch.zeros(20, 1, 28, 28), torch.arange(20) % 10
    config = train_digits.read_arguments([*TINY, "--conditional"])
    made = train_digits.train(config, images, labels, "cpu")
    norms = [p for name, p in made["generator"].named_parameters() if name.endswith("norm.gamma")]
    assert len(norms) == 2
    for gamma in norms:
        assert (gamma - 1).abs().amax(dim=1).count_nonzero() > 1  # classes went their own ways from 1
        assert not torch.equal(gamma[0], gamma[1])


@pytest.mark.parametrize("network", [0, 1])
def test_attention_is_the_tutorials(network):
    """128 channels at 7×7, projections of a 4×4 convolution and ReLU in both networks, and batch norm between in G."""
    model = train_digits.build(64, conditional=True)[network].eval()
    assert list(model.attention) == ["7"]
    layer = model.attention["7"]
    assert layer.channels == 128
    for projection, width in ((layer.query, 16), (layer.key, 16), (layer.value, 128)):
        pad, convolution, *norm, relu = projection
        assert convolution.weight.shape == (width, 128, 4, 4)
        assert [type(layer) for layer in norm] == [nn.BatchNorm2d] * (network == 0)
        assert isinstance(relu, nn.ReLU)
        x = torch.randn(2, 128, 7, 7)
        assert projection(x).shape == (2, width, 7, 7)
        # "same" with an even kernel: one row and column before, two after.
        corner = torch.einsum("bcij,ocij->bo", x[:, :, :3, :3], convolution.weight[:, :, 1:, 1:])
        torch.testing.assert_close(convolution(pad(x))[:, :, 0, 0], corner, atol=1e-4, rtol=1e-4)
    normalised = {name for name in spectral_norms(model) if "attention" in name}
    assert len(normalised) == (0 if network == 0 else 3)


def test_noise_hides_what_d_sees(monkeypatch):
    images, labels = torch.zeros(20, 1, 28, 28), torch.arange(20) % 10
    seen = []
    monkeypatch.setattr(train_digits, "hinge_discriminator_loss", lambda real, fake: (real - fake).mean())
    whole = train_digits.SAGANDiscriminator.forward

    def look(self, images, *rest, **more):
        seen.append(images.detach()[:4].std().item())
        return whole(self, images, *rest, **more)

    monkeypatch.setattr(train_digits.SAGANDiscriminator, "forward", look)
    for noise in (0.0, 0.5):
        config = train_digits.read_arguments([*TINY, "--conditional", "--noise", str(noise)])
        train_digits.train(config, images, labels, "cpu")
    real_without, real_with = seen[0], seen[len(seen) // 2]
    assert real_without == 0
    assert real_with == pytest.approx(0.5, rel=0.05)


def test_the_classifier_is_tested_on_images_it_did_not_learn_from(monkeypatch):
    learnt, tested = [], []

    class Judge(train_digits.SVC):
        def fit(self, x, y):
            learnt.extend(x[:, 0].tolist())
            return super().fit(x, y)

        def score(self, x, y):
            tested.extend(x[:, 0].tolist())
            return super().score(x, y)

    monkeypatch.setattr(train_digits, "SVC", Judge)
    images = torch.arange(50.0).view(50, 1, 1, 1) * torch.ones(1, 1, 2, 2)
    train_digits.judge(images, torch.arange(50) // 25)
    assert not set(learnt) & set(tested)
    assert sorted(learnt + tested) == list(range(50))
    assert len(tested) == 10
