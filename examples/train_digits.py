"""Train a SAGAN on handwritten digits: the MNIST system of the TensorFlow tutorial.

    python examples/train_digits.py --conditional               # scikit-learn's digits, nothing to download
    python examples/train_digits.py                             # the same without classes
    python examples/train_digits.py --conditional --data mnist  # a folder with MNIST's own files, packed or not

Images of 28 pixels and one channel, and in both networks one attention layer on 128 channels at 7×7 whose projections
are 4×4 convolutions. They are followed by batch norm and ReLU in G, as in the tutorial; in D, by ReLU alone, and
spectral norm stands for the batch norm, which lets D win before G has drawn a stroke. With classes, G has a conditional
batch norm, D the projection of the class, and the grid one row for each digit. At the end a classifier that was trained
on real digits alone looks at 1000 generated ones. The folder `--out` receives the grid and a checkpoint.
"""

from __future__ import annotations

import argparse
import gzip
import math
import os
import sys
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

# By default the threads of a CPU wait for one another by spinning, which makes a step many times slower as soon as
# another program wants one of the cores. They shall sleep instead. It has to be said before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import sources
from command_line import Parser
from pictures import save_grid
from safekeeping import save
from torch_sagan import (
    SAGANDiscriminator,
    SAGANGenerator,
    SelfAttention2d,
    hinge_discriminator_loss,
    hinge_generator_loss,
    spectral_norm,
)

SIZE, CLASSES, Z_DIM = 28, 10, 128
EMA_DECAY = 0.99
GRID = 10  # images in a row of the grid
JUDGED = 1000  # samples that the classifier looks at
JUDGE_READS = 10_000  # real images that it learns from and is tested on: MNIST's 60 000 would take it minutes


def fail(message: object) -> NoReturn:
    """End with one line on stderr and a non-zero status."""
    raise SystemExit("train_digits.py: " + " ".join(str(message).split()))


# ---------------------------------------------------------------------------------------------------------- data


def read_idx(folder: Path, name: str, dimensions: int) -> Tensor:
    """The bytes of an IDX file, uint8 in the shape that it states; packed by gzip if only `name.gz` is there.

    The format: two zeros, 8 for unsigned bytes, the number of dimensions; each dimension as four bytes, the highest
    first; the values, row by row.
    """
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if path is None:
        fail(f"--data {folder}: neither {name} nor {name}.gz is there")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        fail(f"{path} cannot be read: {error}")
    magic, start = bytes((0, 0, 8, dimensions)), 4 + 4 * dimensions
    if content[:4] != magic:
        fail(f"{path} starts with {content[:4].hex(' ') or 'nothing'}, not {magic.hex(' ')}")
    if len(content) < start:
        fail(f"{path} ends within its header")
    shape = np.frombuffer(content[4:start], dtype=">u4").tolist()
    if len(content) - start != math.prod(shape):
        fail(f"{path} states {math.prod(shape)} values {tuple(shape)} and holds {len(content) - start}")
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape).copy())


def read_mnist(folder: Path) -> tuple[Tensor, Tensor]:
    """MNIST's training images (N, 1, 28, 28) and labels (N,), both uint8."""
    if not folder.is_dir():
        fail(f"--data {folder}: no such folder")
    images = read_idx(folder, "train-images-idx3-ubyte", dimensions=3)
    labels = read_idx(folder, "train-labels-idx1-ubyte", dimensions=1)
    if images.shape[1:] != (SIZE, SIZE):
        fail(f"--data {folder}: images of {SIZE} by {SIZE} pixels are needed, these have {tuple(images.shape[1:])}")
    if len(images) != len(labels):
        fail(f"--data {folder}: {len(images)} images, but {len(labels)} labels")
    if (found := labels.unique().tolist()) != list(range(CLASSES)):
        given = ", ".join(map(str, found)) or "none"
        fail(f"--data {folder}: each digit is needed as a label, and no other, got {given}")
    return images[:, None], labels


def read_data(folder: str | None) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) in [-1, 1] and labels (N,): MNIST's, or without a folder scikit-learn's digits."""
    if folder:
        images, labels = read_mnist(Path(folder))
    else:
        images, labels = map(torch.from_numpy, (sources.digits(SIZE).images, load_digits().target))
    return images.float() / 127.5 - 1, labels.long()


# ------------------------------------------------------------------------------------------------------ networks


def convolution(in_channels: int, out_channels: int) -> list[nn.Module]:
    """The tutorial's 4×4 convolution. The even kernel needs one row and column more at the end."""
    # This is what TensorFlow calls "same". torch knows that word too, but warns of even kernels.
    return [nn.ZeroPad2d((1, 2, 1, 2)), nn.Conv2d(in_channels, out_channels, kernel_size=4, bias=False)]


