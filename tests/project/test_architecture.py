"""Imports run downwards, in the package and in the examples; what is public; what importing costs."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest
import torch

import torch_sagan

ROOT = Path(__file__).parents[2]
PACKAGE = Path(torch_sagan.__file__).parent
EXAMPLES, BENCHMARKS = ROOT / "examples", ROOT / "benchmarks"

# From the bottom up: folders, and modules beside them. What is not listed is above all others.
PACKAGE_ORDER = ["_torch", "_modes", "_checks", "losses", "attention", "surgery", "spectral", "networks", "maps"]
EXAMPLES_ORDER = ["networks", "training", "evaluation"]
BENCHMARKS_ORDER = ["examples_path", "measurement"]


def imports(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Every module that a file imports, anywhere in it, with the names taken from it; relative ones spelled out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, []
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            yield node.module or "", [alias.name for alias in node.names]


def modules_in(folder: Path, prefix: str = "") -> dict[str, Path]:
    """The Python modules below a folder by their dotted names; a package by the name of its folder."""
    paths = {path: path.relative_to(folder).with_suffix("").parts for path in sorted(folder.rglob("*.py"))}
    return {prefix + ".".join(part for part in parts if part != "__init__"): path for path, parts in paths.items()}


MODULES = {name.rstrip("."): path for name, path in modules_in(PACKAGE, "torch_sagan.").items()}
EXAMPLE_MODULES, BENCHMARK_MODULES = modules_in(EXAMPLES), modules_in(BENCHMARKS)


def imported(path: Path, modules: dict[str, Path]) -> set[str]:
    """Those of the modules that a file imports."""
    named = {name for module, names in imports(path) for name in (module, *(f"{module}.{name}" for name in names))}
    found = named & set(modules)
    # `from a.b import c` imports the module a.b.c, not the package a.b whose docstring is all that it holds.
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def upward_imports(modules: dict[str, Path], order: list[str], root: str = "") -> list[str]:
    """Imports of a folder further up, and cycles."""

    def level(name: str) -> int:
        top = name.removeprefix(root).split(".")[0]
        return order.index(top) if top in order else len(order) + (name.rstrip(".") == root.rstrip("."))

    graph = {name: imported(path, modules) - {name} for name, path in modules.items()}
    list(TopologicalSorter(graph).static_order())  # raises an error if there is a cycle
    return [f"{name} imports {other}" for name in graph for other in graph[name] if level(other) > level(name)]


def test_imports_of_the_package_run_downwards() -> None:
    assert not upward_imports(MODULES, PACKAGE_ORDER, "torch_sagan.")


def test_imports_of_examples_run_downwards() -> None:
    assert not upward_imports(EXAMPLE_MODULES, EXAMPLES_ORDER)
    assert not upward_imports(BENCHMARK_MODULES, BENCHMARKS_ORDER)


def test_examples_know_nothing_of_the_benchmarks() -> None:
    benchmarks = {name.split(".")[0] for name in BENCHMARK_MODULES}
    for path in EXAMPLE_MODULES.values():
        assert benchmarks.isdisjoint(module.split(".")[0] for module, _ in imports(path)), path


def test_the_check_sees_imports_in_every_form(tmp_path: Path) -> None:
    files = {
        "low/a.py": "",
        "high/b.py": "def f():\n    from low import a\n",
        "low/c.py": "import high.b",
        "script.py": "from high.b import x",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    modules = modules_in(tmp_path)
    assert upward_imports(modules, ["low", "high"]) == ["low.c imports high.b"]
    (tmp_path / "low/a.py").write_text("from low import c")
    with pytest.raises(ValueError, match="cycle"):
        upward_imports(modules, ["low", "high"])


def test_torch_is_the_only_requirement() -> None:
    """But for reading files of safetensors, and for torch_sagan.hub, which the package itself does not import."""
    needed = {module.split(".")[0] for path in MODULES.values() for module, _ in imports(path)}
    assert needed - sys.stdlib_module_names == {"torch", "torch_sagan", "safetensors", "huggingface_hub"}
    code = "import sys, torch_sagan; sys.exit('safetensors' in sys.modules or 'huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_module_for_leftovers() -> None:
    for folder in ("src", "tests", "examples", "benchmarks"):
        names = {path.stem for path in (ROOT / folder).rglob("*.py")}
        assert names.isdisjoint({"utils", "util", "misc", "helpers", "common"})


def test_examples_use_the_public_names() -> None:
    for name, path in (EXAMPLE_MODULES | BENCHMARK_MODULES).items():
        if name == "measurement.contenders":  # which measures a kernel, whatever attention would take
            continue
        for module, names in imports(path):
            if module.split(".")[0] == "torch_sagan":
                assert module == "torch_sagan", f"{path.name} imports {module}"
                private = set(names) - set(torch_sagan.__all__) - {"__version__"}
                assert not private, f"{path.name} takes {sorted(private)} from torch_sagan"


def test_references_do_not_import_what_they_verify() -> None:
    assert not any(
        module.startswith("torch_sagan") for module, _ in imports(ROOT / "tests" / "support" / "references.py")
    )


# --- the examples --------------------------------------------------------------------------------------------------


def test_networks_know_nothing_of_us() -> None:
    for name, path in EXAMPLE_MODULES.items():
        if name.startswith("networks."):
            ours = {module.split(".")[0] for module, _ in imports(path)} - {"torch"} - sys.stdlib_module_names
            assert not ours, f"{name} imports {sorted(ours)}"


def test_scripts_alone_are_at_the_top() -> None:
    for name, path in (EXAMPLE_MODULES | BENCHMARK_MODULES).items():
        runs = '\nif __name__ == "__main__":\n' in path.read_text(encoding="utf-8")
        assert runs == ("." not in name and name != "examples_path"), name


def calls_backward(path: Path) -> bool:
    """Whether anything in a file is called by the name `backward`, as a method or as torch.autograd's function."""
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return any(ast.unparse(call.func).split(".")[-1] == "backward" for call in calls)


