"""The evaluator: its scores against closed forms, its fallback, and that it does not affect training."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evaluation import classifier as classifier_module
from evaluation import inception as inception_module
from evaluation.classifier import Classified, Classifier, Network
from evaluation.evaluator import Evaluator, open_evaluator, real_images
from evaluation.inception import Features
from evaluation.sliced_wasserstein import sliced_wasserstein
from tiny_runs import assert_same, checkpoint, leave_out_images, lines, train
from torch_sagan import SAGANGenerator
from training.data.dataset import Batch
from training.data.sources import ArrayDataset, digits
from training.output.model_card import open_generator

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
        colors = torch.zeros(len(z), 3)
        colors[:, :2] = self.mean + self.deviation * z[:, :2]
        return colors[:, :, None, None].expand(-1, 3, 16, 16)


def two_means(images: Tensor) -> Features:
    """The mean red and green of uint8 images, in [-1, 1], as features and as logits."""
    assert images.dtype == torch.uint8
    assert images.shape[1] == 3
    means = images.float().mean((2, 3))[:, :2] / 127.5 - 1
    return Features(means, means)


def batches(*images: Tensor) -> list[Batch]:
    return [Batch(batch) for batch in images]


def painted(count: int, seed: int) -> Tensor:
    z = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    return (Painter()(z) * 127.5 + 127.5).round().clamp(0, 255).byte()


# ----------------------------------------------------------------------------------------------- the real images


def sliced(one: ArrayDataset, other: ArrayDataset, count: int, skip: int = 0) -> float:
    images = [torch.cat([b.images for b in real_images(d, count, skip=s)]) for d, s in ((one, 0), (other, skip))]
    return sliced_wasserstein(*images)["mean"]


@pytest.mark.parametrize("against_training", [False, True])
@pytest.mark.parametrize("held_out", [False, True])
def test_scores_are_against_the_images_asked_for(held_out: bool, against_training: bool) -> None:
    """The generator's, and in its place those of others: what it is compared with and what else there is."""
    training, test = (
        ArrayDataset(noise(count, seed=count).numpy() // divisor, flip=False) for count, divisor in ((90, 1), (60, 2))
    )
    others = test if held_out else None
    evaluate = open_evaluator(training, others, samples=40, against_training=against_training)
    reference, place = (test, training) if held_out and not against_training else (training, others or training)
    scores = evaluate(generator(), 8)
    assert evaluate.samples == 40
    assert scores["swd_real"] == sliced(reference, place, 40, 0 if held_out else 40)
    assert evaluate.against.startswith("held-out" if reference is test else "training images")


def test_all_training_images_may_be_taken_where_the_others_do_not_suffice() -> None:
    training, test = (ArrayDataset(noise(count).numpy(), flip=False) for count in (90, 60))
    for others in (test, None):
        evaluate = open_evaluator(training, others, samples=50_000, against_training=True)
        assert evaluate.samples == 90
        assert evaluate(generator(), 8).keys() == {"swd"}
    assert open_evaluator(training, test, samples=50_000).samples == 60
    assert open_evaluator(training, None, samples=50_000).samples == 45


# ------------------------------------------------------------------------------------------------------ the scores


def test_without_inception_there_is_the_sliced_wasserstein_distance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    evaluate = Evaluator(batches(noise(20), noise(20, seed=1)), samples=30, batch_size=8)
    assert evaluate.samples == 30
    assert evaluate.note.startswith("without FID: ")
    assert "\n" not in evaluate.note
    model = generator().eval()
    z = torch.randn(30, 8, generator=torch.Generator().manual_seed(3))
    fake = (model(z).detach() * 127.5 + 127.5).round().byte()
    expected = sliced_wasserstein(torch.cat([noise(20), noise(20, seed=1)])[:30], fake)["mean"]
    assert evaluate(model, 8, seed=3) == {"swd": pytest.approx(expected, rel=0.01)}  # batches of 8 round differently


@pytest.mark.exhaustive
@needs_torchmetrics
def test_fid_has_its_closed_form() -> None:
    # Between N(μ, σ² I) and N(0, s² I) in two dimensions: 2 μ² + 2 (σ − s)².
    count = 2000
    evaluate = Evaluator(batches(painted(count, seed=1)), samples=count, batch_size=500, inception=two_means)
    assert evaluate.note == ""
    for mean, deviation in ((0.0, 0.3), (0.25, 0.3), (0.0, 0.15)):
        scores = evaluate(Painter(mean, deviation), 2)
        expected = 2 * mean**2 + 2 * (deviation - 0.3) ** 2
        # The mean of 2000 numbers is good to 0.3 / √2000 = 0.007, and colors beyond white and black are cut off.
        assert scores["fid"] == pytest.approx(expected, rel=0.1, abs=3e-4)
        assert list(scores) == ["fid", "kid", "inception_score", "precision", "recall", "swd"]


@needs_torchmetrics
def test_the_real_images_are_looked_at_once_and_each_score_stands_alone() -> None:
    seen: list[int] = []

    def features(images: Tensor) -> Features:
        seen.append(len(images))
        return two_means(images)

    evaluate = Evaluator(batches(noise(30)), samples=30, batch_size=20, inception=features)
    assert sum(seen) == 30
    first = evaluate(Painter(0.2), 2)
    assert sum(seen) == 60
    other = evaluate(Painter(0.5), 2)
    assert evaluate(Painter(0.2), 2) == first
    assert other["fid"] > first["fid"]
    assert evaluate(Painter(0.2), 2, seed=1) != first


@needs_torchmetrics
def test_gray_images_are_shown_to_inception_in_three_channels() -> None:
    evaluate = Evaluator(batches(noise(10, channels=1)), samples=10, inception=two_means)
    assert all(math.isfinite(score) for score in evaluate(generator(image_channels=1), 8).values())


def test_a_sampler_gives_labels_to_a_conditional_generator() -> None:
    asked: list[int] = []

    def sampler(count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        asked.append(count)
        return torch.randn(count, 8, generator=random), torch.randint(5, (count,), generator=random)

    evaluate = Evaluator(batches(noise(10)), samples=10, batch_size=4)
    assert evaluate(generator(num_classes=5), sampler)["swd"] > 0
    assert asked == [4, 4, 2]


def labeled(count: int, classes: Tensor) -> list[Batch]:
    """Painted images in two batches, with these classes in turn."""
    labels = classes[torch.arange(count) % len(classes)]
    images = painted(count, seed=1)
    return [Batch(*half) for half in zip(images.split(count // 2), labels.split(count // 2), strict=True)]


class ClassPainter(Painter):
    """A painter whose class c has its mean at c / 4."""

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(z) + labels[:, None, None, None] / 4 * torch.tensor([1.0, 1.0, 0.0]).view(1, 3, 1, 1)


def requested(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 2, generator=rng), torch.randint(2, (count,), generator=rng)


@needs_torchmetrics
def test_fid_of_each_class_has_its_closed_form() -> None:
    """Both real classes are N(0, s² I); the generated ones have their means at 0 and at 1/4: FID 0 and 2/4²."""
    count = 2000
    evaluate = Evaluator(
        labeled(count, torch.tensor([0, 1])), samples=count, batch_size=500, inception=two_means, per_class=True
    )
    scores = evaluate(ClassPainter(), requested)
    assert list(scores) == [
        "fid", "kid", "inception_score", "precision", "recall", "fid_class_0", "fid_class_1", "swd",
    ]  # fmt: skip
    # 1000 of each class: both means are good to 0.3 / √1000 = 0.01, their distance of 1/4 to 5 %, its square to 10 %.
    assert scores["fid_class_0"] == pytest.approx(0, abs=1e-3)
    assert scores["fid_class_1"] == pytest.approx(2 / 4**2, rel=0.2)


@needs_torchmetrics
def test_classes_without_images_have_no_fid() -> None:
    """Class 1 is not among the real images, and class 2 is never requested."""
    evaluate = Evaluator(labeled(40, torch.tensor([0, 2])), samples=40, inception=two_means, per_class=True)
    scores = evaluate(ClassPainter(), requested)
    assert [name for name in scores if name.startswith("fid_class")] == ["fid_class_0"]


@needs_torchmetrics
@pytest.mark.parametrize(("real_has_labels", "per_class"), [(True, False), (False, True)])
def test_fid_of_each_class_only_on_demand_and_with_labels(real_has_labels: bool, per_class: bool) -> None:
    real = labeled(20, torch.tensor([0, 1])) if real_has_labels else batches(painted(20, seed=1))
    evaluate = Evaluator(real, samples=20, inception=two_means, per_class=per_class)
    assert not [name for name in evaluate(ClassPainter(), requested) if "class" in name]


@needs_torchmetrics
def test_the_inception_score_is_that_of_the_logits() -> None:
    """An extractor that is sure of one of two classes for each image: exp(H(p)), of classes with shares p."""

    def sure(images: Tensor) -> Features:
        bright = images.float().mean((1, 2, 3)) > 127.5
        return Features(two_means(images).pooled, torch.stack([~bright, bright], 1).float() * 100)

    evaluate = Evaluator(batches(painted(1000, seed=1)), samples=1000, inception=sure)

    class Share(nn.Module):
        def forward(self, z: Tensor, bright: Tensor) -> Tensor:
            return (bright - 0.5).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)

    def quarter(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(count, 2, generator=rng), (torch.arange(count) % 4 == 0).float()

    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    # The mean over ten tenths, in which the shares are chance: an entropy estimated from 100 is 1/200 too low.
    assert evaluate(Share(), quarter)["inception_score"] == pytest.approx(math.exp(entropy), rel=0.01)


class Grays(Classifier):
    """A classifier whose features are two means, and which takes the gray 159 for class 1."""

    def __init__(self) -> None:
        super().__init__(Network(16, 3, 2), scale=1.0, accuracy=0.75, tested=4, recalls=[0.5, 1.0])
        self.asked: list[Tensor] = []

    def __call__(self, images: Tensor) -> Classified:
        self.asked.append(images)
        return Classified(two_means(images).pooled, (images[:, 0, 0, 0] == 159).long())


@pytest.mark.parametrize("inception", [None, pytest.param(two_means, marks=needs_torchmetrics)])
def test_agreement_compares_images_with_the_classes_requested(inception: Any) -> None:
    grays = Grays()
    real = labeled(20, torch.tensor([0, 1]))
    evaluate = Evaluator(real, real, samples=20, batch_size=8, classifier=grays, inception=inception)
    grays.asked.clear()
    scores = evaluate(ClassPainter(deviation=0.0), requested)
    # Without deviation an image shows its class alone: 0 is 127.5 and 1/4 is 159.4, rounded.
    assert scores["agreement"] == 1
    assert scores["agreement_real"] == 0.75  # with the images that were not learned from
    assert sum(map(len, grays.asked)) == 20
    assert all(images.dtype == torch.uint8 for images in grays.asked)
    # The first one selects, and small ones are good; FID does not replace the other distance.
    assert next(iter(scores)) == ("fid" if inception else "classifier_distance")
    assert scores["classifier_distance"] > 0
    assert scores["classifier_distance_real"] == pytest.approx(0, abs=1e-9)  # of the same images
    assert scores["swd_real"] == 0
    wrong = evaluate(ClassPainter(deviation=0.0), lambda count, rng: (torch.zeros(count, 2), torch.ones(count).long()))
    assert wrong["agreement"] == 1
    other = evaluate(ClassPainter(0.25, deviation=0.0), requested)
    assert other["agreement"] == 0  # what is requested as class 0 looks like 1, and 1 like neither
    assert "agreement" not in evaluate(Painter(), 2)  # a generator without classes


# -------------------------------------------------------------------------------------- training does not notice it


@pytest.mark.parametrize("inception", [None, pytest.param(two_means, marks=needs_torchmetrics)])
def test_evaluation_changes_nothing(inception: Any) -> None:
    model = generator()
    model(torch.randn(4, 8))
    model.blocks[0].eval()  # a mode of its own, which has to survive
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    evaluate = Evaluator(batches(noise(10)), samples=10, batch_size=4, inception=inception)
    scores = evaluate(model, 8)
    assert torch.equal(state, torch.get_rng_state())
    assert [module.training for module in model.modules()] == modes
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert all(weight.grad is None for weight in model.parameters())
    torch.rand(3)
    assert evaluate(model, 8) == scores


def test_an_error_in_the_generator_leaves_no_trace() -> None:
    class Broken(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            torch.rand(3)
            raise RuntimeError("broken")

    model, state = Broken(), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broken"):
        Evaluator(batches(noise(4)), samples=4)(model, 8)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())


# ------------------------------------------------------------------------------------------------------ real images


def test_real_images_are_the_same_at_each_call_and_all_different() -> None:
    source = digits(16)
    some, again = (torch.cat([batch.images for batch in real_images(source, 100, batch_size=32)]) for _ in range(2))
    assert torch.equal(some, again)
    assert len(some) == 100
    assert [len(batch.images) for batch in real_images(source, 100, batch_size=32)] == [32, 32, 32, 4]
    everything = torch.cat([batch.images for batch in real_images(source, 10**6)])
    assert sorted(image.sum() for image in everything) == sorted(image.sum() for image in source.images)


def test_real_images_keep_their_labels() -> None:
    source = digits(16)
    assert source.labels is not None
    (batch,) = real_images(source, 40)
    for image, label in zip(batch.images, batch.labels, strict=True):
        same = [i for i, other in enumerate(source.images) if (other == image.numpy()).all()]
        assert [int(source.labels.numbers[i]) for i in same] == [label] * len(same) != []
    source.labels = None
    (batch,) = real_images(source, 40)
    assert batch.labels is None


def test_every_other_real_image_is_mirrored_on_demand() -> None:
    source = ArrayDataset(torch.arange(4).byte().expand(6, 3, 4, 4).numpy())
    plain, mirrored = (next(real_images(source, 6, flip=flip)).images for flip in (False, True))
    assert torch.equal(mirrored[::2], plain[::2])
    assert torch.equal(mirrored[1::2], plain[1::2].flip(-1))


# ----------------------------------------------------------------------------------------- where Inception comes from


@pytest.fixture
def fidelity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[dict[str, Tensor]], Path]:
    """A stand-in for torch-fidelity (which needs torchvision) that takes two means; returns a maker of weight files."""

    class Stub(nn.Module):
        def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str) -> None:
            super().__init__()
            assert features_list == ["2048", "logits_unbiased"]
            self.weight = nn.Parameter(torch.zeros(1))
            self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            pooled, logits = two_means(images)
            return self.weight * pooled, logits

    if find_spec("torchmetrics"):  # it asks for torch-fidelity when it is imported, and keeps the answer
        inception_module.import_torchmetrics()
    module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Stub  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def write(state: dict[str, Tensor]) -> Path:
        path = tmp_path / "hub" / "checkpoints" / Path(inception_module.WEIGHTS).name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path)
        return path

    return write


@needs_torchmetrics
@pytest.mark.parametrize("given", [True, False])
def test_weights_are_taken_from_the_path_or_from_torch_hub(
    given: bool, fidelity: Callable[[dict[str, Tensor]], Path]
) -> None:
    path = fidelity({"weight": torch.ones(1)})
    evaluate = Evaluator(batches(noise(8)), samples=8, inception=path if given else None)
    assert evaluate.note == ""
    assert evaluate(Painter(), 2) == Evaluator(batches(noise(8)), samples=8, inception=two_means)(Painter(), 2)


@needs_torchmetrics
def test_weights_that_are_missing_or_wrong_are_named(
    fidelity: Callable[[dict[str, Tensor]], Path], tmp_path: Path
) -> None:
    assert "there are no Inception weights at" in Evaluator(batches(noise(8)), samples=8).note
    with pytest.raises(ValueError, match=r"no Inception weights at .*nowhere\.pth; they are at https://"):
        Evaluator(batches(noise(8)), samples=8, inception=tmp_path / "nowhere.pth")
    wrong = fidelity({"other": torch.ones(1)})
    with pytest.raises(ValueError, match=r"does not hold torch-fidelity's Inception weights") as error:
        Evaluator(batches(noise(8)), samples=8, inception=wrong)
    assert "\n" not in str(error.value)


@needs_torchmetrics
def test_lack_of_memory_is_not_the_fault_of_the_weights(
    fidelity: Callable[[dict[str, Tensor]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fidelity({"weight": torch.ones(1)})
    monkeypatch.setattr(torch, "load", lambda *_, **__: torch.empty(10**15))
    with pytest.raises(OSError, match="can't allocate memory: you tried to allocate"):
        Evaluator(batches(noise(8)), samples=8, inception=path)


@pytest.mark.parametrize("package", ["torchmetrics", "torch_fidelity"])
def test_packages_that_are_missing_are_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # as Python notes a package that cannot be imported
    note = Evaluator(batches(noise(8)), samples=8).note
    named = package.replace("_", "-") if find_spec("torchmetrics") else "torchmetrics"
    assert f"{named} cannot be imported" in note
    assert "pip install -r examples/evaluation/requirements.txt" in note  # as docs/evaluation.md says
    with pytest.raises(ValueError, match=f"{named} cannot be imported"):
        Evaluator(batches(noise(8)), samples=8, inception=Path("weights.pth"))


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], r"two real images or more, got 0"),
        ([noise(1)], r"two real images or more, got 1"),
        ([noise(4).float()], r"expected uint8 images \(B, 1 or 3, H, W\), got torch\.float32 \(4, 3, 16, 16\)"),
        ([noise(4)[0]], r"got torch\.uint8 \(3, 16, 16\)"),
        ([noise(4, channels=2)], r"got torch\.uint8 \(4, 2, 16, 16\)"),
    ],
)
def test_wrong_real_images_are_named(batches: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Evaluator([Batch(batch) for batch in batches], samples=8)


def test_a_generator_of_another_size_is_named() -> None:
    with pytest.raises(ValueError, match="16 pixels like the real ones, got 32"):
        Evaluator(batches(noise(4)), samples=4)(SAGANGenerator(32, z_dim=8, base_channels=4), 8)


# -------------------------------------------------------------------------------------------------- with the trainer


def test_a_training_with_evaluation_ends_where_one_without_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out_images(monkeypatch)
    monkeypatch.setattr(classifier_module, "STEPS", 4)
    settings = [
        "--classes",
        "own",
        "--augment",
        "color",
        "--noise",
        "0.1",
    ]  # random numbers and statistics of all kinds
    settings += ["--steps", "4", "--eval-samples", "20"]
    ends = []
    for name, every in (("evaluated", "2"), ("not", "0")):
        train(tmp_path / name, *settings, "--eval-every", every)
        end = checkpoint(tmp_path / name)
        ends.append({part: end[part] for part in ("generator", "discriminator", "average", "images")})
    assert_same(*ends)
    scores = {line["step"]: line["scores"] for line in lines(tmp_path / "evaluated") if "scores" in line}
    assert scores.keys() == {2, 4}
    for score in scores.values():
        assert next(iter(score)) == "classifier_distance"  # selects
        assert score["classifier_distance"] > score["classifier_distance_real"]
        assert score["swd"] > 0
        assert 0 <= score["agreement"] <= 1
    assert checkpoint(tmp_path / "evaluated")["scores"] == scores[4]


def test_the_recalibrated_average_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_images(monkeypatch)
    given = []

    def open_evaluator(config, data, device, cache):
        return lambda generator, seed: given.append(generator.state_dict()) or {"swd": 1.0}

    train(tmp_path, "--steps", "2", "--lr-g", "0.01", "--eval-every", "2", open_evaluator=open_evaluator)
    generator, card = open_generator(tmp_path)
    for name, value in generator.state_dict().items():
        torch.testing.assert_close(given[0][name], value, rtol=0, atol=0)
    assert card["scores"] == {"swd": 1.0}
