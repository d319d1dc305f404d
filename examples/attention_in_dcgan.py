"""Attention for a DCGAN that exists: a line for each network, and they return what they did, until they are trained on.

    python examples/attention_in_dcgan.py            # about three minutes on a CPU, nothing to download

`dcgan.py` stands for your model: nothing in it knows of attention. An eighth of the training comes before
the insertion.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait by spinning slow each other down

import torch
from torch import nn

import faces
from dcgan import Z_DIM, Discriminator, Generator, train
from pictures import save_attention, save_grid
from torch_sagan import SelfAttention2d, apply_spectral_norm, insert_self_attention, record_attention

PEOPLE = 2048
PLACES = ((0.52, 0.37), (0.2, 0.5), (0.95, 0.5))  # an eye, the head-band, the shirt


def attention(channels: int) -> nn.Module:
    # Where weights grow freely, the softmax soon looks at one place alone.
    return apply_spectral_norm(SelfAttention2d.official(channels))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Put attention into a DCGAN and train it on embedded faces.")
    parser.add_argument("--steps", type=int, default=2400, help="of each network (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/attention-in-dcgan"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="fixes everything (default: %(default)s)")
    given = parser.parse_args(arguments)
    if given.steps < 1:
        parser.error(f"--steps must be at least 1, got {given.steps}")

    torch.manual_seed(given.seed)
    images = torch.from_numpy(faces.render(faces.traits(PEOPLE), size=32)).float() / 127.5 - 1  # (N, 3, 32, 32)
    z = torch.randn(32, Z_DIM, 1, 1)
    generator, discriminator = Generator(), Discriminator()
    train(generator, discriminator, images, given.steps // 8)

    before = generator(z), discriminator(images[:32])
    insert_self_attention(generator, after="main.8", example_input=z, attention=attention)
    insert_self_attention(discriminator, after="main.4", example_input=images[:1], attention=attention)
    after = generator(z), discriminator(images[:32])
    print("unchanged by the insertion:", all(map(torch.equal, before, after)))

    train(generator, discriminator, images, given.steps - given.steps // 8)  # its new optimisers know the layers
    print("gamma of G", *(f"{p.item():+.4f}" for name, p in generator.named_parameters() if name.endswith("gamma")))
    print("gamma of D", *(f"{p.item():+.4f}" for name, p in discriminator.named_parameters() if name.endswith("gamma")))
    with record_attention(generator.eval()) as records, torch.no_grad():
        samples, shown = generator(z), generator(z[:4])
    save_grid(given.out / "samples.png", samples, columns=8)
    save_attention(given.out / "attention.png", shown, records["main.8.inserted_attention"][-1], PLACES)
    print(f"pictures in {given.out}")


if __name__ == "__main__":
    main()
