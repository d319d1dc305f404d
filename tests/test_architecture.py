"""The house: which room may import which, what is public, what importing costs."""

from __future__ import annotations

import ast
import inspect
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

# From the ground up. Imports run downward only; rooms on one floor never import each other.
FLOORS = [
    {"arguments", "memory_efficient"},
    {"functional"},
    {"attention", "spectral", "losses"},
    {"conditional", "recalibration", "visualization"},
    {"blocks", "explorer"},
    {"generator", "discriminator", "surgery"},
    {"checkpoints"},
    {"__init__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ROOMS = sorted(path.stem for path in PACKAGE.glob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Every module that a file imports, anywhere in it, with the names taken from it; relative ones spelled out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, []
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(part for part in ("torch_sagan" if node.level else "", node.module) if part)
            yield module, [alias.name for alias in node.names]


def rooms_imported(path: Path) -> set[str]:
    rooms = set()
    for module, names in imports(path):
        top, _, room = module.partition(".")
        if top != "torch_sagan":
            continue
        # ``from torch_sagan import x`` means the room x, or else the package itself.
        rooms |= {room.split(".")[0]} if room else {name if name in FLOOR else "__init__" for name in names or [""]}
    return rooms


# --- rooms ---------------------------------------------------------------------------------------------------------


def test_every_room_has_a_floor() -> None:
    assert set(ROOMS) <= set(FLOOR)
    assert not [path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert {"__init__", "functional", "attention", "spectral", "generator", "discriminator", "losses"} <= set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_downward(room: str) -> None:
    for other in rooms_imported(PACKAGE / f"{room}.py"):
        assert FLOOR[other] < FLOOR[room], f"{room} imports {other}"


def test_the_check_sees_imports_in_every_form(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text(
        "import torch_sagan.blocks\n"
        "from torch_sagan import functional\n"
        "from . import generator\n"
        "def f():\n    from .attention import SelfAttention2d\n    from torch_sagan import spectral_norm\n"
    )
    assert rooms_imported(source) == {"blocks", "functional", "generator", "attention", "__init__"}


@pytest.mark.parametrize("room", ROOMS)
def test_torch_is_the_only_requirement(room: str) -> None:
    for module, _ in imports(PACKAGE / f"{room}.py"):
        top = module.split(".")[0]
        assert top in {"torch", "torch_sagan"} or top in sys.stdlib_module_names, f"{room} imports {module}"


@pytest.mark.parametrize("room", ROOMS)
def test_no_star_imports(room: str) -> None:
    assert not [module for module, names in imports(PACKAGE / f"{room}.py") if "*" in names]


def test_no_room_for_leftovers() -> None:
    for folder in ("src", "tests", "examples"):
        names = {path.stem for path in (ROOT / folder).rglob("*.py")}
        assert names.isdisjoint({"utils", "util", "misc", "helpers", "common"})


@pytest.mark.parametrize("folder", ["tests", "examples"])
def test_tests_and_examples_use_the_public_names(folder: str) -> None:
    # Which path attention takes is chosen by size alone; its tests have to reach each of them at small sizes.
    paths = sorted(set((ROOT / folder).glob("*.py")) - {ROOT / "tests" / "test_memory_efficient.py"})
    assert paths
    for path in paths:
        for module, names in imports(path):
            if module.split(".")[0] == "torch_sagan":
                assert module == "torch_sagan", f"{path.name} imports {module}"
                private = set(names) - set(torch_sagan.__all__) - {"__version__"}
                assert not private, f"{path.name} takes {sorted(private)} from torch_sagan"


def test_oracles_do_not_import_what_they_judge() -> None:
    assert not rooms_imported(Path(__file__).parent / "references.py")


# --- public names --------------------------------------------------------------------------------------------------


def test_all_is_what_is_there() -> None:
    """Every public name of the package is in ``__all__``, and everything in ``__all__`` is there."""
    # Rooms become attributes when they are imported; only functional is public as a room.
    rooms = set(ROOMS) - {"functional"}
    here = {name for name in vars(torch_sagan) if not name.startswith("_")}
    own = {name for name in here if not (name in rooms and isinstance(getattr(torch_sagan, name), ModuleType))}
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


def test_rooms_are_documented_and_marked_as_typed() -> None:
    for room in ROOMS:
        assert ast.get_docstring(ast.parse((PACKAGE / f"{room}.py").read_text(encoding="utf-8"))), room
    assert (PACKAGE / "py.typed").is_file()


def test_version() -> None:
    assert torch_sagan.__version__.count(".") == 2
    newest = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[0]
    assert newest in ("Unreleased", torch_sagan.__version__)


# --- importing -----------------------------------------------------------------------------------------------------


def test_importing_loads_torch_and_nothing_else() -> None:
    """In a fresh interpreter: whatever comes with ``import torch`` is there before, only our own modules come after."""
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import torch_sagan\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names)), 'torchvision' in sys.modules)"
    )
    environment = {"PYTHONPATH": str(PACKAGE.parent)}
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
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(PACKAGE.parent)})


def test_this_interpreter_has_the_torch_that_is_asked_for() -> None:
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    assert (major, minor) >= (2, 5)
