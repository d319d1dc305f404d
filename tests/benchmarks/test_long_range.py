"""Does attention help? Both arms differ in nothing else, agreement is measured correctly, and so are the statistics."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ttest_rel
from torch import nn

import long_range
from evaluation import color_agreement
from evaluation.color_agreement import PAIRS, ColorClassifiers, Reading
from long_range import LocalAttention, Settings, networks
from measurement.intervals import paired_difference
from torch_sagan import SelfAttention2d
from training.data import procedural_faces as faces

SIZE = 32
TINY = ["--steps", "3", "--batch-size", "4", "--image-size", "16", "--base-channels", "4", "--samples", "20"]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """A run sets them for its process, here that of all tests; other numbers of threads sum in other orders."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def classifiers() -> ColorClassifiers:
    return ColorClassifiers(SIZE, count=800)


def portraits(count: int, first: int = 0) -> np.ndarray:
    return faces.render(faces.traits(count, first=first), SIZE)


# --------------------------------------------------------------------------------------------------- the fair control


def test_arms_begin_with_the_same_weights_and_outputs() -> None:
    pairs = []
    for arm in long_range.ARMS:
        torch.manual_seed(3)
        pairs.append(networks(arm, Settings(base_channels=4)))
    images, z = torch.randn(2, 3, 32, 32), torch.randn(2, 64)
    for one, other, x in zip(*pairs, (z, images), strict=True):
        assert one.state_dict().keys() == other.state_dict().keys()
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(one(x), other(x))
        assert sum(isinstance(module, SelfAttention2d) for module in one.modules()) == 1


def test_the_local_layer_attends_to_its_own_position_and_attention_to_all() -> None:
    for layer, own in ((LocalAttention(8), True), (SelfAttention2d(8), False)):
        nn.init.constant_(layer.gamma, 0.5)
        x = torch.randn(1, 8, 4, 4, requires_grad=True)
        (slope,) = torch.autograd.grad(layer(x)[0, :, 1, 2].sum(), x)
        seen = slope.abs().sum(1)[0] > 0  # (4, 4)
        assert seen[1, 2]
        assert bool(seen.sum() == 1) is own


@pytest.mark.parametrize("arm", long_range.ARMS)
def test_without_attention_no_logit_compares_band_and_shirt(arm: str) -> None:
    torch.manual_seed(0)
    discriminator = networks(arm, Settings())[1].double().eval()
    for layer in discriminator.attention.values():
        nn.init.constant_(layer.gamma, 1.0)
    band, shirt = torch.zeros(2, 1, 3, 32, 32, dtype=torch.double)
    band[..., 5:7, 10:22] = 1.0  # y = -0.64
    shirt[..., 30:32, 8:24] = 1.0  # y = 0.9
    logits = discriminator(torch.cat([band + shirt, band, shirt, 0 * band]))
    apart = (logits[0] - logits[1] - logits[2] + logits[3]).abs().item()  # 0 where the two only add up
    assert apart < 1e-12 if arm == "local" else apart > 1e-6


def test_the_local_layer_is_its_equation_and_uses_every_parameter() -> None:
    layer = LocalAttention(8, qk_channels=3)
    nn.init.constant_(layer.gamma, 0.5)
    x = torch.randn(2, 8, 3, 3)
    y = layer(x)
    for b, row, column in ((0, 0, 0), (1, 2, 1)):
        at = x[b, :, row, column]
        f, g, h = (p.weight.flatten(1) @ at + p.bias for p in (layer.key, layer.query, layer.value))
        expected = 0.5 * h / (1 + torch.exp(-(f @ g))) + at
        torch.testing.assert_close(y[b, :, row, column], expected)
    y.square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in layer.parameters())


def test_arms_see_the_same_images_and_latent_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(steps=2, batch_size=4, image_size=16, base_channels=4, samples=4)
    monkeypatch.setattr(long_range, "TRAINED_ON", 16)
    monkeypatch.setitem(long_range.ARMS, "again", SelfAttention2d)
    monkeypatch.setitem(long_range.ARMS, "local", LocalAttention)
    made = {arm: long_range.generate(long_range.train(arm, 1, settings)[0], settings) for arm in long_range.ARMS}
    assert torch.equal(made["attention"], made["again"])
    assert (made["attention"].float() - made["local"].float()).abs().mean() < 3  # gamma has hardly moved
    other, gammas = long_range.train("attention", 2, settings)
    assert not torch.equal(long_range.generate(other, settings), made["attention"])
    begin = replace(settings, steps=0)
    untrained = [long_range.generate(long_range.train("local", seed, begin)[0], begin) for seed in (1, 2)]
    assert not torch.equal(*untrained)  # the weights, too, are those of the seed
    assert set(gammas) == {"G.attention.4", "D.attention.4"}
    assert any(gammas.values())


