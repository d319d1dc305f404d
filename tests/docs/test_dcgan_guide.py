"""The guide for a DCGAN holds for the network of PyTorch's tutorial as it is: a student's path from end to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from pages import DOCS, blocks, defined, run
from public_networks import TutorialDiscriminator, TutorialGenerator, tutorial_weights_init
from torch_sagan import (
    apply_spectral_norm,
    attention_overlay,
    hinge_discriminator_loss,
    hinge_generator_loss,
    insert_self_attention,
    insertion_points,
    record_attention,
    spectral_norms,
)
from training.data import procedural_faces as faces

PAGE = DOCS / "dcgan.md"
WIDTH, BATCH = 8, 8
health: Callable[..., dict[str, bool]] = defined(PAGE, "health", torch=torch)
Loss = Callable[[Tensor, Tensor], Tensor]


def tutorial(sigmoid: bool) -> tuple[TutorialGenerator, TutorialDiscriminator]:
    generator, discriminator = TutorialGenerator(WIDTH), TutorialDiscriminator(WIDTH)
    for network in (generator, discriminator):
        network.apply(tutorial_weights_init)
    if not sigmoid:
        discriminator.main[-1] = nn.Identity()  # the guide's line
    return generator, discriminator


def adam(network: nn.Module, rate: float) -> torch.optim.Adam:
    return torch.optim.Adam(network.parameters(), lr=rate, betas=(0.0, 0.9))


def step(
    generator: nn.Module, discriminator: nn.Module, optimizers: tuple[torch.optim.Adam, ...], images: Tensor
) -> list[Tensor]:
    """One of the guide's, on images and latent vectors drawn from PyTorch's generator. Returns D's outputs."""
    real = images[torch.randint(len(images), (BATCH,))]  # (B, 3, 64, 64)
    fake = generator(torch.randn(BATCH, 100, 1, 1))
    of_real, of_fake = discriminator(real), discriminator(fake.detach())
    optimizers[1].zero_grad()
    hinge_discriminator_loss(of_real, of_fake).backward()
    optimizers[1].step()
    optimizers[0].zero_grad()
    hinge_generator_loss(discriminator(fake)).backward()
    optimizers[0].step()
    return [of_real, of_fake]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.from_numpy(faces.render(faces.traits(128), size=64)).float() / 127.5 - 1  # (128, 3, 64, 64)


def test_the_guide_shows_the_networks_of_the_tutorial() -> None:
    namespace: dict[str, object] = {}
    run(PAGE, blocks(PAGE)[0], namespace)
    for name, ours in (("netG", TutorialGenerator()), ("netD", TutorialDiscriminator())):
        shown = namespace[name]
        assert isinstance(shown, nn.Module)
        assert str(shown.main) == str(ours.main)  # layers, sizes and settings, in their order
        assert {k: v.shape for k, v in shown.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}


def test_the_table_of_all_models_names_places_of_the_tutorial() -> None:
    text = (DOCS / "existing-models.md").read_text(encoding="utf-8")
    assert "| DCGAN of PyTorch's tutorial, generator | `main.8`, `main.11` | 128 at 16×16, 64 at 32×32 |" in text
    assert "| its discriminator | `main.4` (`main.3` is the norm before the activation) | 128 at 16×16 |" in text
    points = {}
    with torch.device("meta"):
        for network, shape in ((TutorialGenerator(), (1, 100, 1, 1)), (TutorialDiscriminator(), (1, 3, 64, 64))):
            found = insertion_points(network, torch.empty(shape))
            points |= {(shape[1], point.path): (point.channels, point.size) for point in found}
    assert points[100, "main.8"] == points[3, "main.4"] == points[3, "main.3"] == (128, (16, 16))
    assert points[100, "main.11"] == (64, (32, 32))


@pytest.mark.slow
@pytest.mark.parametrize("sigmoid", [True, False], ids=["as it is", "without its Sigmoid"])
def test_the_health_check_tells_a_dead_generator(sigmoid: bool, images: Tensor) -> None:
    networks = tutorial(sigmoid)
    optimizers = adam(networks[0], 1e-4), adam(networks[1], 4e-4)
    for _ in range(100):
        outputs = step(*networks, optimizers, images)
    assert health(networks[0], *outputs) == {"no gradient": sigmoid, "within [0, 1]": sigmoid}


def test_each_sign_of_the_health_check_stands_for_itself() -> None:
    network = nn.Linear(1, 1)
    for gradient, outputs, expected in (
        (1.0, (-1.0, 1.0), (False, False)),
        (0.0, (-1.0, 1.0), (True, False)),
        (1.0, (0.0, 1.0), (False, True)),
        (1.0, (0.5, 1.1), (False, False)),
    ):
        network.weight.grad = torch.full((1, 1), gradient)
        network.bias.requires_grad_(False)  # has none
        assert tuple(health(network, *torch.tensor(outputs).split(1)).values()) == expected


