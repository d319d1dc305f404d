"""Attention for an existing DCGAN: a line for each network, and they return what they did, until they are trained on.

    python examples/attention_in_dcgan.py            # under two minutes on one CPU core, nothing to download

`networks/dcgan.py` stands for your model: nothing in it knows of attention. Its D ends in a Sigmoid, which is taken out
first. An eighth of the training comes before the insertion.
"""

from __future__ import annotations

import training.threads  # noqa: F401  before torch  # isort: skip

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import trange

from networks.dcgan import Z_DIM, Discriminator, Generator
from torch_sagan import SelfAttention2d, apply_spectral_norm, insert_self_attention, record_attention
from training.data import procedural_faces as faces
from training.output.image_io import save_attention, save_grid
from training.script import script, short_run_parser

PEOPLE, BATCH = 2048, 16
QUERIES = ((0.52, 0.63), (0.73, 0.5), (0.2, 0.5), (0.95, 0.5))  # an eye, the mouth, the headband, the shirt


def attention(channels: int) -> nn.Module:
    # Without a norm the weights grow, and the softmax soon attends to a single position.
    return apply_spectral_norm(SelfAttention2d.official(channels))


def train(generator: nn.Module, discriminator: nn.Module, images: Tensor, steps: int, when: str) -> None:
    """Train both on images (N, 3, 32, 32) in [-1, 1]."""
    g_adam, d_adam = (
        torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.5, 0.999), fused=True)
        for network in (generator, discriminator)
    )
    bce, ones, zeros = binary_cross_entropy_with_logits, torch.ones(BATCH), torch.zeros(BATCH)
    for _ in trange(steps, desc=when):
        real = images[torch.randint(len(images), (BATCH,))]  # (B, 3, 32, 32)
        fake = generator(torch.randn(BATCH, Z_DIM, 1, 1))
        d_adam.zero_grad()
        (bce(discriminator(real), ones) + bce(discriminator(fake.detach()), zeros)).backward()
        d_adam.step()
        g_adam.zero_grad()
        bce(discriminator(fake), ones).backward()
        g_adam.step()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = short_run_parser(
        "Put attention into a DCGAN and train it on procedural faces.", 1400, out="runs/attention-in-dcgan"
    )
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # more threads would add in another order and give another figure
    torch.manual_seed(args.seed)
    images = torch.from_numpy(faces.render(faces.traits(PEOPLE), size=32)).float() / 127.5 - 1  # (N, 3, 32, 32)
    z = torch.randn(32, Z_DIM, 1, 1)
    generator, discriminator = Generator(), Discriminator()
    discriminator.main[-1] = nn.Identity()  # was a Sigmoid: losses take logits
    train(generator, discriminator, images, args.steps // 8, "before")

    before = generator(z), discriminator(images[:32])
    insert_self_attention(generator, after="main.8", example_input=z, attention=attention)
    insert_self_attention(discriminator, after="main.4", example_input=images[:1], attention=attention)
    after = generator(z), discriminator(images[:32])
    print("unchanged by the insertion:", all(map(torch.equal, before, after)))

    train(generator, discriminator, images, args.steps - args.steps // 8, "after")  # its new optimizers know the layers
    print("gamma of G", *(f"{p.item():+.4f}" for name, p in generator.named_parameters() if name.endswith("gamma")))
    print("gamma of D", *(f"{p.item():+.4f}" for name, p in discriminator.named_parameters() if name.endswith("gamma")))
    with record_attention(generator.eval()) as records, torch.no_grad():
        samples, shown = generator(z), generator(z[:4])
    save_grid(args.out / "samples.png", samples, columns=8)
    save_attention(args.out / "attention.png", shown, records["main.8.inserted_attention"][-1], QUERIES)
    print(f"images in {args.out}")


if __name__ == "__main__":
    script(main)