def generator_projection(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Sequential(*convolution(in_channels, out_channels), nn.BatchNorm2d(out_channels), nn.ReLU())


def discriminator_projection(in_channels: int, out_channels: int) -> nn.Module:
    pad, conv = convolution(in_channels, out_channels)
    return nn.Sequential(pad, spectral_norm(conv), nn.ReLU())


def build(base_channels: int, conditional: bool) -> tuple[SAGANGenerator, SAGANDiscriminator]:
    """G: z 128 -> 128@7, attention -> 64@14 -> 1@28. D: 1@28 -> 64@14 -> 128@7, attention -> 1."""
    options: dict[str, Any] = {
        "image_channels": 1,
        "base_channels": base_channels,
        "num_classes": CLASSES if conditional else None,
        "attention_resolutions": (7,),
    }
    in_generator = partial(SelfAttention2d, projection=generator_projection)
    in_discriminator = partial(SelfAttention2d, projection=discriminator_projection)
    return (
        SAGANGenerator(SIZE, z_dim=Z_DIM, attention=in_generator, **options),
        SAGANDiscriminator(SIZE, attention=in_discriminator, **options),
    )


# ------------------------------------------------------------------------------------------------------ training


def with_noise(images: Tensor, strength: float) -> Tensor:
    """What D sees: the background of real digits is exactly black, which no generator can be (arXiv:1610.04490)."""
    return images + strength * torch.randn_like(images)


def train(config: argparse.Namespace, images: Tensor, labels: Tensor, device: str) -> dict[str, nn.Module]:
    """Train both networks. Returns them and the moving average of the generator, which is what draws."""
    generator, discriminator = (network.to(device) for network in build(config.base_channels, config.conditional))
    # Buffers (u and v, batch-norm statistics) are copied: averaged ones would not belong to any weights.
    average = AveragedModel(generator, use_buffers=False).eval()
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=config.lr_g, betas=(0.0, 0.9), fused=True)
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), lr=config.lr_d, betas=(0.0, 0.9), fused=True)

    bar = tqdm(range(config.steps), unit="step", dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 10)
    for step in bar:
        drawn = torch.randint(len(images), (config.batch_size,))  # with repetition: the epochs are many and short
        real = images[drawn].to(device)  # (B, 1, 28, 28)
        # The fakes are asked for the classes of the real images, so that the classes alone tell D nothing.
        asked = labels[drawn].to(device) if config.conditional else None  # (B,)

        fake = generator(torch.randn(len(real), Z_DIM, device=device), asked)  # (B, 1, 28, 28)
        both = None if asked is None else torch.cat([asked, asked])  # (2B,)
        logits = discriminator(with_noise(torch.cat([real, fake.detach()]), config.noise), both)  # (2B,)
        discriminator_loss = hinge_discriminator_loss(*logits.chunk(2))
        discriminator_optimizer.zero_grad()
        discriminator_loss.backward()
        discriminator_optimizer.step()

        discriminator.requires_grad_(False)  # gradients flow through D, none to its weights
        generator_loss = hinge_generator_loss(discriminator(with_noise(fake, config.noise), asked))
        generator_optimizer.zero_grad()
        generator_loss.backward()
        generator_optimizer.step()
        discriminator.requires_grad_(True)
        # At first the average forgets quickly, so that it does not remember the untrained weights for long.
        average.multi_avg_fn = get_ema_multi_avg_fn(min(EMA_DECAY, (1 + step) / (10 + step)))
        average.update_parameters(generator)

        if step % 50 == 49 or step + 1 == config.steps:
            losses = torch.stack([discriminator_loss, generator_loss]).tolist()
            if not np.isfinite(losses).all():
                fail(f"step {step + 1}: the losses are no longer finite. Lower learning rates may help")
            bar.set_postfix_str("D {:.2f} G {:.2f}".format(*losses), refresh=False)
    return {"generator": generator, "discriminator": discriminator, "average": average}


# ------------------------------------------------------------------------------------------------------- judging


@torch.no_grad()
def draw(generator: nn.Module, z: Tensor, labels: Tensor, conditional: bool) -> Tensor:
    """Images (B, 1, 28, 28), a hundred at a time."""
    parts = zip(z.split(100), labels.split(100), strict=True)
    return torch.cat([generator(part, asked if conditional else None) for part, asked in parts])


