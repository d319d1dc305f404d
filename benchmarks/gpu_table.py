"""What this machine does with the library: tables to paste into an issue. `make gpu` runs it after the tests.

    python benchmarks/gpu_table.py                        # on a GPU, minutes
    python benchmarks/gpu_table.py --device cpu --tiny    # a rehearsal: everything in tiny sizes

Times are medians. Those of attention are of its kernels alone, from replays of a CUDA graph, beside the floor that the
card's own rates give; all others are what a run has to wait for. `benchmark.py` compares more, and takes longer.
"""

from __future__ import annotations

import examples_path  # noqa: F401  # isort: skip
import training.threads  # noqa: F401  before torch  # isort: skip

import argparse
import gc
import itertools
import math
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

import torch_sagan
from measurement.floors import Rates, attention_work, measure_rates, times
from measurement.passes import attention_layers, feature_map, gradient_penalty
from measurement.peak_memory import allocated_by
from measurement.stopwatch import Run, Stopwatch, on_device
from torch_sagan import functional, spectral_norms
from training.average import recalibrated
from training.data.dataset import Batch
from training.data.loading import read_batches
from training.data.sources import ArrayDataset, InfiniteBatchSampler
from training.data.workers import usable_cores
from training.flags import Config
from training.output.sampling import draw
from training.runs.distributed import SINGLE_PROCESS, ShardSampler, pick_device
from training.script import Parser, given_path, script
from training.state import TrainingState

# A row: its name, and what measures its cells, which is called only if there is time left.
Row = tuple[str, Callable[[], Sequence[object]]]

# B, D, E, N, M, by the layer that has this shape.
SHAPES = {
    "D, 4×4": (128, 64, 512, 16, 16),
    "D, 8×8": (128, 32, 256, 64, 64),
    "G, 16×16": (64, 16, 128, 256, 256),
    "G, 32×32": (64, 8, 64, 1024, 1024),
    "residual D, 32×32": (512, 16, 64, 1024, 256),
    "residual G, 32×32": (256, 32, 128, 1024, 256),
    "64×64": (16, 8, 64, 4096, 4096),
    "128×128": (1, 8, 64, 16384, 16384),
}
PENALTIES = [(16, 128, 16), (16, 64, 32), (4, 64, 64), (1, 64, 128)]  # B, C, H = W


class Machine:
    """The device, how long to measure, and the rates that have been found."""

    def __init__(self, device: torch.device, *, tiny: bool) -> None:
        self.device, self.tiny, self.cuda = device, tiny, device.type == "cuda"
        self.watch = Stopwatch(device, 0.0 if tiny else 0.2)
        self.rates: dict[str, Rates] = {}
        # On a CPU most processors emulate bfloat16.
        self.dtypes = {"float32": torch.float32} | ({"bf16": torch.bfloat16} if self.cuda else {})

    def seconds(self, run: Run, *, kernels: bool = False) -> float:
        """The median time of a run, or of its kernels alone; NaN where memory does not suffice."""
        try:
            return self.watch(run=on_device(run, self.device) if kernels else run)["run"]
        except torch.OutOfMemoryError:
            return math.nan

    def mebibytes(self, run: Run) -> float:
        """The GPU's memory that a run takes at most; NaN where it does not suffice, and on a CPU."""
        try:
            return allocated_by(run) if self.cuda else math.nan
        except torch.OutOfMemoryError:
            return math.nan


class Section(NamedTuple):
    title: str
    columns: tuple[str, ...]
    rows: Callable[[Machine], Iterator[Row]]


def about(machine: Machine) -> Iterator[Row]:
    if machine.cuda:
        card = torch.cuda.get_device_properties(machine.device)
        yield (
            "card",
            lambda: [f"{card.name}, {card.total_memory / 2**30:.0f} GiB, capability {card.major}.{card.minor}"],
        )
        yield "driver", lambda: [driver()]
        yield "CUDA, cuDNN", lambda: [f"{torch.version.cuda}, {torch.backends.cudnn.version()}"]
    versions = f"{torch.__version__}, {torch_sagan.__version__}, {platform.python_version()}"
    yield "torch, torch-sagan, Python", lambda: [versions]
    yield "machine", lambda: [f"{platform.system()} {platform.machine()}, {usable_cores()} cores"]
    yield "date", lambda: [time.strftime("%Y-%m-%d")]


def driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def tests(report: Path, machine: Machine) -> Iterator[Row]:
    """The counts of pytest's report, and the names of the tests that failed."""
    if not report.exists():
        yield "they did not end", lambda: []
        return
    cases = list(ElementTree.parse(report).iter("testcase"))
    found = {kind: [case for case in cases if case.find(kind) is not None] for kind in ("failure", "error", "skipped")}
    failed = found["failure"] + found["error"]
    passed = len(cases) - len(failed) - len(found["skipped"])
    yield f"{passed} passed, {len(failed)} failed, {len(found['skipped'])} skipped", lambda: []
    for case in failed:
        yield case.get("name", ""), partial(list, [reason(case)])


