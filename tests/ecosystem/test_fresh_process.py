"""What is saved by one process runs in another, which knows nothing of the first: every kind of file, of every subject.

A program in memory may hold what its file cannot, and may find in its own process what no other one has.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import loaded_artifacts
from subjects import ATTENTION, LAYERS, REPRESENTATIVE, SUBJECTS, build, inputs

pytestmark = pytest.mark.slow  # exporting, and starting a process, takes seconds

NEW_EXPORTER = hasattr(torch.compiler, "is_exporting")  # since torch 2.7
# The exporter of torch 2.5 fails on batch norm with the onnxscript of today.
ONNX_EXPORTS = NEW_EXPORTER and find_spec("onnxscript") is not None and find_spec("onnxruntime") is not None

Example = tuple[Tensor, ...]


def export(module: nn.Module, example: Example, path: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=1024)  # without an end, torch 2.5 objects to the largest integer
    program = torch.export.export(module, example, dynamic_shapes=tuple({0: batch} for _ in example))
    with path.open("wb") as file:  # a path would have to end in .pt2
        torch.export.save(program, file)


def export_inside_autocast(module: nn.Module, example: Example, path: Path) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        export(module, example, path)


def export_to_onnx(module: nn.Module, example: Example, path: Path) -> None:
    shapes = tuple({0: torch.export.Dim("batch")} for _ in example)
    torch.onnx.export(module, example, path, dynamo=True, dynamic_shapes=shapes, verbose=False)


def export_to_onnx_by_the_older(module: nn.Module, example: Example, path: Path) -> None:
    torch.onnx.export(module.eval(), example, path, dynamo=False)


def save_safetensors(module: nn.Module, example: Example, path: Path) -> None:
    from safetensors.torch import save_file

    save_file(module.state_dict(), path)


SAVERS: dict[str, Callable[[nn.Module, Example, Path], object]] = {
    "torch.export": export,
    "torch.export in autocast": export_inside_autocast,
    "torch.jit.trace": lambda module, example, path: torch.jit.save(torch.jit.trace(module, example), path),
    "ONNX": export_to_onnx,
    "ONNX, dynamo=False": export_to_onnx_by_the_older,
    "make_fx": lambda module, example, path: torch.save(make_fx(module)(*example), path),
    # In a model, since torch cannot pickle the graph of a module whose own annotations are postponed.
    "torch.fx": lambda module, _, path: torch.save(torch.fx.symbolic_trace(nn.Sequential(module)), path),
    "torch.save": lambda module, _, path: torch.save(module, path),
    "pickle": lambda module, _, path: path.write_bytes(pickle.dumps(module)),
    "state dict": lambda module, _, path: torch.save(module.state_dict(), path),
    "state dict, assigned": lambda module, _, path: torch.save(module.state_dict(), path),
    "safetensors": save_safetensors,
}


EXPORTED = ("torch.export", "torch.export in autocast", "ONNX", "ONNX, dynamo=False")
IN_FLOAT32 = EXPORTED[1:]
FIXED_BATCH = ("make_fx", "ONNX, dynamo=False")
PROGRAMS = (*EXPORTED, "torch.jit.trace", "make_fx")
MODULES = ("torch.fx", "torch.save", "pickle")  # torch refuses those with a parametrization
# Its exporter is the slowest: of each column one with classes or without, and each way to compute attention.
IN_ONNX = [
    "attention in tiles",
    "official attention",
    "attention in a sequence",
    "attention in a volume",
    *LAYERS,
    "generator",
    "discriminator",
    "discriminator with classes",
]
IN_AUTOCAST = ["official attention", "l2 attention", "spectral norm", "generator", "discriminator"]
FEWER = dict.fromkeys(MODULES, ATTENTION) | {
    "ONNX": IN_ONNX if ONNX_EXPORTS else [],
    # It does not know an operator of PyTorch's own spectral norm.
    "ONNX, dynamo=False": [*(name for name in IN_ONNX if name != "torch's spectral norm"), "l2 attention"]
    if ONNX_EXPORTS
    else [],
    "torch.export in autocast": IN_AUTOCAST if NEW_EXPORTER else [],
    "safetensors": SUBJECTS if find_spec("safetensors") else [],
}
PAIRS = [(kind, subject) for kind in SAVERS for subject in FEWER.get(kind, SUBJECTS)]


def is_representative(kind: str, subject: str) -> bool:
    """The exporters, which compile, take most of the time: none of theirs, and one of each other program."""
    if kind in PROGRAMS:
        return subject == "discriminator" and kind not in EXPORTED
    return subject in REPRESENTATIVE


def save(kind: str, subject: str, path: Path) -> None:
    """The file, and beside it inputs with the outputs that they had in this process."""
    dtype = torch.float32 if kind in IN_FLOAT32 else torch.float64
    module = build(subject, dtype).eval()
    SAVERS[kind](module, inputs(subject, 3, dtype), path)
    sizes = (3,) if kind in FIXED_BATCH else (1, 3, 7)
    batches = [inputs(subject, size, dtype) for size in sizes]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled="autocast" in kind):
        cases = [(list(batch), module(*batch).detach()) for batch in batches]
    torch.save(cases, path.with_name(f"{path.name}.cases"))


Outcomes = dict[tuple[str, str], str]


@pytest.fixture(scope="module", params=["representative", pytest.param("others", marks=pytest.mark.exhaustive)])
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What is wrong with each kind of file of each subject; all are loaded by one process."""
    folder = tmp_path_factory.mktemp("artifacts")
    manifest: list[dict[str, str]] = []
    found: Outcomes = {}
    for kind, subject in PAIRS:
        if is_representative(kind, subject) != (request.param == "representative"):
            continue
        file = f"{kind}, {subject}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what torch's exporters and traces use, and has deprecated
                save(kind, subject, folder / file)
        except Exception:
            found[kind, subject] = f"not saved: {traceback.format_exc()}"
        else:
            manifest.append({"kind": kind, "subject": subject, "file": file})
    (folder / "manifest.json").write_text(json.dumps(manifest))
    script = Path(loaded_artifacts.__file__)
    child = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(folder)], cwd=folder, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    results = json.loads(child.stdout.splitlines()[-1])
    for artifact in manifest:
        found[artifact["kind"], artifact["subject"]] = results[artifact["file"]]
    return found