def judge(images: Tensor, labels: Tensor) -> tuple[SVC, float]:
    """A classifier trained on four fifths of the real images, and its accuracy on the last fifth."""
    chosen = torch.randperm(len(images))[:JUDGE_READS]
    pixels, classes = images[chosen].flatten(1).numpy(), labels[chosen].numpy()
    held_out = len(chosen) // 5
    classifier = SVC(C=10).fit(pixels[held_out:], classes[held_out:])
    return classifier, classifier.score(pixels[:held_out], classes[:held_out])


# ---------------------------------------------------------------------------------------------------------- main


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("train_digits.py", "%(prog)s [settings]", description="Train a SAGAN on handwritten digits.")
    parser.add_argument("--conditional", action="store_true", help="draw the digit that is asked for")
    parser.add_argument(
        "--data", metavar="FOLDER",
        help="with MNIST's train-images-idx3-ubyte and labels, .gz or not (default: scikit-learn's digits)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=2000, help="steps of each network (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="images in a batch (default: %(default)s)")
    parser.add_argument(
        "--base-channels", type=int, default=64, help="channels at 14×14; twice as many at 7×7 (default: %(default)s)"
    )
    parser.add_argument("--lr-g", type=float, default=5e-4, help="the generator's learning rate (default: %(default)s)")
    parser.add_argument(
        "--lr-d", type=float, default=2e-4, help="the discriminator's learning rate (default: %(default)s)"
    )
    parser.add_argument(
        "--noise",
        type=float,
        default=0.3,
        help="added to what D sees; pixels reach from -1 to 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="fixes weights, latent vectors and the order of the images (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/train_digits"),
        help="folder for grid and checkpoint (default: %(default)s)",
    )
    config = parser.parse_args(arguments)
    for name in ("steps", "batch_size", "base_channels"):
        if getattr(config, name) < 1:
            fail(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    for name in ("lr_g", "lr_d", "noise"):
        if not 0 <= getattr(config, name) < math.inf:  # nor is nan
            fail(f"--{name.replace('_', '-')} must be a finite number, at least 0, got {getattr(config, name)}")
    return config


def main(arguments: Sequence[str] | None = None) -> None:
    config = read_arguments(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(config.seed)
    images, labels = read_data(config.data)
    try:
        config.out.mkdir(parents=True, exist_ok=True)  # before the training, so that no time is lost
    except OSError as error:
        fail(f"--out {error}")
    print(f"data        {len(images)} digits of {config.data or 'scikit-learn'}, on {device}", flush=True)
    classifier, accuracy = judge(images, labels)
    print(f"classifier  {100 * accuracy:.1f} % right on real digits that it did not learn from", flush=True)
    made = train(config, images, labels, device)

    # One row for each class, one column for each latent vector; without classes, every image has its own vector.
    z = torch.randn(GRID**2, Z_DIM, device=device)
    z = z[:GRID].repeat(CLASSES, 1) if config.conditional else z
    asked = torch.arange(CLASSES, device=device)
    grid = draw(made["average"], z, asked.repeat_interleave(GRID), config.conditional)
    z, asked = torch.randn(JUDGED, Z_DIM, device=device), asked.repeat_interleave(JUDGED // CLASSES)
    samples = draw(made["average"], z, asked, config.conditional)  # (1000, 1, 28, 28)

    files = {"grid": config.out / "grid.png", "checkpoint": config.out / "checkpoint.pt"}
    try:
        save_grid(files["grid"], grid, columns=GRID)
    except OSError as error:
        fail(f"cannot save {files['grid']}: {error}")
    settings = {name: value for name, value in vars(config).items() if name != "out"}
    save({name: network.state_dict() for name, network in made.items()} | {"config": settings}, files["checkpoint"])

    seen = torch.from_numpy(classifier.predict(samples.flatten(1).cpu().numpy()))  # (1000,)
    if config.conditional:
        agreement = 100 * (seen == asked.cpu()).double().mean()
        print(f"agreement with the asked class: {agreement:.1f} % of {JUDGED} samples")
    else:
        counts = enumerate(seen.bincount(minlength=CLASSES).tolist())
        print(f"what it sees in {JUDGED} samples: " + ", ".join(f"{digit}: {count}" for digit, count in counts))
    for what, file in files.items():
        print(f"{what:12}{file}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
