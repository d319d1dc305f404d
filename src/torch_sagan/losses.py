"""What the two networks minimize, each a scalar. Nothing here steps an optimizer or calls ``backward``.

``real_logits`` and ``fake_logits`` are D's logits of real and of generated images.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "gradient_penalty",
    "hinge_discriminator_loss",
    "hinge_generator_loss",
    "relativistic_discriminator_loss",
    "relativistic_generator_loss",
    "wasserstein_discriminator_loss",
    "wasserstein_generator_loss",
    "zero_centered_gradient_penalty",
]


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    r"""Hinge loss of the discriminator, of logits of any shape.

    .. math::
        \operatorname{mean}\max(0, 1 - D(x)) \allowbreak + \operatorname{mean}\max(0, 1 + D(G(z)))

    Source: Zhang et al., arXiv:1805.08318, equation 4.
    """
    return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    r"""Hinge loss of the generator, :math:`-\operatorname{mean} D(G(z))`, of logits of any shape.

    Source: Zhang et al., arXiv:1805.08318, equation 4.
    """
    return -fake_logits.mean()


def wasserstein_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    r"""Wasserstein loss of the discriminator, of logits of any shape.

    .. math::
        \operatorname{mean} D(G(z)) - \operatorname{mean} D(x)

    WGAN-GP adds ``weight * gradient_penalty(...)``.

    Source: Gulrajani et al., *Improved Training of Wasserstein GANs*, arXiv:1704.00028, equation 3.
    """
    return fake_logits.mean() - real_logits.mean()


def wasserstein_generator_loss(fake_logits: Tensor) -> Tensor:
    """Wasserstein loss of the generator: that of the hinge loss, :func:`hinge_generator_loss`.

    Source: Gulrajani et al., arXiv:1704.00028.
    """
    return hinge_generator_loss(fake_logits)


def relativistic_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    r"""Relativistic loss of the discriminator, of logits (B,), compared in pairs: those of the same index.

    .. math::
        \operatorname{mean} \operatorname{softplus}(D(G(z)) - D(x))

    Every real image is compared with one generated image, so D cannot lower its loss by calling all of them real.
    Alone it need not converge: add :func:`zero_centered_gradient_penalty` on real (R1) and on generated images (R2).

    Raises:
        ValueError: when the shapes differ, since there would be no pairs.

    Source: Huang et al., *The GAN is dead; long live the GAN! A Modern GAN Baseline* (R3GAN), arXiv:2501.05441; the
    loss is from Jolicoeur-Martineau, arXiv:1807.00734.
    """
    _check_pairs(real_logits, fake_logits)
    return F.softplus(fake_logits - real_logits).mean()


def relativistic_generator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    r"""Relativistic loss of the generator, which unlike the others needs D's logits of real images.

    .. math::
        \operatorname{mean} \operatorname{softplus}(D(x) - D(G(z)))

    Pairs, errors and source are those of :func:`relativistic_discriminator_loss`.
    """
    _check_pairs(real_logits, fake_logits)
    return F.softplus(real_logits - fake_logits).mean()


def gradient_penalty(
    discriminator: Callable[..., Tensor],
    real: Tensor,
    fake: Tensor,
    labels: Tensor | None = None,
    *,
    target: float = 1.0,
) -> Tensor:
    r"""Gradient penalty of WGAN-GP: pull the norm of D's gradient toward ``target``.

    .. math::
        \operatorname{mean}\,(\lVert \nabla_{\hat x} D(\hat x) \rVert_2 - t)^2

    at random points :math:`\hat x` between real and generated images. It has no weight (the source multiplies it by
    10), and can be differentiated with respect to D's parameters; no gradient flows into the images. A D with several
    outputs for an image, as a PatchGAN, counts by their sum.

    Args:
        discriminator: D; called as ``discriminator(images)`` or ``discriminator(images, labels)``.
        real: (B, ...) real images.
        fake: (B, ...) generated images.
        labels: (B,) passed on to D when given.
        target: the norm t. 0 gives a zero-centered penalty.

    Raises:
        ValueError: when the shapes of real and fake differ.

    :class:`SAGANDiscriminator` with spectral normalization starts with gradients far below 1, which this penalty then
    fights: build it with ``spectral_norm=None``. (The summed outputs of a large PatchGAN can be far above 1.)
    ``torch.compile`` has no double backward, so D must run eagerly here.

    Source: Gulrajani et al., arXiv:1704.00028, equation 3.
    """
    if real.shape != fake.shape:
        raise ValueError(f"real and fake must have one shape, got {tuple(real.shape)} and {tuple(fake.shape)}")
    real, fake = real.detach(), fake.detach()
    t = torch.rand(len(real), *[1] * (real.ndim - 1), dtype=real.dtype, device=real.device)  # (B, 1, ...)
    gradient = _gradient(discriminator, torch.lerp(fake, real, t), labels)  # (B, ...)
    norms = torch.linalg.vector_norm(gradient.flatten(1), dim=1)  # (B,)
    return torch.square(norms - target).mean()


def zero_centered_gradient_penalty(
    discriminator: Callable[..., Tensor], images: Tensor, labels: Tensor | None = None
) -> Tensor:
    r"""Zero-centered gradient penalty, R1 at real and R2 at generated images.

    .. math::
        \operatorname{mean} \lVert \nabla_x D(x) \rVert_2^2

    As with :func:`gradient_penalty`, no gradient flows into the images (B, ...), ``labels`` are passed on to D when
    given, D must run eagerly, and there is no weight (the source multiplies by γ/2).

    Source: Mescheder et al., *Which Training Methods for GANs do actually Converge?*, arXiv:1801.04406, equations 9
    and 10.
    """
    return _gradient(discriminator, images.detach(), labels).square().flatten(1).sum(1).mean()


def _gradient(discriminator: Callable[..., Tensor], images: Tensor, labels: Tensor | None) -> Tensor:
    """The gradient of each image's logit with respect to that image (B, ...), itself differentiable."""
    images = images.requires_grad_()
    with torch.enable_grad():
        logits = discriminator(images) if labels is None else discriminator(images, labels)  # (B,)
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)  # (B, ...)
    return gradient


def _check_pairs(real_logits: Tensor, fake_logits: Tensor) -> None:
    if real_logits.shape != fake_logits.shape:
        raise ValueError(
            "expected as many logits of real as of generated images, to be compared in pairs, got "
            f"{tuple(real_logits.shape)} and {tuple(fake_logits.shape)}"
        )
