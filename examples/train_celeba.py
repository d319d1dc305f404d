"""Train a SAGAN on faces.

    python examples/train_celeba.py                                    # procedural faces, nothing to download
    python examples/train_celeba.py --data ~/img_align_celeba.zip      # or a folder of images, at any depth
    python examples/train_celeba.py --data digits --image-size 28 --steps 1500
    python examples/train_celeba.py --resume auto                      # go on where that run stopped, or begin
    python examples/train_celeba.py --dry-run                          # a few steps, to see that everything works
    torchrun --nproc-per-node 8 examples/train_celeba.py --data ~/img_align_celeba.zip --batch-size 512 --precision bf16

Networks as in the 64-pixel PyTorch implementations, hinge loss (or `--loss wgan-gp`), Adam with betas (0, 0.9) and two
learning rates, and a moving average of the generator, which draws the samples. The folder `--out` receives sample
grids, attention overlays, `log.jsonl`, TensorBoard's files and checkpoints. A run that was stopped (by Ctrl-C, SIGTERM,
or the power) and resumed goes on as if it had never stopped: on the CPU, to the last bit.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from signal import SIGTERM
from typing import Any

# By default the threads of a CPU wait for one another by spinning, which makes a step many times slower as soon as
# another program wants one of the cores. They shall sleep instead. It has to be said before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from averages import recalibrated
from command_line import fail, option, read_arguments, script, settle, sizes
from distributed import ALONE, Ranks, Shares, averaging_only, pick_device, processes
from image_cache import usable_cores
from judging import Judge, real_images
from memory import out_of_memory
from pictures import save_attention, save_grid
from run_lock import RunLock
from run_log import Means, RunLog, one_report
from safekeeping import load, newest, postponed_signals, save, save_and_rotate, set_aside, versions
from sliced_wasserstein import COARSEST
from sources import Folder, Images, Shuffle, crop_setting, open_source
from tensor_files import refuse_unsafe_torch
from torch_sagan import (
    SAGANDiscriminator,
    SAGANGenerator,
    SelfAttention2d,
    gradient_penalty,
    hinge_discriminator_loss,
    hinge_generator_loss,
    spectral_norm,
    spectral_norms,
    wasserstein_discriminator_loss,
    wasserstein_generator_loss,
)
from workers import decoded

# ------------------------------------------------------------------------------------------------- configuration


LOSSES = {
    "hinge": (hinge_discriminator_loss, hinge_generator_loss),
    "wgan-gp": (wasserstein_discriminator_loss, wasserstein_generator_loss),
}


@dataclass(frozen=True)
class Config:
    """All settings. The text of each is its comment here and its help on the command line."""

    data: str = option("faces", "data", "faces (procedural), digits (scikit-learn's), a folder or a zip of images")
    image_size: int = option(64, "data", "width and height, pixels: 4 to 7 doubled some times", fixed=True)
    crop: str = option("auto", "data", "centre crop, pixels, or 0: the largest square; auto: 0, or CelebA's usual 160")
    cache: bool = option(True, "data", "decode a folder's images once, into a file, instead of at every epoch")
    cache_dir: str = option("", "data", "folder for decoded images (default: cache/ beside the folder --out)")
    workers: int = option(4, "data", "processes that decode with --no-cache, at most one per core", least=0)

    z_dim: int = option(128, "networks", "length of the latent vector", least=1)
    base_channels: int = option(64, "networks", "channels of the largest feature map, doubled at each smaller one")
    g_attention: str = option("auto", "networks", "sizes of G's maps that get attention: 16, or 16,32, auto, none")
    d_attention: str = option("auto", "networks", "sizes of D's maps that get attention: 8, or 4,8, auto, none")

    loss: str = option("hinge", "training", "wgan-gp builds D without spectral norm", choices=tuple(LOSSES), fixed=True)
    steps: int = option(100_000, "training", "length of the run, steps of G", least=1)
    batch_size: int = option(64, "training", "images in a step, all processes together", least=1)
    d_steps: int = option(1, "training", "steps of D for each step of G", least=1)
    lr_g: float = option(1e-4, "training", "the generator's learning rate, per Adam step", least=0)
    lr_d: float = option(4e-4, "training", "the discriminator's learning rate, per Adam step", least=0)
    lr_decay: str = option("none", "training", "linear: both rates fall to 0", choices=("none", "linear"))
    decay_from: int = option(0, "training", "step from which --lr-decay linear falls, to 0 at --steps", least=0)
    gp_weight: float = option(10.0, "training", "weight of the gradient penalty of wgan-gp", least=0)
    ema_decay: float = option(0.999, "training", "what the averaged G keeps at each step, a fraction", least=0)
    seed: int = option(0, "training", "fixes weights, latent vectors, order and flips of the images", least=0)

    device: str = option("auto", "speed", "cpu, cuda, cuda:1, mps …; auto takes a GPU if there is one")
    precision: str = option("float32", "speed", "bf16: autocast; weights stay float32", choices=("float32", "bf16"))
    compile: bool = option(False, "speed", "compile G and D with torch.compile (with wgan-gp, G alone)")
    channels_last: str = option("auto", "speed", "layout of feature maps; auto: on CUDA", choices=("auto", "yes", "no"))
    accumulate: int = option(1, "speed", "passes that a step's images are divided among, to save memory", least=1)

    out: str = option("", "output", "folder for what the run makes (default: runs/ and the name of the data)")
    log_every: int = option(50, "output", "steps between two lines of log.jsonl", least=1)
    sample_every: int = option(1000, "output", "steps between two sample grids and attention overlays", least=1)
    save_every: int = option(1000, "output", "steps between two checkpoints", least=1)
    keep_last: int = option(3, "output", "checkpoints to keep, the newest", least=1)
    keep_every: int = option(20_000, "output", "steps between two checkpoints kept for good, 0 for none", least=0)
    tensorboard: bool = option(True, "output", "also write event files for TensorBoard")

    judge_every: int = option(5000, "judging", "steps between two judgements of the averaged G, 0 for none", least=0)
    judge_samples: int = option(2000, "judging", "images of each kind (published FIDs take 50000)", least=2)
    inception: str = option("", "judging", "Inception's weights, for FID and KID (default: where torch.hub has them)")

    def __post_init__(self) -> None:
        object.__setattr__(self, "crop", str(self.crop))  # a number in checkpoints from before there was auto


def check(config: Config, ranks: Ranks) -> None:
    """What concerns one setting alone is checked beside it."""
    if not config.data:
        fail("--data is empty: expected faces, digits, a folder or a zip archive")
    if Path(config.out).exists() and not Path(config.out).is_dir():
        fail(f"--out {config.out}: there is a file of this name, a folder is needed")
    crop_setting(config.crop)
    if config.seed >= 2**62:
        fail(f"--seed must be below 2^62, got {config.seed}")
    if config.ema_decay > 1:
        fail(f"--ema-decay must be between 0 and 1, got {config.ema_decay}")
    if config.loss == "hinge" and config.gp_weight != Config.gp_weight:
        fail(f"--gp-weight {config.gp_weight}: only --loss wgan-gp has a gradient penalty")
    if config.lr_decay == "none" and config.decay_from:
        fail(f"--decay-from {config.decay_from}: nothing decays without --lr-decay linear")
    if config.lr_decay == "linear" and config.decay_from >= config.steps:
        fail(f"--decay-from {config.decay_from}: the run ends at step {config.steps}, before that")
    if config.batch_size % (ranks.world * config.accumulate):
        shares = f"{ranks.world} × {config.accumulate}"
        fail(f"--batch-size {config.batch_size} cannot be divided evenly (processes × --accumulate: {shares})")


def default_out(data: str) -> str:
    name = Path(os.path.abspath(data)).name.removesuffix(".zip")  # of . and .. too; links keep their names
    return f"runs/{name or 'images'}"


# ---------------------------------------------------------------------------------------------------------- data


def read_images(
    source: Images | Folder, config: Config, position: int, device: torch.device, ranks: Ranks
) -> Iterator[tuple[Tensor, dict[str, str]]]:
    """Pieces (uint8 images, unreadable paths) of batches, from the image at `position` of the run's endless order on.

    The order is that of all processes together, so a run may go on with more of them, or with fewer.
    """
    order = Shuffle(len(source), config.batch_size, seed=config.seed, flip=config.data != "digits", position=position)
    # From memory or the cache, a batch is one copy: to hand it over from a worker takes four times as long.
    workers = min(config.workers, usable_cores()) if isinstance(source, Folder) else 0
    return decoded(source, Shares(order, ranks, config.accumulate), workers=workers, pin_memory=device.type == "cuda")


def save_reals(source: Images | Folder, config: Config, path: Path) -> None:
    """A grid of the run's first images as the discriminator is shown them: cropped, resized, mirrored."""
    order = Shuffle(len(source), min(64, len(source)), seed=config.seed, flip=config.data != "digits")
    images, _ = source[next(iter(order))]  # (64, C, S, S); what cannot be read is named when the training draws it
    save_grid(path, images / 127.5 - 1, columns=8)


