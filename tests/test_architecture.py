"""Which module may import which, in the package and in the examples; what is public; what importing costs."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import torch_sagan

ROOT = Path(__file__).parent.parent
PACKAGE = Path(torch_sagan.__file__).parent

# From the bottom up. Imports run downwards only; modules of one layer never import each other.
LAYERS = [
    {"dispatch", "grouped_iteration", "inserted", "legacy_spectral_norm", "modes"},
    {"double_backward", "example_pass"},
    {"fused_attention", "tiled_attention"},
    {"arguments", "functional"},
    {"attention", "layer_selection", "losses", "spectral"},
    {"conditional", "recording", "spectral_models", "surgery", "visualization"},
    {"blocks", "explorer", "insertion", "recalibration"},
    {"generator", "discriminator"},
    {"checkpoints"},
    {"__init__"},
]
LAYER = {module: layer for layer, modules in enumerate(LAYERS) for module in modules}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Every module that a file imports, anywhere in it, with the names taken from it; relative ones spelled out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, []
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(part for part in ("torch_sagan" if node.level else "", node.module) if part)
            yield module, [alias.name for alias in node.names]


def modules_imported(path: Path) -> set[str]:
    found = set()
    for module, names in imports(path):
        top, _, inner = module.partition(".")
        if top != "torch_sagan":
            continue
        # ``from torch_sagan import x`` means the module x, or else the package itself.
        found |= {inner.split(".")[0]} if inner else {name if name in LAYER else "__init__" for name in names or [""]}
    return found


def imports_of_modules() -> dict[str, set[str]]:
    """Of every module of the package but ``__init__``, the others that it imports."""
    return {module: modules_imported(PACKAGE / f"{module}.py") for module in MODULES if module != "__init__"}


# --- the package ---------------------------------------------------------------------------------------------------


def test_every_module_has_a_layer() -> None:
    assert set(MODULES) <= set(LAYER)
    assert not [path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert {"__init__", "functional", "attention", "spectral", "generator", "discriminator", "losses"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards(module: str) -> None:
    for other in modules_imported(PACKAGE / f"{module}.py"):
        assert LAYER[other] < LAYER[module], f"{module} imports {other}"


def test_the_diagram_of_modules_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from draw_modules import draw

    drawn = draw(LAYERS[:-1], imports_of_modules())  # __init__ imports nearly all of them
    committed = (ROOT / "docs" / "images" / "modules.svg").read_text(encoding="utf-8")
    assert committed == drawn, "run python docs/draw_modules.py"


def test_the_check_sees_imports_in_every_form(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text(
        "import torch_sagan.blocks\n"
        "from torch_sagan import functional\n"
        "from . import generator\n"
        "def f():\n    from .attention import SelfAttention2d\n    from torch_sagan import spectral_norm\n"
    )
    assert modules_imported(source) == {"blocks", "functional", "generator", "attention", "__init__"}


@pytest.mark.parametrize("module", MODULES)
def test_torch_is_the_only_requirement(module: str) -> None:
    for imported, _ in imports(PACKAGE / f"{module}.py"):
        top = imported.split(".")[0]
        assert top in {"torch", "torch_sagan"} or top in sys.stdlib_module_names, f"{module} imports {imported}"


@pytest.mark.parametrize("module", MODULES)
def test_no_star_imports(module: str) -> None:
    assert not [name for name, names in imports(PACKAGE / f"{module}.py") if "*" in names]


def test_no_module_for_leftovers() -> None:
    for folder in ("src", "tests", "examples"):
        names = {path.stem for path in (ROOT / folder).rglob("*.py")}
        assert names.isdisjoint({"utils", "util", "misc", "helpers", "common"})


@pytest.mark.parametrize("folder", ["tests", "examples"])
def test_tests_and_examples_use_the_public_names(folder: str) -> None:
    # Which path attention takes is chosen by size and device; its tests have to reach each of them at small sizes, on
    # the CPU.
    own = {ROOT / "tests" / name for name in ("test_fast_attention.py", "test_variants.py", "emulated_kernels.py")}
    paths = sorted(set((ROOT / folder).rglob("*.py")) - own)
    assert paths
    for path in paths:
        for module, names in imports(path):
            if module.split(".")[0] == "torch_sagan":
                assert module == "torch_sagan", f"{path.name} imports {module}"
                private = set(names) - set(torch_sagan.__all__) - {"__version__"}
                assert not private, f"{path.name} takes {sorted(private)} from torch_sagan"


def test_references_do_not_import_what_they_verify() -> None:
    assert not modules_imported(Path(__file__).parent / "references.py")


# --- the examples --------------------------------------------------------------------------------------------------

EXAMPLES = ROOT / "examples"
# As above, from the bottom up. On top are the scripts, of which two use the trainer itself.
EXAMPLE_LAYERS = [
    {"networks.dcgan", "networks.cyclegan", "networks.plain"},
    {"measurement.operators", "measurement.photographs", "measurement.stopwatch", "measurement.tables"},
    {"measurement.floors", "measurement.passes"},
    {"measurement.peak_memory"},
    {"measurement.contenders"},
    {"training.prefetch"},
    {
        "training.threads", "training.memory", "training.command_line", "training.tensor_files", "training.signals",
        "training.workers", "training.faces", "training.cifar10", "training.mnist", "training.labels",
        "training.latents", "training.augmentation", "training.average", "training.architectures",
    },
    {
        "training.checkpointing", "training.distributed", "training.image_folder", "training.published",
        "training.run_lock",
    },
    {"training.image_cache", "training.image_io", "training.logging", "training.model_card", "training.step"},
    {"training.cuda_graph", "training.data", "training.objectives"},
    {"training.configuration"},
    {"training.state"},
    {"training.sampling"},
    {"evaluation.inception", "evaluation.precision_recall", "evaluation.sliced_wasserstein"},
    {
        "evaluation.class_agreement", "evaluation.color_agreement", "evaluation.fid", "evaluation.kid",
        "evaluation.inception_score",
    },
    {"evaluation.evaluator"},
    {
        "attention_in_cyclegan", "attention_in_dcgan", "average_drift", "generate", "gpu_table", "long_range",
        "minimal", "recipe_costs", "report", "show_attention", "train_celeba",
    },
    {"benchmark", "train_digits"},
]  # fmt: skip
EXAMPLE_LAYER = {module: layer for layer, modules in enumerate(EXAMPLE_LAYERS) for module in modules}


def example_name(path: Path) -> str:
    return ".".join(path.relative_to(EXAMPLES).with_suffix("").parts)


EXAMPLE_MODULES = {example_name(path): path for path in sorted(EXAMPLES.rglob("*.py"))}
SCRIPTS = [name for name in EXAMPLE_MODULES if "." not in name]


def examples_imported(path: Path) -> set[str]:
    """The modules of the examples that a file imports."""
    named = {name for module, names in imports(path) for name in (module, *(f"{module}.{name}" for name in names))}
    return named & set(EXAMPLE_MODULES)


def test_every_example_has_a_layer() -> None:
    assert set(EXAMPLE_MODULES) == set(EXAMPLE_LAYER)
    folders = {path.name for path in EXAMPLES.iterdir() if path.is_dir()}
    assert {"training", "evaluation", "measurement", "networks", "recipes"} <= folders


@pytest.mark.parametrize("module", EXAMPLE_MODULES)
def test_imports_of_examples_run_downwards(module: str) -> None:
    for other in examples_imported(EXAMPLE_MODULES[module]):
        assert EXAMPLE_LAYER[other] < EXAMPLE_LAYER[module], f"{module} imports {other}"


def test_the_check_sees_imports_of_examples_in_every_form(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text(
        "import training.step, train_celeba\n"
        "from training import faces, nothing\n"
        "def f():\n    from evaluation.fid import fid\n    import torch\n"
    )
    assert examples_imported(source) == {"training.step", "train_celeba", "training.faces", "evaluation.fid"}


def test_networks_know_nothing_of_us() -> None:
    for name, path in EXAMPLE_MODULES.items():
        if name.startswith("networks."):
            ours = {module.split(".")[0] for module, _ in imports(path)} - {"torch"} - sys.stdlib_module_names
            # The baseline of the benchmark is the library's networks with its own layers in them.
            assert ours <= ({"torch_sagan"} if name == "networks.plain" else set()), f"{name} imports {sorted(ours)}"


def is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


@pytest.mark.parametrize("module", EXAMPLE_MODULES)
def test_scripts_alone_are_at_the_top(module: str) -> None:
    body = ast.parse(EXAMPLE_MODULES[module].read_text(encoding="utf-8")).body
    assert any(map(is_main_guard, body)) == (module in SCRIPTS)


def calls_backward(path: Path) -> bool:
    """Whether anything in a file is called by the name `backward`, as a method or as torch.autograd's function."""
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return any(ast.unparse(call.func).split(".")[-1] == "backward" for call in calls)


