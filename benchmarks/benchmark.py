"""Measure how fast the layers are, as ratios to plain implementations, in one process.

    python benchmarks/benchmark.py                          # everything, some ten minutes on two CPU cores
    python benchmarks/benchmark.py attention                # one part; --help lists them
    python benchmarks/benchmark.py --device cuda --json benchmark.json --plot growth.svg
    python benchmarks/benchmark.py --draw docs/images/attention-growth.json   # a chart from results, as in the docs

Each number is the median of repeats that take turns with the baseline's, so that a machine whose speed drifts does not
favor either. A ratio above 1 means that the library is so many times as fast. The plain implementations are those
of the public PyTorch repositories: two ``bmm`` and a softmax; power iterations with a dozen small operations; a graph
of the generated images in the discriminator's step. On CUDA attention has more peers, and a floor that the card's own
rates give; precision and layout there are the trainer's.
"""

from __future__ import annotations

import examples_path  # noqa: F401  # isort: skip
import training.threads  # noqa: F401  before torch  # isort: skip

import argparse
import gc
import json
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import torch_sagan
from measurement.contenders import CUDA_SHAPES, compare, small_matrix
from measurement.derivatives import CONTENDERS, PASSES, fits, peak, points
from measurement.floors import Rates, attention_work, layer_work, measure_rates, times
from measurement.growth_chart import growth_chart
from measurement.passes import (
    attention_layers,
    feature_map,
    forward_backward,
    forward_only,
    gradient_penalty,
    in_trained_layout,
)
from measurement.peak_memory import can_measure_memory, peak_memory, peak_of_this_process
from measurement.photographs import photographs
from measurement.plain import plain_step
from measurement.stopwatch import CALLS, Run, Stopwatch, on_device
from measurement.summary_chart import draw
from measurement.tables import print_rows
from torch_sagan import SAGANDiscriminator, spectral_norm
from training.architectures import build_discriminator
from training.flags import Config
from training.runs.atomic_files import write_text
from training.runs.distributed import SINGLE_PROCESS, pick_device
from training.script import Parser, given_path, script
from training.state import TrainingState
from training.step import Piece

ATTENTION_SHAPES = [(16, 256, 8), (16, 128, 16), (16, 64, 32), (4, 64, 64), (1, 32, 128)]  # B, C, H = W
PENALTY_SHAPES = [(16, 128, 16), (16, 64, 32), (1, 32, 64), (4, 64, 64)]
ON_DEVICE = f"; time of the kernels, from replays of a CUDA graph of {CALLS} calls"  # in a table's header
VOLUME_SHAPES = [(1, 32, 16), (1, 32, 32)]  # B, C, D = H = W
DERIVATIVE_SIZES = [1024, 4096, 8192, 16384]  # N
MEMORY_FROM = 32 * 32  # positions; with fewer, the noise of the process is larger than the attention matrix


def attention(watch: Stopwatch, dtype: torch.dtype, rates: Rates) -> list[dict[str, Any]]:
    """The layer at five shapes: time forward, forward + backward, and memory."""
    rows = []
    for shape in ATTENTION_SHAPES:
        batch, channels, size = shape
        layers = attention_layers(channels, watch.device)
        x = feature_map(batch, channels, size, watch.device)
        gradient = torch.randn_like(x)
        with autocast(watch.device, dtype):
            forward = watch(**{name: forward_only(layer, x) for name, layer in layers.items()})
            both = watch(**{name: forward_backward(layer, x, gradient) for name, layer in layers.items()})
        row: dict[str, Any] = {"B, C, H×W": f"{batch}, {channels}, {size}×{size}"}
        # On a CPU the three kinds of work follow each other.
        bounds = [sum(times(work, rates).values()) for work in layer_work(*shape)]
        least_of = bounds[0], sum(bounds)
        for what, seconds, least in zip(("forward", "both"), (forward, both), least_of, strict=True):
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


def attention_on_cuda(watch: Stopwatch, dtype: torch.dtype, rates: Rates) -> list[dict[str, Any]]:
    """Attention alone against all that PyTorch offers, and against the least time that this card would need."""
    rows = []
    for shape in CUDA_SHAPES:
        floors = [times(work, rates) for work in attention_work(shape, dtype.itemsize)]
        limits = [max(floor, key=floor.__getitem__) for floor in floors]
        least = [f"{1e6 * floor[limit]:.3g} µs ({limit})" for floor, limit in zip(floors, limits, strict=True)]
        print(f"\nB, D, E, N, M = {str(shape)[1:-1]}: floor {least[0]} forward, {least[1]} backward")
        found = compare(watch, shape, dtype, rates)
        print_rows(found)
        rows += [{"B, D, E, N, M": shape} | row for row in found]
        gc.collect()
        torch.cuda.empty_cache()  # of the graphs
    return rows