# ------------------------------------------------------------------------------------------------------ networks


def build_generator(config: Config, image_channels: int) -> SAGANGenerator:
    return SAGANGenerator(
        config.image_size,
        z_dim=config.z_dim,
        base_channels=config.base_channels,
        image_channels=image_channels,
        attention_resolutions=sizes("g_attention", config.g_attention),
    )


def build_discriminator(config: Config, image_channels: int) -> SAGANDiscriminator:
    return SAGANDiscriminator(
        config.image_size,
        base_channels=config.base_channels,
        image_channels=image_channels,
        attention_resolutions=sizes("d_attention", config.d_attention),
        # A gradient penalty wants slopes of 1, the norm keeps them far below: one or the other.
        spectral_norm=None if config.loss == "wgan-gp" else spectral_norm,
    )


class Run:
    """All that changes while training: what a checkpoint holds."""

    def __init__(self, config: Config, image_channels: int, device: torch.device, ranks: Ranks = ALONE) -> None:
        torch.manual_seed(config.seed)  # the same weights on every process
        self.config, self.device, self.ranks = config, device, ranks
        channels_last = device.type == "cuda" if config.channels_last == "auto" else config.channels_last == "yes"
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        generator = build_generator(config, image_channels).to(device)
        discriminator = build_discriminator(config, image_channels).to(device)
        for network in (generator, discriminator):
            network.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self.average = copy.deepcopy(generator).eval().requires_grad_(False)
        self.generator, self.discriminator = ranks.synchronized_batch_norm(generator), discriminator
        if config.compile:
            self.generator.compile(dynamic=False)
            if config.loss != "wgan-gp":  # a compiled graph has no double backward, which the penalty needs
                self.discriminator.compile(dynamic=False)
        # What the training calls: the same networks, with gradients averaged over processes.
        self.parallel_generator = ranks.parallel(self.generator)
        self.parallel_discriminator = ranks.parallel(self.discriminator)
        self.generator_optimizer = adam(self.generator, config.lr_g)
        self.discriminator_optimizer = adam(self.discriminator, config.lr_d)
        self.generator_scheduler = LambdaLR(self.generator_optimizer, lambda step: self.decay(step))
        self.discriminator_scheduler = LambdaLR(self.discriminator_optimizer, lambda step: self.decay(step))
        self.latents = torch.Generator(device).manual_seed(config.seed + 1)  # the same numbers on every process
        torch.manual_seed(config.seed + 3 + ranks.rank)  # others on each, for the gradient penalty
        self.step = 0
        self.images = 0  # drawn from the data so far, by all processes
        self.best: dict[str, float] = {}  # the lowest score of a judgement so far, by the score's name
        self.means = Means({"G": self.generator, "D": self.discriminator}, ranks)

    def decay(self, step: int) -> float:
        """What the learning rates are multiplied with."""
        config = self.config
        if config.lr_decay == "none" or step < config.decay_from:
            return 1.0
        return max(0.0, (config.steps - step) / max(1, config.steps - config.decay_from))

    def sample_latents(self) -> tuple[Tensor, ...]:
        """This process's latent vectors, in pieces. All draw those of all, so their number does not matter."""
        shape = (self.config.batch_size, self.config.z_dim)
        z = torch.randn(shape, generator=self.latents, device=self.device)  # (B, z_dim)
        return self.ranks.share(z).chunk(self.config.accumulate)

    def to_device(self, images: Tensor) -> Tensor:
        """Uint8 (B, C, S, S), pinned where the device is a GPU, to numbers in [-1, 1] there."""
        images = images.to(self.device, non_blocking=True)
        return images.to(torch.float32, memory_format=self.memory_format) / 127.5 - 1

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def numbers(self) -> dict[str, Any]:
        """Learning rates, and how much each attention layer adds: its gamma, under its network and place."""
        networks = {"G": self.generator, "D": self.discriminator}
        gammas = {
            f"{network}.{path}": module.gamma.item()
            for network, model in networks.items()
            for path, module in model.named_modules()
            if isinstance(module, SelfAttention2d)
        }
        (lr_g,), (lr_d,) = self.generator_scheduler.get_last_lr(), self.discriminator_scheduler.get_last_lr()
        return {"lr_g": lr_g, "lr_d": lr_d, "gamma": gammas}

    def parts(self) -> dict[str, Any]:
        networks = ("generator", "discriminator")
        names = [f"{network}{part}" for part in ("", "_optimizer", "_scheduler") for network in networks]
        return {name: getattr(self, name) for name in [*names, "average"]}

    def state_dict(self) -> dict[str, Any]:
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        return {name: part.state_dict() for name, part in self.parts().items()} | {
            "config": asdict(self.config),
            "random": {
                "device": self.device.type,
                "latents": self.latents.get_state(),
                "ranks": self.ranks.gather(random),
            },
            "versions": versions(),
            "step": self.step,
            "images": self.images,
            "best": self.best,
            "losses": self.means.losses,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        for network, lr in (("generator", self.config.lr_g), ("discriminator", self.config.lr_d)):
            # The command line's word is the last: its rates, its length of the run.
            getattr(self, f"{network}_scheduler").base_lrs = [lr]
            getattr(self, f"{network}_optimizer").param_groups[0]["lr"] = lr * self.decay(state["step"])
        self.step, self.images, self.best = state["step"], state["images"], state["best"]
        self.means.losses = state["losses"].view(-1, 2)
        random = state["random"]
        if self.ranks.rank < len(random["ranks"]):
            torch.set_rng_state(random["ranks"][self.ranks.rank]["cpu"])
        else:  # the checkpoint was made by fewer processes: this one's numbers start here
            torch.manual_seed(self.config.seed + 3 + self.ranks.rank + self.step)
        if self.device.type != random["device"]:
            self.latents.manual_seed(self.config.seed + 1 + self.step)  # another kind of device, another kind of state
            return
        self.latents.set_state(random["latents"])
        if self.device.type == "cuda" and self.ranks.rank < len(random["ranks"]):
            torch.cuda.set_rng_state(random["ranks"][self.ranks.rank]["cuda"], self.device)


def adam(model: nn.Module, lr: float) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=lr, betas=(0.0, 0.9), fused=True)


