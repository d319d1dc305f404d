"""A complete SAGAN trainer in one file, to copy and to change. It needs torch, Pillow and torch_sagan.

    python examples/minimal.py IMAGES                    # a folder of images, at any depth
    python examples/minimal.py IMAGES --steps 20000 --image-size 128 --batch-size 32

Run it again to continue from `--out`/checkpoint.pt. What it leaves out (several processes, mixed precision, classes,
evaluation, a cache of decoded images) is in train_celeba.py.
"""

import argparse
import copy
import errno
import os
import sys
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from torch_sagan import SAGANDiscriminator, SAGANGenerator, hinge_discriminator_loss, hinge_generator_loss

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("images", type=Path, help="folder of images")
parser.add_argument("--out", type=Path, default=Path("runs/minimal"), help="default: %(default)s")
parser.add_argument("--steps", type=int, default=100_000, help="default: %(default)s")
parser.add_argument("--image-size", type=int, default=64, help="4 to 7 doubled several times (default: %(default)s)")
parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
parser.add_argument("--base-channels", type=int, default=64, help="channels at the image's side (default: %(default)s)")
parser.add_argument("--lr-g", type=float, default=1e-4, help="learning rate of the generator (default: %(default)s)")
parser.add_argument("--lr-d", type=float, default=4e-4, help="of the discriminator (default: %(default)s)")
parser.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints (default: 1000)")

Z_DIM, EMA_DECAY = 128, 0.999
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


class ImageFolder(Dataset[Tensor]):
    """Images (3, S, S) in [-1, 1]: the largest center square, resized, mirrored half of the time."""

    def __init__(self, root: Path, size: int, out: Path) -> None:
        found = {path for path in root.resolve().rglob("*") if path.suffix.lower() in SUFFIXES}
        self.paths = sorted(found - set(out.resolve().glob("samples-*.png")))
        self.size = size
        if not self.paths:
            raise SystemExit(f"minimal.py: no images in {root}")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        for path in self.paths[index:] + self.paths[:index]:
            try:
                with Image.open(path) as file:
                    image = ImageOps.exif_transpose(file).convert("RGB")
                break
            except Exception as error:  # whatever a damaged file makes Pillow raise
                print(f"left out {path}: {error}", file=sys.stderr)
        else:
            raise OSError("none of the images can be read")
        image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.LANCZOS)
        image = ImageOps.mirror(image) if torch.rand(()) < 0.5 else image
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.view(self.size, self.size, 3).permute(2, 0, 1).float() / 127.5 - 1


def save_grid(path: Path, images: Tensor, columns: int = 8) -> None:
    """Images (B, 3, S, S) in [-1, 1] as one PNG; B is a multiple of `columns`."""
    count, channels, height, width = images.shape
    rows = images.view(count // columns, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    pixels = rows.reshape(-1, columns * width, channels).mul(127.5).add(127.5).round().clamp(0, 255).byte()
    Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), bytes(pixels.flatten().tolist())).save(path)


def main() -> None:
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    data = ImageFolder(args.images, args.image_size, args.out)
    whole = len(data) >= args.batch_size  # leave the last, smaller batch out
    loader = DataLoader(data, args.batch_size, shuffle=True, drop_last=whole, num_workers=min(8, os.cpu_count() or 1))
    generator = SAGANGenerator(args.image_size, z_dim=Z_DIM, base_channels=args.base_channels).to(device)
    discriminator = SAGANDiscriminator(args.image_size, base_channels=args.base_channels).to(device)
    average = copy.deepcopy(generator).eval().requires_grad_(False)  # draws the samples
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=args.lr_g, betas=(0.0, 0.9))
    d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=args.lr_d, betas=(0.0, 0.9))
    z_fixed = torch.randn(64, Z_DIM, device=device)
    networks = {"generator": generator, "discriminator": discriminator, "average": average}
    parts: dict[str, Any] = {**networks, "g_optimizer": g_optimizer, "d_optimizer": d_optimizer}
    checkpoint, first = args.out / "checkpoint.pt", 0
    if checkpoint.exists():
        # Adam counts its steps on the CPU: counters on the GPU would be waited for at the update of each weight.
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        first = state["step"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
        g_optimizer.param_groups[0]["lr"], d_optimizer.param_groups[0]["lr"] = args.lr_g, args.lr_d
        print(f"resumed at step {first}")

    for step, images in zip(range(first + 1, args.steps + 1), chain.from_iterable(repeat(loader)), strict=False):
        real = images.to(device)  # (B, 3, S, S)
        fake = generator(torch.randn(len(real), Z_DIM, device=device))  # (B, 3, S, S)
        # One pass for both kinds, so that the spectral norm iterates once.
        real_logits, fake_logits = discriminator(torch.cat([real, fake.detach()])).chunk(2)  # (B,) each
        d_loss = hinge_discriminator_loss(real_logits, fake_logits)
        d_optimizer.zero_grad()
        d_loss.backward()
        d_optimizer.step()

        discriminator.requires_grad_(False)  # gradients flow through D, none to its weights
        g_loss = hinge_generator_loss(discriminator(fake))
        g_optimizer.zero_grad()
        g_loss.backward()
        g_optimizer.step()
        discriminator.requires_grad_(True)

        with torch.no_grad():
            decay = min(EMA_DECAY, step / (10 + step))  # forgets the untrained weights quickly
            for ours, theirs in zip(average.parameters(), generator.parameters(), strict=True):
                ours.lerp_(theirs, 1 - decay)
            # Averages of u, v or batch statistics would not match the averaged weights.
            for buffer, source in zip(average.buffers(), generator.buffers(), strict=True):
                buffer.copy_(source)

        if step % 100 == 0 or step == args.steps:
            print(f"step {step}  D {d_loss.item():.3f}  G {g_loss.item():.3f}", flush=True)
        if step % args.save_every == 0 or step == args.steps:
            moments = [*g_optimizer.state.values(), *d_optimizer.state.values()]
            saved = [*(network.state_dict() for network in networks.values()), *moments]
            if not all(tensor.isfinite().all() for named in saved for tensor in named.values()):
                raise SystemExit(f"minimal.py: step {step}: the training is no longer finite; {checkpoint} is older")
            with open(checkpoint.with_suffix(".new"), "wb") as file:  # if the run is killed here, the old one stays
                torch.save({"step": step} | {name: part.state_dict() for name, part in parts.items()}, file)
                file.flush()
                try:
                    os.fsync(file.fileno())
                except OSError as error:
                    if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):  # else the file system has none
                        raise
            os.replace(file.name, checkpoint)
            save_grid(args.out / f"samples-{step:06d}.png", average(z_fixed))
    print(f"samples and checkpoint: {args.out}")


if __name__ == "__main__":
    main()
