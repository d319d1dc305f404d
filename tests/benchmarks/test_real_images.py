"""The comparison on real images: what each arm adds, equal time and scores, and a table that says what the runs say."""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel

import mnist_files
import real_images
from generators import checkpoint, shaken
from measurement.plain_dcgan import Discriminator, Generator, train
from real_images import ARMS, SHOWN, collect, table
from training.flags import Config
from training.output.model_card import open_generator
from training.script import read_arguments, resolve_config

SCORES = {
    "classifier_distance": 20.0,
    "agreement": 0.9,
    "classifier_precision": 0.8,
    "classifier_recall": 0.7,
    "swd": 31.0,
}


def result(arm: str, seed: int, more: float = 0.0, settings: tuple[str, ...] = ()) -> dict[str, object]:
    scores = {name: score + more for name, score in SCORES.items()}
    scores |= {f"{name}_real": score / 2 for name, score in SCORES.items()}
    return {"arm": arm, "seed": seed, "settings": list(settings), "cpu_seconds": 600.0 + seed, "scores": scores}


def write(out: Path, *results: dict[str, object]) -> None:
    for content in results:
        (out / f"{content['arm']}-{content['seed']}.json").write_text(json.dumps(content))


# --- the arms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_differs_from_the_recipe_in_attention_or_norm_alone(arm: str) -> None:
    settings = [
        vars(resolve_config(Config, {n: v for n, v in given.items() if n in Config.__annotations__}, None))
        for given in (read_arguments(Config, [f"@{real_images.RECIPE}", *more], "") for more in ([], ARMS[arm]))
    ]
    changed = {name: value for name, value in settings[1].items() if value != settings[0][name]}
    g, d = {"g_attention": "14"}, {"d_attention": "7"}
    assert changed == {"recipe": {}, "G": g, "D": d, "both": g | d, "conv": {"d_norm": "convolution"}}[arm]
    assert settings[0]["g_attention"] == settings[0]["d_attention"] == "none"


def test_the_plain_networks_are_a_dcgan_with_spectral_norm_in_d() -> None:
    torch.manual_seed(0)
    z, labels = torch.randn(3, 100), torch.tensor([4, 0, 9])
    g, d = Generator(10), Discriminator(10)
    images = g(z, labels)
    assert images.shape == (3, 1, 28, 28)
    assert not torch.equal(images, g(z, labels.flip(0)))
    logits = d(images, labels)
    assert logits.shape == (3,)
    assert not torch.equal(logits, d(images, labels.flip(0)))
    assert sum(name.endswith("parametrizations.weight.original") for name, _ in d.named_parameters()) == 3
    assert not any("parametrizations" in name for name, _ in g.named_parameters())


def test_the_plain_networks_learn() -> None:
    """Images of class 0 are black and of class 1 white; in fifty steps G tells which is which."""
    labels = torch.arange(16) % 2
    batch = (2.0 * labels - 1)[:, None, None, None].expand(-1, 1, 28, 28), labels
    *_, generator = train(iter([batch] * 50), 2, 1e-3, 0)
    means = generator(torch.randn(16, 100), labels).mean((1, 2, 3))
    assert means[1::2].min() > means[::2].max() + 0.5  # of a range of 2


@pytest.mark.exhaustive  # trains a classifier
@pytest.mark.slow
def test_the_plain_dcgan_gets_its_time_and_is_scored_as_the_trainer_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    labels = (np.arange(60) % 2).astype(np.uint8)
    images = (labels[:, None, None] * 200 + rng.integers(0, 50, (60, 28, 28))).astype(np.uint8)
    (tmp_path / "data").mkdir()
    for part in ("train", "t10k"):
        mnist_files.write(tmp_path / "data", mnist_files.idx(images), mnist_files.idx(labels), part=part)
    monkeypatch.setattr(real_images, "DATA", str(tmp_path / "data"))
    monkeypatch.setattr(real_images, "SAMPLES", 40)
    threads, until = torch.get_num_threads(), time.process_time() + 1
    try:
        assert real_images.plain(until, 0, tmp_path / "run") == 0
    finally:
        torch.set_num_threads(threads)
    assert time.process_time() > until
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert line["step"] >= 1
    assert {*SHOWN, *(f"{name}_real" for name in SHOWN)} <= line["scores"].keys()