# ---------------------------------------------------------------------------------------------------------- step
#
# A process's images pass through the networks in `--accumulate` pieces, whose gradients add up to the mean over the
# batch. Each piece is a pass of its own: batch norm takes its statistics from it, and spectral norm iterates once.


def training_step(run: Run, reals: Iterator[Tensor]) -> Tensor:
    """The steps of D and one of G. Returns their losses (2,), on the device: nothing here waits for it."""
    config = run.config
    for turn in range(config.d_steps):
        z = run.sample_latents()
        # G has not changed when its own step comes, so it can learn from the images that D has just learnt from. In
        # pieces it makes them again, or the graphs of all of them would be held at once.
        once = config.accumulate == 1 and turn == config.d_steps - 1
        fakes = list(generate(run, z, learn=True)) if once else generate(run, z, learn=False)
        discriminator_loss = discriminator_step(run, itertools.islice(reals, config.accumulate), fakes)
        run.images += config.batch_size
    generator_loss = generator_step(run, fakes if once else generate(run, z, learn=True))
    run.generator_scheduler.step()
    run.discriminator_scheduler.step()
    run.step += 1
    return torch.stack([discriminator_loss, generator_loss])


def generate(run: Run, z: Sequence[Tensor], *, learn: bool) -> Iterator[Tensor]:
    """G's images (B, C, S, S) of each piece of latent vectors, with a graph where G shall learn."""
    for i, piece in enumerate(z):
        with torch.set_grad_enabled(learn), averaging_only(run.parallel_generator, i == len(z) - 1), run.autocast():
            fake: Tensor = run.parallel_generator(piece)
        yield fake