def reason(case: ElementTree.Element) -> str:
    message = next(part.get("message", "") for part in case if part.tag in ("failure", "error"))
    return (message.splitlines() or [""])[0][:160]


def rates(machine: Machine) -> Iterator[Row]:
    def measure(name: str, precision: str) -> Sequence[object]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        found = measure_rates(machine.watch, machine.dtypes[name])
        torch.set_float32_matmul_precision(before)
        if precision == "high":  # as the trainer has it
            machine.rates[name] = found
        return [found.product / 1e12, found.exponential / 1e12, found.copy / 1e12]

    if machine.cuda:
        yield "float32", partial(measure, "float32", "highest")
        yield "bf16", partial(measure, "bf16", "high")
    yield "TF32" if machine.cuda else "float32", partial(measure, "float32", "high")


Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.bmm(functional.attention_map(query, key), value.mT).mT


def attention(machine: Machine) -> Iterator[Row]:
    def measure(shape: tuple[int, int, int, int, int], name: str) -> Sequence[object]:
        b, d, e, n, m = shape
        dtype = machine.dtypes[name]
        rows = [torch.randn(b, count, width, device=machine.device) for count, width in ((n, d), (m, d), (m, e))]
        query, key, value = (
            x.to(dtype).mT.requires_grad_() for x in rows
        )  # as a channels-last convolution leaves them
        gradient = torch.randn(b, n, e, device=machine.device).to(dtype).mT
        torch.compiler.reset()  # or it would not be compiled for one more shape
        ways: list[Way] = [functional.attention, plain, torch.compile(plain, dynamic=False)]

        def forward(way: Way) -> None:
            way(query, key, value)

        def both(way: Way) -> None:
            torch.autograd.grad(way(query, key, value), (query, key, value), gradient)

        floors = [max(times(work, machine.rates[name]).values()) for work in attention_work(shape, dtype.itemsize)]
        cells: list[object] = []
        for run, floor in ((forward, floors[0]), (both, sum(floors))):
            ours, *others = (1e6 * machine.seconds(partial(run, way), kernels=True) for way in ways)
            cells += [ours, 1e6 * floor, f"{1e6 * floor / ours:.0%}", *others]
        return cells

    shapes = {"8×8": (2, 2, 16, 64, 64)} if machine.tiny else SHAPES
    for name, (label, shape) in itertools.product(reversed(machine.dtypes), shapes.items()):
        yield f"{label}, {name}: {str(shape)[1:-1]}", partial(measure, shape, name)


def penalty(machine: Machine) -> Iterator[Row]:
    def measure(shape: tuple[int, int, int]) -> Sequence[object]:
        batch, channels, size = shape
        layers = attention_layers(channels, machine.device)
        x = feature_map(batch, channels, size, machine.device)
        runs = [gradient_penalty(layers[name], x, torch.ones_like(x)) for name in ("ours", "plain")]
        return [*(1e3 * machine.seconds(run) for run in runs), *(machine.mebibytes(run) for run in runs)]

    for shape in [(2, 16, 8)] if machine.tiny else PENALTIES:
        yield str(shape)[1:-1], partial(measure, shape)


def state_of(machine: Machine, architecture: str, batch: int, **settings: Any) -> tuple[TrainingState, Iterator[Any]]:
    """A run of the trainer, and its batches, whose images are in page-locked memory."""
    settings |= {"image_size": 128 if architecture == "resnet" else 64}
    settings |= {"image_size": 16, "base_channels": 4} if machine.tiny else {}
    config = Config(batch_size=batch, architecture=architecture, device=str(machine.device), **settings)
    classes = {str(i): 1 for i in range(1000)} if architecture == "resnet" else {}
    state = TrainingState(config, classes=classes, device=machine.device)
    images = torch.randint(256, (batch, 3, config.image_size, config.image_size), dtype=torch.uint8)
    labels = torch.randint(1000, (batch,)) if classes else None
    made = Batch(images, labels)
    return state, state.batches(itertools.repeat(made.pin_memory() if machine.cuda else made))


def steps(machine: Machine, *, compiled: bool = False) -> Iterator[Row]:
    def measure(architecture: str, batch: int, **settings: Any) -> Sequence[object]:
        torch.compiler.reset()
        state, batches = state_of(machine, architecture, batch, **settings)
        count = 1 if machine.tiny or architecture == "resnet" else 10  # steps between two synchronizations

        def run() -> None:
            for _ in range(count):
                state.advance(batches)

        run()  # tries algorithms, some of which need more memory than those that are chosen
        if machine.cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = machine.seconds(run) / count
        memory = torch.cuda.max_memory_allocated() / 2**30 if machine.cuda else math.nan
        return [batch / seconds, 1e3 * seconds, memory]

    size = 4 if machine.tiny else 64
    if compiled:
        for precision in reversed(machine.dtypes):
            name = f"DCGAN, {precision}, compiled, batch {size}"
            yield name, partial(measure, "dcgan", size, precision=precision, compile=True)
        return
    large = 4 if machine.tiny else residual_batch(machine)
    for architecture, batch in (("dcgan", size), ("resnet", large)):
        for precision, graph in itertools.product(reversed(machine.dtypes), (False, True)):
            name = f"{NAMES[architecture]}, {precision}{', CUDA graph' * graph}, batch {batch}"
            if machine.cuda or not graph:
                yield name, partial(measure, architecture, batch, precision=precision, cuda_graph=graph)