# ---------------------------------------------------------------------------------------------------------- agreement


def test_colors_are_read_as_they_were_drawn(classifiers: ColorClassifiers) -> None:
    people = faces.traits(300, first=77)
    images = faces.render(people, SIZE)
    for pair in PAIRS:
        truth = [pair.palette.index(tuple(int(c) for c in color)) for color in getattr(people, pair.trait)]
        for read in classifiers.colors(images, pair):
            assert (read == truth).mean() > 0.99


def test_real_faces_agree_and_halves_of_different_faces_do_not(classifiers: ColorClassifiers) -> None:
    one, other = portraits(400), portraits(400, first=400)
    left_right, top_bottom = one.copy(), one.copy()
    left_right[..., SIZE // 2 :] = other[..., SIZE // 2 :]
    top_bottom[:, :, SIZE // 2 :] = other[:, :, SIZE // 2 :]
    for pair in PAIRS:
        real = classifiers(one)[pair.name]
        colors = len(pair.palette)
        assert real.disagreement < 0.01
        assert real.chance == pytest.approx(1 - 1 / colors, abs=0.02)
        mixed = classifiers(left_right if pair.mirrored else top_bottom)[pair.name]
        assert mixed.relative == pytest.approx(1, abs=0.1)  # √(0.83 · 0.17 / 400) / 0.83 = 0.023, four deviations


def test_odd_eyes_are_counted(classifiers: ColorClassifiers) -> None:
    people = faces.traits(100)
    other = people._replace(eyes=np.roll(people.eyes, 1, axis=0))
    images = faces.render(people, SIZE)
    images[:30, :, :, SIZE // 2 :] = faces.render(other, SIZE)[:30, :, :, SIZE // 2 :]
    differ = (np.roll(people.eyes, 1, axis=0) != people.eyes).any(1)[:30].sum()
    assert classifiers(images)["eyes"].disagreement == pytest.approx(differ / 100, abs=0.011)
    assert classifiers(images)["earrings"].disagreement < 0.02


def test_a_set_with_one_color_shows_no_agreement(classifiers: ColorClassifiers) -> None:
    people = faces.traits(50)
    images = faces.render(people._replace(eyes=np.repeat(people.eyes[:1], 50, axis=0)), SIZE)
    assert classifiers(images)["eyes"] == Reading(0.0, 0.0)
    assert classifiers(images)["eyes"].relative == 1.0


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
@pytest.mark.parametrize("size", [16, 32, 64])
def test_windows_are_on_their_parts_and_do_not_overlap(pair: color_agreement.Pair, size: int) -> None:
    marked = np.zeros((1, 3, size, size), np.uint8)
    for value, (x, y) in ((100, pair.here), (200, pair.there)):
        marked[0, :, int((y + 1) / 2 * size), int((x + 1) / 2 * size)] = value
    here, there = color_agreement.windows(marked, pair)
    assert np.unique(here) == pytest.approx([-1, 100 / 127.5 - 1])
    assert np.unique(there) == pytest.approx([-1, 200 / 127.5 - 1])


# ------------------------------------------------------------------------------------------------- results and report


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    one, other = [0.3, 0.5, 0.4, 0.6, 0.35], [0.4, 0.55, 0.6, 0.58, 0.5]
    mean, half = paired_difference(one, other)
    interval = ttest_rel(one, other).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((interval.low, interval.high))
    assert mean == pytest.approx(statistics.mean(one) - statistics.mean(other))
    assert np.isnan(paired_difference([1.0], [2.0])[1])


def result(arm: str, seed: int, relative: float) -> dict:
    pairs = {pair.name: {"disagreement": 0.8 * relative, "chance": 0.8} for pair in PAIRS}
    return {"arm": arm, "seed": seed, "pairs": pairs, "relative": relative, "swd": 10 + seed}


def test_the_table_holds_means_spreads_and_the_paired_difference() -> None:
    found = {
        "attention": {seed: result("attention", seed, 0.2 + 0.1 * seed) for seed in range(3)},
        "local": {seed: result("local", seed, 0.5 + 0.1 * seed + 0.01 * (seed == 1)) for seed in (0, 1, 2, 3)},
    }
    rows = long_range.table(found, {"real faces": result("", 0, 0.0)}).splitlines()
    cells = {row.split(" | ")[0].strip("| "): row.strip("| ").split(" | ")[1:] for row in rows}
    assert cells["chance"][0] == "80"
    assert cells["**attention**, 3 seeds"][-2:] == ["0.3 ± 0.1", "11 ± 1"]
    assert cells["**local**, 4 seeds"][-1] == "11.5 ± 1.3"
    # −0.3, −0.31, −0.3: mean −0.3033, deviation 0.00577, t(0.975, 2) = 4.303.
    assert cells["attention − local, 3 pairs [95 % interval]"][-2:] == ["-0.3 [-0.32, -0.29]", "+0 [+0, +0]"]
    assert len({len(row.split(" | ")) for row in rows}) == 1


def drawn(svg: str, tag: str, fill: str) -> list[dict[str, str]]:
    elements = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}" + tag)
    return [element.attrib for element in elements if fill in (element.get("fill"), element.get("stroke"))]


def test_the_chart_shows_means_spreads_and_baselines_of_each_pair() -> None:
    found = {
        "attention": {seed: result("attention", seed, 0.2 + 0.1 * seed) for seed in range(3)},
        "local": {seed: result("local", seed, 0.5) for seed in range(3)},
    }
    marks = {"real faces": result("", 0, 0.0), "halves of different faces": result("", 0, 1.0)}
    summary = long_range.summarize(found, marks, Settings())
    assert list(summary) == [pair.name for pair in PAIRS]
    assert summary["eyes"] == {
        "pixels apart": pytest.approx(0.51 * 16),
        "chance": pytest.approx(80),
        "real faces": 0,
        "attention": {"mean": pytest.approx(24), "deviation": pytest.approx(8)},  # 16, 24, 32 %
        "local": {"mean": pytest.approx(40), "deviation": pytest.approx(0)},
    }
    summary["band and shirt"]["attention"]["mean"] = 80.0
    svg = long_range.chart(summary)
    bars = {arm: drawn(svg, "rect", long_range.COLORS[arm]) for arm in long_range.ARMS}
    unit = float(bars["local"][0]["height"]) / 40  # pixels of a per cent
    assert [float(bar["height"]) / unit for bar in bars["attention"]] == pytest.approx([24, 24, 24, 80], abs=0.1)
    assert [float(bar["x"]) for bar in bars["local"]] == sorted(float(bar["x"]) for bar in bars["local"])
    bottom = float(bars["local"][0]["y"]) + float(bars["local"][0]["height"])
    for mark, percent in (("chance", 80), ("real faces", 0)):
        heights = [
            float(re.findall(r"M[\d.]+ ([\d.]+)H", line["d"])[0])
            for line in drawn(svg, "path", long_range.COLORS[mark])[1:]
        ]
        assert heights == pytest.approx([bottom - percent * unit] * 4, abs=0.2)
    spreads = [re.findall(r"M[\d.]+ ([\d.]+)V([\d.]+)", line["d"]) for line in drawn(svg, "path", long_range.SPREAD)]
    low, high = (float(at) for at in next(filter(None, spreads))[0])
    assert ((bottom - low) / unit, (bottom - high) / unit) == (pytest.approx(16, abs=0.2), pytest.approx(32, abs=0.2))
    names = [text.text for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert [name for name in names if name in summary] == ["eyes", "cheeks", "earrings", "band and shirt"]  # near first


def test_the_chart_of_the_docs_is_drawn_from_the_numbers_of_its_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    docs = Path(__file__).parents[2] / "docs"
    recorded = docs / "images" / "long-range.json"
    (tmp_path / "copy.json").write_text(recorded.read_text())
    assert long_range.main(["--draw", str(tmp_path / "copy.json")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'copy.svg'}\n"
    assert (tmp_path / "copy.svg").read_text() == recorded.with_suffix(".svg").read_text()
    rows = [
        row.strip("| ").split(" | ") for row in (docs / "does-attention-help.md").read_text().splitlines() if "|" in row
    ]
    cells = {name.strip("*"): values for name, *values in rows}
    for i, pair in enumerate(PAIRS):
        of_pair = json.loads(recorded.read_text())[pair.name]
        assert of_pair["pixels apart"] == pytest.approx(math.dist(pair.here, pair.there) * 16)
        for name in ("chance", "real faces"):
            assert f"{of_pair[name]:.3g}" == cells[name][i]
        for arm in long_range.ARMS:
            assert f"{of_pair[arm]['mean']:.3g} ± {of_pair[arm]['deviation']:.2g}" == cells[arm][i]


def test_names_in_a_summary_are_no_markup(tmp_path: Path) -> None:
    """A chart is opened in a browser, and its summary may come from anybody."""
    summary = json.loads((Path(__file__).parents[2] / "docs" / "images" / "long-range.json").read_text())
    name = "</text><script>alert(1)</script>&\"'\x1b"
    summary[name] = summary.pop(next(iter(summary)))
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(summary))
    assert long_range.main(["--draw", str(path)]) == 0
    drawn = ElementTree.parse(path.with_suffix(".svg"))
    assert not [element for element in drawn.iter() if element.tag.endswith("script")]
    assert name.replace("\x1b", "\\x1b") in {element.text for element in drawn.iter() if element.tag.endswith("text")}


@pytest.mark.parametrize("text", ["", "[1]", '{"eyes": {}}', "{}", "[" * 100_000])
def test_what_is_no_summary_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match=r"summary\.json: it cannot be read as a summary") as error:
        long_range.main(["--draw", str(path)])
    assert "\n" not in str(error.value)
    assert not path.with_suffix(".svg").exists()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer faces to read and to train on, and runs in this process."""

    class Here:
        """As much of a pool of processes as is used."""

        def __init__(self, *settings: object) -> None: ...
        def __enter__(self) -> Here:
            return self

        def __exit__(self, *error: object) -> None: ...
        def submit(self, function, *arguments):
            function(*arguments)
            done: Future[str] = Future()
            done.set_result("done")
            return done

    monkeypatch.setattr(long_range, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(long_range, "TRAINED_ON", 32)
    monkeypatch.setattr(long_range, "ColorClassifiers", lambda size: ColorClassifiers(size, count=100))


def test_a_run_leaves_results_and_the_next_one_goes_on_with_them(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert long_range.main([*TINY, "--seeds", "1", "--out", str(tmp_path)]) == 0
    names = {f"{arm}-0.{kind}" for arm in ("attention", "local") for kind in ("json", "png")}
    made = {path.name for path in tmp_path.iterdir()}
    assert made == names | {"baselines.json", "table.md", "summary.json", "summary.svg"}
    first = {name: (tmp_path / name).stat().st_mtime_ns for name in names}
    long_range.main([*TINY, "--seeds", "2", "--out", str(tmp_path)])
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in names} == first
    assert json.loads((tmp_path / "local-1.json").read_text())["settings"]["steps"] == 3
    assert "2 runs of 3 steps" in capsys.readouterr().out
    text = (tmp_path / "table.md").read_text()
    (tmp_path / "table.md").unlink()
    long_range.main([*TINY, "--report", "--out", str(tmp_path)])
    assert (tmp_path / "table.md").read_text() == text
    assert "runs of" not in capsys.readouterr().out
    assert "2 pairs" in text
    with Image.open(tmp_path / "local-0.png") as image:
        assert image.width > 8 * 16
    with pytest.raises(SystemExit, match=r"attention-\d\.json was made with steps 3: give another --out") as error:
        long_range.main([*TINY, "--steps", "4", "--out", str(tmp_path)])
    assert "\n" not in str(error.value)
    (tmp_path / "local-0.json").write_text("{")
    with pytest.raises(SystemExit, match=r"local-0\.json: it cannot be read as a result"):
        long_range.main([*TINY, "--report", "--out", str(tmp_path)])


@pytest.mark.slow  # starts processes of its own, which import torch and read as many faces as an experiment
@pytest.mark.exhaustive
def test_runs_take_processes_of_their_own(tmp_path: Path) -> None:
    assert long_range.main([*TINY, "--seeds", "1", "--processes", "2", "--out", str(tmp_path)]) == 0
    assert "1 pairs" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], r"--seeds must be above 0, got 0"),
        (["--steps", "-1"], r"--steps must be above 0, got -1"),
        (["--image-size", "50"], r"image_size .* got 50"),
        (["--out", "{tmp}/file/results"], r"file"),
        (["--report"], r"expected results of both arms"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hello")
    arguments = [argument.format(tmp=tmp_path) for argument in ["--out", "{tmp}/out", *arguments]]
    with pytest.raises(SystemExit, match=message) as error:
        long_range.main(arguments)
    assert "\n" not in str(error.value)
