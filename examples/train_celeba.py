"""Train a SAGAN on faces.

    python examples/train_celeba.py                                    # procedural faces, nothing to download
    python examples/train_celeba.py --data ~/img_align_celeba          # a folder of images, at any depth
    python examples/train_celeba.py --data digits --image-size 28 --steps 1500
    python examples/train_celeba.py --resume runs/faces/checkpoint.pt  # go on where that run stopped
    python examples/train_celeba.py --dry-run                          # a few steps, to see that everything works

Networks as in the 64-pixel PyTorch implementations, hinge loss (or `--loss wgan-gp`), Adam with betas (0, 0.9) and two
learning rates, and a moving average of the generator, which draws the samples. The folder `--out` receives sample
grids, attention overlays, `log.jsonl` and `checkpoint.pt`. A run that was stopped (Ctrl-C does) and resumed goes on as
if it had never stopped: on the CPU, to the last bit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn

# By default the threads of a CPU wait for one another by spinning, which makes a step many times slower as soon as
# another program wants one of the cores. They shall sleep instead. It has to be said before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from pictures import save_attention, save_grid
from safekeeping import ignore_interrupts, load, postponed_signals, save
from sources import Folder, Images, Shuffle, open_source
from torch_sagan import (
    SAGANDiscriminator,
    SAGANGenerator,
    SelfAttention2d,
    gradient_penalty,
    hinge_discriminator_loss,
    hinge_generator_loss,
    spectral_norm,
    wasserstein_discriminator_loss,
    wasserstein_generator_loss,
)

# ------------------------------------------------------------------------------------------------- configuration


def fail(message: object) -> NoReturn:
    """End with one line on stderr and a non-zero status."""
    raise SystemExit("train_celeba.py: " + " ".join(str(message).split()))


def option(default: Any, group: str, text: str, **more: Any) -> Any:
    """A setting: its default, the heading it stands under in --help, and its comment, which is its help."""
    return field(default=default, metadata={"group": group, "help": text, **more})


LOSSES = {
    "hinge": (hinge_discriminator_loss, hinge_generator_loss),
    "wgan-gp": (wasserstein_discriminator_loss, wasserstein_generator_loss),
}


@dataclass(frozen=True)
class Config:
    """All settings. The text of each is its comment here and its help on the command line."""

    data: str = option("faces", "data", "faces (procedural), digits (scikit-learn's), or a folder of images")
    image_size: int = option(64, "data", "width and height of the images, pixels: 4 to 7 doubled some times")
    crop: int = option(160, "data", "centre crop of a folder's images, pixels (160 for aligned CelebA, 0 for all)")
    workers: int = option(4, "data", "processes that decode a folder's images, at most one per core")

    z_dim: int = option(128, "networks", "length of the latent vector")
    base_channels: int = option(64, "networks", "channels of the largest feature map, doubled at each smaller one")
    g_attention: str = option("auto", "networks", "sizes of G's maps that get attention: 16, or 16,32, auto, none")
    d_attention: str = option("auto", "networks", "sizes of D's maps that get attention: 8, or 4,8, auto, none")

    loss: str = option("hinge", "training", "wgan-gp builds D without spectral norm", choices=list(LOSSES))
    steps: int = option(100_000, "training", "length of the run, generator steps")
    batch_size: int = option(64, "training", "images in a batch")
    d_steps: int = option(1, "training", "discriminator steps for each generator step")
    lr_g: float = option(1e-4, "training", "the generator's learning rate, per Adam step")
    lr_d: float = option(4e-4, "training", "the discriminator's learning rate, per Adam step")
    gp_weight: float = option(10.0, "training", "weight of the gradient penalty of wgan-gp")
    ema_decay: float = option(0.999, "training", "what the averaged generator keeps at each step, a fraction")
    seed: int = option(0, "training", "fixes weights, latent vectors, order and flips of the images")
    device: str = option("auto", "training", "cpu, cuda, cuda:1, mps …; auto takes a GPU if there is one")

    out: str = option("", "output", "folder for what the run makes (default: runs/ and the name of the data)")
    log_every: int = option(50, "output", "steps between two lines of log.jsonl")
    sample_every: int = option(1000, "output", "steps between two sample grids and attention overlays")
    save_every: int = option(1000, "output", "steps between two checkpoints")


# A checkpoint's weights fit only networks that were built with the same values of these.
ARCHITECTURE = ("image_size", "z_dim", "base_channels", "g_attention", "d_attention", "loss")


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What was given on the command line, and only that: the rest comes from Config or from a checkpoint."""
    parser = argparse.ArgumentParser(
        description="Train a SAGAN on faces, digits or your own images.", argument_default=argparse.SUPPRESS
    )
    groups = {name: parser.add_argument_group(name) for name in ("data", "networks", "training", "output")}
    kinds = typing.get_type_hints(Config)
    for setting in fields(Config):
        groups[setting.metadata["group"]].add_argument(
            "--" + setting.name.replace("_", "-"),
            type=kinds[setting.name],
            choices=setting.metadata.get("choices"),
            metavar=None if "choices" in setting.metadata else kinds[setting.name].__name__.upper(),
            help=setting.metadata["help"] + (f" (default: {setting.default})" if setting.default != "" else ""),
        )
    groups["output"].add_argument(
        "--resume", metavar="PATH", default=None, help="go on from this checkpoint, with its settings"
    )
    groups["output"].add_argument("--dry-run", action="store_true", default=False, help="three steps, then stop")
    return parser.parse_args(arguments)