def discriminator_step(run: Run, reals: Iterable[Tensor], fakes: Iterable[Tensor]) -> Tensor:
    """One step of D on pieces of real and of generated images, each (B, C, S, S). Returns its loss."""
    config, D = run.config, run.parallel_discriminator
    run.discriminator_optimizer.zero_grad()
    losses = []
    for i, (real, fake) in enumerate(zip(reals, fakes, strict=True), start=1):
        fake = fake.detach()  # G does not learn here
        with averaging_only(D, i == config.accumulate):
            with run.autocast():
                logits = D(torch.cat([real, fake]))  # (2B,): one pass, so the weights are normalised once
            loss = LOSSES[config.loss][0](*logits.float().chunk(2))
            if config.loss == "wgan-gp":  # in float32: the gradient of a gradient has no digits to lose
                loss = loss + config.gp_weight * gradient_penalty(run.discriminator, real, fake.float())
            loss = loss / config.accumulate
            loss.backward()
        losses.append(loss.detach())
    run.discriminator_optimizer.step()
    return torch.stack(losses).sum()


def generator_step(run: Run, fakes: Iterable[Tensor]) -> Tensor:
    """One step of G on pieces of its images, and of its moving average. Returns G's loss."""
    run.discriminator.requires_grad_(False)  # gradients flow through D, none to its weights
    run.generator_optimizer.zero_grad()
    losses = []
    for fake in fakes:
        with run.autocast():
            logits = run.discriminator(fake)  # (B,)
        loss = LOSSES[run.config.loss][1](logits.float()) / run.config.accumulate
        loss.backward()
        losses.append(loss.detach())
    run.generator_optimizer.step()
    run.discriminator.requires_grad_(True)
    run.ranks.average_statistics(run.generator)
    update_average(run)
    return torch.stack(losses).sum()