def test_the_share_of_even_keys_is_that_of_the_maps(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "checkpoint.pt", shaken(num_classes=3, attention_resolutions=[8]))
    generator, _ = open_generator(path)
    z = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    _, (maps,) = generator(z, torch.arange(6) % 3, return_attention=True)  # (6, 64, 64)
    even = sum(maps[:, :, 8 * row + column] for row in range(8) for column in range(8) if row % 2 == column % 2)
    share = even.mean().item()
    assert share != pytest.approx(0.5, abs=1e-3)
    assert real_images.even_keys(path, samples=6) == {"attention.8": pytest.approx(share, abs=5e-4)}  # three digits
    assert real_images.even_keys(checkpoint(tmp_path / "none.pt", shaken(attention_resolutions=[])), 4) == {}


def test_in_equal_time_an_arm_with_slower_steps_gets_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"recipe": 0.1, "G": 0.2, "D": 0.125, "both": 0.4, "conv": 0.1}
    asked: list[float] = []

    class Watch:
        def __init__(self, device: torch.device, seconds: float) -> None:
            asked.append(seconds)

        def __call__(self, **steps: Callable[[], object]) -> dict[str, float]:
            assert steps.keys() == times.keys()
            assert steps["both"]() is not None  # a step of these networks, which works
            return times

    monkeypatch.setattr(real_images, "Stopwatch", Watch)
    threads = torch.get_num_threads()
    try:
        fewer = real_images.fewer_steps(["--steps", "600", "--decay-from", "200", "--batch-size", "2"])
    finally:
        torch.set_num_threads(threads)
    assert asked[0] >= 10  # of seconds, so that a busy machine disturbs all arms alike
    assert fewer == {
        "recipe": [],
        "G": ["--steps", "300", "--decay-from", "100"],
        "D": ["--steps", "480", "--decay-from", "160"],
        "both": ["--steps", "150", "--decay-from", "50"],
        "conv": ["--steps", "600", "--decay-from", "200"],
    }


# --- results ---------------------------------------------------------------------------------------------------------


def test_the_table_holds_medians_ranges_and_paired_differences(tmp_path: Path) -> None:
    changes = [0.5, -1.0, 4.0]
    write(tmp_path, *(result("recipe", seed, seed / 10) for seed in range(3)))
    write(tmp_path, *(result("G", seed, seed / 10 + change) for seed, change in enumerate(changes)))
    write(tmp_path, result("plain", 0, 9.0, ("as it is",)))
    text = table(collect(tmp_path, ["recipe", "G", "plain"], []))
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in text.splitlines()}
    assert rows["real images"][:2] == ["10.0", "45.0"]
    assert rows["**recipe**, 3 seeds"][0] == "20.1 [20.0, 20.2]"
    assert rows["**recipe**, 3 seeds"][-1] == "601"
    assert rows["**plain**, 1 seeds"][0] == "29.0 [29.0, 29.0]"
    interval = ttest_rel([20.5, 19.1, 24.2], [20.0, 20.1, 20.2]).confidence_interval()
    cells = map(float, re.findall(r"[+-][\d.]+", rows["G − recipe, 3 pairs [95 % interval]"][0]))
    assert list(cells) == pytest.approx([statistics.mean(changes), *interval], abs=0.051)  # it shows one digit
    assert not any("plain −" in row for row in rows)


def test_results_of_other_settings_are_refused(tmp_path: Path) -> None:
    write(tmp_path, result("recipe", 0, settings=("--steps", "600")))
    with pytest.raises(SystemExit, match=r"was made with --steps 600: give another --out"):
        collect(tmp_path, ["recipe"], [])
    assert collect(tmp_path, ["recipe"], ["--steps", "600"])["recipe"].keys() == {0}
    (tmp_path / "recipe-1.json").write_text("[1]")
    with pytest.raises(SystemExit, match=r"recipe-1\.json: it cannot be read as a result"):
        collect(tmp_path, ["recipe"], ["--steps", "600"])


