"""The layers of class-conditional networks: batch norm with parameters per class, and the projection of a class."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_sagan._checks import at_least_one
from torch_sagan._torch import on_device
from torch_sagan.networks.labels import check_labels
from torch_sagan.spectral.registration import spectral_norm

__all__ = ["ConditionalBatchNorm2d", "ProjectionHead"]


class ConditionalBatchNorm2d(nn.Module):
    r"""Batch norm with a scale and a shift for each class.

    .. math::
        y = \gamma_c\, \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta_c

    The statistics are those of the whole batch, whatever its classes, as in the paper's released code. It starts with
    :math:`\gamma = 1` and :math:`\beta = 0`, and is not spectrally normalized.

    With ``spectral_norm`` it is as in mmgeneration and PyTorch-StudioGAN: :math:`\gamma = 1 + W_{SN}` and
    :math:`\beta = V_{SN}` come from two normalized embeddings, which start Xavier-uniform.

    Args:
        channels: the number of channels, C.
        num_classes: how many classes there are.
        eps: added to the variance.
        momentum: weight of a new batch in the running statistics.
        spectral_norm: ``spectral_norm(module) -> module`` for the two embeddings, or None for plain parameters.
        device: where the parameters are made; default: PyTorch's default device.
        dtype: of the parameters; default: PyTorch's default dtype.

    Attributes:
        gamma, beta: the scale and the shift of each class, (num_classes, C); without ``spectral_norm``.
        scale, shift: the embeddings W and V, (num_classes, C); with ``spectral_norm``.
        norm: the batch norm without an affine part, which ``SyncBatchNorm.convert_sync_batchnorm`` finds.

    Raises:
        ValueError, TypeError: in ``forward``, for labels that are missing, or of another shape, type, device or range.

    Source: de Vries et al., *Modulating early visual processing by language*, arXiv:1707.00683, as used by
    Zhang et al., arXiv:1805.08318.

    >>> import torch
    >>> from torch_sagan import ConditionalBatchNorm2d
    >>> norm = ConditionalBatchNorm2d(64, num_classes=10)
    >>> norm(torch.randn(2, 64, 8, 8), torch.tensor([3, 7])).shape
    torch.Size([2, 64, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        spectral_norm: Callable[[nn.Module], nn.Module] | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        at_least_one(channels=channels, num_classes=num_classes)
        with on_device(device):
            self.norm: nn.BatchNorm2d = nn.BatchNorm2d(channels, eps=eps, momentum=momentum, affine=False)
            self.size: tuple[int, int] = (channels, num_classes)
            self.normalized: bool = spectral_norm is not None
            if spectral_norm is not None:
                self.scale: nn.Module = spectral_norm(_xavier_embedding(num_classes, channels))
                self.shift: nn.Module = spectral_norm(_xavier_embedding(num_classes, channels))
            else:
                self.gamma: nn.Parameter = nn.Parameter(torch.ones(num_classes, channels))
                self.beta: nn.Parameter = nn.Parameter(torch.zeros(num_classes, channels))
        if dtype is not None:
            self.to(dtype)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Normalize x (B, C, H, W), each sample with the scale and shift of its class; labels is (B,), of integers."""
        check_labels(labels, self.size[1], x)
        if self.normalized:
            gamma, beta = 1 + self.scale(labels), self.shift(labels)  # (B, C)
        else:
            gamma, beta = F.embedding(labels, self.gamma), F.embedding(labels, self.beta)  # (B, C)
        normalized = self.norm(x)  # (B, C, H, W)
        return torch.addcmul(beta[:, :, None, None], gamma[:, :, None, None], normalized)  # (B, C, H, W)

    def reset_parameters(self) -> None:
        """Make this a new layer again, with parameters and running statistics as at its start."""
        self.norm.reset_parameters()
        if self.normalized:
            for embedding in (self.scale, self.shift):
                weight = torch.empty_like(cast(Tensor, embedding.weight))
                embedding.weight = nn.init.xavier_uniform_(weight)
        else:
            nn.init.ones_(self.gamma)
            nn.init.zeros_(self.beta)

    def extra_repr(self) -> str:
        return "{}, num_classes={}".format(*self.size)


class ProjectionHead(nn.Module):
    r"""A logit of features h and of their agreement with the class c: :math:`w^\top h + b + \langle e_c, h \rangle`.

    w and b are those of a linear layer, and :math:`e_c` is the embedding of the class. Both layers start
    Xavier-uniform, with a zero bias, and are spectrally normalized.

    Args:
        channels: the length of h, C.
        num_classes: how many classes there are, or None for the linear part alone.
        spectral_norm: ``spectral_norm(module) -> module``, or None to leave both plain.
        device: where the parameters are made; default: PyTorch's default device.
        dtype: of the parameters; default: PyTorch's default dtype.

    Raises:
        ValueError, TypeError: in ``forward``, for labels that are missing or given when not wanted, or of another
            shape, type, device or range.

    Source: Miyato and Koyama, *cGANs with Projection Discriminator*, arXiv:1802.05637, equation 5.

    >>> import torch
    >>> from torch_sagan import ProjectionHead
    >>> head = ProjectionHead(64, num_classes=10)
    >>> head(torch.randn(2, 64), torch.tensor([3, 7])).shape
    torch.Size([2])
    """

    def __init__(
        self,
        channels: int,
        num_classes: int | None = None,
        *,
        spectral_norm: Callable[[nn.Module], nn.Module] | None = spectral_norm,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        at_least_one(channels=channels, num_classes=num_classes)
        spectral_norm = spectral_norm or (lambda module: module)
        with on_device(device):
            linear = nn.Linear(channels, 1)
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
            self.linear: nn.Module = spectral_norm(linear)
            self.num_classes = num_classes
            if num_classes is not None:
                self.embedding: nn.Module = spectral_norm(_xavier_embedding(num_classes, channels))
        if dtype is not None:
            self.to(dtype)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """The logits (B,) of features (B, C); labels is (B,), of integers, or None without classes."""
        check_labels(labels, self.num_classes, features)
        logits = self.linear(features).squeeze(1)  # (B,)
        if labels is not None:
            logits = logits + (self.embedding(labels) * features).sum(dim=1)  # (B,)
        return logits


def _xavier_embedding(num_classes: int, channels: int) -> nn.Embedding:
    embedding = nn.Embedding(num_classes, channels)
    nn.init.xavier_uniform_(embedding.weight)
    return embedding