def check(config: Config) -> None:
    for name in ("steps", "batch_size", "d_steps", "z_dim", "log_every", "sample_every", "save_every"):
        if getattr(config, name) < 1:
            fail(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    for name in ("workers", "crop", "lr_g", "lr_d", "seed"):
        if getattr(config, name) < 0:
            fail(f"--{name.replace('_', '-')} cannot be negative, got {getattr(config, name)}")
    if not 0 <= config.ema_decay <= 1:
        fail(f"--ema-decay must be between 0 and 1, got {config.ema_decay}")


def resolutions(text: str) -> list[int] | None:
    """Turn 16,32 into [16, 32], none into [], and auto into None, which leaves the choice to the network."""
    if text == "auto":
        return None
    return [] if text == "none" else [int(size) for size in text.split(",")]


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name}: {str(error).splitlines()[0]}")
    return device


# ---------------------------------------------------------------------------------------------------------- data


def open_loader(source: Images | Folder, config: Config, position: int, device: torch.device) -> DataLoader[Any]:
    """Batches (uint8 images, unreadable paths), from the image at `position` of the run's endless order on."""
    order = Shuffle(len(source), config.batch_size, seed=config.seed, flip=config.data != "digits", position=position)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return DataLoader(
        source,
        sampler=order,
        batch_size=None,  # the sampler's items are whole batches already
        num_workers=min(config.workers, cores) if isinstance(source, Folder) else 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # or the loader would draw from the generator whose state a checkpoint keeps
        worker_init_fn=ignore_interrupts,
    )


# ------------------------------------------------------------------------------------------------------ networks


