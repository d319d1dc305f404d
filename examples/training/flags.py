"""The settings of a training run: what each means, and which go together."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from training.architectures import ARCHITECTURES
from training.augmentation import augmentation
from training.objectives import DEFAULT_WEIGHT, LOSSES
from training.script import fail, option, path_option


@dataclass(frozen=True)
class Config:
    """All settings of the trainer. The text of each is both its comment here and its help on the command line."""

    data: str = path_option(
        "faces",
        "data",
        "faces, faces:200, digits, textures; mnist, fashion-mnist, kmnist, cifar10, celeba: found or downloaded; an "
        "image folder or zip; a folder with MNIST's files, CIFAR-10's archive",
    )
    classes: str = option("none", "data", "none, own (folders, digits, hair …) or attributes:Smiling,Male", fixed=True)
    attributes: str = path_option("", "data", "CelebA's list_attr_celeba.txt (default: the one in or beside --data)")
    image_size: int = option(64, "data", "width and height, pixels: 4 to 7 doubled several times", fixed=True)
    crop: str = option(
        "auto", "data", "center crop, pixels, or 0: the largest square; auto: 0, or CelebA's 160; pad: all"
    )
    channels: str = option(
        "auto", "data", "1: gray, 3: colors; auto: 3 of a folder, others' own", choices=("auto", "1", "3"), fixed=True
    )
    mirror: bool = option(True, "data", "mirror images at random (digits, and MNIST and its like, never are)")
    cache: bool = option(True, "data", "decode a folder's images once, into a file, instead of at every epoch")
    cache_dir: str = path_option("", "data", "folder for decoded images (default: cache/ beside the folder --out)")
    num_workers: int = option(4, "data", "processes that decode with --no-cache, at most one per core", least=0)

    architecture: str = option("dcgan", "networks", "resnet is the paper's, mnist a tutorial's", choices=ARCHITECTURES)
    z_dim: int = option(128, "networks", "length of the latent vector", least=1)
    base_channels: int = option(64, "networks", "channels of the largest feature map, doubled at each smaller one")
    g_widths: str = option(
        "auto", "networks", "channels of each of G's feature maps, smallest first; auto: by --base-channels", fixed=True
    )
    d_widths: str = option(
        "auto", "networks", "channels of each of D's blocks, from the image on; auto: by --base-channels", fixed=True
    )
    d_downsampling_blocks: str = option(
        "auto",
        "networks",
        "how many of resnet's D blocks halve the map; auto: down to 4 to 7 pixels",
        choices=("auto", *map(str, range(1, 10))),
        fixed=True,
    )
    normalize_classes: bool = option(False, "networks", "spectral norm of G's scales and shifts of classes", fixed=True)
    norm_eps: float = option(1e-5, "networks", "what batch norms add to the variance", least=0, fixed=True)
    conditioning: str = option(
        "batch_norm",
        "networks",
        "where a class enters G: batch_norm as the paper, or latent: short runs learn it sooner",
        choices=("batch_norm", "latent"),
        fixed=True,
    )
    upsampling: str = option(
        "auto",
        "networks",
        "of dcgan's G: transposed, or nearest: no checkerboard; auto: the architecture's own",
        choices=("auto", "transposed", "nearest"),
        fixed=True,
    )
    g_attention: str = option("auto", "networks", "sizes of G's feature maps with attention: 16, or 16,32, auto, none")
    d_attention: str = option("auto", "networks", "sizes of D's feature maps with attention: 8, or 4,8, auto, none")
    d_norm: str = option(
        "matrix",
        "networks",
        "what D's spectral norm bounds: its unfolded kernels, or its convolutions",
        choices=("matrix", "convolution"),
        fixed=True,
    )
    sigma_eps: float = option(1e-12, "networks", "eps of the spectral norm's power iteration", least=0)

    loss: str = option("hinge", "training", "wgan-gp builds D without spectral norm", choices=LOSSES, fixed=True)
    penalty_weight: str = option("auto", "training", "λ of wgan-gp (auto: 10), γ of relativistic's R1 and R2 (auto: 1)")
    augment: str = option("none", "training", "for small data sets: color,translation,cutout, or some of them")
    noise: float = option(0.0, "training", "standard deviation of noise added to every image that D sees", least=0)
    steps: int = option(100_000, "training", "length of the run, steps of G", least=1)
    batch_size: int = option(64, "training", "images in a step, all processes together", least=1)
    d_steps: int = option(1, "training", "steps of D for each step of G", least=1)
    lr_g: float = option(1e-4, "training", "the generator's learning rate, per Adam step", least=0)
    lr_d: float = option(4e-4, "training", "the discriminator's learning rate, per Adam step", least=0)
    lr_decay: str = option("none", "training", "linear: both rates fall to 0", choices=("none", "linear"))
    decay_from: int = option(0, "training", "step from which --lr-decay linear falls, to 0 at --steps", least=0)
    beta1: float = option(0.0, "training", "Adam's decay of the mean gradient", least=0)
    beta2: float = option(0.9, "training", "Adam's decay of the mean squared gradient", least=0)
    ema_decay: float = option(0.999, "training", "what the averaged G keeps at each step, a fraction", least=0)
    ema_start: int = option(0, "training", "step at which averaging starts; before, it is a copy of G", least=0)
    seed: int = option(0, "training", "fixes weights, latent vectors, order and flips of the images", least=0)

    device: str = option("auto", "speed", "cpu, cuda, cuda:1, mps …; auto takes a GPU if there is one")
    precision: str = option("float32", "speed", "bf16: autocast; weights stay float32", choices=("float32", "bf16"))
    compile: bool = option(False, "speed", "compile G and D with torch.compile (with a gradient penalty, G alone)")
    cuda_graph: bool = option(False, "speed", "start a step's kernels at once, as a CUDA graph; one process, on CUDA")
    channels_last: str = option(
        "auto", "speed", "layout of feature maps; auto: on CUDA, without --compile", choices=("auto", "yes", "no")
    )
    grad_accum_steps: int = option(1, "speed", "passes that a step's images are divided among, to save memory", least=1)
    sync_batch_norm: bool = option(True, "speed", "batch norm over the images of all processes, on CUDA")

    out: str = path_option("", "output", "folder for what the run makes (default: runs/ and the name of the data)")
    log_every: int = option(50, "output", "steps between two lines of log.jsonl", least=1)
    sample_every: int = option(1000, "output", "steps between two sample grids and attention overlays", least=1)
    save_every: int = option(1000, "output", "steps between two checkpoints", least=1)
    keep_last: int = option(3, "output", "checkpoints to keep, the newest", least=1)
    keep_every: int = option(20_000, "output", "steps between two checkpoints kept for good, 0 to disable", least=0)
    tensorboard: bool = option(True, "output", "also write event files for TensorBoard")

    eval_every: int = option(
        5000, "evaluation", "steps between scores of the averaged G, or once at the end; 0 to disable", least=0
    )
    eval_samples: int = option(2000, "evaluation", "images of each kind (published FIDs take 50000)", least=2)
    eval_against: str = option(
        "held-out",
        "evaluation",
        "training: against training images, as published FIDs are; else held-out ones where there are some",
        choices=("held-out", "training"),
    )
    inception: str = path_option("", "evaluation", "Inception's weights, for FID (default: where torch.hub has them)")

    @property
    def has_penalty(self) -> bool:
        """Whether the loss has a gradient penalty, for which D is differentiated twice."""
        return self.loss in DEFAULT_WEIGHT

    @property
    def penalty(self) -> float:
        """The weight of that penalty."""
        default = DEFAULT_WEIGHT.get(self.loss, 0.0)
        return default if self.penalty_weight == "auto" else float(self.penalty_weight)


def check(config: Config, processes: int) -> None:
    """Refuse settings that contradict each other or cannot be used. Limits of one setting are beside its default."""
    if not config.data:
        fail("--data is empty: expected a name such as faces or mnist, a folder or an archive")
    if Path(config.out).exists() and not Path(config.out).is_dir():
        fail(f"--out {config.out}: expected a folder, but there is a file of this name")
    if config.seed >= 2**62:
        fail(f"--seed must be below 2^62, got {config.seed}")
    for name in ("ema_decay", "beta1", "beta2"):
        # With 1, Adam's means would never change.
        if getattr(config, name) > 1 or (name != "ema_decay" and getattr(config, name) == 1):
            fail(f"--{name.replace('_', '-')} must be between 0 and 1, got {getattr(config, name)}")
    _check_penalty(config)
    if config.conditioning == "latent" and config.classes == "none":
        fail("--conditioning latent: with --classes none there is no class that could be joined to the latent vector")
    if config.d_norm == "convolution" and config.loss == "wgan-gp":
        fail("--d-norm convolution: --loss wgan-gp builds D without spectral norm")
    if config.upsampling == "transposed" and config.architecture == "resnet":
        fail("--upsampling transposed: --architecture resnet has nearest alone")
    if config.normalize_classes and (config.classes == "none" or config.conditioning == "latent"):
        fail("--normalize-classes: batch norms have no classes without --classes, or with --conditioning latent")
    if config.lr_decay == "none" and config.decay_from:
        fail(f"--decay-from {config.decay_from}: nothing decays without --lr-decay linear")
    if config.lr_decay == "linear" and config.decay_from >= config.steps:
        fail(f"--decay-from {config.decay_from}: the run ends at step {config.steps}, before that")
    if config.batch_size % (processes * config.grad_accum_steps):
        shares = f"{processes} × {config.grad_accum_steps}"
        fail(f"--batch-size {config.batch_size} cannot be divided evenly (processes × --grad-accum-steps: {shares})")
    if config.cuda_graph and processes > 1:
        fail(f"--cuda-graph: a graph is of one process, got {processes} (NCCL's part of a step is not captured)")
    if config.cuda_graph and config.compile:
        fail("--cuda-graph with --compile has not been tested: give one of the two")
    try:
        augmentation(config.augment)
    except ValueError as error:
        fail(f"--augment {config.augment}: {error}")


def _check_penalty(config: Config) -> None:
    weight = config.penalty_weight
    if weight == "auto":
        return
    if not config.has_penalty:
        fail(f"--penalty-weight {weight}: --loss {config.loss} has no gradient penalty")
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        fail(f"--penalty-weight must be auto or a number of at least 0, got {weight}")


def default_out(data: str) -> str:
    """The folder of a run without --out."""
    name = Path(os.path.abspath(data)).name.removesuffix(".zip").removesuffix(".tar.gz")  # of . and .. too
    name = name.replace(":", "-")  # of faces:200, since some file systems allow no colon
    return f"runs/{name or 'images'}"