@torch.no_grad()
def update_average(run: Run) -> None:
    """Move the averaged generator towards G. (AveragedModel would wait for the GPU each time, to count.)"""
    # At first the average forgets quickly, so that it does not remember the untrained weights for thousands of steps.
    decay = min(run.config.ema_decay, (1 + run.step) / (10 + run.step))
    get_ema_multi_avg_fn(decay)(list(run.average.parameters()), list(run.generator.parameters()), 0)
    # Buffers (u and v, batch-norm statistics) are copied: averaged ones would not belong to any weights.
    for ours, buffer in zip(run.average.buffers(), run.generator.buffers(), strict=True):
        ours.copy_(buffer)


# --------------------------------------------------------------------------------------------- pictures and scores

# Where the overlay's columns look from, (row, column) as fractions: an eye, the mouth, the hair, the background.
PLACES = ((0.52, 0.37), (0.73, 0.5), (0.15, 0.5), (0.06, 0.06))


def image_paths(run: Run, out: Path) -> dict[str, Path]:
    """What `draw` writes at this step."""
    kinds = ("samples", "attention") if run.average.attention else ("samples",)
    return {kind: out / f"{kind}-{run.step:06d}.png" for kind in kinds}


@torch.no_grad()
def draw(run: Run, out: Path) -> dict[str, Path]:
    """Write what the averaged generator makes of fixed latent vectors, and where its last attention looks."""
    fixed = torch.Generator().manual_seed(run.config.seed + 2)  # its own, so that drawing changes nothing
    z = torch.randn(64, run.config.z_dim, generator=fixed).to(run.device)  # (64, z_dim)
    made = image_paths(run, out)
    average = usable_average(run)
    save_grid(made["samples"], torch.cat([average(part) for part in z.split(16)]), columns=8)
    if "attention" in made:
        images, maps = average(z[:6], return_attention=True)  # (6, C, S, S), [(6, N, M), …]
        save_attention(made["attention"], images, maps[-1], PLACES)
    return made