def penalty(watch: Stopwatch) -> list[dict[str, Any]]:
    """WGAN-GP's penalty through the layer, which differentiates attention twice: time and memory."""
    rows = []
    for shape in PENALTY_SHAPES:
        batch, channels, size = shape
        layers = attention_layers(channels, watch.device)
        del layers["sdpa"], layers["padded"]  # PyTorch's fused kernels have no second derivative
        x = feature_map(batch, channels, size, watch.device)
        gradient = torch.randn_like(x)
        runs = {name: gradient_penalty(layer, x, gradient) for name, layer in layers.items()}
        seconds = watch(**{name: on_device(run, watch.device) for name, run in runs.items()})
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


def volume(device: torch.device) -> list[dict[str, Any]]:
    """The memory of the layer for volumes, each pass in a process of its own; on a CPU, minutes for the larger one."""
    rows: list[dict[str, Any]] = []
    for batch, channels, size in VOLUME_SHAPES:
        row: dict[str, Any] = {"B, C, D×H×W": f"{batch}, {channels}, {size}×{size}×{size}"}
        row["one matrix, MiB"] = batch * size**6 * 4 / 2**20
        for name, make in (("forward + backward", forward_backward), ("gradient penalty", gradient_penalty)):
            if can_measure_memory(device):
                row[f"{name}, MiB"] = peak_memory("volume", (batch, channels, size), device, make)
        rows.append(row)
        print_rows(rows[-1:], header=len(rows) == 1)
    return rows


def derivatives(watch: Stopwatch) -> list[dict[str, Any]]:
    """First, second and forward derivatives of attention: time and memory, of all that have them and fit."""
    rows: list[dict[str, Any]] = []
    for n in DERIVATIVE_SIZES:
        x = points(n, watch.device)
        fitting = [name for name in CONTENDERS if name == "ours" or fits(n, watch.device)]
        turns = watch if n <= DERIVATIVE_SIZES[1] else Stopwatch(watch.device, 0.0, at_least=1)
        for derivative, make in PASSES.items():
            seconds = turns(**{name: make(CONTENDERS[name], x) for name in fitting})
            row = {"N": n, "derivative": derivative} | {f"{name} ms": 1e3 * seconds[name] for name in fitting}
            row |= {f"{name}/ours": seconds[name] / seconds["ours"] for name in fitting if name != "ours"}
            if can_measure_memory(watch.device):
                row |= {f"{name} MiB": peak(name, derivative, n, watch.device) for name in fitting}
            rows.append(row)
            print_rows(rows[-1:], header=derivative == "gradient")
    return rows


def growth(watch: Stopwatch) -> list[dict[str, Any]]:
    """How the time and the memory of one training pass grow: with N, with B and with C."""
    rows = []
    sizes = (8, 16, 32, 64, 96, 128)
    for shape in [(1, 64, size) for size in sizes] + [(b, 64, 32) for b in (4, 16)] + [(1, c, 64) for c in (16, 256)]:
        batch, channels, size = shape
        layers = attention_layers(channels, watch.device)
        x = feature_map(batch, channels, size, watch.device)
        runs = {name: forward_backward(layer, x, torch.ones_like(x)) for name, layer in layers.items()}
        seconds = watch(**{name: on_device(run, watch.device) for name, run in runs.items()})
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
        "convolution's": partial(spectral_norm, of="convolution", input_size=8),
    }
    convolutions: dict[str, nn.Module] = {}
    for name, normalize in kinds.items():
        convolution = nn.Conv2d(256, 512, 4, 2, 1)
        convolutions[name] = (normalize(convolution) if normalize else convolution).to(watch.device)
    networks: dict[str, nn.Module] = {}
    for name, normalize in kinds.items():
        if name == "convolution's":
            networks[name] = build_discriminator("dcgan", 64, attention_resolutions=None, norm_of="convolution")
        else:
            networks[name] = SAGANDiscriminator(64, spectral_norm=normalize)
        networks[name].to(watch.device)
    comparisons: list[tuple[str, dict[str, nn.Module], Tensor]] = [
        ("Conv2d(256, 512, 4) to 4×4, batch 1", convolutions, torch.randn(1, 256, 8, 8, device=watch.device)),
        ("discriminator, 64 px, batch 8", networks, torch.randn(8, 3, 64, 64, device=watch.device)),
    ]
    rows = []
    for title, modules, x in comparisons:
        x = in_trained_layout(x, watch.device)
        modules = {name: in_trained_layout(module, watch.device) for name, module in modules.items()}
        gradient = torch.ones_like(modules["none"](x))
        seconds = watch(**{name: forward_backward(module, x, gradient) for name, module in modules.items()})
        extra = {name: seconds[name] - seconds["none"] for name in ("torch", "ours", "convolution's")}
        rows.append(
            {"spectral norm on": title}
            | {f"{name} ms": 1e3 * value for name, value in seconds.items()}
            | {"extra torch ms": 1e3 * extra["torch"], "extra ours ms": 1e3 * extra["ours"]}
            | {"extra convolution's ms": 1e3 * extra["convolution's"]}
            | {"ours/torch": extra["ours"] / extra["torch"]}
            | {"convolution's, share of the pass": extra["convolution's"] / seconds["convolution's"]}
        )
    print_rows(rows)
    return rows


