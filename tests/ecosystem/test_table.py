"""Each row of the table in docs/ecosystem.md has a test, and each test of this folder a row."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "ecosystem.md"
# What every row takes for granted.
OTHERS = {"test_table.py", "test_device_and_dtype.py"}

# The beginning of each row, and the test of what it says.
ROWS = {
    "`torch.compile(fullgraph=True)`, batches of any size, training and evaluation": "test_compile",
    "its default backend": "test_compile_with_inductor",
    "`torch.export`, batch dimension dynamic": "test_export",
    "the same inside `torch.autocast`, saved; run inside the same": "test_export_inside_autocast",
    "ONNX, `dynamo=True`, run by onnxruntime": "test_onnx",
    "ONNX, `dynamo=False`, one size of batch": "test_onnx_by_the_older_exporter",
    "`make_fx`, evaluation": "test_make_fx",
    "the same, saved by `torch.save`; `import torch_sagan` before loading": "test_saved_graph",
    "`FakeTensorMode`": "test_fake_tensors",
    "`torch.jit.script`": "test_script_fails",
    "`torch.jit.trace`, saved and loaded, evaluation": "test_trace",
    "`torch.fx.symbolic_trace` and feature extractors built on it": "test_symbolic_trace",
    "the graph of a model with it, saved by `torch.save`": "test_saved_symbolic_trace",
    "autocast, bfloat16 and float16": "test_autocast",
    "`.bfloat16()`, `.half()`": "test_half_precision",
    "`.double()`": "test_double",
    "channels last, in volumes too": "test_channels_last",
    "activation checkpointing, evaluation": "test_activation_checkpointing_in_evaluation",
    "activation checkpointing, training": "test_activation_checkpointing_in_training",
    "the same with the iteration stopped": "test_activation_checkpointing_with_the_iteration_stopped",
    "`copy.deepcopy`": "test_deepcopy",
    "state dicts by `torch.save` and `torch.load(weights_only=True)`, by `assign=True`, by safetensors": (
        "test_state_dict_in_a_file"
    ),
    "safetensors of a channels-last module": "test_safetensors_of_a_channels_last_module",
    "whole modules by pickle or `torch.save(module)`": "test_saved_module",
    "the error that says so": "test_pickled_module",
    "made on the meta device, loaded by `to_empty` or `assign=True`": "test_meta_device",
    "another variant's state dict": "test_state_dict_of_another_variant",
    "the state dict of the layer without the norm": "test_state_dict_of_a_plain_layer",
    "PyTorch's own spectral norm's state dicts, strict, both ways": "test_state_dicts_of_both_implementations",
    "`transfer_parametrizations_and_params` to another layer": "test_transferred_parametrizations",
    "`quantize_dynamic`": "test_dynamic_quantization",
    "`torch.nn.utils.prune`": "test_pruning",
    "low-rank updates (LoRA) as a parametrization": "test_low_rank_updates",
    "`DistributedDataParallel`, in D with two passes before one backward": "test_distributed_data_parallel",
    "FSDP2, `fully_shard`": "test_fully_sharded_data_parallel",
    "`AveragedModel` (EMA), its default": "test_averaged_model",
    "`AveragedModel(use_buffers=True)`": "test_averaged_buffers_are_wrong",
    "`torch.func.functional_call`, `torch.func.grad`": "test_functional_call_and_grad",
    "`vmap` of `grad`: one gradient per sample, evaluation": "test_vmap_of_grad",
    "`vmap` over an ensemble, `stack_module_state`": "test_vmap_over_an_ensemble",
    "forward mode, `torch.func.jvp` and dual tensors": "test_forward_mode",
    "forward hooks, pre-hooks, full backward hooks": "test_hooks",
    "initializing before the norm": "test_initialization_before_the_norm",
    "initializing `module.weight` after the norm": "test_initialization_after_the_norm_is_lost",
    "initializing the original, then `reset_power_iteration`": "test_initialization_of_the_original",
    "a DCGAN's `weights_init` on batch norms": "test_initialization_of_conditional_batch_norm",
}


def test_the_table_has_a_row_for_every_test() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows[2:]] == list(ROWS)
    assert len({row.count("|") for row in rows}) == 1
    files = [path for path in FOLDER.glob("test_*.py") if path.name not in OTHERS]
    tests = [name for path in files for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M)]
    assert len(tests) > 30
    assert sorted(ROWS.values()) == sorted(tests)