def redraw(run: Run, out: Path) -> None:
    """Write the images of the step at which a run is resumed, where it was killed before it had drawn them."""
    due = run.step % run.config.sample_every == 0 or run.step >= run.config.steps
    if due and not all(path.exists() for path in image_paths(run, out).values()):
        draw(run, out)


def usable_average(run: Run) -> SAGANGenerator:
    if not all(weight.isfinite().all() for weight in run.average.parameters()):
        fail(f"step {run.step}: training has diverged, the averaged generator holds infinities or NaN")
    return recalibrated(run.average)


Judgement = Callable[[nn.Module, int], dict[str, float]]  # a generator and a seed -> scores; the first decides
OpenJudge = Callable[[Config, Images | Folder, torch.device], Judgement | None]


def open_judge(config: Config, source: Images | Folder, device: torch.device) -> Judgement | None:
    """FID and KID where Inception is at hand, and else the sliced Wasserstein distance. Less is better."""
    if config.image_size < COARSEST:
        print(f"judging   none: that takes images of {COARSEST} pixels or more")
        return None
    real = real_images(source, config.judge_samples, flip=config.data != "digits")
    inception = Path(config.inception) if config.inception else None
    judge = Judge(real, samples=config.judge_samples, device=device, inception=inception)
    print(f"judging   {judge.samples} images of each kind every {config.judge_every} steps; {judge.note}".rstrip("; "))
    return lambda generator, seed: judge(generator, config.z_dim, seed=seed)


# ---------------------------------------------------------------------------------------------------------- main


def images_on_device(run: Run, batches: Iterator[tuple[Tensor, dict[str, str]]]) -> Iterator[Tensor]:
    """The images on the device, while what cannot be read is named once."""
    named: dict[str, str] = {}
    for images, unreadable in batches:
        for path in sorted(unreadable.keys() - named):
            tqdm.write(f"{unreadable[path]}, left out: {path}", file=sys.stderr)
        named.update(unreadable)
        yield run.to_device(images)  # (B, C, S, S)


def judged(run: Run, judge: Judgement) -> tuple[dict[str, float], bool]:
    """A judge's scores of the averaged generator, and whether they are the best so far."""
    with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):  # its chance is not the training's
        scores = judge(usable_average(run), run.config.seed)
    name, score = next(iter(scores.items()))
    # On a machine without Inception another score decides, and is compared with its own kind alone.
    best = score < run.best.get(name, math.inf)
    run.best[name] = min(score, run.best.get(name, math.inf))
    return scores, best


def sigmas(run: Run) -> dict[str, dict[str, float]]:
    """The exact largest singular value of every normalised weight."""
    if run.device.type == "mps":  # it has no float64
        return {}
    return {"sigma_G": spectral_norms(run.generator), "sigma_D": spectral_norms(run.discriminator)}