def test_gans_learn_in_one_place() -> None:
    """In the step, and in the four files that stand alone."""
    learning = {name for name, path in EXAMPLE_MODULES.items() if calls_backward(path)}
    assert learning == {
        "training.step", "minimal", "attention_in_dcgan", "attention_in_cyclegan", "networks.plain",
    }  # fmt: skip


def test_minimal_is_small_and_stands_alone() -> None:
    path = EXAMPLES / "minimal.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 150
    needed = {module.split(".")[0] for module, _ in imports(path)} - sys.stdlib_module_names
    assert needed == {"torch", "PIL", "torch_sagan"}


# --- public names --------------------------------------------------------------------------------------------------


def test_all_is_what_is_there() -> None:
    """Every public name of the package is in ``__all__``, and everything in ``__all__`` is there."""
    # Modules become attributes when they are imported; only functional is public as a module.
    modules = set(MODULES) - {"functional"}
    here = {name for name in vars(torch_sagan) if not name.startswith("_")}
    own = {name for name in here if not (name in modules and isinstance(getattr(torch_sagan, name), ModuleType))}
    assert own == set(torch_sagan.__all__) - {"__version__"}
    assert len(torch_sagan.__all__) == len(set(torch_sagan.__all__))


def test_names_that_are_promised() -> None:
    promised = {
        "SelfAttention2d", "SpectralNorm", "spectral_norm", "remove_spectral_norm", "apply_spectral_norm",
        "reset_power_iteration", "spectral_norms", "SAGANGenerator", "SAGANDiscriminator", "hinge_discriminator_loss",
        "hinge_generator_loss", "wasserstein_discriminator_loss", "wasserstein_generator_loss", "gradient_penalty",
        "ConditionalBatchNorm2d", "ProjectionHead", "attention_overlay", "load_reference_state_dict", "functional",
        "insert_self_attention", "remove_self_attention", "record_attention", "mark_queries", "AttentionRecord",
        "convert_legacy_spectral_norm", "explore_attention",
    }  # fmt: skip
    assert promised <= set(torch_sagan.__all__)


