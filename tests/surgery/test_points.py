"""Insertion points: all of them, in order, with the costs that are counted and measured; no trace in the model."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from existing_models import (
    Pyramid,
    Restless,
    VolumeUNet,
    Wrapped,
    patch_discriminator,
    residual_generator,
    speech_discriminator,
    unet,
)
from networks.cyclegan import Discriminator, Generator
from torch_sagan import (
    InsertionPoint,
    SelfAttention2d,
    insert_self_attention,
    insertion_points,
    spectral_norm,
)

IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
PYRAMID = {"x": torch.zeros(2, 3, 6, 6), "scale": torch.ones(1)}


def listed(points: list[InsertionPoint]) -> list[tuple[str, str, int, tuple[int, ...], int]]:
    return [point[:5] for point in points]


def call(model: nn.Module, example: Tensor | dict[str, Tensor]) -> Tensor:
    output: Tensor = model(**example) if isinstance(example, dict) else model(example)
    return output


def operations(model: nn.Module, example: Tensor | dict[str, Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        call(model, example)
    total: int = counter.get_total_flops()
    return total


# --- which, and in which order -------------------------------------------------------------------------------------


def test_patch_discriminator() -> None:
    assert listed(insertion_points(patch_discriminator(), IMAGES)) == [
        ("model.0", "Conv2d", 4, (16, 16), 1),
        ("model.1", "LeakyReLU", 4, (16, 16), 1),
        ("model.2", "Conv2d", 8, (8, 8), 1),
        ("model.3", "BatchNorm2d", 8, (8, 8), 1),
        ("model.4", "LeakyReLU", 8, (8, 8), 1),
        ("model.5", "Conv2d", 16, (4, 4), 1),
        ("model.6", "BatchNorm2d", 16, (4, 4), 1),
        ("model.7", "LeakyReLU", 16, (4, 4), 1),
        ("model.8", "Conv2d", 32, (3, 3), 1),
        ("model.9", "BatchNorm2d", 32, (3, 3), 1),
        ("model.10", "LeakyReLU", 32, (3, 3), 1),
        ("model.11", "Conv2d", 1, (2, 2), 1),
        ("model", "Sequential", 1, (2, 2), 1),
    ]


def test_cyclegan_generator() -> None:
    points = listed(insertion_points(residual_generator(), IMAGES[..., :24]))
    assert points[:2] == [("model.0", "ReflectionPad2d", 3, (38, 30), 1), ("model.1", "Conv2d", 4, (32, 24), 1)]
    block = [("0", "ReflectionPad2d"), ("1", "Conv2d"), ("2", "InstanceNorm2d"), ("3", "ReLU"), ("4", "Dropout")]
    block += [("5", "ReflectionPad2d"), ("6", "Conv2d"), ("7", "InstanceNorm2d")]
    size = {"ReflectionPad2d": (10, 8)}
    assert points[10:20] == [
        *((f"model.10.conv_block.{name}", kind, 16, size.get(kind, (8, 6)), 1) for name, kind in block),
        ("model.10.conv_block", "Sequential", 16, (8, 6), 1),
        ("model.10", "ResidualBlock", 16, (8, 6), 1),
    ]
    assert [path for path, *_ in points[-3:]] == ["model.20", "model.21", "model"]
    assert len(points) == 22 + 3 * 9 + 1  # the layers, those inside of the three blocks, and all of them together


def test_unet() -> None:
    """A module returns after what it contains, and the skip connection doubles the channels."""
    points = listed(insertion_points(unet(), IMAGES))
    order = [path for path, *_ in points]
    inner, outer = "model.1.model.3.model.3", "model.1.model.3"
    assert order.index("model.1.model.0") < order.index(f"{outer}.model.0") < order.index(f"{inner}.model.0")
    assert order.index(f"{inner}.model") + 1 == order.index(inner) < order.index(f"{outer}.model.4")
    assert (inner, "SkipBlock", 32, (4, 4), 1) in points
    assert (outer, "SkipBlock", 16, (8, 8), 1) in points
    assert ("model.1", "SkipBlock", 8, (16, 16), 1) in points


def test_a_module_that_runs_twice_and_modules_that_return_something_else() -> None:
    """Of those left out one returns a tuple, one a vector, one maps of different channels, and one is not called."""
    points = insertion_points(Pyramid(), PYRAMID)
    assert listed(points) == [
        ("stem", "Conv2d", 8, (6, 6), 1),
        ("block.0", "Conv2d", 8, (6, 6), 2),
        ("block.1", "BatchNorm2d", 8, (6, 6), 2),
        ("block", "Sequential", 8, (6, 6), 2),
        ("narrow", "Conv2d", 4, (6, 6), 1),
    ]
    assert points[1].operations == 2 * points[0].operations


def test_a_module_that_runs_at_two_sizes() -> None:
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            small = self.conv(nn.functional.avg_pool2d(x, 2))
            return self.conv(x) + nn.functional.interpolate(small, scale_factor=2)

    (point,) = insertion_points(Scales(), IMAGES)
    one, other = (insertion_points(Wrapped(Scales().conv), x)[0] for x in (IMAGES, IMAGES[..., ::2, ::2]))
    assert point[:5] == ("conv", "Conv2d", 8, (32, 32), 2)
    assert point.operations == one.operations + other.operations
    assert one.memory < point.memory < one.memory + other.memory  # their backward passes are not at the same time


def test_attention_that_is_there_already() -> None:
    """The model's own layers are insertion points, but not their projections; an inserted layer is not one."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), SelfAttention2d.official(8), nn.ReLU(True), nn.Conv2d(8, 8, 3))
    x = IMAGES[..., :8, :8]
    assert [point.path for point in insertion_points(model, x)] == ["0", "1", "2", "3"]
    insert_self_attention(model, "2", example_input=x)
    assert [point.path for point in insertion_points(model, x)] == ["0", "1", "2.inserted_attention", "3"]