@one_report()
def train(run: Run, source: Images | Folder, out: Path, judge: Judgement | None = None) -> int:
    """Train until the last step or a signal. Returns that signal's number, or 0."""
    config, ranks = run.config, run.ranks
    with ranks.agreeing():
        log = RunLog(out, run.step, config.steps, config.batch_size, config.tensorboard) if ranks.first else None
    run.means.restart()
    with closing(log) if log else nullcontext(), postponed_signals(second_stops=ranks.world == 1) as signals:
        reals = images_on_device(run, read_images(source, config, run.images, run.device, ranks))
        last = False
        while not last:
            run.means.add(training_step(run, reals))
            if log:
                log.advance()
            signal = signals[0] if signals else SIGTERM * ranks.abandoned
            signal = ranks.largest(signal)  # all processes stop at the same step
            last = run.step == config.steps or signal > 0
            logs, draws, saves = (run.step % n == 0 for n in (config.log_every, config.sample_every, config.save_every))
            judges = config.judge_every > 0 and run.step % config.judge_every == 0
            reports = run.step == config.steps or logs or draws or saves or judges
            if not (reports or last):
                continue
            best = False
            with ranks.agreeing():
                if reports:
                    line = {"images": run.images} | run.means.read(run.step, config.batch_size) | run.numbers()
                    if log:
                        if judges and judge:
                            line["scores"], best = judged(run, judge)
                        log.write(run.step, line)
                else:  # stopped between two lines of the log: the checkpoint keeps the losses for the next one
                    run.means.check(run.step)
            if last or saves or judges:
                state = run.state_dict()
                with ranks.agreeing():
                    if best:
                        save(state, out / "best.pt")
                    if log and (last or saves):
                        save_and_rotate(state, out, keep_last=config.keep_last, keep_every=config.keep_every)
            if draws and not last:
                with ranks.agreeing():
                    if log:
                        log.pictures(run.step, draw(run, out))
                        log.scalars(run.step, sigmas(run) if log.tensorboard else {})
            run.means.restart()
    return signal if run.step < config.steps else 0


def folder_to_resume(resume: str | None, given: dict[str, Any]) -> Path | None:
    """The folder of the run to go on with."""
    if resume is None:
        return None
    if resume == "auto":
        return Path(given.get("out") or default_out(given.get("data", Config.data)))
    return Path(resume) if Path(resume).is_dir() else Path(resume).parent


def find(resume: str, folder: Path) -> dict[str, Any] | None:
    """The checkpoint to go on from."""
    if resume == "auto":
        return newest(folder) if folder.is_dir() else None
    return load(Path(resume))


def main(arguments: Sequence[str] | None = None, open_judge: OpenJudge = open_judge) -> int:
    refuse_unsafe_torch()  # or the run could not be resumed
    with processes() as ranks:
        with ranks.agreeing():
            given = read_arguments(Config, arguments, "Train a SAGAN on faces, digits or your own images.")
        return start(given, ranks, open_judge)  # a function, so that its networks are gone when the processes part