def assert_loaded(outcomes: Outcomes, kind: str) -> None:
    of_this_kind = {subject: error for (other, subject), error in outcomes.items() if other == kind}
    assert of_this_kind, "nothing was saved"
    wrong = {subject: error for subject, error in of_this_kind.items() if error}
    assert not wrong, "\n".join(f"{subject}: {error}" for subject, error in wrong.items())


exported = pytest.mark.parametrize(
    "outcomes", [pytest.param("others", marks=pytest.mark.exhaustive)], indirect=True, scope="module"
)


@exported
def test_export(outcomes: Outcomes) -> None:
    """For batches of any size."""
    assert_loaded(outcomes, "torch.export")


@exported
def test_export_inside_autocast(outcomes: Outcomes) -> None:
    """It is run inside of autocast, too."""
    if not NEW_EXPORTER:
        pytest.skip("needs torch 2.7")
    assert_loaded(outcomes, "torch.export in autocast")


@exported
def test_onnx(outcomes: Outcomes) -> None:
    """For batches of any size, in onnxruntime."""
    if not ONNX_EXPORTS:
        pytest.skip("needs torch 2.7, onnxscript and onnxruntime")
    assert_loaded(outcomes, "ONNX")


@exported
def test_onnx_by_the_older_exporter(outcomes: Outcomes) -> None:
    """For one size of batch, in onnxruntime."""
    if not ONNX_EXPORTS:
        pytest.skip("needs onnxruntime")
    assert_loaded(outcomes, "ONNX, dynamo=False")


def test_trace(outcomes: Outcomes) -> None:
    assert_loaded(outcomes, "torch.jit.trace")


def test_saved_graph(outcomes: Outcomes) -> None:
    assert_loaded(outcomes, "make_fx")


def test_saved_symbolic_trace(outcomes: Outcomes) -> None:
    assert_loaded(outcomes, "torch.fx")


@pytest.mark.parametrize("way", ["torch.save", "pickle"])
def test_saved_module(outcomes: Outcomes, way: str) -> None:
    assert_loaded(outcomes, way)


@pytest.mark.parametrize("packing", ["state dict", "state dict, assigned", "safetensors"])
def test_state_dict_in_a_file(outcomes: Outcomes, packing: str) -> None:
    if packing == "safetensors":
        pytest.importorskip("safetensors")
    assert_loaded(outcomes, packing)
