"""Measure how fast the layers are, as ratios to plain implementations, in one process.

    python examples/benchmark.py                          # everything, some ten minutes on two CPU cores
    python examples/benchmark.py attention                # one part; --help lists them
    python examples/benchmark.py --device cuda --json benchmark.json --plot growth.svg

Each number is the median of repeats that take turns with the baseline's, so that a machine whose speed drifts does not
favour either. A ratio above 1 means that the library is so many times as fast. The plain implementations are those
of the public PyTorch repositories: two ``bmm`` and a softmax; power iterations with a dozen small operations; a graph
of the generated images in the discriminator's step.
"""

from __future__ import annotations

import training.threads  # noqa: F401  before torch  # isort: skip

import argparse
import importlib.util
import json
import multiprocessing
import platform
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import torch_sagan
from measurement.passes import attention_layers, forward_backward, forward_only, gradient_penalty
from measurement.peak_memory import can_measure_memory, peak_memory, peak_of_this_process
from measurement.stopwatch import Run, Stopwatch
from measurement.tables import draw_growth, print_rows
from networks.plain import plain_step
from torch_sagan import SAGANDiscriminator, SAGANGenerator, spectral_norm
from training.objectives import objective
from training.step import GAN, Piece, no_augmentation, training_step

ATTENTION_SHAPES = [(16, 256, 8), (16, 128, 16), (16, 64, 32), (4, 64, 64), (1, 32, 128)]  # B, C, H = W
PENALTY_SHAPES = [(16, 128, 16), (16, 64, 32), (1, 32, 64), (4, 64, 64)]
MEMORY_FROM = 32 * 32  # positions; with fewer, the noise of the process is larger than the attention matrix


def rates(watch: Stopwatch) -> dict[str, float]:
    """The best rates of this machine: products (GFLOP/s), exponentials (G/s) and copies (GB/s, read and written)."""
    n = 2048 if watch.device.type == "cpu" else 8192
    matrix = torch.randn(n, n, device=watch.device)
    cached = torch.rand(2**18 if watch.device.type == "cpu" else 2**26, device=watch.device)
    large = torch.randn(2**25, device=watch.device)
    into, target = torch.empty_like(cached), torch.empty_like(large)
    seconds = watch(
        product=lambda: matrix @ matrix,
        exponential=lambda: torch.exp2(cached, out=into),
        copy=lambda: target.copy_(large),
    )
    return {
        "product": 2 * n**3 / seconds["product"] / 1e9,
        "exponential": cached.numel() / seconds["exponential"] / 1e9,
        "copy": 2 * 4 * large.numel() / seconds["copy"] / 1e9,
    }


