"""The benchmark: what it measures on CUDA, executed on the CPU with an emulated device, and its arithmetic by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend

import benchmark
from emulated_cuda import OnTheCPU, emulate_cuda, emulate_graphs
from measurement import contenders, floors, stopwatch
from measurement.contenders import CUDA_SHAPES, compare, materialize_up_to, small_matrix
from measurement.floors import CHAIN, Rates, Work, attention_work, chained_exponentials, layer_work, times
from measurement.operators import OperatorCounter
from measurement.passes import attention_layer, attention_layers, feature_map
from measurement.peak_memory import allocated_by, peak_memory
from measurement.stopwatch import CALLS, WARM_UP, Replay, Stopwatch, on_device
from training import cuda_graph
from training.flags import Config
from training.state import TrainingState

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
RATES = Rates(product=1e12, exponential=1e10, copy=1e11)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the stopwatch does, in order."""
    happened: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: happened.append("synchronize"))
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: happened.append("clock") or float(len(happened)))
    return happened


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, events: list[str]) -> Iterator[OnTheCPU]:
    """A machine with one GPU, which compiles nothing and whose allocator counts nothing."""
    emulate_graphs(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    with emulate_cuda(monkeypatch) as machine:
        yield machine


@pytest.fixture
def few_calls(monkeypatch: pytest.MonkeyPatch) -> int:
    """The calls in a graph, of which 20 take a quarter of a minute here, and turns before the measured ones: two."""
    monkeypatch.setattr(stopwatch, "CALLS", 2)
    monkeypatch.setitem(WARM_UP, "cuda", 2)
    return 2


# --- times ---------------------------------------------------------------------------------------------------------


def test_the_clock_starts_and_stops_when_the_device_has_finished(events: list[str]) -> None:
    def run() -> None:
        events.append("run")

    Stopwatch(CUDA, 0.0, at_least=3)(run=run)
    warm_up, begin = ["run"] * WARM_UP["cuda"], ["clock"]
    turn = ["synchronize", "clock", "run", "synchronize", "clock"]
    assert events == warm_up + begin + 3 * turn + ["clock"]  # which says that the time is over


def test_contenders_take_turns_and_each_is_warm(events: list[str]) -> None:
    runs = {name: lambda name=name: events.append(name) for name in "ab"}
    Stopwatch(CPU, 0.0, at_least=2)(**runs)
    assert [event for event in events if event != "clock"] == ["a", "b"] + ["a", "b"] * 2
    assert "synchronize" not in events


def test_a_graphed_step_is_measured_after_its_capture() -> None:
    assert WARM_UP["cuda"] > cuda_graph.WARM_UP


def test_a_replay_is_many_calls_and_its_time_that_of_one(monkeypatch: pytest.MonkeyPatch, events: list[str]) -> None:
    captured = emulate_graphs(monkeypatch)
    x = torch.zeros(3)
    run = on_device(lambda: x.add_(1), CUDA)
    assert isinstance(run, Replay)
    before = x[0].item()
    run()
    assert x.tolist() == [before + CALLS] * 3
    assert len(captured) == 1
    # The clock advances by one at each event, and a replay has none of its own: start, synchronize, stop.
    assert Stopwatch(CUDA, 0.0)(run=run) == {"run": 2 / CALLS}
    plain = lambda: None  # noqa: E731
    assert on_device(plain, CPU) is plain


# --- memory --------------------------------------------------------------------------------------------------------


def test_memory_on_cuda_is_that_of_the_second_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one allocates what stays; the peak from before is forgotten."""
    allocated, peak = 2**20, 64 * 2**20

    def run() -> None:
        nonlocal allocated, peak
        allocated = max(allocated, 8 * 2**20)  # a buffer of 7 MiB that stays
        peak = max(peak, allocated + 5 * 2**20)

    def reset() -> None:
        nonlocal peak
        peak = allocated

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    assert allocated_by(run) == 5.0


def test_memory_on_cuda_needs_no_process(gpu: OnTheCPU, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.get_context", lambda *_: pytest.fail("another process"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    assert peak_memory("plain", (1, 8, 4), CUDA) == 3.0


# --- floors --------------------------------------------------------------------------------------------------------


def test_the_work_of_attention_is_as_by_hand() -> None:
    """B, D, E, N, M = 2, 3, 5, 7, 11: 154 entries, in bfloat16."""
    forward, backward = attention_work((2, 3, 5, 7, 11), 2)
    # query 42, key 66, value 110 and result 70 numbers; then their gradients, and the result again for its backward
    assert forward == Work(2 * 154 * (3 + 5), 154, 2 * (42 + 66 + 110 + 70))
    assert backward == Work(2 * 154 * (3 * 3 + 2 * 5), 154, 2 * (2 * (42 + 66 + 110 + 70) + 70))


def test_the_floor_of_a_layer_is_as_by_hand() -> None:
    """64 channels on a 32×32 map, 16 of them, in float32: D 8, E 64, N 1024."""
    forward, backward = layer_work(16, 64, 32)
    entries, projections = 16 * 1024**2, 2 * 16 * 1024 * 64 * 80
    assert forward == Work(2 * entries * 72 + projections, entries, 4 * 16 * 1024 * (16 + 256))
    assert backward == Work(2 * entries * 152 + 2 * projections, entries, 2 * 4 * 16 * 1024 * (16 + 256))


def test_times_are_work_over_rates() -> None:
    assert times(Work(2e9, 3e8, 5e9), RATES) == pytest.approx({"product": 2e-3, "exponential": 3e-2, "copy": 5e-2})


def test_rates_are_those_of_one_call(gpu: OnTheCPU, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "CALLS", 3)
    monkeypatch.setattr(floors, "CHAIN", 4)
    monkeypatch.setitem(floors.SIZES, "cuda", (4, 8, 16))
    monkeypatch.setitem(floors.SIZES, "cpu", (4, 8, 16))
    # A run takes one tick of this clock, a replay of a graph two: see above.
    seconds = 2 / 3
    on_cuda = floors.measure_rates(Stopwatch(CUDA, 0.0), torch.float32)
    assert on_cuda == pytest.approx((2 * 4**3 / seconds, 8 * 4 / seconds, 2 * 4 * 16 / seconds))
    assert floors.measure_rates(Stopwatch(CPU, 0.0), torch.float32) == (2 * 4**3, 8, 2 * 4 * 16)


def test_exponentials_are_so_many_and_do_not_run_away() -> None:
    x = torch.rand(8)
    with OperatorCounter() as counter:
        y = chained_exponentials(x)
    assert counter.launches == 2 * CHAIN  # and as many negations, which a compiler makes part of them
    assert (y >= 0.5).all()
    assert (y <= 1).all()


# --- contenders ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["plain", "plain, compiled", "math", "flash", "flex", "ours"])  # on a CPU
def test_every_contender_computes_attention(name: str, gpu: OnTheCPU) -> None:
    """On D = 8 and E = 24, padded to what each takes."""
    q, k, v = (torch.randn(2, 1, n, width) for n, width in ((5, 8), (7, 8), (7, 24)))
    expected = torch.softmax(q.double() @ k.double().mT, dim=3) @ v.double()
    contender = contenders.contenders()[name]
    qk_width, width = contender.widths(8, 24)
    padded = [nn.functional.pad(x, (0, w - x.shape[3])) for x, w in ((q, qk_width), (k, qk_width), (v, width))]
    result = contender.attend(*padded)[..., :24]
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)  # float32, sums of up to 8


def test_each_device_has_its_contenders(gpu: OnTheCPU, monkeypatch: pytest.MonkeyPatch) -> None:
    names = set(contenders.contenders())
    assert names == {"plain", "plain, compiled", "math", "flash", "efficient", "cudnn", "flex", "ours"}
    backends = {contender.attend.args[0] for contender in contenders.contenders().values() if _is_sdpa(contender)}
    assert len(backends) == 4
    assert SDPBackend.FLASH_ATTENTION in backends
    assert contenders.contenders()["flash"].widths(8, 64) == (64, 64)
    assert set(attention_layers(8, CPU)) == {"plain", "sdpa", "padded", "ours"}
    graphed = {name for name in benchmark.step_variants(CUDA) if "CUDA graph" in name}
    assert graphed == {"ours, float32, CUDA graph", "ours, bf16, CUDA graph"}
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert set(benchmark.step_variants(CPU)) == {"plain, float32", "ours, float32", "ours, float32, compiled"}


def _is_sdpa(contender: contenders.Contender) -> bool:
    return getattr(contender.attend, "func", None) is contenders.sdpa


def test_the_peers_need_no_transposes(gpu: OnTheCPU) -> None:
    """What is timed of the plain equation: two products, a softmax, and their derivatives, without a copy."""
    plain = contenders.contenders()["plain"]
    for n, m in ((16, 16), (16, 4)):
        forward, both = contenders.runs(plain, (2, 8, 16, n, m), torch.float32, CUDA)
        with OperatorCounter() as counter:
            forward()
        assert counter.launches == 3
        with OperatorCounter() as counter:
            both()
        assert counter.launches == 3 + 5


def test_ours_gets_rows_that_it_takes_as_they_are(gpu: OnTheCPU) -> None:
    """As from a channels-last feature map: one operator forward, and one backward."""
    _, both = contenders.runs(contenders.Contender(contenders.ours), (2, 8, 16, 12, 8), torch.float32, CUDA)
    with OperatorCounter() as counter:
        both()
    assert counter.launches == 2


def test_a_comparison_on_cuda(gpu: OnTheCPU, few_calls: int) -> None:
    """Whatever a device refuses is a row with the reason."""
    shape = (2, 8, 16, 16, 4)
    rows = compare(Stopwatch(CUDA, 0.0, at_least=1), shape, torch.float32, RATES)
    by_name = {row["by"]: row for row in rows}
    assert by_name.keys() == contenders.contenders().keys()
    assert by_name["cudnn"]["refused"].startswith("RuntimeError")
    assert rows[0]["refused"] == ""  # whose columns the table has
    # All take as long by the clock of this test, two ticks for the calls of a graph.
    forward, _ = (max(times(work, RATES).values()) for work in attention_work(shape, 4))
    for name in ("plain", "math", "ours"):
        row = by_name[name]
        assert row["forward µs"] == row["both µs"] == pytest.approx(1e6 * 2 / few_calls)
        assert row["of its floor"] == f"{forward / (2 / few_calls):.0%}"
        assert row["this/ours"] == 1.0
    assert "0. " in small_matrix([{"B, D, E, N, M": shape} | row for row in rows])


def test_ours_may_not_refuse(gpu: OnTheCPU, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contenders.equation.KERNELS, "cuda", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compare(Stopwatch(CUDA, 0.0), (1, 8, 8, 4, 4), torch.float32, RATES)


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([], 0),
        ([(100, 1.2)], 0),
        ([(100, 0.5), (400, 0.9), (1600, 1.5)], 400),
        ([(1600, 1.5), (400, 0.9), (100, 0.5)], 400),  # in any order
        ([(100, 0.5), (400, 1.1), (1600, 0.9)], 100),  # not beyond a shape at which it was slower
        ([(100, 0.5), (400, 0.9), (400, 1.1)], 100),  # of the same size too
    ],
)
def test_where_the_plain_equation_stops_being_faster(ratios: list[tuple[int, float]], expected: int) -> None:
    assert materialize_up_to(ratios) == expected


def test_what_the_summary_says() -> None:
    rows = [
        {"B, D, E, N, M": (2, 8, 8, 10, 5), "by": "plain", "refused": "", "this/ours": 0.5},
        {"B, D, E, N, M": (2, 8, 8, 10, 5), "by": "math", "refused": "", "this/ours": 9.0},
        {"B, D, E, N, M": (2, 8, 8, 20, 20), "by": "plain", "refused": "", "this/ours": 1.5},
        {"B, D, E, N, M": (2, 8, 8, 40, 40), "by": "plain", "refused": "", "this/ours": 0.9},
        {"B, D, E, N, M": (2, 8, 8, 80, 80), "by": "plain", "refused": "OutOfMemoryError"},
    ]
    text = small_matrix(rows)
    assert "suggest 100." in text
    assert text.endswith("faster in one: 3200.")


def test_the_shapes_are_those_of_the_networks() -> None:
    """Those of attention in the default networks, and in the paper's at 128 pixels."""
    from training.state import build_networks

    for config, classes in ((Config(), None), (Config(image_size=128, batch_size=256, architecture="resnet"), 1000)):
        with torch.device("meta"):
            networks = build_networks(config, 3, classes)
        for network, batch in zip(networks, (config.batch_size, 2 * config.batch_size), strict=True):
            for resolution, layer in network.attention.items():
                n = int(resolution) ** 2
                d, e = layer.query.out_channels, layer.value.out_channels
                assert (batch, d, e, n, n // layer.pool**2) in CUDA_SHAPES


# --- the whole -----------------------------------------------------------------------------------------------------


def test_the_part_on_attention(
    gpu: OnTheCPU, few_calls: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """From the command line, with the trainer's settings of matrix products."""
    monkeypatch.setattr(benchmark, "CUDA_SHAPES", [(2, 8, 16, 16, 4)])
    monkeypatch.setattr(benchmark, "measure_rates", lambda watch, dtype: RATES)
    monkeypatch.setattr(benchmark, "Stopwatch", partial(Stopwatch, at_least=1))
    out = tmp_path / "new folder" / "results.json"
    benchmark.main(["attention", "--device", "cuda", "--json", str(out)])
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.backends.cudnn.benchmark
    text = capsys.readouterr().out
    for precision in ("float32", "bf16"):
        assert f"Attention, {precision} (both = forward + backward; time of the kernels, from replays" in text
    # In float32: query, key, value and result are 256 + 64 + 128 + 512 numbers; 128 exponentials take 0.0128 µs.
    assert "2, 8, 16, 16, 4: floor 0.0384 µs (copy) forward, 0.0973 µs (copy) backward" in text
    assert text.count('SMALL_MATRIX["cuda"] is 67108864; these times suggest 0.') == 2
    results = json.loads(out.read_text())
    assert {row["by"] for row in results["attention, bf16"]} == contenders.contenders().keys()


@pytest.mark.exhaustive
@pytest.mark.slow  # two processes of its own, which import torch
@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be reset on Linux alone")
def test_the_part_on_volumes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of 16×16×16 positions neither the passes of training nor a gradient penalty have a whole matrix."""
    monkeypatch.setattr(benchmark, "VOLUME_SHAPES", [(1, 32, 16)])
    monkeypatch.setattr(benchmark, "measure_rates", lambda watch, dtype: RATES)
    out = tmp_path / "results.json"
    benchmark.main(["volume", "--json", str(out)])
    (row,) = json.loads(out.read_text())["volume"]
    assert row.pop("B, C, D×H×W") == "1, 32, 16×16×16"
    matrix, *passes = row.values()
    assert matrix == 64
    assert len(passes) == 2
    features = 32 * 16**3 * 4 / 2**20
    assert all(features < taken < matrix for taken in passes)


def test_layouts_are_those_of_the_trainer(gpu: OnTheCPU) -> None:
    state = TrainingState(Config(image_size=16, base_channels=4, z_dim=8, batch_size=2), device=CUDA)
    (layer,) = [attention_layers(8, CUDA)["plain"]]
    assert feature_map(2, 8, 4, CUDA).is_contiguous(memory_format=state.memory_format)
    assert layer.query.weight.is_contiguous(memory_format=state.memory_format)
    assert feature_map(2, 8, 4, CUDA, 3).is_contiguous(memory_format=torch.channels_last_3d)
    assert attention_layer("volume", 8, CUDA).query.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert not feature_map(2, 8, 4, CPU).is_contiguous(memory_format=state.memory_format)


@pytest.mark.parametrize("variant", ["ours, float32", "ours, bf16, CUDA graph"])
def test_the_step_of_the_trainer_runs(variant: str, gpu: OnTheCPU, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"image_size": 16, "base_channels": 4, "z_dim": 8, "num_classes": 3}
    run, called, step = benchmark.step_variants(CUDA)[variant](2, **tiny), [], cuda_graph.training_step
    monkeypatch.setattr(cuda_graph, "training_step", lambda *a, **more: called.append(1) or step(*a, **more))
    for _ in range(WARM_UP["cuda"]):
        run()
    assert len(called) == (cuda_graph.WARM_UP + 1 if "graph" in variant else 0)  # the rest is replayed