@pytest.mark.parametrize(
    ("make", "example"),
    [
        pytest.param(residual_generator, IMAGES[..., :16, :16], marks=pytest.mark.exhaustive),  # as the example is
        (patch_discriminator, IMAGES),
        (unet, IMAGES),
        (Generator, IMAGES[..., :16, :16]),
        (Discriminator, IMAGES),
        (Pyramid, PYRAMID),
        (speech_discriminator, IMAGES.view(2, 1, -1)[..., :256]),
        (VolumeUNet, IMAGES.view(2, 1, 3, 32, 32)[..., :2, :8, :8]),
    ],
    ids=[
        "cyclegan",
        "patchgan",
        "unet",
        "example generator",
        "example discriminator",
        "pyramid",
        "speech discriminator",
        "volume unet",
    ],
)
def test_attention_fits_everywhere_and_costs_what_is_counted(
    make: Callable[[], nn.Module], example: Tensor | dict[str, Tensor]
) -> None:
    """Alone behind each point, the model makes as many operations more; behind all of them, its outputs stay."""

    model = make().eval()
    points = insertion_points(model, example)
    own, before = operations(model, example), call(model, example)
    assert points.operations == own
    for point in points:
        attentive = insert_self_attention(copy.deepcopy(model), point.path, example_input=example)
        assert operations(attentive, example) - own == point.operations, point.path
    insert_self_attention(model, [point.path for point in points], example_input=example)
    assert torch.equal(call(model, example), before)


# --- memory --------------------------------------------------------------------------------------------------------