def our_step(batch: int, device: torch.device, *, num_classes: int = 0, **settings: Any) -> Run:
    """The step of the trainer with these settings: images generated once, one pass of D, no unused gradients."""
    config = Config(batch_size=batch, classes="own" if num_classes else "none", **settings)
    state = TrainingState(config, classes={str(i): 1 for i in range(num_classes)}, device=device)
    real = state.to_device(torch.randint(256, (batch, 3, config.image_size, config.image_size), dtype=torch.uint8))
    labels = torch.randint(num_classes, (batch,), device=device) if num_classes else None
    take_step = state.take_step  # nothing else of the state is kept

    def run() -> None:
        take_step(iter([[Piece(real, torch.randn(batch, config.z_dim, device=device), labels)]]))

    return run


def step_variants(device: torch.device) -> dict[str, Callable[[int], Run]]:
    """The steps that are compared, by name, from the batch size."""
    variants: dict[str, Callable[[int], Run]] = {}
    for name, dtype in precisions(device).items():
        ours = partial(our_step, device=device, precision=name)
        variants[f"plain, {name}"] = partial(plain_step, device=device, dtype=dtype)
        variants |= {f"ours, {name}": ours, f"ours, {name}, compiled": partial(ours, compile=True)}
        if device.type == "cuda":
            variants[f"ours, {name}, CUDA graph"] = partial(ours, cuda_graph=True)
    return variants


def step(watch: Stopwatch, batch: int) -> list[dict[str, Any]]:
    """One discriminator step and one generator step of the 64-pixel networks."""
    seconds = watch(**{name: build(batch) for name, build in step_variants(watch.device).items()})
    rows = [
        {f"D + G step, batch {batch}": name, "ms": 1e3 * value, "images/s": batch / value}
        | {"plain float32 / this": seconds["plain, float32"] / value}
        for name, value in seconds.items()
    ]
    print_rows(rows)
    return rows


def residual(watch: Stopwatch, batch: int) -> list[dict[str, Any]]:
    """One step of the paper's own network at 128 pixels: on a CPU once, in a process of its own."""
    measured = {}
    if watch.device.type == "cuda":
        for name in precisions(watch.device):
            for graph in (False, True):
                measured[name + ", CUDA graph" * graph] = _residual_step(batch, watch, name, graph)
    else:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            once = Stopwatch(watch.device, 0.0, at_least=1)
            measured["float32"] = pool.apply(_residual_step, (batch, once, "float32", False))
    rows = [
        {
            "D + G step": f"resnet, 128 px, 1000 classes, {name}",
            "batch": batch,
            "s": seconds,
            "images/s": batch / seconds,
        }
        | ({} if peak is None else {"peak, GiB": peak})
        for name, (seconds, peak) in measured.items()
    ]
    print_rows(rows)
    return rows


def _residual_step(batch: int, watch: Stopwatch, precision: str, graph: bool) -> tuple[float, float | None]:
    network: dict[str, Any] = {"image_size": 128, "architecture": "resnet", "num_classes": 1000}
    if watch.device.type == "cuda":
        gc.collect()  # the networks of the step before
        torch.cuda.reset_peak_memory_stats()
    run = our_step(batch, watch.device, precision=precision, cuda_graph=graph, **network)
    seconds = watch(step=run)["step"]
    if watch.device.type == "cuda":
        return seconds, torch.cuda.max_memory_allocated() / 2**30
    return seconds, peak_of_this_process() / 2**10 if can_measure_memory(watch.device) else None


def data(watch: Stopwatch) -> list[dict[str, Any]]:
    """How fast the trainer's loader gives batches of 64: from JPEGs, from a zip of them, and from their cache."""
    # Imported here, because only this part reads images.
    from train_celeba import read_images
    from training.data.sources import open_data

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


