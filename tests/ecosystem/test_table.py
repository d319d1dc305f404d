"""The table of docs/ecosystem.md: each row has a test in this folder, and every test of it has a row."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "ecosystem.md"
# What every row takes for granted.
OTHERS = {"test_table.py", "test_device_and_dtype.py"}

# The test that checks a row, in the order of the page.
ROWS = {
    "test_compile": "`torch.compile(fullgraph=True)`, batches of any size, training and evaluation",
    "test_compile_with_inductor": "its default backend",
    "test_export": "`torch.export`, batch dimension dynamic",
    "test_export_inside_autocast": "the same inside `torch.autocast`, saved; run inside the same",
    "test_onnx": "ONNX, `dynamo=True`, run by onnxruntime",
    "test_onnx_by_the_older_exporter": "ONNX, `dynamo=False`, one size of batch",
    "test_make_fx": "`make_fx`, evaluation",
    "test_saved_graph": "the same, saved by `torch.save`; `import torch_sagan` before loading",
    "test_fake_tensors": "`FakeTensorMode`",
    "test_script_fails": "`torch.jit.script`",
    "test_trace": "`torch.jit.trace`, saved and loaded, evaluation",
    "test_symbolic_trace": "`torch.fx.symbolic_trace` and feature extractors built on it",
    "test_saved_symbolic_trace": "the graph of a model with it, saved by `torch.save`",
    "test_autocast": "autocast, bfloat16 and float16",
    "test_half_precision": "`.bfloat16()`, `.half()`",
    "test_double": "`.double()`",
    "test_channels_last": "channels last, in volumes too",
    "test_activation_checkpointing_in_evaluation": "activation checkpointing, evaluation",
    "test_activation_checkpointing_in_training": "activation checkpointing, training",
    "test_activation_checkpointing_with_the_iteration_stopped": "the same with the iteration stopped",
    "test_deepcopy": "`copy.deepcopy`",
    "test_state_dict_in_a_file": "state dicts by `torch.save` and `torch.load(weights_only=True)`, `assign=True` too, "
    "or safetensors",
    "test_safetensors_of_a_channels_last_module": "safetensors of a channels-last module",
    "test_saved_module": "whole modules by pickle or `torch.save(module)`",
    "test_pickled_module": "the error that says so",
    "test_meta_device": "made on the meta device, loaded by `to_empty` or `assign=True`",
    "test_state_dict_of_another_variant": "another variant's state dict",
    "test_state_dict_of_a_plain_layer": "the state dict of the layer without the norm",
    "test_state_dicts_of_both_implementations": "PyTorch's own spectral norm's state dicts, strict, both ways",
    "test_distributed_data_parallel": "`DistributedDataParallel`, in D with two passes before one backward",
    "test_fully_sharded_data_parallel": "FSDP2, `fully_shard`",
    "test_averaged_model": "`AveragedModel` (EMA), its default",
    "test_averaged_buffers_are_wrong": "`AveragedModel(use_buffers=True)`",
    "test_functional_call_and_grad": "`torch.func.functional_call`, `torch.func.grad`",
    "test_vmap_of_grad": "`vmap` of `grad`: one gradient per sample, evaluation",
    "test_vmap_over_an_ensemble": "`vmap` over an ensemble, `stack_module_state`",
    "test_forward_mode": "forward mode, `torch.func.jvp` and dual tensors",
    "test_hooks": "forward hooks, pre-hooks, full backward hooks",
    "test_initialization_before_the_norm": "initializing before the norm",
    "test_initialization_after_the_norm_is_lost": "initializing `module.weight` after the norm",
    "test_initialization_of_the_original": "initializing the original, then `reset_power_iteration`",
    "test_initialization_of_conditional_batch_norm": "a DCGAN's `weights_init` on batch norms",
}


def test_every_row_has_a_test_and_every_test_a_row() -> None:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    assert [row[0] for row in rows] == list(ROWS.values())
    assert {len(row) for row in rows} == {len(header)}
    files = [path for path in FOLDER.glob("test_*.py") if path.name not in OTHERS]
    tests = [name for path in files for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M)]
    assert len(tests) > 30
    assert sorted(ROWS) == sorted(tests)
