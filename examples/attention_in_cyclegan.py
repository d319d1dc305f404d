"""Attention for an existing CycleGAN, which turns dark hair fair and back; no two of its images are of one person.

    python examples/attention_in_cyclegan.py                              # under two minutes on one CPU core
    python examples/attention_in_cyclegan.py --attention none --steps 3000  # the same training without it, for longer

`networks/cyclegan.py` stands for your model: nothing in it knows of attention. A fifth of the training comes before the
insertion, which leaves what all four networks return as it was. At the end the translations are compared with the same
faces drawn with fair hair, which a real CycleGAN's data do not have.
"""

from __future__ import annotations

import training.threads  # noqa: F401  before torch  # isort: skip

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss
from tqdm import trange

from networks.cyclegan import Discriminator, Generator
from torch_sagan import insert_self_attention, record_attention, remove_self_attention
from training.data import procedural_faces as faces
from training.output.image_io import save_attention, save_grid
from training.script import script, short_run_parser

PEOPLE = 1024  # of each kind
BATCH = 4
QUERIES = ((0.15, 0.5), (0.52, 0.63), (0.05, 0.05))  # the headband, an eye, the background


def portraits(hair: tuple[int, int, int], first: int) -> Tensor:
    """Faces that differ in everything but the color of their hair: (N, 3, 32, 32) in [-1, 1]."""
    people = faces.traits(PEOPLE, first=first)._replace(hair=np.tile(np.array(hair, np.float32), (PEOPLE, 1)))
    return torch.from_numpy(faces.render(people, size=32)).float() / 127.5 - 1


def train(
    to_b: nn.Module, to_a: nn.Module, is_b: nn.Module, is_a: nn.Module, a: Tensor, b: Tensor, steps: int, when: str
) -> None:
    """Train the generators A -> B and B -> A and the discriminators of B and A on images (N, 3, 32, 32) in [-1, 1].

    Without the paper's pool of earlier images and without decaying rates.
    """
    g_adam, d_adam = (
        torch.optim.Adam(nn.ModuleList(pair).parameters(), lr=2e-4, betas=(0.5, 0.999), fused=True)
        for pair in ((to_b, to_a), (is_b, is_a))
    )
    for _ in trange(steps, desc=when):
        real_a, real_b = (images[torch.randint(len(images), (BATCH,))] for images in (a, b))  # (B, 3, 32, 32)
        # Instance norm keeps the images of a batch apart, so two batches can share a pass.
        fake_b, same_b = to_b(torch.cat([real_a, real_b])).chunk(2)
        fake_a, same_a = to_a(torch.cat([real_b, real_a])).chunk(2)
        fooling = (is_b(fake_b) - 1).square().mean() + (is_a(fake_a) - 1).square().mean()
        cycle = l1_loss(to_a(fake_b), real_a) + l1_loss(to_b(fake_a), real_b)
        identity = l1_loss(same_a, real_a) + l1_loss(same_b, real_b)
        g_adam.zero_grad()
        (fooling + 10 * cycle + 5 * identity).backward()
        g_adam.step()
        d_adam.zero_grad()
        for network, real, fake in ((is_b, real_b, fake_b), (is_a, real_a, fake_a)):
            of_real, of_fake = network(torch.cat([real, fake.detach()])).chunk(2)  # (B, 1, 6, 6)
            loss = (of_real - 1).square().mean() + of_fake.square().mean()
            (loss / 2).backward()
        d_adam.step()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = short_run_parser(
        "Put attention into a CycleGAN that turns dark hair fair and back.", 600, out="runs/attention-in-cyclegan"
    )
    parser.add_argument(
        "--attention", choices=("both", "generators", "discriminators", "none"), default="both",
        help="the networks that get it (default: %(default)s)",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # more threads would add in another order and give another figure
    torch.manual_seed(args.seed)
    dark, fair = portraits(faces.HAIR[0], first=0), portraits(faces.HAIR[3], first=PEOPLE)
    to_fair, to_dark, is_fair, is_dark = networks = Generator(), Generator(), Discriminator(), Discriminator()
    train(*networks, dark, fair, args.steps // 5, "before")

    before = [network(dark[:8]) for network in networks]
    for generator in (to_fair, to_dark):
        insert_self_attention(generator, after=["model.9", "model.15"], example_input=dark[:1])
    for discriminator in (is_fair, is_dark):
        insert_self_attention(discriminator, after="model.4", example_input=dark[:1])
    after = [network(dark[:8]) for network in networks]
    print("unchanged by the insertion:", all(map(torch.equal, before, after)))
    plain = {"both": (), "generators": networks[2:], "discriminators": networks[:2], "none": networks}[args.attention]
    for network in plain:  # removed now, not left out before, so that every choice trains on the same batches
        remove_self_attention(network)

    train(*networks, dark, fair, args.steps - args.steps // 5, "after")  # its new optimizers know the layers
    for name, network in zip(("to fair", "to dark", "is fair", "is dark"), networks, strict=True):
        if network not in plain:
            print("gamma of", name, *(f"{p.item():+.4f}" for n, p in network.named_parameters() if n.endswith("gamma")))
    with torch.no_grad():
        new, truth = portraits(faces.HAIR[0], first=2 * PEOPLE), portraits(faces.HAIR[3], first=2 * PEOPLE)
        error = l1_loss(torch.cat([to_fair(images) for images in new.split(64)]), truth)
        print(
            f"mean absolute error {error:.4f} on {PEOPLE} new faces; of the faces themselves {l1_loss(new, truth):.4f}"
        )
        translated = to_fair(dark[:8])
        save_grid(args.out / "samples.png", torch.cat([dark[:8], translated, to_dark(translated)]), columns=8)
        if to_fair not in plain:
            with record_attention(to_fair) as records:
                to_fair(dark[:4])
            save_attention(args.out / "attention.png", dark[:4], records["model.9.inserted_attention"][-1], QUERIES)
    print(f"images in {args.out}")


if __name__ == "__main__":
    script(main)
