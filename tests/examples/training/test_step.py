"""The training step against the same step written out, and with each of its options."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torch_sagan import hinge_discriminator_loss, hinge_generator_loss
from training.data.dataset import Batch
from training.flags import Config
from training.objectives import LOSSES, hinge, objective
from training.state import TrainingState, random_seed
from training.step import GAN, Objective, Piece, share, total, training_step

CLASSES, Z, PIXELS = 3, 5, 4


class Generator(nn.Module):
    """z and a class to (B, 1, 2, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(Z, PIXELS), nn.Embedding(CLASSES, PIXELS)
        self.asked: list[Tensor | None] = []

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        self.asked.append(labels)
        return torch.tanh(self.linear(z) + (0 if labels is None else self.table(labels))).view(-1, 1, 2, 2)


class Discriminator(nn.Module):
    """(B, 1, 2, 2) and a class to a logit."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out, self.table = nn.Linear(PIXELS, 6), nn.Linear(6, 1), nn.Embedding(CLASSES, 6)
        self.seen: list[tuple[Tensor, Tensor | None]] = []

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        self.seen.append((images.detach().clone(), labels))
        h = torch.tanh(self.hidden(images.flatten(1)))  # (B, 6)
        logits = self.out(h).squeeze(1)  # (B,)
        return logits if labels is None else logits + (h * self.table(labels)).sum(1)


def identity(images: Tensor) -> Tensor:
    return images


def gan(objective: Objective) -> GAN:
    torch.manual_seed(1)
    networks = Generator().double(), Discriminator().double()
    return GAN(*networks, *(torch.optim.SGD(network.parameters(), lr=0.1) for network in networks), objective)


def batches(count: int, pieces: int = 1, size: int = 8, labels: bool = True) -> Iterator[list[Piece]]:
    random = torch.Generator().manual_seed(2)
    for _ in range(count):
        real = torch.randn(size, 1, 2, 2, generator=random).double()
        z = torch.randn(size, Z, generator=random).double()
        classes = torch.randint(CLASSES, (size,), generator=random)
        parts = zip(real.chunk(pieces), z.chunk(pieces), classes.chunk(pieces), strict=True)
        yield [Piece(r, z, c if labels else None) for r, z, c in parts]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("labels", [False, True])
def test_is_the_step_written_out(labels: bool) -> None:
    ours = gan(hinge(0.0, identity))
    G, D = copy.deepcopy(ours.generator), copy.deepcopy(ours.discriminator)
    ((real, z, y),) = next(batches(1, labels=labels))
    losses = training_step(ours, batches(1, labels=labels))

    fake = G(z, y)
    d_loss = hinge_discriminator_loss(D(real, y), D(fake.detach(), y))
    d_gradients = torch.autograd.grad(d_loss, list(D.parameters()), allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(D.parameters(), d_gradients, strict=True):
            parameter -= 0 if gradient is None else 0.1 * gradient
    g_loss = hinge_generator_loss(D(fake, y))
    g_gradients = torch.autograd.grad(g_loss, list(G.parameters()), allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(G.parameters(), g_gradients, strict=True):
            parameter -= 0 if gradient is None else 0.1 * gradient

    # The same operations in float64; only the two kinds of images share a pass.
    torch.testing.assert_close(losses, torch.stack([d_loss, g_loss]).detach(), rtol=1e-12, atol=1e-12)
    for network, expected in ((ours.generator, G), (ours.discriminator, D)):
        for name, value in weights(network).items():
            torch.testing.assert_close(value, expected.get_parameter(name).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_pieces_add_up_to_the_batch(loss: str) -> None:
    """Four pieces of two images move the weights as one piece of eight does (nothing here depends on the batch)."""
    whole, parts = gan(objective(loss, 0.0, identity)), gan(objective(loss, 0.0, identity))
    one = training_step(whole, batches(1))
    other = training_step(parts, batches(1, pieces=4))
    torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)  # float64, summed in another order
    for network, same in ((whole.generator, parts.generator), (whole.discriminator, parts.discriminator)):
        moved = weights(same)
        for name, value in weights(network).items():
            torch.testing.assert_close(moved[name], value, rtol=1e-12, atol=1e-12)


def test_labels_reach_every_pass() -> None:
    ours = gan(objective("relativistic", 1.0, identity))
    ((_, _, y),) = next(batches(1))
    training_step(ours, batches(1))
    assert [torch.equal(asked, y) for asked in ours.generator.asked] == [True]  # one pass, learned from twice
    asked = [labels for _, labels in ours.discriminator.seen]
    # D's step: both kinds at once, R1, R2; G's step: generated, then real images.
    assert [len(labels) for labels in asked] == [16, 8, 8, 8, 8]
    assert all(torch.equal(labels, y.repeat(len(labels) // 8)) for labels in asked)


def test_real_images_are_scored_for_the_generator_only_where_its_loss_needs_them() -> None:
    ours = gan(hinge(0.0, identity))
    training_step(ours, batches(1))
    assert [len(images) for images, _ in ours.discriminator.seen] == [16, 8]


def test_every_image_is_augmented() -> None:
    """In both steps, real and generated, penalty included: D never sees an image without augmentation."""
    ours = gan(objective("relativistic", 1.0, lambda images: images + 100))
    training_step(ours, batches(1))
    assert len(ours.discriminator.seen) == 5
    assert all((images > 50).all() for images, _ in ours.discriminator.seen)


def test_the_generator_learns_through_the_augmentation() -> None:
    blind = gan(hinge(0.0, lambda images: images * 0))
    before = weights(blind.generator)
    training_step(blind, batches(1))
    assert all(torch.equal(value, before[name]) for name, value in weights(blind.generator).items())
    seeing = gan(hinge(0.0, lambda images: images * 2))
    training_step(seeing, batches(1))
    assert any(not torch.equal(value, before[name]) for name, value in weights(seeing.generator).items())


def test_steps_of_the_discriminator_see_a_batch_each() -> None:
    ours, drawn = gan(hinge(0.0, identity)), batches(4)
    training_step(ours, drawn, d_steps=3)
    reals = [images[:8] for images, _ in ours.discriminator.seen if len(images) == 16]
    assert len(reals) == 3
    assert not torch.equal(reals[0], reals[1])
    assert len(list(drawn)) == 1


def test_penalties_weigh_what_they_are_told() -> None:
    """For D(x) = ⟨w, x⟩, R1 and R2 are ‖w‖² each: together γ ‖w‖², and WGAN-GP's is 10 (‖w‖ − 1)²."""
    w = torch.tensor([3.0, 0.0, 4.0, 0.0])
    real, fake = torch.randn(2, 6, 1, 2, 2)

    class Linear(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1) @ w

    for loss, weight, expected in (("relativistic", 0.5, 0.5 * 25), ("wgan-gp", 10.0, 10 * 16), ("hinge", 7.0, 0.0)):
        penalty = objective(loss, weight, identity).penalty(Linear(), real, fake, None)
        assert penalty.item() == pytest.approx(expected, rel=1e-5)  # float32


def test_gradients_stay_where_they_belong() -> None:
    ours = gan(hinge(0.0, identity))
    training_step(ours, batches(1))
    d_gradients = {name: parameter.grad.clone() for name, parameter in ours.discriminator.named_parameters()}
    before = weights(ours.discriminator)
    drawn = next(batches(1))
    from training.step import generate, generator_step

    generator_step(ours, drawn, generate(ours, drawn, learn=True))
    for name, parameter in ours.discriminator.named_parameters():
        assert parameter.requires_grad
        assert torch.equal(parameter.grad, d_gradients[name])
        assert torch.equal(parameter, before[name])


def test_a_batch_of_one_piece_has_no_operators_for_several() -> None:
    """Its loss is neither divided nor added up; only the losses of D and G are put together."""
    loss, (batch,) = torch.randn(()), batches(1)
    assert share(loss, batch) is loss
    assert total([loss]) is loss

    class Stacked(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function.overloadpacket is torch.ops.aten.stack
            return function(*args, **(kwargs or {}))

    for pieces, expected in ((1, 1), (2, 3)):
        with Stacked() as stacked:
            training_step(gan(hinge(0.0, identity)), batches(1, pieces=pieces))
        assert stacked.count == expected


def test_random_numbers_of_a_step_depend_on_seed_step_and_process_alone() -> None:
    keys = [(rank, seed, step) for rank in range(3) for seed in (0, 1, 2**61) for step in (0, 1, 100_000)]
    assert len({random_seed(*key) for key in keys}) == len(keys)
    assert random_seed(1, 2, 3) == random_seed(1, 2, 3)
    drawn = []
    for noise_before in (0, 5):
        state = TrainingState(
            Config(image_size=8, base_channels=2, batch_size=2, noise=0.1), device=torch.device("cpu")
        )
        images = Batch(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), None)
        batches = state.batches(iter([images] * 2))
        state.advance(batches)
        torch.randn(noise_before)  # by whatever runs between two steps
        state.latents.seed()
        state.advance(batches)
        drawn.append(state.discriminator.state_dict())
    for name, value in drawn[0].items():
        assert torch.equal(value, drawn[1][name]), name
