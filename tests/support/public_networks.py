"""The networks that the guides name, with the layers, names and traps of their public code. Widths are arguments.

The traps: a Sigmoid at the end of a discriminator, batch norm between a convolution and its activation, activations
that write in place, a `weights_init` that goes by the names of classes, `DataParallel` around everything, and PyTorch's
older spectral norm.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class TutorialGenerator(nn.Module):
    """The DCGAN of PyTorch's tutorial."""

    def __init__(self, ngf: int = 64, nz: int = 100) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride, padding in (
            (nz, 8 * ngf, 1, 0), (8 * ngf, 4 * ngf, 2, 1), (4 * ngf, 2 * ngf, 2, 1), (2 * ngf, ngf, 2, 1),
        ):  # fmt: skip
            layers += [nn.ConvTranspose2d(before, after, 4, stride, padding, bias=False), nn.BatchNorm2d(after)]
            layers += [nn.ReLU(True)]
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(ngf, 3, 4, 2, 1, bias=False), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z)  # (B, 3, 64, 64)


class TutorialDiscriminator(nn.Module):
    """Its discriminator, which returns probabilities (B, 1, 1, 1)."""

    def __init__(self, ndf: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, ndf, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]
        for wide in (ndf, 2 * ndf, 4 * ndf):
            layers += [nn.Conv2d(wide, 2 * wide, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * wide)]
            layers += [nn.LeakyReLU(0.2, True)]
        self.main = nn.Sequential(*layers, nn.Conv2d(8 * ndf, 1, 4, 1, 0, bias=False), nn.Sigmoid())

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images)


def tutorial_weights_init(module: nn.Module) -> None:
    """By the names of classes, as the tutorial's."""
    name = type(module).__name__
    if "Conv" in name:
        nn.init.normal_(module.weight.data, 0.0, 0.02)
    elif "BatchNorm" in name:
        nn.init.normal_(module.weight.data, 1.0, 0.02)
        nn.init.constant_(module.bias.data, 0)


class ResnetBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for activation in ([nn.ReLU(True)], []):
            layers += [nn.ReflectionPad2d(1), nn.Conv2d(dim, dim, 3), nn.InstanceNorm2d(dim), *activation]
        self.conv_block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class ResnetGenerator(nn.Module):
    """CycleGAN's, `resnet_9blocks` with instance norm."""

    def __init__(self, ngf: int, blocks: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(3, ngf, 7), nn.InstanceNorm2d(ngf), nn.ReLU(True)]
        for wide in (ngf, 2 * ngf):
            layers += [nn.Conv2d(wide, 2 * wide, 3, 2, 1), nn.InstanceNorm2d(2 * wide), nn.ReLU(True)]
        layers += [ResnetBlock(4 * ngf) for _ in range(blocks)]
        for wide in (4 * ngf, 2 * ngf):
            up = nn.ConvTranspose2d(wide, wide // 2, 3, 2, 1, output_padding=1)
            layers += [up, nn.InstanceNorm2d(wide // 2), nn.ReLU(True)]
        self.model = nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(ngf, 3, 7), nn.Tanh())

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


class NLayerDiscriminator(nn.Module):
    """The PatchGAN, three layers with instance norm; with `old_hook` as the many variants under spectral norm."""

    def __init__(self, ndf: int, old_hook: bool = False) -> None:
        super().__init__()
        conv = (lambda *sizes: nn.utils.spectral_norm(nn.Conv2d(*sizes))) if old_hook else nn.Conv2d
        layers: list[nn.Module] = [conv(3, ndf, 4, 2, 1), nn.LeakyReLU(0.2, True)]
        for before, after, stride in ((ndf, 2 * ndf, 2), (2 * ndf, 4 * ndf, 2), (4 * ndf, 8 * ndf, 1)):
            layers += [conv(before, after, 4, stride, 1), nn.InstanceNorm2d(after), nn.LeakyReLU(0.2, True)]
        self.model = nn.Sequential(*layers, conv(8 * ndf, 1, 4, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)  # (B, 1, H, W), one number for each patch


def define_G(
    input_nc: int, output_nc: int, ngf: int, netG: str, norm: str = "batch", *, gpu_ids: Sequence[int] = ()
) -> nn.Module:
    """CycleGAN's generator, by the call that makes it there; of its choices only this one."""
    assert (input_nc, output_nc, netG, norm) == (3, 3, "resnet_9blocks", "instance")
    return init_net(ResnetGenerator(ngf, 9), gpu_ids)


def define_D(input_nc: int, ndf: int, netD: str, *, norm: str = "batch", gpu_ids: Sequence[int] = ()) -> nn.Module:
    """Its PatchGAN."""
    assert (input_nc, netD, norm) == (3, "basic", "instance")
    return init_net(NLayerDiscriminator(ndf), gpu_ids)


def init_net(net: nn.Module, gpu_ids: Sequence[int]) -> nn.Module:
    """Wraps the network for its GPUs first, one GPU too, and then initializes it through the wrapper.

    Where there is no GPU, `DataParallel` only passes on.
    """
    if gpu_ids:
        net = nn.DataParallel(net, list(gpu_ids))
    return net.apply(init_func)


def init_func(module: nn.Module) -> None:
    if "Conv" in type(module).__name__ and hasattr(module, "weight"):
        nn.init.normal_(module.weight.data, 0.0, 0.02)
