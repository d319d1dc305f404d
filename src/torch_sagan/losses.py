"""What the two networks minimise: logits in, a scalar out. Nothing here steps an optimiser or calls ``backward``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "gradient_penalty",
    "hinge_discriminator_loss",
    "hinge_generator_loss",
    "wasserstein_discriminator_loss",
    "wasserstein_generator_loss",
]


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    r""":math:`\operatorname{mean}\max(0, 1 - D(x)) + \operatorname{mean}\max(0, 1 + D(G(z)))`.

    Args:
        real_logits: D's logits of real images, of any shape.
        fake_logits: D's logits of generated images, of any shape.

    Source: Zhang et al., arXiv:1805.08318, equation 4.
    """
    return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    r""":math:`-\operatorname{mean} D(G(z))`. Source: Zhang et al., arXiv:1805.08318, equation 4."""
    return -fake_logits.mean()


def wasserstein_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    r""":math:`\operatorname{mean} D(G(z)) - \operatorname{mean} D(x)`; add ``weight * gradient_penalty(...)`` to it.

    Source: Gulrajani et al., *Improved Training of Wasserstein GANs*, arXiv:1704.00028, equation 3.
    """
    return fake_logits.mean() - real_logits.mean()


def wasserstein_generator_loss(fake_logits: Tensor) -> Tensor:
    r""":math:`-\operatorname{mean} D(G(z))`. Source: Gulrajani et al., arXiv:1704.00028."""
    return -fake_logits.mean()


def gradient_penalty(
    discriminator: Callable[..., Tensor],
    real: Tensor,
    fake: Tensor,
    labels: Tensor | None = None,
    *,
    target: float = 1.0,
) -> Tensor:
    r""":math:`\operatorname{mean}\,(\lVert \nabla_{\hat x} D(\hat x) \rVert_2 - t)^2` at random points
    :math:`\hat x` between real and generated images.

    Args:
        discriminator: D; called as ``discriminator(images)`` or ``discriminator(images, labels)``.
        real: (B, ...) real images.
        fake: (B, ...) generated images, of the same shape. No gradient flows into either.
        labels: (B,) passed on to D when given.
        target: t, the norm that is aimed at. 0 gives a zero-centred penalty.

    Returns:
        A scalar without a weight (the source multiplies it by 10), differentiable with respect to D's parameters.

    Raises:
        ValueError: when the shapes of real and fake differ.

    A D with spectral normalisation starts with gradients far below 1, which this penalty then fights: build D with
    ``spectral_norm=None``. ``torch.compile`` has no double backward, so D must run eagerly here.

    Source: Gulrajani et al., arXiv:1704.00028, equation 3.
    """
    if real.shape != fake.shape:
        raise ValueError(f"real and fake must have one shape, got {tuple(real.shape)} and {tuple(fake.shape)}")
    real, fake = real.detach(), fake.detach()
    t = torch.rand(len(real), *[1] * (real.ndim - 1), dtype=real.dtype, device=real.device)  # (B, 1, ...)
    between = torch.lerp(fake, real, t).requires_grad_()  # (B, ...)
    with torch.enable_grad():
        logits = discriminator(between) if labels is None else discriminator(between, labels)  # (B,)
        (gradient,) = torch.autograd.grad(logits.sum(), between, create_graph=True)  # (B, ...)
    norms: Tensor = torch.linalg.vector_norm(gradient.flatten(1), dim=1)  # (B,)
    return torch.square(norms - target).mean()