def precisions(device: torch.device) -> dict[str, torch.dtype]:
    """Those worth timing, by their `--precision`: devices that emulate bfloat16 take a minute instead of a second."""
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        bf16 = torch.cpu._is_avx512_bf16_supported()
    return {"float32": torch.float32} | ({"bf16": torch.bfloat16} if bf16 else {})


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def main(given: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("rates", "attention", "penalty", "volume", "derivatives", "growth", "spectral", "step", "residual", "data")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)} (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--seconds", type=float, help="time for each comparison (default: 5, on CUDA 1)")
    parser.add_argument("--batch-size", type=int, help="images in a step (default: 32, residual 8; on CUDA 64)")
    parser.add_argument("--json", type=given_path, help="also write everything to this file")
    parser.add_argument("--plot", type=given_path, help="also draw growth to this SVG")
    parser.add_argument(
        "--draw", type=given_path, metavar="RESULTS", help="only that chart, from a file that --json wrote"
    )
    arguments = parser.parse_args(given)
    if arguments.draw:
        draw(arguments.draw, lambda results: growth_chart(results["growth"]))
        return
    unknown = set(arguments.parts) - set(parts)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}: choose from {', '.join(parts)}")
    if arguments.plot and arguments.parts and "growth" not in arguments.parts:
        parser.error("--plot draws the part growth: add it to the parts")
    if not arguments.device.startswith(("cpu", "cuda")):
        parser.error(f"--device {arguments.device}: expected cpu or cuda")
    for file in filter(None, (arguments.json, arguments.plot)):  # now, not after ten minutes
        file.parent.mkdir(parents=True, exist_ok=True)
    device = pick_device(arguments.device, SINGLE_PROCESS)  # with the trainer's settings of matrix products and cuDNN
    cuda = device.type == "cuda"
    chosen = arguments.parts or parts
    watch = Stopwatch(device, arguments.seconds or (1.0 if cuda else 5.0))
    torch.manual_seed(0)

    name = torch.cuda.get_device_name() if cuda else platform.machine()
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "device": name if cuda else f"{name}, {torch.get_num_threads()} threads",
        "versions": f"torch {torch.__version__}, torch-sagan {torch_sagan.__version__}",
    }
    print(*results.values(), sep="; ")
    dtypes = precisions(device)
    # The bound of a CPU is of float32 alone.
    rates = {name: measure_rates(watch, dtype) for name, dtype in dtypes.items() if cuda or name == "float32"}
    results["rates"] = {name: best._asdict() for name, best in rates.items()}
    for name, best in rates.items():
        product, exponential, copy = (value / 1e9 for value in best)
        print(f"at best: product {product:.0f} GFLOP/s ({name}), exp {exponential:.2f} G/s, copy {copy:.1f} GB/s")
    for name, dtype in dtypes.items() if "attention" in chosen else ():
        if cuda:
            print(f"\nAttention, {name} (both = forward + backward{ON_DEVICE})")
            found = attention_on_cuda(watch, dtype, rates[name])
            print(small_matrix(found))
        else:
            print(f"\nSelfAttention2d, {name} (both = forward + backward)")
            found = attention(watch, dtype, rates["float32"])
        results[f"attention, {name}"] = found
    if "penalty" in chosen:
        print(f"\nWGAN-GP's penalty through SelfAttention2d, float32{ON_DEVICE * cuda}")
        results["penalty"] = penalty(watch)
    if "volume" in chosen:
        print("\nSelfAttention3d, float32: extra memory")
        results["volume"] = volume(device)
    if "derivatives" in chosen:
        print("\nDerivatives of attention with PyTorch's signature, one head of 64 channels, float32")
        results["derivatives"] = derivatives(watch)
    if "growth" in chosen:
        print(f"\nGrowth of one training pass, float32{ON_DEVICE * cuda}")
        results["growth"] = growth(watch)
        if arguments.plot:
            write_text(arguments.plot, growth_chart(results["growth"]))
    if "spectral" in chosen:
        print("\nSpectral norm, forward + backward")
        results["spectral"] = spectral(watch)
    if "step" in chosen:
        print("\nThe whole training step, 64-pixel networks")
        results["step"] = step(watch, arguments.batch_size or (64 if cuda else 32))
    if "residual" in chosen:
        print("\nThe paper's own network")
        results["residual"] = residual(watch, arguments.batch_size or (64 if cuda else 8))
    if "data" in chosen:
        print("\nReading images, as the trainer does")
        results["data"] = data(watch)
    if arguments.json:
        write_text(arguments.json, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        print(f"\nwrote {arguments.json}")


if __name__ == "__main__":
    script(main)
