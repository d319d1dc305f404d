"""Run by a fresh interpreter: load every file that a folder's ``manifest.json`` lists, run it, compare its outputs.

Prints a JSON object from the name of each artifact to what is wrong with it, an empty string if nothing is.
"""

from __future__ import annotations

import json
import pickle
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

Program = Callable[..., Tensor]

# What needs nothing but torch, or onnxruntime, comes first: it must not import the package.
WITHOUT_THE_PACKAGE = ("torch.export", "torch.export in autocast", "torch.jit.trace", "ONNX", "ONNX, dynamo=False")


def onnx_program(path: Path) -> Program:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*x: Tensor) -> Tensor:
        fed = {entry.name: tensor.numpy() for entry, tensor in zip(session.get_inputs(), x, strict=True)}
        return torch.from_numpy(session.run(None, fed)[0])

    return run


def in_autocast(program: Program) -> Program:
    def run(*x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return program(*x)

    return run


def with_operators(path: Path) -> Program:
    """The graph names operators of the package, which registers them."""
    import torch_sagan  # noqa: F401

    return torch.load(path, weights_only=False)


def with_state_dict(subject: str, state: dict[str, Tensor], *, assign: bool = False) -> Program:
    from subjects import SUBJECTS

    with torch.device("meta" if assign else "cpu"):
        module = SUBJECTS[subject].make().double()
    module.load_state_dict(state, assign=assign)
    return module.eval()


def load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


LOADERS: dict[str, Callable[[Path, str], Program]] = {
    "torch.export": lambda path, _: torch.export.load(path).module(),
    "torch.export in autocast": lambda path, _: in_autocast(torch.export.load(path).module()),
    "torch.jit.trace": lambda path, _: torch.jit.load(path),
    "ONNX": lambda path, _: onnx_program(path),
    "ONNX, dynamo=False": lambda path, _: onnx_program(path),
    "make_fx": lambda path, _: with_operators(path),
    "torch.fx": lambda path, _: torch.load(path, weights_only=False),
    "torch.save": lambda path, _: torch.load(path, weights_only=False),
    "pickle": lambda path, _: pickle.loads(path.read_bytes()),
    "state dict": lambda path, subject: with_state_dict(subject, torch.load(path, weights_only=True)),
    "state dict, assigned": lambda path, subject: with_state_dict(
        subject, torch.load(path, weights_only=True, mmap=True), assign=True
    ),
    "safetensors": lambda path, subject: with_state_dict(subject, load_safetensors(path)),
}


def difference(folder: Path, kind: str, subject: str, file: str) -> str:
    """What is wrong with an artifact."""
    cases: Sequence[tuple[list[Tensor], Tensor]] = torch.load(folder / f"{file}.cases", weights_only=True)
    try:
        program = LOADERS[kind](folder / file, subject)
        for x, expected in cases:
            y = program(*x)
            # Float64 but for the order of summation, and float32 over a dozen layers.
            rtol, atol = (1e-9, 1e-10) if expected.dtype == torch.float64 else (1e-4, 1e-5)
            if "autocast" in kind:  # some roundings of 2**-8
                rtol, atol = 0, 0.06 * float(expected.abs().max())
            torch.testing.assert_close(y.detach(), expected, rtol=rtol, atol=atol)
        if kind in WITHOUT_THE_PACKAGE:
            assert "torch_sagan" not in sys.modules, "it imported torch_sagan"
    except Exception:
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    given = Path(sys.argv[1])
    artifacts = json.loads((given / "manifest.json").read_text())
    artifacts.sort(key=lambda artifact: artifact["kind"] not in WITHOUT_THE_PACKAGE)
    results = {artifact["file"]: difference(given, **artifact) for artifact in artifacts}
    print(json.dumps(results))