NAMES = {"dcgan": "DCGAN", "resnet": "residual"}


def residual_batch(machine: Machine) -> int:
    """256, or fewer where a GPU has less than the 60 GiB that this may take in float32."""
    memory = torch.cuda.get_device_properties(machine.device).total_memory / 2**30 if machine.cuda else 8
    return int(max(4, min(256, 2 ** int(math.log2(256 * memory / 60)))))


def loader(machine: Machine) -> Iterator[Row]:
    """From images in a mapped file. (Those of the cache are read, not mapped.)"""

    def measure(size: int, batch: int, count: int) -> Sequence[object]:
        with tempfile.NamedTemporaryFile() as file:
            images = np.memmap(file, np.uint8, "w+", shape=(count, 3, size, size))
            images[:] = np.arange(size, dtype=np.uint8)
            shards = ShardSampler(InfiniteBatchSampler(count, batch, seed=0, flip=True), SINGLE_PROCESS, 1)
            batches = read_batches(ArrayDataset(images), shards, pin_memory=machine.cuda)
            repeats = 3 if machine.tiny else 2 * count // batch
            next(batches)
            start = time.perf_counter()
            for _ in range(repeats):
                next(batches)
            return [repeats * batch / (time.perf_counter() - start)]

    for size, batch, count in [(16, 4, 64)] if machine.tiny else [(64, 64, 20_000), (128, 256, 10_000)]:
        yield f"{size} px, batch {batch}", partial(measure, size, batch, count)


def jobs(machine: Machine) -> Iterator[Row]:
    """What a run does now and then, while its device waits."""

    def measure(architecture: str) -> Sequence[object]:
        state, batches = state_of(machine, architecture, 4)
        state.advance(batches)
        with tempfile.TemporaryDirectory() as folder:
            return [
                once(machine, job)
                for job in (
                    lambda: recalibrated(state.average),
                    lambda: (spectral_norms(state.generator), spectral_norms(state.discriminator)),
                    lambda: draw(state, Path(folder)),
                    lambda: torch.save(state.state_dict(), Path(folder, "checkpoint.pt")),
                )
            ]

    for architecture, name in NAMES.items():
        yield name, partial(measure, architecture)


def once(machine: Machine, job: Callable[[], object]) -> float:
    start = time.perf_counter()
    job()
    if machine.cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


ATTENTION = ("ours, µs", "floor", "of it", "plain", "compiled")
SECTIONS = [
    Section("Machine", ("",), about),
    Section("Rates", ("products, TFLOP/s", "exponentials, T/s", "copy, TB/s"), rates),
    Section("Training step", ("images/s", "ms", "GiB"), steps),
    Section(
        "Attention: B, D, E, N, M",
        tuple(f"{run}: {what}" for run in ("forward", "both") for what in ATTENTION),
        attention,
    ),
    Section("Gradient penalty: B, C, H = W", ("ours, ms", "plain, ms", "ours, MiB", "plain, MiB"), penalty),
    Section("Loader, from the cache", ("images/s",), loader),
    Section("Now and then, s", ("recalibrate", "exact sigmas", "samples, attention", "checkpoint"), jobs),
    Section("Training step, compiled", ("images/s", "ms", "GiB"), partial(steps, compiled=True)),
]


def cell(value: object) -> str:
    if isinstance(value, float):
        if math.isnan(value):
            return "–"
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value).replace("|", "\\|")


def show(section: Section, machine: Machine, deadline: float) -> None:
    """Print the table of a section, row by row. A row that fails has its error in the place of its cells."""
    print(f"\n**{section.title}**\n\n| | {' | '.join(section.columns)} |\n|{' --- |' * (1 + len(section.columns))}")
    try:
        for name, measure in section.rows(machine):
            try:
                cells = measure() if time.monotonic() < deadline else ["no time left"]
            except Exception as error:  # whatever a GPU, a driver or a compiler makes of it
                cells = [said(error)]
            padding = [""] * (len(section.columns) - len(cells))
            print(f"| {' | '.join(map(cell, [name, *cells, *padding]))} |", flush=True)
            if machine.cuda:
                gc.collect()
                torch.cuda.empty_cache()
    except Exception as error:
        print(f"\n{said(error)}")


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 … or cpu (default: cuda)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, whose times say nothing")
    parser.add_argument(
        "--budget", type=float, default=300, help="seconds after which nothing more begins (default: 300)"
    )
    parser.add_argument("--tests", type=given_path, help="pytest's report (--junitxml), to be shown as well")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.budget
    machine = Machine(pick_device(options.device, SINGLE_PROCESS), tiny=options.tiny)
    torch.manual_seed(0)
    sections = list(SECTIONS)
    if options.tests:
        sections.insert(1, Section("Tests", ("",), partial(tests, options.tests)))
    for section in sections:
        show(section, machine, deadline)


if __name__ == "__main__":
    script(main)
