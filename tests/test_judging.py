"""The judge: its scores against closed forms, its fallback, and that training never notices it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import judging
import train_celeba
from judging import Judge, real_images
from sliced_wasserstein import sliced_wasserstein
from sources import Images, digits
from torch_sagan import SAGANGenerator

CPU = torch.device("cpu")
needs_torchmetrics = pytest.mark.skipif(find_spec("torchmetrics") is None, reason="torchmetrics is not installed")


def noise(count: int, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, channels, 16, 16), generator=torch.Generator().manual_seed(seed)).byte()


def generator(**more: int) -> SAGANGenerator:
    return SAGANGenerator(16, z_dim=8, base_channels=4, **more)


class Painter(nn.Module):
    """A generator of flat images: brightness and contrast of the first two latent numbers."""

    def __init__(self, mean: float = 0.0, deviation: float = 0.3) -> None:
        super().__init__()
        self.mean, self.deviation = mean, deviation

    def forward(self, z: Tensor) -> Tensor:
        colours = torch.zeros(len(z), 3)
        colours[:, :2] = self.mean + self.deviation * z[:, :2]
        return colours[:, :, None, None].expand(-1, 3, 16, 16)


def two_means(images: Tensor) -> Tensor:
    """The mean red and green of uint8 images, in [-1, 1]."""
    assert images.dtype == torch.uint8
    assert images.shape[1] == 3
    return images.float().mean((2, 3))[:, :2] / 127.5 - 1


def painted(count: int, seed: int) -> Tensor:
    z = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    return (Painter()(z) * 127.5 + 127.5).round().clamp(0, 255).byte()


# ------------------------------------------------------------------------------------------------------ the scores


def test_without_inception_there_is_the_sliced_wasserstein_distance(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    judge = Judge([noise(20), noise(20, seed=1)], samples=30, batch_size=8)
    assert judge.samples == 30
    assert judge.note.startswith("without FID and KID: ")
    assert "\n" not in judge.note
    model = generator().eval()
    z = torch.randn(30, 8, generator=torch.Generator().manual_seed(3))
    fake = (model(z).detach() * 127.5 + 127.5).round().byte()
    expected = sliced_wasserstein(torch.cat([noise(20), noise(20, seed=1)])[:30], fake)["mean"]
    assert judge(model, 8, seed=3) == {"swd": pytest.approx(expected, rel=0.01)}  # batches of 8 round differently


@needs_torchmetrics
def test_fid_has_its_closed_form():
    # Between N(μ, σ² I) and N(0, s² I) in two dimensions: 2 μ² + 2 (σ − s)².
    count = 2000
    judge = Judge([painted(count, seed=1)], samples=count, batch_size=500, inception=two_means)
    assert judge.note == ""
    for mean, deviation in ((0.0, 0.3), (0.25, 0.3), (0.0, 0.15)):
        scores = judge(Painter(mean, deviation), 2)
        expected = 2 * mean**2 + 2 * (deviation - 0.3) ** 2
        # The mean of 2000 numbers is good to 0.3 / √2000 = 0.007, and colours beyond white and black are cut off.
        assert scores["fid"] == pytest.approx(expected, rel=0.1, abs=3e-4)
        assert list(scores) == ["fid", "kid", "swd"]


@needs_torchmetrics
def test_kid_is_the_unbiased_polynomial_distance():
    count = 60  # fewer than a subset of 1000, so that all 100 subsets are the whole set
    real = painted(count, seed=1)
    judge = Judge([real], samples=count, inception=two_means)
    model = Painter(0.2)
    z = torch.randn(count, 2, generator=torch.Generator().manual_seed(5))
    fake = (model(z) * 127.5 + 127.5).round().clamp(0, 255).byte()
    x, y = two_means(real).double(), two_means(fake).double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / 2 + 1) ** 3

    def off_diagonal(k: Tensor) -> Tensor:
        return (k.sum() - k.trace()) / (count * (count - 1))

    expected = off_diagonal(kernel(x, x)) + off_diagonal(kernel(y, y)) - 2 * kernel(x, y).mean()
    assert judge(model, 2, seed=5)["kid"] == pytest.approx(1000 * expected.item(), rel=1e-3)


@needs_torchmetrics
def test_the_real_images_are_looked_at_once_and_each_score_stands_alone():
    seen: list[int] = []

    def features(images: Tensor) -> Tensor:
        seen.append(len(images))
        return two_means(images)

    judge = Judge([noise(30)], samples=30, batch_size=20, inception=features)
    assert sum(seen) == 30
    first = judge(Painter(0.2), 2)
    assert sum(seen) == 60
    other = judge(Painter(0.5), 2)
    assert judge(Painter(0.2), 2) == first
    assert other["fid"] > first["fid"]
    assert judge(Painter(0.2), 2, seed=1) != first


@needs_torchmetrics
def test_grey_images_are_shown_to_inception_in_three_channels():
    judge = Judge([noise(10, channels=1)], samples=10, inception=two_means)
    assert all(math.isfinite(score) for score in judge(generator(image_channels=1), 8).values())


def test_a_sampler_gives_labels_to_a_conditional_generator():
    asked: list[int] = []

    def sampler(count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        asked.append(count)
        return torch.randn(count, 8, generator=random), torch.randint(5, (count,), generator=random)

    judge = Judge([noise(10)], samples=10, batch_size=4)
    assert judge(generator(num_classes=5), sampler)["swd"] > 0
    assert asked == [4, 4, 2]


# -------------------------------------------------------------------------------------- training does not notice it


@pytest.mark.parametrize("inception", [None, pytest.param(two_means, marks=needs_torchmetrics)])
def test_judging_changes_nothing(inception):
    model = generator()
    model(torch.randn(4, 8))
    model.blocks[0].eval()  # a mode of its own, which has to survive
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    judge = Judge([noise(10)], samples=10, batch_size=4, inception=inception)
    scores = judge(model, 8)
    assert torch.equal(state, torch.get_rng_state())
    assert [module.training for module in model.modules()] == modes
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert all(weight.grad is None for weight in model.parameters())
    torch.rand(3)
    assert judge(model, 8) == scores


def test_an_error_in_the_generator_leaves_no_trace():
    class Broken(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            torch.rand(3)
            raise RuntimeError("broken")

    model, state = Broken(), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broken"):
        Judge([noise(4)], samples=4)(model, 8)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())


# ------------------------------------------------------------------------------------------------------ real images


def test_real_images_are_the_same_at_each_call_and_all_different():
    source = digits(16)
    some, again = (torch.cat(list(real_images(source, 100, batch_size=32))) for _ in range(2))
    assert torch.equal(some, again)
    assert len(some) == 100
    assert [len(batch) for batch in real_images(source, 100, batch_size=32)] == [32, 32, 32, 4]
    everything = torch.cat(list(real_images(source, 10**6)))
    assert sorted(image.sum() for image in everything) == sorted(image.sum() for image in source.images)


def test_every_other_real_image_is_mirrored_on_demand():
    source = Images(torch.arange(4).byte().expand(6, 3, 4, 4).numpy())
    plain, mirrored = (next(real_images(source, 6, flip=flip)) for flip in (False, True))
    assert torch.equal(mirrored[::2], plain[::2])
    assert torch.equal(mirrored[1::2], plain[1::2].flip(-1))


# ----------------------------------------------------------------------------------------- where Inception comes from


@pytest.fixture
def fidelity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[dict[str, Tensor]], Path]:
    """A stand-in for torch-fidelity (which needs torchvision) that takes two means; returns a maker of weight files."""

    class Stub(nn.Module):
        def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str) -> None:
            super().__init__()
            assert features_list == ["2048"]
            self.weight = nn.Parameter(torch.zeros(1))
            self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))

        def forward(self, images: Tensor) -> tuple[Tensor]:
            return (self.weight * two_means(images),)

    module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Stub  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def write(state: dict[str, Tensor]) -> Path:
        path = tmp_path / "hub" / "checkpoints" / Path(judging.WEIGHTS).name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path)
        return path

    return write


@needs_torchmetrics
@pytest.mark.parametrize("given", [True, False])
def test_weights_are_taken_from_the_path_or_from_torch_hub(given, fidelity):
    path = fidelity({"weight": torch.ones(1)})
    judge = Judge([noise(8)], samples=8, inception=path if given else None)
    assert judge.note == ""
    assert judge(Painter(), 2) == Judge([noise(8)], samples=8, inception=two_means)(Painter(), 2)


@needs_torchmetrics
def test_weights_that_are_missing_or_wrong_are_named(fidelity, tmp_path):
    assert "there are no Inception weights at" in Judge([noise(8)], samples=8).note
    with pytest.raises(ValueError, match=r"no Inception weights at .*nowhere\.pth; they are at https://"):
        Judge([noise(8)], samples=8, inception=tmp_path / "nowhere.pth")
    wrong = fidelity({"other": torch.ones(1)})
    with pytest.raises(ValueError, match=r"does not hold torch-fidelity's Inception weights") as error:
        Judge([noise(8)], samples=8, inception=wrong)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("package", ["torchmetrics", "torch_fidelity"])
def test_packages_that_are_missing_are_named(package, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # as Python notes a package that cannot be imported
    note = Judge([noise(8)], samples=8).note
    named = package.replace("_", "-") if find_spec("torchmetrics") else "torchmetrics"
    assert f"{named} cannot be imported" in note
    assert "pip install 'torch-sagan[judging]'" in note
    with pytest.raises(ValueError, match=f"{named} cannot be imported"):
        Judge([noise(8)], samples=8, inception=Path("weights.pth"))


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], r"two real images or more to judge with, got 0"),
        ([noise(1)], r"two real images or more to judge with, got 1"),
        ([noise(4).float()], r"expected uint8 images \(B, 1 or 3, H, W\), got torch\.float32 \(4, 3, 16, 16\)"),
        ([noise(4)[0]], r"got torch\.uint8 \(3, 16, 16\)"),
        ([noise(4, channels=2)], r"got torch\.uint8 \(4, 2, 16, 16\)"),
    ],
)
def test_wrong_real_images_are_named(batches, message):
    with pytest.raises(ValueError, match=message):
        Judge(batches, samples=8)


def test_a_generator_of_another_size_is_named():
    with pytest.raises(ValueError, match="16 pixels like the real ones, got 32"):
        Judge([noise(4)], samples=4)(SAGANGenerator(32, z_dim=8, base_channels=4), 8)


# -------------------------------------------------------------------------------------------------- with the trainer


def test_a_judged_training_ends_where_one_without_a_judge_does(tmp_path):
    settings = ["--data", "digits", "--image-size", "16", "--base-channels", "4", "--batch-size", "4", "--z-dim", "8"]
    settings += ["--steps", "4", "--judge-samples", "20", "--device", "cpu", "--no-tensorboard"]
    ends = []
    for name, every in (("judged", "2"), ("not", "0")):
        train_celeba.main([*settings, "--judge-every", every, "--out", str(tmp_path / name)])
        ends.append(torch.load(tmp_path / name / "checkpoint.pt", weights_only=True))
    one, other = ends
    for part in ("generator", "discriminator", "average"):
        for key, value in one[part].items():
            torch.testing.assert_close(value, other[part][key], rtol=0, atol=0)
    lines = [json.loads(line) for line in (tmp_path / "judged" / "log.jsonl").read_text().splitlines()]
    assert all(line["scores"]["swd"] > 0 for line in lines if line["step"] in (2, 4))
