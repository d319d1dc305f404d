"""The state of a training run, which a checkpoint stores: networks, optimizers, counts.

Random numbers are not part of it: each step starts them anew from the run's seed and its own number.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from torch_sagan import SAGANDiscriminator, SAGANGenerator, SelfAttention2d
from training.architectures import build_discriminator, build_generator
from training.augmentation import augmentation
from training.average import update_average
from training.cuda_graph import GraphedStep
from training.data.dataset import Batch
from training.flags import Config
from training.objectives import objective
from training.output.logging import Means
from training.runs.checkpointing import CONTENTS, versions
from training.runs.distributed import SINGLE_PROCESS, Ranks
from training.script import resolutions, widths
from training.step import GAN, Piece, training_step


class TrainingState:
    """A run at one of its steps. `classes` are the names of its classes, each with its number of images."""

    def __init__(
        self,
        config: Config,
        *,
        image_channels: int = 3,
        classes: dict[str, int] | None = None,
        device: torch.device,
        ranks: Ranks = SINGLE_PROCESS,
    ) -> None:
        torch.manual_seed(config.seed)  # the same weights on every process
        self.config, self.device, self.ranks, self.classes = config, device, ranks, classes or {}
        self.versions = versions()
        # Compiled, a convolution's backward on CUDA returns a weight of one output in another layout than promised.
        automatic = device.type == "cuda" and not config.compile
        channels_last = automatic if config.channels_last == "auto" else config.channels_last == "yes"
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        generator, discriminator = build_networks(config, image_channels, len(self.classes) or None)
        for network in (generator, discriminator):
            network.to(device).to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self.average: SAGANGenerator = copy.deepcopy(generator).eval().requires_grad_(False)
        self.generator = ranks.synchronized_batch_norm(generator) if config.sync_batch_norm else generator
        self.discriminator = discriminator
        if config.compile:
            self.generator.compile(dynamic=False)
            if not config.has_penalty:  # a compiled graph has no double backward
                self.discriminator.compile(dynamic=False)
        self.generator_optimizer = adam(self.generator, config.lr_g, config)
        self.discriminator_optimizer = adam(self.discriminator, config.lr_d, config)
        self.generator_scheduler = LambdaLR(self.generator_optimizer, self.lr_factor)
        self.discriminator_scheduler = LambdaLR(self.discriminator_optimizer, self.lr_factor)
        # The networks that the step calls: the same ones, with gradients averaged over processes.
        self.gan = GAN(
            ranks.parallel(self.generator),
            ranks.parallel(self.discriminator),
            self.generator_optimizer,
            self.discriminator_optimizer,
            objective(config.loss, config.penalty, augmentation(config.augment, config.noise)),
            self.autocast,
        )
        self.latents = torch.Generator(device)
        self.step = 0
        self.data: dict[str, Any] = {}  # what the images of this run are recognized by
        self.images = 0  # read from the data so far, by all processes together
        self.best: dict[str, float] = {}  # the lowest score of an evaluation so far, by the score's name
        self.scores: dict[str, float] = {}  # of the last evaluation
        self.means = Means({"G": self.generator, "D": self.discriminator}, ranks)
        self.take_step = self.build_step()

    def build_step(self) -> Callable[[Iterator[list[Piece]]], Tensor]:
        """The training step of these networks and optimizers as they are now."""
        if self.config.cuda_graph:
            return GraphedStep(self.gan, d_steps=self.config.d_steps)
        return partial(training_step, self.gan, d_steps=self.config.d_steps)

    def draw(self, batches: Iterator[list[Piece]]) -> list[list[Piece]]:
        """The batches of the next step. Nothing changes before all are there, so a wait for images can be given up."""
        self.latents.manual_seed(random_seed(0, self.config.seed, self.step))  # the same numbers on every process
        return [next(batches) for _ in range(self.config.d_steps)]

    def advance(self, batches: Iterator[list[Piece]]) -> Tensor:
        """One step of G and its steps of D. Returns the losses of D and G (2,), on the device."""
        drawn = self.draw(batches)
        # Other numbers on each process, for penalties, augmentation and noise.
        torch.manual_seed(random_seed(1 + self.ranks.rank, self.config.seed, self.step))
        losses = self.take_step(iter(drawn))
        self.images += len(drawn) * self.config.batch_size
        self.ranks.average_statistics(self.generator)
        steps = self.step - self.config.ema_start
        update_average(self.average, self.generator, decay=self.config.ema_decay, steps=steps)
        self.generator_scheduler.step()
        self.discriminator_scheduler.step()
        self.step += 1
        return losses

    def batches(self, data: Iterator[Batch]) -> Iterator[list[Piece]]:
        """This process's batches on the device, in pieces. Each item of `data` has the images of one piece."""
        while True:
            pieces = []
            for z in self.sample_latents():
                images, labels = next(data)
                labels = None if labels is None else labels.to(self.device, non_blocking=True)
                pieces.append(Piece(self.to_device(images), z, labels))
            yield pieces

    def lr_factor(self, step: int) -> float:
        """The factor of the learning rates at this step."""
        config = self.config
        if config.lr_decay == "none" or step < config.decay_from:
            return 1.0
        return max(0.0, (config.steps - step) / max(1, config.steps - config.decay_from))

    def sample_latents(self) -> tuple[Tensor, ...]:
        """This process's latent vectors, in pieces. Each process draws those of all, so that the number of processes
        does not change them."""
        shape = (self.config.batch_size, self.config.z_dim)
        z = torch.randn(shape, generator=self.latents, device=self.device)  # (B, z_dim)
        return self.ranks.shard(z).chunk(self.config.grad_accum_steps)

    def to_device(self, images: Tensor) -> Tensor:
        """Move uint8 images (B, C, S, S), pinned if the device is a GPU, to the device, as numbers in [-1, 1]."""
        images = images.to(self.device, non_blocking=True)
        return images.to(torch.float32, memory_format=self.memory_format) / 127.5 - 1

    def autocast(self) -> torch.autocast:
        """The precision of forward passes."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def numbers(self) -> dict[str, Any]:
        """Learning rates, and the gamma of each attention layer, under its network and path."""
        networks = {"G": self.generator, "D": self.discriminator}
        gammas = {
            f"{network}.{path}": module.gamma.item()
            for network, model in networks.items()
            for path, module in model.named_modules()
            if isinstance(module, SelfAttention2d)
        }
        (lr_g,), (lr_d,) = self.generator_scheduler.get_last_lr(), self.discriminator_scheduler.get_last_lr()
        return {"lr_g": lr_g, "lr_d": lr_d, "gamma": gammas}

    @property
    def losses(self) -> Tensor:
        """The losses (n, 2) of D and G that no line of the log has yet."""
        return self.means.losses

    @losses.setter
    def losses(self, losses: Tensor) -> None:
        self.means.losses = losses.view(-1, 2)

    def state_dict(self) -> dict[str, Any]:
        """A checkpoint: state dicts, tensors and plain values."""
        parts = {name: getattr(self, name) for name in CONTENTS} | {"config": asdict(self.config), "data": self.data}
        return {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint, on any device and any number of processes."""
        for name in CONTENTS:
            part = getattr(self, name)
            if isinstance(part, Optimizer):
                load_moments(part, state[name])
            elif hasattr(part, "load_state_dict"):
                part.load_state_dict(state[name])
            elif name not in ("config", "classes", "versions"):  # which are those of now
                setattr(self, name, state[name])
        for network, lr in (("generator", self.config.lr_g), ("discriminator", self.config.lr_d)):
            # Rates and length of the run are those of the command line, not of the checkpoint.
            getattr(self, f"{network}_scheduler").base_lrs = [lr]
            (group,) = getattr(self, f"{network}_optimizer").param_groups
            group["lr"] = lr * self.lr_factor(self.step)
        self.take_step = self.build_step()  # a graph would have the moments from before