def test_memory_of_the_model_itself() -> None:
    """What its pass keeps: the input, the first convolution's output, and the ReLU's, each of which is used again."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ReLU())
    points = insertion_points(model, torch.zeros(2, 3, 10, 10))
    floats = 2 * 10 * 10 * (3 + 8 + 4)  # a ReLU keeps its output
    assert points.memory == 4 * floats


MEASURE = """
import sys
sys.path.insert(0, sys.argv[1])
import examples_path, training.threads
import torch
from measurement.peak_memory import peak_memory_here
torch.set_num_threads(int(sys.argv[2]))
print(peak_memory_here(sys.argv[3], tuple(map(int, sys.argv[4:])), torch.device("cpu")))
"""


def measured(kind: str, batch: int, channels: int, size: int) -> float:
    """The bytes by which a training pass of one layer raises the peak of a process."""
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    shape = map(str, (batch, channels, size))
    # glibc keeps what is freed for later, unless a block is so large that it goes back to the system.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(benchmarks), str(torch.get_num_threads()), kind, *shape],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return 2**20 * float(result.stdout)


@pytest.mark.exhaustive
@pytest.mark.slow  # each is measured in two processes of their own, which import torch
@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be reset on Linux alone")
@pytest.mark.parametrize("shape", [(1, 256, 64), (16, 64, 32)], ids=str)
def test_memory_is_what_is_measured(shape: tuple[int, int, int]) -> None:
    """Within a fifth: more is not promised, since convolutions and threads have small buffers of their own."""
    batch, channels, size = shape
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # each has a tile
    try:
        (point,) = insertion_points(nn.Sequential(nn.Conv2d(1, channels, 1)), torch.zeros(batch, 1, size, size))
        assert point.memory == pytest.approx(measured("ours", *shape), rel=0.2)
        assert point.plain_memory == pytest.approx(measured("plain", *shape), rel=0.2)
    finally:
        torch.set_num_threads(threads)


def test_memory_grows_with_the_positions_here_and_with_their_square_in_the_equation() -> None:
    model = nn.Sequential(nn.Conv2d(1, 64, 1))
    small, large = (insertion_points(model, torch.zeros(1, 1, size, size))[0] for size in (64, 128))
    assert large.memory < 4 * small.memory
    assert large.plain_memory > 14 * small.plain_memory


def test_a_small_matrix_is_made_here_too() -> None:
    (point,) = insertion_points(nn.Sequential(nn.Conv2d(1, 64, 1)), torch.zeros(1, 1, 16, 16))
    assert point.memory == point.plain_memory


def test_half_precision_takes_half() -> None:
    points = [
        insertion_points(nn.Sequential(nn.Conv2d(1, 16, 1)).to(dtype), torch.zeros(1, 1, 48, 48, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert points[0][0].plain_memory == 2 * points[1][0].plain_memory


# --- the table -----------------------------------------------------------------------------------------------------


def test_table() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 4, 2, 1), nn.Sequential(nn.ReLU(), nn.Conv2d(32, 64, 4, 2, 1)), nn.Flatten())
    points = insertion_points(model, torch.zeros(16, 3, 32, 32))
    assert str(points).splitlines() == [
        "path  module      channels   size  calls  operations         memory, here  memory, plain",
        "0     Conv2d            32  16x16      1        86 M  +108%        18 MiB         18 MiB",
        "1.0   ReLU              32  16x16      1        86 M  +108%        18 MiB         18 MiB",
        "1.1   Conv2d            64    8x8      1        20 M   +25%       1.8 MiB        1.8 MiB",
        "1     Sequential        64    8x8      1        20 M   +25%       1.8 MiB        1.8 MiB",
        "the model itself: 80 M operations, keeps 704 KiB for its backward pass",
    ]


def test_a_model_without_any() -> None:
    points = insertion_points(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.zeros(3, 1, 2, 2))
    assert points == []
    assert points.operations == 2 * 3 * 4 * 2
    assert str(points).splitlines() == [
        "no insertion points",
        "  '0' returns a tensor (3, 4), expected a feature map (B, C, L), (B, C, H, W) or (B, C, D, H, W)",
        "  '1' returns a tensor (3, 2), expected a feature map (B, C, L), (B, C, H, W) or (B, C, D, H, W)",
    ]
    assert str(insertion_points(nn.Linear(4, 2), torch.zeros(3, 4))) == "no insertion points"
    assert str(insertion_points(nn.Sequential(nn.Identity()), IMAGES)).count("%") == 0  # no share of nothing


def test_at_most_five_reasons_are_printed() -> None:
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(4, 4) for _ in range(6)))
    lines = str(insertion_points(model, torch.zeros(3, 1, 2, 2))).splitlines()
    assert lines[5].startswith("  '4' returns")
    assert lines[6:] == ["  and 2 more"]
    five = insertion_points(model[:5], torch.zeros(3, 1, 2, 2))
    assert len(str(five).splitlines()) == 6
    assert len(five.refused) == 5


def test_table_of_sequences_and_volumes() -> None:
    table = str(insertion_points(nn.Sequential(nn.Conv1d(1, 8, 1), nn.ReLU()), torch.zeros(2, 1, 100))).splitlines()
    assert [line.split()[:5] for line in table[1:3]] == [
        ["0", "Conv1d", "8", "100", "1"],
        ["1", "ReLU", "8", "100", "1"],
    ]
    table = str(insertion_points(nn.Sequential(nn.Conv3d(1, 8, 1)), torch.zeros(2, 1, 3, 4, 5))).splitlines()
    assert table[1].split()[:5] == ["0", "Conv3d", "8", "3x4x5", "1"]


def test_a_terminal_that_knows_ascii_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    print(insertion_points(nn.Sequential(nn.Conv2d(3, 32, 4)), torch.zeros(1, 3, 8, 8)))
    print(insertion_points(nn.Sequential(nn.Flatten()), torch.zeros(1, 3, 8, 8)))
    terminal.seek(0)
    assert "5x5" in terminal.read()


# --- the model stays as it was -------------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(Restless(), nn.BatchNorm2d(3), nn.Dropout(), spectral_norm(nn.Conv2d(3, 4, 1)), nn.ReLU(True))
    model[2].eval()
    buffers = list(model.buffers())
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    with torch.no_grad():
        points = insertion_points(model, IMAGES)
        assert not torch.is_grad_enabled()
    assert [point.path for point in points] == ["0", "1", "2", "3", "4"]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert all(buffer is now for buffer, now in zip(buffers, model.buffers(), strict=True))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_after_an_error_too() -> None:
    model = nn.Sequential(Restless(), nn.Conv2d(3, 4, 1))
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        insertion_points(model, torch.zeros(1, 5, 4, 4))
    assert model.training
    assert model[0].count == 0
    assert not any(module._forward_hooks for module in model.modules())


def test_what_cannot_get_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="Sequential is compiled"):
        insertion_points(nn.Sequential(torch.compile(nn.Conv2d(3, 3, 1), backend="eager")), IMAGES)
    with pytest.raises(ValueError, match=r"the model is wrapped in DataParallel: insert into its \.module"):
        insertion_points(nn.DataParallel(nn.Conv2d(3, 3, 1)), IMAGES)
    with pytest.raises(TypeError, match=r"example_input takes a tensor, .* got list"):
        insertion_points(nn.Conv2d(3, 3, 1), [IMAGES])  # type: ignore[arg-type]