def bound(shape: tuple[int, int, int], rate: dict[str, float]) -> tuple[float, float]:
    """The least seconds for forward, and forward + backward with recomputation: products, exponentials, and reading or
    writing each tensor of the layer once."""
    batch, channels, size = shape
    d, e, n = max(1, channels // 8), channels, size * size
    maps, projections = batch * n * n, 2 * batch * n * channels * (2 * d + e)
    tensors = 4 * batch * n * (2 * d + 4 * e)

    def seconds(flops: float, exponentials: float, moved: float) -> float:
        return (flops / rate["product"] + exponentials / rate["exponential"] + moved / rate["copy"]) / 1e9

    forward = seconds(2 * maps * (d + e) + projections, maps, tensors)
    backward = seconds(2 * maps * (3 * d + 2 * e) + 2 * projections, maps, 2 * tensors)
    return forward, forward + backward


def attention(watch: Stopwatch, dtype: torch.dtype, rate: dict[str, float]) -> list[dict[str, Any]]:
    """The layer at five shapes: time forward, forward + backward, and memory."""
    rows = []
    for shape in ATTENTION_SHAPES:
        batch, channels, size = shape
        layers = attention_layers(channels, watch.device)
        x = torch.randn(batch, channels, size, size, device=watch.device)
        gradient = torch.randn_like(x)
        with autocast(watch.device, dtype):
            forward = watch(**{name: forward_only(layer, x) for name, layer in layers.items()})
            both = watch(**{name: forward_backward(layer, x, gradient) for name, layer in layers.items()})
        row: dict[str, Any] = {"B, C, H×W": f"{batch}, {channels}, {size}×{size}"}
        for what, seconds, least in zip(("forward", "both"), (forward, both), bound(shape, rate), strict=True):
            row |= {
                f"{what}: plain ms": 1e3 * seconds["plain"],
                "ours ms" if what == "forward" else "ours  ms": 1e3 * seconds["ours"],
                f"{what} plain/ours": seconds["plain"] / seconds["ours"],
                f"{what} sdpa/ours": seconds["sdpa"] / seconds["ours"],
                f"{what} padded/ours": seconds["padded"] / seconds["ours"],
            }
            if dtype == torch.float32:
                row[f"{what} of bound"] = f"{least / seconds['ours']:.0%}"
        if size * size >= MEMORY_FROM and can_measure_memory(watch.device) and dtype == torch.float32:
            row["MiB plain"], row["sdpa"], row["padded"], row["ours"] = (
                peak_memory(kind, shape, watch.device) for kind in ("plain", "sdpa", "padded", "ours")
            )
        rows.append(row)
        print_rows(rows[-1:], header=len(rows) == 1)
    return rows


def penalty(watch: Stopwatch) -> list[dict[str, Any]]:
    """WGAN-GP's penalty through the layer, which differentiates attention twice: time and memory."""
    rows = []
    for shape in PENALTY_SHAPES:
        batch, channels, size = shape
        layers = attention_layers(channels, watch.device)
        del layers["sdpa"], layers["padded"]  # PyTorch's fused kernels have no second derivative
        x = torch.randn(batch, channels, size, size, device=watch.device)
        gradient = torch.randn_like(x)
        seconds = watch(**{name: gradient_penalty(layer, x, gradient) for name, layer in layers.items()})
        row: dict[str, Any] = {"B, C, H×W": f"{batch}, {channels}, {size}×{size}"}
        row |= {f"{name} ms": 1e3 * value for name, value in seconds.items()}
        row["plain/ours"] = seconds["plain"] / seconds["ours"]
        if size * size >= MEMORY_FROM and can_measure_memory(watch.device):
            memory = {name: peak_memory(name, shape, watch.device, gradient_penalty) for name in layers}
            row |= {"MiB plain": memory["plain"], "MiB ours": memory["ours"]}
            row["MiB ours/plain"] = memory["ours"] / memory["plain"]
        rows.append(row)
        print_rows(rows[-1:], header=len(rows) == 1)
    return rows


def growth(watch: Stopwatch) -> list[dict[str, Any]]:
    """How the time and the memory of one training pass grow: with N, with B and with C."""
    rows = []
    sizes = (8, 16, 32, 64, 96, 128)
    for shape in [(1, 64, size) for size in sizes] + [(b, 64, 32) for b in (4, 16)] + [(1, c, 64) for c in (16, 256)]:
        batch, channels, size = shape
        layers = attention_layers(channels, watch.device)
        x = torch.randn(batch, channels, size, size, device=watch.device)
        seconds = watch(**{name: forward_backward(layer, x, torch.ones_like(x)) for name, layer in layers.items()})
        memory = {name: peak_memory(name, shape, watch.device) for name in layers if can_measure_memory(watch.device)}
        rows.append(
            {"B": batch, "C": channels, "N": size * size}
            | {f"{name} ms": 1e3 * value for name, value in seconds.items()}
            | {f"{name} MiB": value for name, value in memory.items()}
        )
        print_rows(rows[-1:], header=len(rows) == 1)
    return rows


def spectral(watch: Stopwatch) -> list[dict[str, Any]]:
    """What spectral norm adds to a training pass of one convolution, and of the whole 64-pixel discriminator."""
    kinds: dict[str, Callable[[nn.Module], nn.Module] | None] = {
        "none": None,
        "torch": parametrizations.spectral_norm,
        "ours": spectral_norm,
    }
    convolutions: dict[str, nn.Module] = {}
    for name, normalize in kinds.items():
        convolution = nn.Conv2d(256, 512, 4, 2, 1).to(watch.device)
        convolutions[name] = normalize(convolution) if normalize else convolution
    networks: dict[str, nn.Module] = {
        name: SAGANDiscriminator(64, spectral_norm=normalize).to(watch.device) for name, normalize in kinds.items()
    }
    comparisons: list[tuple[str, dict[str, nn.Module], Tensor]] = [
        ("Conv2d(256, 512, 4) to 4×4, batch 1", convolutions, torch.randn(1, 256, 8, 8, device=watch.device)),
        ("discriminator, 64 px, batch 8", networks, torch.randn(8, 3, 64, 64, device=watch.device)),
    ]
    rows = []
    for title, modules, x in comparisons:
        gradient = torch.ones_like(modules["none"](x))
        seconds = watch(**{name: forward_backward(module, x, gradient) for name, module in modules.items()})
        extra = {name: seconds[name] - seconds["none"] for name in ("torch", "ours")}
        rows.append(
            {"spectral norm on": title}
            | {f"{name} ms": 1e3 * value for name, value in seconds.items()}
            | {"extra torch ms": 1e3 * extra["torch"], "extra ours ms": 1e3 * extra["ours"]}
            | {"ours/torch": extra["ours"] / extra["torch"]}
        )
    print_rows(rows)
    return rows


def our_step(
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    compiled: bool = False,
    image_size: int = 64,
    num_classes: int | None = None,
    architecture: Literal["dcgan", "resnet"] = "dcgan",
) -> Run:
    """The step of the examples: images generated once, one pass of D, no unused gradients."""
    generator = SAGANGenerator(image_size, num_classes=num_classes, architecture=architecture).to(device)
    discriminator = SAGANDiscriminator(image_size, num_classes=num_classes, architecture=architecture).to(device)
    real = torch.randn(batch, 3, image_size, image_size, device=device).clamp(-1, 1)
    labels = None if num_classes is None else torch.randint(num_classes, (batch,), device=device)
    if compiled:
        generator.compile()
        discriminator.compile()
    gan = GAN(
        generator,
        discriminator,
        adam(generator, 1e-4),
        adam(discriminator, 4e-4),
        objective("hinge", 0.0, no_augmentation),
        partial(autocast, device, dtype),
    )

    def run() -> None:
        training_step(gan, iter([[Piece(real, torch.randn(batch, 128, device=device), labels)]]))

    return run


def step(watch: Stopwatch, batch: int) -> list[dict[str, Any]]:
    """One discriminator step and one generator step of the 64-pixel networks."""
    make: dict[str, Callable[[], Run]] = {
        "plain, float32": partial(plain_step, batch, watch.device, torch.float32),
        "ours, float32": partial(our_step, batch, watch.device, torch.float32),
        "ours, float32, compiled": partial(our_step, batch, watch.device, torch.float32, compiled=True),
    }
    if multiplies_bfloat16(watch.device):
        make |= {
            "plain, bf16": partial(plain_step, batch, watch.device, torch.bfloat16),
            "ours, bf16": partial(our_step, batch, watch.device, torch.bfloat16),
            "ours, bf16, compiled": partial(our_step, batch, watch.device, torch.bfloat16, compiled=True),
        }
    seconds = watch(**{name: build() for name, build in make.items()})
    rows = [
        {f"D + G step, batch {batch}": name, "ms": 1e3 * value, "images/s": batch / value}
        | {"plain float32 / this": seconds["plain, float32"] / value}
        for name, value in seconds.items()
    ]
    print_rows(rows)
    return rows


def residual(watch: Stopwatch) -> list[dict[str, Any]]:
    """One step of the paper's own network at 128 pixels, in a process of its own."""
    batch = 8 if watch.device.type == "cpu" else 64
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seconds, peak = pool.apply(_residual_step, (batch, watch.device))
    row = {"D + G step": "resnet, 128 px, 1000 classes", "batch": batch, "s": seconds, "images/s": batch / seconds}
    if peak is not None:
        row["peak of the process, GiB"] = peak
    print_rows([row])
    return [row]


def _residual_step(batch: int, device: torch.device) -> tuple[float, float | None]:
    run = our_step(batch, device, torch.float32, image_size=128, num_classes=1000, architecture="resnet")
    run()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter() - start, torch.cuda.max_memory_allocated() / 2**30
    seconds = time.perf_counter() - start
    return seconds, peak_of_this_process() / 2**10 if can_measure_memory(device) else None


def data(watch: Stopwatch) -> list[dict[str, Any]]:
    """How fast the trainer's loader gives batches of 64: from JPEGs, from a zip of them, and from their cache."""
    # Imported here, because only this part reads images.
    from train_celeba import read_images
    from training.configuration import Config
    from training.data import open_data
    from training.distributed import SINGLE_PROCESS

    config = Config(data="photographs")

    def feed(source: Any, steps: int) -> float:
        """Images per second, after the batches that the workers prepared in advance."""
        batches = read_images(source, config, 0, watch.device, SINGLE_PROCESS)
        for _ in range(1 + 2 * config.num_workers):
            next(batches)
        start = time.perf_counter()
        for _ in range(steps):
            next(batches)
        return steps * config.batch_size / (time.perf_counter() - start)

    rows = []
    with tempfile.TemporaryDirectory() as at:
        for what, path in zip(("folder", "zip"), photographs(Path(at)), strict=True):
            stream = open_data(str(path), size=64, crop=160)
            start = time.perf_counter()
            cache = open_data(str(path), size=64, crop=160, cache=Path(at, "cache"))
            build = len(stream) / (time.perf_counter() - start)
            turns = [(feed(stream, 32), feed(cache, 1600)) for _ in range(3)]
            streamed, cached = map(statistics.median, zip(*turns, strict=True))
            rows.append(
                {"2000 JPEGs, 178×218 to 64×64": what, "decoded img/s": streamed, "building img/s": build}
                | {"cached img/s": cached, "cached/decoded": cached / streamed}
            )
    print_rows(rows)
    return rows


def photographs(at: Path) -> tuple[Path, Path]:
    """A folder and a zip of 2000 JPEGs of the size of aligned CelebA's, cropped from scikit-learn's photographs."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    folder, archive = at / "photographs", at / "photographs.zip"
    folder.mkdir()
    originals = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    corners = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0)).tolist()
    with zipfile.ZipFile(archive, "w") as zipped:
        for number, (scale, x, y) in enumerate(corners):
            original, file = originals[number % 2], folder / f"{number:06d}.jpg"
            height = 218 + scale * (original.height - 218)
            width = height * 178 / 218
            left, top = x * (original.width - width), y * (original.height - height)
            box = (left, top, left + width, top + height)
            original.resize((178, 218), Image.Resampling.BICUBIC, box).save(file, quality=90)
            zipped.write(file, file.name)
    return folder, archive


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is worth timing: processors that emulate it take a minute instead of a second."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported())


def adam(module: nn.Module, lr: float) -> torch.optim.Adam:
    return torch.optim.Adam(module.parameters(), lr, betas=(0.0, 0.9), fused=True)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("rates", "attention", "penalty", "growth", "spectral", "step", "residual", "data")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)} (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each comparison (default: 5)")
    parser.add_argument("--batch-size", type=int, help="images in a step (default: 32, on CUDA 64)")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--plot", type=Path, help="also draw the part growth to this SVG or PNG (needs matplotlib)")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(parts)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}: choose from {', '.join(parts)}")
    if arguments.plot and arguments.parts and "growth" not in arguments.parts:
        parser.error("--plot draws the part growth: add it to the parts")
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is not installed")
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is available")
    chosen = arguments.parts or parts
    watch = Stopwatch(device, arguments.seconds)
    torch.manual_seed(0)

    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else name,
        "versions": f"torch {torch.__version__}, torch-sagan {torch_sagan.__version__}",
    }
    print(*results.values(), sep="; ")
    rate = results["rates"] = rates(watch)
    print(
        "at best: product {product:.0f} GFLOP/s, exponential {exponential:.2f} G/s, copy {copy:.1f} GB/s".format(**rate)
    )
    for dtype in (torch.float32, torch.bfloat16) if multiplies_bfloat16(device) else (torch.float32,):
        if "attention" in chosen:
            label = str(dtype).removeprefix("torch.")
            print(f"\nSelfAttention2d, {label} (both = forward + backward)")
            results[f"attention, {label}"] = attention(watch, dtype, rate)
    if "penalty" in chosen:
        print("\nWGAN-GP's penalty through SelfAttention2d, float32")
        results["penalty"] = penalty(watch)
    if "growth" in chosen:
        print("\nGrowth of one training pass, float32")
        results["growth"] = growth(watch)
        if arguments.plot:
            draw_growth(results["growth"], arguments.plot)
    if "spectral" in chosen:
        print("\nSpectral norm, forward + backward")
        results["spectral"] = spectral(watch)
    if "step" in chosen:
        print("\nThe whole training step, 64-pixel networks")
        results["step"] = step(watch, arguments.batch_size or (64 if device.type == "cuda" else 32))
    if "residual" in chosen:
        print("\nThe paper's own network")
        results["residual"] = residual(watch)
    if "data" in chosen:
        print("\nReading images, as the trainer does")
        results["data"] = data(watch)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        print(f"\nwrote {arguments.json}")


if __name__ == "__main__":
    main()