def start(given: dict[str, Any], ranks: Ranks, open_judge: OpenJudge) -> int:
    """Do what the command line asks for. Returns the status."""
    resume, dry_run = given.pop("resume"), given.pop("dry_run")
    folder = ranks.from_first(folder_to_resume(resume, given))
    out = Path(given.get("out") or folder or default_out(given.get("data", Config.data)))
    given["out"] = str(out)
    if dry_run:  # in a folder of its own, since its settings are not those of the run
        out = out / "dry-run"
    with closing(RunLock(out)) as lock:
        with ranks.agreeing():
            if ranks.first and lock.path.exists():  # a run's folder: lock it before looking for the newest checkpoint
                lock.acquire()
            state = find(resume, folder) if folder and ranks.first else None
        state = ranks.from_first(state)
        first = state["step"] if state else 0
        with ranks.agreeing(ValueError):
            config = settle(Config, given, state and state["config"])
            check(config, ranks)
            cache = Path(config.cache_dir or Path(config.out).parent / "cache") if config.cache else None
            if dry_run:
                config = replace(config, steps=first + 3, log_every=1, sample_every=2, save_every=2)
                config = replace(config, judge_every=min(config.judge_every, 2), judge_samples=64)
                config = replace(config, out=str(out))
            if first >= config.steps and resume != "auto":
                fail(f"--steps {config.steps}: the checkpoint is at step {first} already")
            device = pick_device(config.device, ranks)
        same = state is not None and folder is not None and folder.resolve() == out.resolve()
        with ranks.agreeing(ValueError):
            run = Run(config, image_channels=1 if config.data == "digits" else 3, device=device, ranks=ranks)
            if state:
                try:
                    run.load_state_dict(state)
                except KeyError as missing:
                    fail(f"--resume {resume}: the checkpoint lacks {missing}")
                except RuntimeError:
                    fail(f"--resume {resume}: its weights do not fit the networks for --data {config.data}")
                except (TypeError, ValueError, AttributeError, IndexError) as error:
                    fail(f"--resume {resume}: the checkpoint was edited or damaged: {error}")
            if same and ranks.first:
                redraw(run, out)
        if first >= config.steps:
            print(f"complete  {config.out} is at step {first}")
            return 0
        with ranks.agreeing(ValueError):
            source = open_source(config.data, size=config.image_size, crop=crop_setting(config.crop), cache=cache)
        with ranks.agreeing(ValueError):
            if ranks.first:
                out.mkdir(parents=True, exist_ok=True)
                lock.acquire()
                if earlier := set_aside(out, after=first if same else None):
                    print(f"kept      what an earlier run left in {earlier}")
                save_reals(source, config, out / "reals.png")
                announce(run, source, out / "reals.png", state)
        judge = None
        with ranks.agreeing(ValueError):
            if ranks.first and 0 < config.judge_every <= config.steps:
                judge = open_judge(config, source, device)
        try:
            stopped = train(run, source, out, judge)
        except torch._dynamo.exc.TorchDynamoException as error:
            fail(f"--compile: {str(error).splitlines()[0]}")
        except OSError as error:
            fail(f"step {run.step + 1}: {error}")
        except (RuntimeError, MemoryError) as error:
            if short := out_of_memory(error):
                fail(f"step {run.step + 1}: {short} Less --batch-size or more --accumulate needs less")
            raise
        with ranks.agreeing():
            made = draw(run, out) if ranks.first else {}
        made |= {"checkpoint": out / f"checkpoint-{run.step:06d}.pt", "log": out / "log.jsonl"}
        if stopped:
            print(f"stopped at step {run.step}; go on with --resume {out}")
        if dry_run:
            print(f"dry run    all that it wrote is in {out}")
        for what, file in made.items():
            print(f"{what:11}{file}")
        return 128 + stopped if stopped else 0


def announce(run: Run, source: Images | Folder, reals: Path, state: dict[str, Any] | None) -> None:
    """Say what is going to happen."""
    config = run.config
    if isinstance(source, Folder):
        for path, reason in source.others.items():
            print(f"{reason}, left out: {path}", file=sys.stderr)
    if state and (other := {name: v for name, v in state["versions"].items() if v != versions().get(name)}):
        print(f"versions  the checkpoint was made with {', '.join(f'{name} {v}' for name, v in other.items())}")
    weights = {name: sum(p.numel() for p in getattr(run, name).parameters()) for name in ("generator", "discriminator")}
    speed = [config.precision, *(["compiled"] if config.compile else [])]
    if config.compile and config.loss == "wgan-gp":
        speed[-1] = "G compiled, D not (a compiled graph has no double backward)"
    print(f"data      {config.data}: {len(source)} images at {config.image_size} px; the first are in {reals}")
    if folder := source if isinstance(source, Folder) else source.folder:
        print(f"crop      {folder.crops()}")
    print(f"networks  G {weights['generator']:,} and D {weights['discriminator']:,} weights, on {run.device}")
    print(f"loss      {config.loss}" + (", D without spectral norm" if config.loss == "wgan-gp" else ""))
    print(f"training  steps {run.step} to {config.steps}, batches of {config.batch_size}, {', '.join(speed)}")
    if run.ranks.world > 1:
        print(f"processes {run.ranks.world}, each with {config.batch_size // run.ranks.world} images of a batch")
    sys.stdout.flush()


if __name__ == "__main__":
    script(main)
