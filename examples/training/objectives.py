"""The objectives of the trainer's `--loss`, each with its source.

Each is a pair of losses, for some of them with a penalty.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from torch_sagan import (
    gradient_penalty,
    hinge_discriminator_loss,
    hinge_generator_loss,
    relativistic_discriminator_loss,
    relativistic_generator_loss,
    wasserstein_discriminator_loss,
    wasserstein_generator_loss,
    zero_centered_gradient_penalty,
)
from training.step import Objective

LOSSES = ("hinge", "wgan-gp", "relativistic")
DEFAULT_WEIGHT = {"wgan-gp": 10.0, "relativistic": 1.0}  # of the penalty; other losses have none


def objective(loss: str, penalty_weight: float, augment: Callable[[Tensor], Tensor]) -> Objective:
    """The objective that `--loss` names; its penalty, if it has one, has this weight."""
    build = {"hinge": hinge, "wgan-gp": wasserstein, "relativistic": relativistic}[loss]
    return build(penalty_weight, augment)


def hinge(penalty_weight: float, augment: Callable[[Tensor], Tensor]) -> Objective:
    """The paper's loss, which has no penalty (arXiv:1805.08318)."""
    return Objective(hinge_discriminator_loss, lambda fake, real: hinge_generator_loss(fake), augment=augment)


def wasserstein(penalty_weight: float, augment: Callable[[Tensor], Tensor]) -> Objective:
    """WGAN-GP (arXiv:1704.00028)."""

    def penalty(discriminator: nn.Module, real: Tensor, fake: Tensor, labels: Tensor | None) -> Tensor:
        return penalty_weight * gradient_penalty(discriminator, real, fake, labels)

    return Objective(
        wasserstein_discriminator_loss, lambda fake, real: wasserstein_generator_loss(fake), penalty, augment
    )


def relativistic(penalty_weight: float, augment: Callable[[Tensor], Tensor]) -> Objective:
    """R3GAN: the relativistic loss with R1 and R2, weighted by γ/2 (arXiv:2501.05441)."""

    def penalty(discriminator: nn.Module, real: Tensor, fake: Tensor, labels: Tensor | None) -> Tensor:
        at = partial(zero_centered_gradient_penalty, discriminator, labels=labels)
        return penalty_weight / 2 * (at(real) + at(fake))

    return Objective(
        relativistic_discriminator_loss,
        lambda fake, real: relativistic_generator_loss(real(), fake),
        penalty,
        augment,
    )