class Run:
    """All that changes while training: what a checkpoint holds."""

    def __init__(self, config: Config, image_channels: int, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        self.config, self.device = config, device
        self.generator = SAGANGenerator(
            config.image_size,
            z_dim=config.z_dim,
            base_channels=config.base_channels,
            image_channels=image_channels,
            attention_resolutions=resolutions(config.g_attention),
        ).to(device)
        self.discriminator = SAGANDiscriminator(
            config.image_size,
            base_channels=config.base_channels,
            image_channels=image_channels,
            attention_resolutions=resolutions(config.d_attention),
            # A gradient penalty wants slopes of 1, the norm keeps them far below: one or the other.
            spectral_norm=None if config.loss == "wgan-gp" else spectral_norm,
        ).to(device)
        # Buffers (u and v, batch-norm statistics) are copied: averaged ones would not belong to any weights.
        self.average = AveragedModel(self.generator, use_buffers=False).eval()
        self.generator_optimizer = adam(self.generator, config.lr_g)
        self.discriminator_optimizer = adam(self.discriminator, config.lr_d)
        self.latents = torch.Generator(device).manual_seed(config.seed + 1)
        self.step = 0
        self.images = 0  # drawn from the data so far

    def sample_latents(self) -> Tensor:
        shape = (self.config.batch_size, self.config.z_dim)
        return torch.randn(shape, generator=self.latents, device=self.device)  # (B, z_dim)

    def gammas(self) -> dict[str, Tensor]:
        """How much each attention layer adds: its gamma, under the name of its network and place."""
        networks = {"G": self.generator, "D": self.discriminator}
        return {
            f"{network}.{path}": module.gamma.detach()
            for network, model in networks.items()
            for path, module in model.named_modules()
            if isinstance(module, SelfAttention2d)
        }

    def parts(self) -> dict[str, Any]:
        names = ("generator", "discriminator", "average", "generator_optimizer", "discriminator_optimizer")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        random = {"cpu": torch.get_rng_state(), "latents": self.latents.get_state(), "device": self.device.type}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        state = {name: part.state_dict() for name, part in self.parts().items()}
        return state | {"config": asdict(self.config), "random": random, "step": self.step, "images": self.images}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.generator_optimizer.param_groups[0]["lr"] = self.config.lr_g  # the command line's word is the last
        self.discriminator_optimizer.param_groups[0]["lr"] = self.config.lr_d
        self.step, self.images = state["step"], state["images"]
        torch.set_rng_state(state["random"]["cpu"])
        if self.device.type != state["random"]["device"]:
            return  # another kind of device has another kind of generator: the latent vectors start afresh
        self.latents.set_state(state["random"]["latents"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random"]["cuda"], self.device)


def adam(model: nn.Module, lr: float) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=lr, betas=(0.0, 0.9), fused=True)


# ---------------------------------------------------------------------------------------------------------- step


def discriminator_step(run: Run, real: Tensor, fake: Tensor) -> Tensor:
    """One step of D on real and generated images, each (B, C, S, S). Returns its loss."""
    fake = fake.detach()  # G does not learn here
    logits = run.discriminator(torch.cat([real, fake]))  # (2B,): one pass, so the weights are normalised once
    loss = LOSSES[run.config.loss][0](*logits.chunk(2))
    if run.config.loss == "wgan-gp":
        loss = loss + run.config.gp_weight * gradient_penalty(run.discriminator, real, fake)
    run.discriminator_optimizer.zero_grad()
    loss.backward()
    run.discriminator_optimizer.step()
    return loss.detach()


def generator_step(run: Run, fake: Tensor) -> Tensor:
    """One step of G on the images that D has just learnt from, and of its moving average. Returns G's loss.

    G has not changed since it made them, so there is no need to make others.
    """
    run.discriminator.requires_grad_(False)  # gradients flow through D, none to its weights
    loss: Tensor = LOSSES[run.config.loss][1](run.discriminator(fake))
    run.generator_optimizer.zero_grad()
    loss.backward()
    run.generator_optimizer.step()
    run.discriminator.requires_grad_(True)
    # At first the average forgets quickly, so that it does not remember the untrained weights for thousands of steps.
    decay = min(run.config.ema_decay, (1 + run.step) / (10 + run.step))
    run.average.multi_avg_fn = get_ema_multi_avg_fn(decay)
    run.average.update_parameters(run.generator)
    return loss.detach()


# ------------------------------------------------------------------------------------------------ log and saving

# Where the overlay's columns look from, (row, column) as fractions: an eye, the mouth, the hair, the background.
PLACES = ((0.52, 0.37), (0.73, 0.5), (0.15, 0.5), (0.06, 0.06))


@torch.no_grad()
def draw(run: Run, out: Path) -> dict[str, Path]:
    """Write what the averaged generator makes of fixed latent vectors, and where its last attention looks."""
    fixed = torch.Generator().manual_seed(run.config.seed + 2)  # its own, so that drawing changes nothing
    z = torch.randn(64, run.config.z_dim, generator=fixed).to(run.device)  # (64, z_dim)
    made = {"samples": out / f"samples-{run.step:06d}.png"}
    save_grid(made["samples"], torch.cat([run.average(part) for part in z.split(16)]), columns=8)
    images, maps = run.average(z[:6], return_attention=True)  # (6, C, S, S), [(6, N, M), …]
    if maps:
        made["attention"] = out / f"attention-{run.step:06d}.png"
        save_attention(made["attention"], images, maps[-1], PLACES)
    return made


class Log:
    """Losses, gammas and speed, to `log.jsonl` and to the progress bar. Numbers leave the device only when written."""

    def __init__(self, run: Run, path: Path) -> None:
        self.run, self.path = run, path
        # Lines of steps that the checkpoint does not know, the last one perhaps cut off, will be written again.
        lines = path.read_text().splitlines() if run.step and path.exists() else []
        known = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= run.step]
        path.write_text("".join(line + "\n" for line in known))
        size = run.config.batch_size
        self.bar = tqdm(
            total=run.config.steps * size, initial=run.step * size, unit="img", unit_scale=True, dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10,
        )  # fmt: skip
        self.sums = torch.zeros(2, device=run.device)
        self.count, self.time = 0, time.monotonic()

    def add(self, discriminator_loss: Tensor, generator_loss: Tensor) -> None:
        self.sums += torch.stack([discriminator_loss, generator_loss])
        self.count += 1
        self.bar.update(self.run.config.batch_size)

    def write(self) -> None:
        """Write the means since the last line. A loss that is not a number ends the run here, before a save."""
        gammas = self.run.gammas()
        values = torch.cat([self.sums / self.count, *gammas.values()]).tolist()
        weights = [*self.run.generator.parameters(), *self.run.discriminator.parameters()]
        sound = all(map(math.isfinite, values)) and bool(torch.stack([w.isfinite().all() for w in weights]).all())
        rate = self.count * self.run.config.batch_size / (time.monotonic() - self.time)
        if not sound:
            fail(
                f"step {self.run.step}: the training is no longer finite (losses of D {values[0]:g}, of G "
                f"{values[1]:g}); the last checkpoint is from before. Lower learning rates may help"
            )
        named = dict(zip(gammas, values[2:], strict=True))
        line = {"step": self.run.step, "images": self.run.images, "loss_d": values[0], "loss_g": values[1]}
        with open(self.path, "a") as file:
            file.write(json.dumps(line | {"gamma": named, "images_per_second": round(rate, 1)}) + "\n")
        shown = " ".join(f"{name.replace('attention.', '')} {value:+.2f}" for name, value in named.items())
        self.bar.set_postfix_str(f"D {values[0]:.2f} G {values[1]:.2f} gamma {shown}", refresh=False)
        self.sums.zero_()
        self.count, self.time = 0, time.monotonic()


# ---------------------------------------------------------------------------------------------------------- main


def train(run: Run, source: Images | Folder, out: Path) -> int:
    """Train until the last step or a signal. Returns that signal's number, or 0."""
    config, checkpoint = run.config, out / "checkpoint.pt"
    batches = iter(open_loader(source, config, run.images, run.device))
    named: set[str] = set()
    log = Log(run, out / "log.jsonl")
    with postponed_signals() as signals, log.bar:
        last = False
        while not last:
            for _ in range(config.d_steps):
                images, unreadable = next(batches)
                for path in sorted(set(unreadable) - named):
                    tqdm.write(f"unreadable, left out: {path}", file=sys.stderr)
                named.update(unreadable)
                real = images.to(run.device, non_blocking=True).float() / 127.5 - 1  # (B, C, S, S) in [-1, 1]
                fake = run.generator(run.sample_latents())  # (B, C, S, S)
                discriminator_loss = discriminator_step(run, real, fake)
                run.images += len(images)
            generator_loss = generator_step(run, fake)
            run.step += 1
            log.add(discriminator_loss, generator_loss)

            last = run.step == config.steps or bool(signals)
            if last or run.step % config.log_every == 0 or run.step % config.save_every == 0:
                log.write()
            if last or run.step % config.save_every == 0:
                save(run.state_dict(), checkpoint)
            if not last and run.step % config.sample_every == 0:
                draw(run, out)
                log.time = time.monotonic()  # the pictures' time is not the training's
    return signals[0] if run.step < config.steps else 0


def main(arguments: Sequence[str] | None = None) -> int:
    given = vars(read_arguments(arguments))
    resume, dry_run = given.pop("resume"), given.pop("dry_run")
    state = load(Path(resume)) if resume else None
    stored = Config(**state["config"]) if state else Config()
    config = replace(stored, **given)
    config = replace(config, out=config.out or f"runs/{Path(config.data).name}")
    first = state["step"] if state else 0
    if dry_run:
        config = replace(config, steps=first + 3, log_every=1, sample_every=2, save_every=2)
    check(config)
    for name in ARCHITECTURE if state else ():
        if getattr(config, name) != getattr(stored, name):
            flag = "--" + name.replace("_", "-")
            fail(f"{flag} {getattr(config, name)}: the checkpoint was made with {getattr(stored, name)}")
    if first >= config.steps:
        fail(f"--steps {config.steps}: the checkpoint is at step {first} already")

    device = pick_device(config.device)
    out = Path(config.out)
    try:
        run = Run(config, image_channels=1 if config.data == "digits" else 3, device=device)
        source = open_source(config.data, size=config.image_size, crop=config.crop)
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        fail(error)
    if isinstance(source, Folder):
        for path in source.others:
            print(f"not an image, left out: {path}", file=sys.stderr)
    if state:
        try:
            run.load_state_dict(state)
        except (RuntimeError, KeyError):
            fail(f"--resume {resume}: its weights do not fit the networks for --data {config.data}")
    elif (out / "checkpoint.pt").exists():
        kept = (out / "checkpoint.pt").replace(out / "checkpoint-before.pt")
        print(f"kept      an earlier run's checkpoint as {kept}")

    weights = {name: sum(p.numel() for p in getattr(run, name).parameters()) for name in ("generator", "discriminator")}
    print(f"data      {config.data}: {len(source)} images at {config.image_size} px")
    print(f"networks  G {weights['generator']:,} and D {weights['discriminator']:,} weights, on {device}")
    print(f"loss      {config.loss}" + (", D without spectral norm" if config.loss == "wgan-gp" else ""))
    print(f"training  steps {first} to {config.steps}, batches of {config.batch_size}", flush=True)
    stopped = train(run, source, out)
    made = draw(run, out) | {"checkpoint": out / "checkpoint.pt", "log": out / "log.jsonl"}
    if stopped:
        print(f"stopped at step {run.step}; go on with --resume {made['checkpoint']}")
    for what, file in made.items():
        print(f"{what:11}{file}")
    return 128 + stopped if stopped else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
