"""A SAGAN written plainly, as in the public implementations: the baseline of the benchmark."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_sagan import SAGANDiscriminator, SAGANGenerator, hinge_discriminator_loss, hinge_generator_loss


class PlainAttention(nn.Module):
    """The plain equation of the layer: the N×N attention matrix is materialized and saved for the backward."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 8, 1)
        self.key = nn.Conv2d(channels, channels // 8, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attention = torch.softmax(torch.bmm(query.transpose(1, 2), key), dim=-1)  # (B, N, N)
        return torch.bmm(value, attention.transpose(1, 2))  # (B, C, N)

    def forward(self, x: Tensor) -> Tensor:
        attended = self.attend(self.query(x).flatten(2), self.key(x).flatten(2), self.value(x).flatten(2))
        return self.gamma * attended.view_as(x) + x  # (B, C, H, W)


class SDPAttention(PlainAttention):
    """The same through PyTorch's scaled_dot_product_attention."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2).unsqueeze(1) for t in (query, key, value))  # (B, 1, N, ·)
        return F.scaled_dot_product_attention(q, k, v, scale=1.0).squeeze(1).transpose(1, 2)  # (B, C, N)


class PaddedSDPAttention(PlainAttention):
    """The same with query and key padded to the width of the value, which lets the CPU's fused kernel take them."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        padding = (0, value.shape[1] - query.shape[1])
        q, k = (F.pad(t.transpose(1, 2), padding).unsqueeze(1) for t in (query, key))  # (B, 1, N, C)
        v = value.transpose(1, 2).contiguous().unsqueeze(1)  # (B, 1, N, C)
        return F.scaled_dot_product_attention(q, k, v, scale=1.0).squeeze(1).transpose(1, 2)  # (B, C, N)


class PlainSpectralNorm(nn.Module):
    """A layer that divides its weight by the spectral norm before each use, with u and v as parameters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        del module.weight
        self.weight_bar = weight
        self.u = nn.Parameter(F.normalize(torch.randn(weight.shape[0]), dim=0), requires_grad=False)
        self.v = nn.Parameter(F.normalize(torch.randn(weight[0].numel()), dim=0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.weight_bar.view(len(self.weight_bar), -1)
        v = torch.mv(torch.t(matrix.detach()), self.u.detach())
        self.v.data = v / (v.norm() + 1e-12)
        u = torch.mv(matrix.detach(), self.v.detach())
        self.u.data = u / (u.norm() + 1e-12)
        sigma = self.u.clone().dot(matrix.mv(self.v.clone()))
        self.module.weight = self.weight_bar / sigma.expand_as(self.weight_bar)
        y: Tensor = self.module(x)
        return y


def plain_step(batch: int, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """The step of the public implementations: three passes of D, a graph of everything, Adam with default settings."""
    generator = SAGANGenerator(64, attention=PlainAttention, spectral_norm=PlainSpectralNorm).to(device)
    discriminator = SAGANDiscriminator(64, attention=PlainAttention, spectral_norm=PlainSpectralNorm).to(device)
    g_adam, d_adam = (
        torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr, betas=(0.0, 0.9))
        for network, lr in ((generator, 1e-4), (discriminator, 4e-4))
    )
    real = torch.randn(batch, 3, 64, 64, device=device).clamp(-1, 1)

    def run() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            real_logits = discriminator(real)
            fake_logits = discriminator(generator(torch.randn(batch, 128, device=device)))
            d_loss = hinge_discriminator_loss(real_logits, fake_logits)
        d_adam.zero_grad()
        g_adam.zero_grad()
        d_loss.backward()
        d_adam.step()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            g_loss = hinge_generator_loss(discriminator(generator(torch.randn(batch, 128, device=device))))
        d_adam.zero_grad()
        g_adam.zero_grad()
        g_loss.backward()
        g_adam.step()

    return run