def random_seed(*key: int) -> int:
    """A seed for these numbers; keys that differ by one give seeds that have nothing in common."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def build_networks(
    config: Config, image_channels: int, num_classes: int | None
) -> tuple[SAGANGenerator, SAGANDiscriminator]:
    """G and D of a run, untrained, on the CPU."""
    shared: dict[str, Any] = {
        "image_channels": image_channels,
        "num_classes": num_classes,
        "eps": config.sigma_eps,
    }
    halvings = config.d_downsampling_blocks
    generator = build_generator(
        config.architecture,
        config.image_size,
        z_dim=config.z_dim,
        conditioning=config.conditioning if num_classes else "batch_norm",
        upsampling=None if config.upsampling == "auto" else config.upsampling,
        attention_resolutions=resolutions("g_attention", config.g_attention),
        normalize_classes=config.normalize_classes,
        norm_eps=config.norm_eps,
        **widths("g_widths", config.g_widths, config.base_channels),
        **shared,
    )
    discriminator = build_discriminator(
        config.architecture,
        config.image_size,
        attention_resolutions=resolutions("d_attention", config.d_attention),
        # WGAN-GP's penalty pulls gradients to norm 1, spectral norm keeps them far below: use only one of the two.
        norm_of=None if config.loss == "wgan-gp" else config.d_norm,
        **widths("d_widths", config.d_widths, config.base_channels),
        downsampling_blocks=None if halvings == "auto" else int(halvings),
        **shared,
    )
    return generator, discriminator


def adam(model: nn.Module, lr: float, config: Config) -> torch.optim.Adam:
    """The optimizer of one network."""
    return torch.optim.Adam(model.parameters(), lr=lr, betas=(config.beta1, config.beta2), fused=True)


def load_moments(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Continue with a checkpoint's moments and counts of steps, but with this optimizer's settings.

    `load_state_dict` keeps the layout that the moments had when they were saved. The fused update goes through the
    memory of weight and moments in parallel, so each needs the layout of its weight, or elements would be mixed up.
    """
    optimizer.load_state_dict(state | {"param_groups": optimizer.state_dict()["param_groups"]})
    for weight, values in optimizer.state.items():
        for name, value in values.items():
            if name != "step":
                values[name] = torch.empty_like(weight, requires_grad=False).copy_(value)
