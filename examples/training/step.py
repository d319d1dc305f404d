"""The training step of every script: the discriminator learns, then the generator.

What differs from one GAN to another is passed in as an `Objective`: losses, a penalty, an augmentation. A process's
share of a batch passes through the networks in one or several pieces, whose gradients add up to the mean over the
batch. Each piece is a pass of its own: batch norm takes its statistics from it, and spectral norm iterates once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from training.runs.distributed import no_sync_unless, unwrap


class Piece(NamedTuple):
    """The part of a batch that passes through the networks at once."""

    real: Tensor  # (B, C, S, S) in [-1, 1]
    z: Tensor  # (B, z_dim)
    labels: Tensor | None = None  # (B,) the classes of the real images, also requested of G


def no_penalty(discriminator: nn.Module, real: Tensor, fake: Tensor, labels: Tensor | None) -> Tensor:
    """The penalty of an objective without one."""
    return real.new_zeros(())


def no_augmentation(images: Tensor) -> Tensor:
    """The augmentation of an objective without one."""
    return images


@dataclass(frozen=True)
class Objective:
    """The losses that the two networks minimize."""

    discriminator_loss: Callable[[Tensor, Tensor], Tensor]  # logits (B,) of real and of generated images -> scalar
    generator_loss: Callable[[Tensor, Callable[[], Tensor]], Tensor]  # logits of generated, and of real ones on demand
    penalty: Callable[[nn.Module, Tensor, Tensor, Tensor | None], Tensor] = (
        no_penalty  # D, real, fake, labels -> scalar
    )
    augment: Callable[[Tensor], Tensor] = no_augmentation  # of every image that D sees, in both steps; differentiable


@dataclass(frozen=True)
class GAN:
    """Two networks as they are called (perhaps wrapped for several processes), and how they learn."""

    generator: nn.Module
    discriminator: nn.Module
    generator_optimizer: Optimizer
    discriminator_optimizer: Optimizer
    objective: Objective
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext


def training_step(gan: GAN, batches: Iterator[Sequence[Piece]], *, d_steps: int = 1) -> Tensor:
    """`d_steps` steps of D, each on another batch, and one of G. Returns the last losses of D and G (2,).

    The losses stay on the device, so that nothing here waits for it.
    """
    for turn in range(d_steps):
        batch = next(batches)
        # G does not change during D's steps, so it can learn from the images that D has just learned from. With several
        # pieces they are generated again; otherwise the graphs of all pieces would be in memory at once.
        reuse = len(batch) == 1 and turn == d_steps - 1
        fakes = list(generate(gan, batch, learn=True)) if reuse else generate(gan, batch, learn=False)
        discriminator_loss = discriminator_step(gan, batch, fakes)
    generator_loss = generator_step(gan, batch, fakes if reuse else generate(gan, batch, learn=True))
    return torch.stack([discriminator_loss, generator_loss])


def generate(gan: GAN, batch: Sequence[Piece], *, learn: bool) -> Iterator[Tensor]:
    """G's images (B, C, S, S) for each piece, with a graph if G is to learn from them."""
    for i, piece in enumerate(batch, start=1):
        with torch.set_grad_enabled(learn), no_sync_unless(gan.generator, i == len(batch)), gan.autocast():
            fake: Tensor = gan.generator(piece.z, piece.labels)
        yield fake.to(piece.real.dtype)


def discriminator_step(gan: GAN, batch: Sequence[Piece], fakes: Iterable[Tensor]) -> Tensor:
    """One step of D on real images and on generated ones, which get no gradient. Returns its loss."""
    gan.discriminator_optimizer.zero_grad()
    losses = []
    for i, (piece, fake) in enumerate(zip(batch, fakes, strict=True), start=1):
        images = gan.objective.augment(torch.cat([piece.real, fake.detach()]))  # (2B, C, S, S)
        labels = None if piece.labels is None else piece.labels.repeat(2)  # (2B,)
        with no_sync_unless(gan.discriminator, i == len(batch)):
            # One pass for both kinds, so that the weights are normalized once.
            logits = score(gan, gan.discriminator, images, labels)  # (2B,)
            loss = gan.objective.discriminator_loss(*logits.chunk(2))
            # Outside autocast: a gradient of a gradient needs full precision.
            real, generated = images.chunk(2)
            loss = loss + gan.objective.penalty(unwrap(gan.discriminator), real, generated, piece.labels)
            loss = share(loss, batch)
            loss.backward()
        losses.append(loss.detach())
    gan.discriminator_optimizer.step()
    return total(losses)


def generator_step(gan: GAN, batch: Sequence[Piece], fakes: Iterable[Tensor]) -> Tensor:
    """One step of G on its images. Returns its loss."""
    discriminator, augment = unwrap(gan.discriminator), gan.objective.augment
    discriminator.requires_grad_(False)  # gradients flow through D, none to its weights
    gan.generator_optimizer.zero_grad()
    losses = []
    for piece, fake in zip(batch, fakes, strict=True):
        fake_logits = score(gan, discriminator, augment(fake), piece.labels)  # (B,)
        real_logits = partial(_score_augmented, gan, discriminator, piece)
        loss = share(gan.objective.generator_loss(fake_logits, real_logits), batch)
        loss.backward()
        losses.append(loss.detach())
    gan.generator_optimizer.step()
    discriminator.requires_grad_(True)
    return total(losses)


# A batch of one piece needs neither of the two, and on a GPU a launch takes longer than its arithmetic.


def share(loss: Tensor, batch: Sequence[Piece]) -> Tensor:
    """A piece's part of the mean over its batch."""
    return loss if len(batch) == 1 else loss / len(batch)


def total(losses: Sequence[Tensor]) -> Tensor:
    """The sum of the parts of all pieces."""
    return losses[0] if len(losses) == 1 else torch.stack(list(losses)).sum()


def score(gan: GAN, discriminator: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
    """D's logits (B,), in the precision of the images."""
    with gan.autocast():
        logits: Tensor = discriminator(images, labels)
    return logits.to(images.dtype)


def _score_augmented(gan: GAN, discriminator: nn.Module, piece: Piece) -> Tensor:
    return score(gan, discriminator, gan.objective.augment(piece.real), piece.labels)