def test_the_health_check_is_the_same_on_both_pages() -> None:
    source = [
        next(block for block in blocks(page) if "def health" in block).partition("def health")[2].partition("\n\n")[0]
        for page in (PAGE, DOCS / "how-it-is-trained.md")
    ]
    assert source[0] == source[1]
    assert len(source[0].splitlines()) == 7  # arguments, a docstring and five lines


def test_the_tutorials_loss_from_logits() -> None:
    """What the guide proposes to those who keep it: BCELoss of a Sigmoid is BCEWithLogitsLoss without one."""
    logits, labels = torch.randn(8), torch.randint(2, (8,)).float()
    expected = nn.BCELoss()(logits.sigmoid(), labels)
    # float32, a few roundings of a logarithm
    torch.testing.assert_close(nn.BCEWithLogitsLoss()(logits, labels), expected, rtol=1e-5, atol=1e-6)
    assert binary_cross_entropy_with_logits(logits, labels) == nn.BCEWithLogitsLoss()(logits, labels)


def given(seed: int) -> tuple[nn.Module, nn.Module, tuple[torch.optim.Adam, ...]]:
    """As the guide builds them: the Sigmoid out, attention in, the norm, then the optimizers."""
    torch.manual_seed(seed)
    generator, discriminator = tutorial(sigmoid=False)
    insert_self_attention(generator, after="main.11", example_input=torch.randn(1, 100, 1, 1))
    insert_self_attention(discriminator, after="main.4", example_input=torch.randn(1, 3, 64, 64))
    apply_spectral_norm(discriminator)
    return generator, discriminator, (adam(generator, 1e-4), adam(discriminator, 4e-4))


@pytest.mark.slow
def test_a_students_path(images: Tensor, tmp_path: Path) -> None:
    """The tutorial's DCGAN, unmodified, to an attention map and to a run that is resumed bitwise."""
    generator, discriminator = tutorial(sigmoid=True)
    z = torch.randn(4, 100, 1, 1)
    optimizers = adam(generator, 1e-4), adam(discriminator, 4e-4)
    for _ in range(2):  # trained before, so that batch statistics are not those of a new network
        step(generator, discriminator, optimizers, images)

    keys = discriminator.state_dict().keys()
    probabilities = discriminator.eval()(images[:4])
    discriminator.main[-1] = nn.Identity()
    assert torch.equal(discriminator(images[:4]).sigmoid(), probabilities)
    assert discriminator.state_dict().keys() == keys

    before = generator.eval()(z), discriminator(images[:4])
    insert_self_attention(generator, after="main.11", example_input=z)
    insert_self_attention(discriminator, after="main.4", example_input=images[:1])
    assert torch.equal(generator(z), before[0])
    assert torch.equal(discriminator(images[:4]), before[1])
    assert isinstance(discriminator.main[4], nn.LeakyReLU)  # behind the activation: main.3 is a norm
    assert isinstance(discriminator.main[3], nn.BatchNorm2d)
    assert discriminator.main[4].inserted_attention.channels == 2 * WIDTH

    apply_spectral_norm(discriminator)
    assert (discriminator(images[:4]) - before[1]).abs().max() > 0.01  # the guide says so
    assert "main.4.inserted_attention.value.weight" in spectral_norms(discriminator)

    generator.train()
    discriminator.train()
    optimizers = adam(generator, 1e-4), adam(discriminator, 4e-4)
    for _ in range(2):
        step(generator, discriminator, optimizers, images)
    layer = generator.get_submodule("main.11.inserted_attention")
    assert layer.gamma.item() != 0

    with record_attention(generator) as records, torch.no_grad():
        samples = generator(z)
    overlay = attention_overlay(samples, records["main.11.inserted_attention"][-1], (28, 24))
    assert overlay.shape == (4, 3, 64, 64)

    parts = {"netG": generator, "netD": discriminator, "optimizerG": optimizers[0], "optimizerD": optimizers[1]}
    torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "run.pt")
    random = torch.get_rng_state()
    for _ in range(2):
        step(generator, discriminator, optimizers, images)

    again = given(seed=1)
    resumed = dict(zip(parts, (again[0], again[1], *again[2]), strict=True))
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    for name, part in resumed.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(random)
    for _ in range(2):
        step(again[0], again[1], again[2], images)
    for name in ("netG", "netD"):
        saved = parts[name].state_dict()
        assert all(torch.equal(value, saved[key]) for key, value in resumed[name].state_dict().items()), name
        assert not all(torch.equal(value, saved[key]) for key, value in state[name].items()), "no step was made"
