"""Attention put into a DCGAN and a CycleGAN: the insertion changes nothing, and what is trained on with it is drawn."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

import attention_in_cyclegan
import attention_in_dcgan
from png_grids import sheet
from training.output.image_io import TILE


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """An example sets them for its process, here that of all tests."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("example", "steps", "layers", "figures"),  # so few steps that one comes before the insertion
    [
        (attention_in_dcgan, 8, 2, {"samples.png": sheet(8, 4), "attention.png": sheet(5, 4, TILE)}),
        pytest.param(  # the test below runs it too, for a step
            *(attention_in_cyclegan, 5, 6, {"samples.png": sheet(8, 3), "attention.png": sheet(4, 4, TILE)}),
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_attention_in_an_existing_model(
    example: ModuleType,
    steps: int,
    layers: int,
    figures: dict[str, tuple[int, int]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(example, "PEOPLE", 32)
    printed = []
    for threads in (1, 2):
        out = tmp_path / str(threads)
        torch.set_num_threads(threads)
        example.main(["--steps", str(steps), "--out", str(out), "--seed", "5"])
        said = capsys.readouterr()
        printed.append(said.out.replace(str(out), "OUT"))
        assert "before: 100%" in said.err
        assert "after: 100%" in said.err
        assert {path.name for path in out.iterdir()} == set(figures)
        for name, size in figures.items():
            with Image.open(out / name) as image:
                assert image.size == size
    assert printed[0] == printed[1]
    for name in figures:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert "unchanged by the insertion: True" in printed[0]
    gammas = re.findall(r"[+-]0\.\d{4}", printed[0])
    assert len(gammas) == layers
    assert all(float(gamma) != 0 for gamma in gammas)


def test_attention_in_some_networks_of_a_cyclegan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_in_cyclegan, "PEOPLE", 16)
    random_states = []
    for choice, layers in (("both", 6), ("generators", 4), ("discriminators", 2), ("none", 0)):
        out = tmp_path / choice
        attention_in_cyclegan.main(["--steps", "1", "--out", str(out), "--attention", choice])
        random_states.append(torch.get_rng_state())
        assert len(re.findall(r"[+-]0\.\d{4}", capsys.readouterr().out)) == layers
        assert (out / "attention.png").exists() == (choice in ("both", "generators"))
    assert all(torch.equal(state, random_states[0]) for state in random_states)  # the same batches


@pytest.mark.parametrize("example", [attention_in_dcgan, attention_in_cyclegan])
def test_no_steps_are_refused(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [f"{example.__name__}.py"])
    with pytest.raises(SystemExit, match=rf"^{example.__name__}\.py: argument --steps: must be at least 1, got 0"):
        example.main(["--steps", "0", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