def test_results_in_equal_time_and_of_equal_steps_are_not_mixed(tmp_path: Path) -> None:
    write(tmp_path, result("recipe", 0), result("G", 0) | {"equal_time": True})
    assert collect(tmp_path, ["recipe", "G"], [], equal_time=True)["G"].keys() == {0}
    with pytest.raises(SystemExit, match=r"G-0\.json was made with --equal-time: give another --out"):
        collect(tmp_path, ["recipe", "G"], [])
    write(tmp_path, result("G", 0))
    with pytest.raises(SystemExit, match=r"G-0\.json was made without --equal-time: give another --out"):
        collect(tmp_path, ["recipe", "G"], [], equal_time=True)


# --- the chart -------------------------------------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"


def test_the_chart_has_every_run_its_median_and_real_images_at_their_values() -> None:
    runs = [result("recipe", seed, more) for seed, more in enumerate((0.0, 20.0, 5.0))] + [result("plain", 0, 30.0)]
    elements = list(ElementTree.fromstring(real_images.chart({"runs": runs})).iter())
    dots = [float(element.attrib["cx"]) for element in elements if element.tag == f"{SVG}circle"][1:]  # after the key's
    assert len(dots) == 3 * len(runs)  # distance, agreement, recall
    first, second, third, plain = dots[:4]
    pixel = (second - first) / 20  # of a unit of distance
    assert pixel > 0
    assert (third - first, plain - first) == (pytest.approx(5 * pixel, abs=0.1), pytest.approx(30 * pixel, abs=0.1))
    lines = {
        color: [float(e.attrib["d"][1:].split()[0]) for e in elements if e.get("stroke-width") == width][1:]
        for color, width in (("median", "3"), ("real", "2"))
    }
    assert lines["median"][:2] == [third, plain]
    assert lines["real"][0] == pytest.approx(first - SCORES["classifier_distance"] / 2 * pixel, abs=0.1)
    texts = [element.text for element in elements if element.tag == f"{SVG}text"]
    assert [text for text in texts if text in ("recipe", "plain")] == ["recipe", "plain"] * 3
    assert "agreement, % (larger is better)" in texts


@pytest.mark.parametrize(
    "name", ["real-images-recipe", "real-images-attention", "real-images-equal-time", "real-images-norms"]
)
def test_the_charts_of_the_docs_are_drawn_from_their_numbers(name: str, tmp_path: Path) -> None:
    recorded = Path(__file__).parents[2] / "docs" / "images" / f"{name}.json"
    (tmp_path / "copy.json").write_text(recorded.read_text())
    assert real_images.main(["--draw", str(tmp_path / "copy.json")]) == 0
    assert (tmp_path / "copy.svg").read_text() == recorded.with_suffix(".svg").read_text()


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"runs": []}', '{"runs": [{"arm": "recipe", "scores": {}}]}'])
def test_what_is_no_summary_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match=r"summary\.json: it cannot be read as a summary") as error:
        real_images.main(["--draw", str(path)])
    assert "\n" not in str(error.value)
    assert not path.with_suffix(".svg").exists()


def test_what_is_not_finite_is_not_drawn(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({"runs": [result("recipe", 0, float("nan"))]}))
    with pytest.raises(SystemExit, match="expected finite values of distance"):
        real_images.main(["--draw", str(path)])


def test_a_report_needs_results_of_every_arm_and_writes_none_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, result("recipe", 0))
    with pytest.raises(SystemExit, match="expected results of plain"):
        real_images.main(["--report", "--out", str(tmp_path)])
    write(tmp_path, result("plain", 0))
    assert real_images.main(["--report", "--out", str(tmp_path)]) == 0
    assert "**plain**, 1 seeds" in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [run["arm"] for run in summary["runs"]] == ["recipe", "plain"]
    assert summary["recipe"][0].startswith("--data fashion-mnist")
    assert "--steps" in " ".join(summary["recipe"])