def public_objects() -> Iterator[tuple[str, object]]:
    for name in torch_sagan.__all__:
        thing = getattr(torch_sagan, name)
        yield name, thing
        members = vars(thing).items() if inspect.isclass(thing) or inspect.ismodule(thing) else ()
        for member, value in members:
            if isinstance(value, classmethod | staticmethod):
                value = value.__func__
            own = inspect.isfunction(value) and value.__module__.startswith("torch_sagan")
            if own and not member.startswith("_"):
                yield f"{name}.{member}", value


@pytest.mark.parametrize(("name", "thing"), list(public_objects()), ids=lambda x: x if isinstance(x, str) else "")
def test_documented_and_typed(name: str, thing: object) -> None:
    if name != "__version__":
        documentation = inspect.getdoc(thing)
        assert documentation, f"{name} has no docstring"
        if inspect.isclass(thing):
            assert thing.__doc__, f"{name} only inherits its docstring"
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        assert signature.return_annotation is not inspect.Signature.empty
        for parameter in signature.parameters.values():
            assert parameter.name in ("self", "cls") or parameter.annotation is not inspect.Parameter.empty


def test_modules_are_documented_and_marked_as_typed() -> None:
    for path in [*map(PACKAGE.joinpath, (f"{module}.py" for module in MODULES)), *EXAMPLE_MODULES.values()]:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
    assert (PACKAGE / "py.typed").is_file()


def test_version() -> None:
    assert torch_sagan.__version__.count(".") == 2
    newest = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[0]
    assert newest in ("Unreleased", torch_sagan.__version__)


# --- importing -----------------------------------------------------------------------------------------------------


def test_importing_loads_torch_and_nothing_else() -> None:
    """In a fresh interpreter: after torch and its dependencies, only our own modules are loaded."""
    code = (
        # From torch 2.15 on, its FLOP counter, with which our operators register, loads triton where that is installed.
        "import sys, torch, torch.utils.flop_counter; before = set(sys.modules)\n"
        "import torch_sagan\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names)), 'torchvision' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:torch_sagan", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    names, torchvision = result.stdout.strip().rsplit(" ", 1)
    assert set(ast.literal_eval(names)) <= {"torch", "torch_sagan"}
    assert torchvision == "False"


def test_importing_leaves_the_random_state_alone() -> None:
    code = "import torch; s = torch.get_rng_state(); import torch_sagan; assert torch.equal(s, torch.get_rng_state())"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)})


def test_this_interpreter_has_the_torch_that_is_asked_for() -> None:
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    assert (major, minor) >= (2, 5)
