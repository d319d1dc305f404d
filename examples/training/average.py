"""The moving average of the generator's weights: the generator that is sampled, evaluated and exported."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from torch_sagan import SAGANGenerator, recalibrate
from training.latents import draw_labels

CALIBRATION = 16, 64  # batches, and latent vectors in each: about a thousand samples fix the batch statistics


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, *, decay: float, steps: int) -> None:
    """average ← d · average + (1 − d) · model, after `steps` earlier updates of this average; a copy if `steps` is
    negative.

    d = min(decay, (1 + steps) / (10 + steps)): at first the average forgets quickly, so that the untrained weights
    are gone after a few steps. (`AveragedModel` counts on the device, and would wait for the GPU in each step.)
    """
    decay = min(decay, (1 + steps) / (10 + steps)) if steps >= 0 else 0.0
    get_ema_multi_avg_fn(decay)(list(average.parameters()), list(model.parameters()), 0)
    # Buffers (u and v, batch-norm statistics) are copied: averaged ones would not belong to any weights.
    buffers = list(zip(average.buffers(), model.buffers(), strict=True))
    for dtype in {ours.dtype for ours, _ in buffers}:  # CUDA copies tensors of one type at once, mixed ones one by one
        ours, theirs = zip(*(pair for pair in buffers if pair[0].dtype == dtype), strict=True)
        torch._foreach_copy_(ours, theirs)


def recalibrated(average: SAGANGenerator, images_per_class: Sequence[int] = ()) -> SAGANGenerator:
    """A copy of an averaged generator whose sigmas and batch statistics are those of its own weights.

    Labels are drawn as in training, by the numbers of images in its classes; if these are not known, all classes count
    the same. The result depends on nothing else, so that a run and a script that opens its checkpoint get the same.
    """
    rng = torch.Generator().manual_seed(0)
    device = next(average.parameters()).device

    def inputs() -> Iterator[tuple[Tensor, Tensor | None]]:
        batches, size = CALIBRATION
        for _ in range(batches):
            z = torch.randn(size, average.z_dim, generator=rng).to(device)  # (64, z_dim)
            labels = None
            if average.num_classes is not None:
                shares = images_per_class or [1] * average.num_classes
                labels = draw_labels(size, shares, rng).to(device)  # (64,)
            yield z, labels

    generator: SAGANGenerator = copy.deepcopy(average)
    return recalibrate(generator, inputs())