def test_gans_learn_in_one_place() -> None:
    """In the step, and in the files that stand alone. (The classifier of the scores is no GAN.)"""
    learning = {name for name, path in (EXAMPLE_MODULES | BENCHMARK_MODULES).items() if calls_backward(path)}
    assert learning == {
        "training.step", "minimal", "attention_in_dcgan", "attention_in_cyclegan", "measurement.plain",
        "measurement.plain_dcgan", "evaluation.classifier",
    }  # fmt: skip


def test_minimal_is_small_and_stands_alone() -> None:
    path = EXAMPLES / "minimal.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 150
    needed = {module.split(".")[0] for module, _ in imports(path)} - sys.stdlib_module_names
    assert needed == {"torch", "PIL", "torch_sagan"}


# --- public names --------------------------------------------------------------------------------------------------


def test_all_is_what_is_there() -> None:
    """Every public name that is not deprecated is in ``__all__``, and everything in ``__all__`` is there."""
    # Sub-packages become attributes when they are imported; of all modules only functional is public.
    here = {
        name
        for name, thing in vars(torch_sagan).items()
        if not name.startswith("_") and (name == "functional" or not isinstance(thing, ModuleType))
    }
    deprecated = {"load_reference_state_dict"}
    assert here - deprecated == set(torch_sagan.__all__) - {"__version__"}
    assert len(torch_sagan.__all__) == len(set(torch_sagan.__all__))


def test_names_that_are_promised() -> None:
    promised = {
        "SelfAttention2d", "SpectralNorm", "spectral_norm", "remove_spectral_norm", "apply_spectral_norm",
        "reset_power_iteration", "spectral_norms", "SAGANGenerator", "SAGANDiscriminator", "hinge_discriminator_loss",
        "hinge_generator_loss", "wasserstein_discriminator_loss", "wasserstein_generator_loss", "gradient_penalty",
        "ConditionalBatchNorm2d", "ProjectionHead", "attention_overlay", "load_published", "functional",
        "insert_self_attention", "remove_self_attention", "record_attention", "mark_queries", "AttentionRecord",
        "convert_legacy_spectral_norm", "explore_attention",
    }  # fmt: skip
    assert promised <= set(torch_sagan.__all__)


def test_classes_do_not_inherit_their_documentation() -> None:
    for name in torch_sagan.__all__:
        thing = getattr(torch_sagan, name)
        assert not isinstance(thing, type) or thing.__doc__, f"{name} only inherits its docstring"


def test_marked_as_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", torch_sagan.__version__)  # .dev: not released
    newest = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[0]
    assert newest in ("Unreleased", torch_sagan.__version__)


# --- importing -----------------------------------------------------------------------------------------------------


# From torch 2.15 on, its FLOP counter, with which our operators register, loads triton where that is installed.
IMPORT = """
import json, sys, torch, torch.utils.flop_counter
from torch.nn.modules import module
def outside():
    hooks = {name: len(value) for name, value in vars(module).items() if name.endswith("_hooks")}
    return hooks | {"random": torch.get_rng_state().tolist()}
modules, before = set(sys.modules), outside()
import torch_sagan
print(json.dumps([sorted(set(sys.modules) - modules), before, outside()]))
"""


@pytest.fixture(scope="module")
def fresh_import() -> tuple[list[str], dict[str, object], dict[str, object]]:
    """In a fresh interpreter that has loaded torch: the modules that are new, and what is outside, before and after."""
    command = [sys.executable, "-W", "error::UserWarning:torch_sagan", "-c", IMPORT]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    modules, before, after = json.loads(result.stdout)
    return modules, before, after


def test_importing_loads_torch_and_nothing_else(fresh_import: tuple[list[str], object, object]) -> None:
    """After torch and its dependencies, only our own modules are loaded."""
    modules, _, _ = fresh_import
    assert "torch_sagan" in modules
    assert "torchvision" not in modules
    assert {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names) <= {"torch", "torch_sagan"}


def test_importing_changes_nothing_outside(fresh_import: tuple[object, dict[str, object], dict[str, object]]) -> None:
    """No random number is drawn, and no hook is registered for the modules of the process."""
    _, before, after = fresh_import
    assert "_global_module_registration_hooks" in before
    assert after == before


def test_this_interpreter_has_the_torch_that_is_asked_for() -> None:
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    assert (major, minor) >= (2, 5)
