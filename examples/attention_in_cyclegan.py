"""Attention for a CycleGAN that exists, which turns dark hair fair and back; no two of its pictures are of one person.

    python examples/attention_in_cyclegan.py         # about two minutes on one CPU core, nothing to download

`cyclegan.py` stands for your model: nothing in it knows of attention. A fifth of the training comes before the
insertion, which leaves what all four networks return as it was.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait by spinning slow each other down

import numpy as np
import torch
from torch import Tensor

import faces
from cyclegan import Discriminator, Generator, train
from pictures import save_attention, save_grid
from torch_sagan import insert_self_attention, record_attention

PEOPLE = 1024  # of each kind
PLACES = ((0.15, 0.5), (0.52, 0.37), (0.05, 0.05))  # the head-band, an eye, the background


def portraits(hair: tuple[int, int, int], first: int) -> Tensor:
    """Faces that differ in everything but the colour of their hair: (N, 3, 32, 32) in [-1, 1]."""
    people = faces.traits(PEOPLE, first=first)._replace(hair=np.tile(np.array(hair, np.float32), (PEOPLE, 1)))
    return torch.from_numpy(faces.render(people, size=32)).float() / 127.5 - 1


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Put attention into a CycleGAN that turns dark hair fair and back.")
    parser.add_argument("--steps", type=int, default=800, help="of each network (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/attention-in-cyclegan"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="fixes everything (default: %(default)s)")
    given = parser.parse_args(arguments)
    if given.steps < 1:
        parser.error(f"--steps must be at least 1, got {given.steps}")

    torch.manual_seed(given.seed)
    dark, fair = portraits(faces.HAIR[0], first=0), portraits(faces.HAIR[3], first=PEOPLE)
    to_fair, to_dark, is_fair, is_dark = networks = Generator(), Generator(), Discriminator(), Discriminator()
    train(*networks, dark, fair, given.steps // 5)

    before = [network(dark[:8]) for network in networks]
    for generator in (to_fair, to_dark):
        insert_self_attention(generator, after="model.9", example_input=dark[:1])
    for discriminator in (is_fair, is_dark):
        insert_self_attention(discriminator, after="model.4", example_input=dark[:1])
    after = [network(dark[:8]) for network in networks]
    print("unchanged by the insertion:", all(map(torch.equal, before, after)))

    train(*networks, dark, fair, given.steps - given.steps // 5)  # its new optimisers know the layers
    for name, network in zip(("to fair", "to dark", "is fair", "is dark"), networks, strict=True):
        print("gamma of", name, *(f"{p.item():+.4f}" for n, p in network.named_parameters() if n.endswith("gamma")))
    with record_attention(to_fair) as records, torch.no_grad():
        translated = to_fair(dark[:8])
        back = to_dark(translated)
        to_fair(dark[:4])
    save_grid(given.out / "samples.png", torch.cat([dark[:8], translated, back]), columns=8)
    save_attention(given.out / "attention.png", dark[:4], records["model.9.inserted_attention"][-1], PLACES)
    print(f"pictures in {given.out}")


if __name__ == "__main__":
    main()
