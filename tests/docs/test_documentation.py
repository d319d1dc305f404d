"""What the README and the guides show runs: their Python blocks, one after the other, as a reader would paste them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import Field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import public_networks
import torch_sagan
from pages import COMMANDS, DOCS, ROOT, blocks, commands, fences, indented, is_python, run
from training.flags import Config
from training.script import flag

EXAMPLES, BENCHMARKS = ROOT / "examples", ROOT / "benchmarks"
PAGES = sorted([ROOT / "README.md", EXAMPLES / "README.md", BENCHMARKS / "README.md", *DOCS.glob("*.md")])
WITH_CODE = [page for page in PAGES if blocks(page)]
EXPORTING = [page for page in WITH_CODE if any("torch.onnx.export" in block for block in blocks(page))]  # which is slow

# What a page imports that is neither ours nor installed, and what stands for it here.
STAND_INS = {"models": public_networks, "models.networks": public_networks}


def can_run(block: str) -> bool:
    """Whether what a block needs beside torch is installed."""
    if "onnx" in block and torch.__version__ < "2.7":  # whose exporter does not know all of these operators
        return False
    if "from training" in block and torch.__version__ < "2.6":  # the scripts refuse to read files with it
        return False
    needed = {"onnx": ("onnxscript", "onnxruntime"), "safetensors": ("safetensors",)}
    return all(find_spec(package) for word, packages in needed.items() if word in block for package in packages)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's exporter uses what torch has deprecated
@pytest.mark.filterwarnings("ignore:`torch.jit")  # as does its forward mode
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.exhaustive] if page in EXPORTING else []) for page in WITH_CODE],
    ids=lambda page: page.name,
)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, module in STAND_INS.items():
        monkeypatch.setitem(sys.modules, name, module)
    if page.name == "evaluation.md":
        export_animals(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    for block in filter(can_run, blocks(page)):
        run(page, block, namespace)
    if page.name == "evaluation.md" and "session" in namespace:
        check_onnx(namespace, tmp_path)


def export_animals(folder: Path) -> None:
    """The file of a small generator with classes, as the page's command leaves it."""
    model_card = pytest.importorskip("training.output.model_card")
    arguments = {"architecture": "dcgan", "image_size": 16, "base_channels": 8, "z_dim": 16, "num_classes": 2}
    arguments |= {"attention_resolutions": [8]}
    card = {"generator": arguments, "classes": {"cat": 3, "dog": 4}}
    generator = torch_sagan.SAGANGenerator(**arguments)
    with torch.no_grad():
        for parameter in generator.parameters():  # a new one draws all classes alike
            parameter.add_(0.2 * torch.randn_like(parameter))
    model_card.save(generator.state_dict(), card, folder / "animals.safetensors")


def check_onnx(namespace: dict[str, Any], folder: Path) -> None:
    """The page names both files, and the exported network draws what the generator does."""
    assert {path.name for path in folder.glob("*.onnx*")} == {"animals.onnx", "animals.onnx.data"}
    assert namespace["number"] == 0
    z, labels = torch.from_numpy(namespace["z"]), torch.zeros(5, dtype=torch.long)
    with torch.no_grad():
        expected = namespace["generator"](z, labels)
        other = namespace["generator"](z, labels + 1)
    drawn = torch.from_numpy(namespace["images"])
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)  # float32, in another order of summation
    assert (drawn - other).abs().max() > 0.01


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.name}")
def test_every_block_runs_or_says_why_not(page: Path) -> None:
    """Blocks of Python, also where they are only indented. Commands have tests of their own, below."""
    for fence in fences(page):
        assert fence.language, f"{page.name}: a block without a language: {fence.body[:60]!r}"
        runs = fence.language == "python" or fence.language in COMMANDS or fence.language.startswith("{")
        assert runs or fence.why_not, f"{page.name}: neither run nor marked: {fence.body[:60]!r}"
    for block in indented(page):
        assert not is_python(block), f"{page.name}: only indented, so it is not run: {block[:60]!r}"


def test_the_readme_and_the_guides_have_code() -> None:
    assert {"README.md", "get-started.md", "existing-models.md", "how-it-is-trained.md"} <= {
        page.name for page in WITH_CODE
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.name}")
def test_every_fence_is_closed(page: Path) -> None:
    assert page.read_text(encoding="utf-8").count("```") % 2 == 0


def test_the_reference_lists_every_public_name() -> None:
    text = (ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8")
    modules = text.split(".. automodule:: torch_sagan.functional")
    own, functions = (re.findall(r"^   (\w+)$", part, re.MULTILINE) for part in modules)
    assert sorted([*own, "functional"]) == sorted(torch_sagan.__all__)
    assert sorted(functions) == sorted(torch_sagan.functional.__all__)


class FastaiAttention(nn.Module):
    """The layer of fastai 1 and 2: query and key have each other's names, the softmax runs over dimension 1."""

    def __init__(self, channels: int, bias: bool = False) -> None:
        super().__init__()
        for name, width in {"query": channels // 8, "key": channels // 8, "value": channels}.items():
            self.add_module(name, nn.utils.spectral_norm(nn.Conv1d(channels, width, 1, bias=bias)))
        self.gamma = nn.Parameter(torch.tensor([0.7]))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        weights = torch.bmm(self.query(flat).transpose(1, 2), self.key(flat)).softmax(dim=1)
        return (self.gamma * torch.bmm(self.value(flat), weights) + flat).view_as(x)


class FastaiPooledAttention(nn.Module):
    """Its other layer, whose convolutions are in a block of their own: key and value pooled, and a last projection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = {"query": (channels, channels // 8), "key": (channels, channels // 8)}
        for name, pair in (widths | {"value": (channels, channels // 2), "out": (channels // 2, channels)}).items():
            self.add_module(name, nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(*pair, 1, bias=False))))
        self.gamma = nn.Parameter(torch.tensor([0.7]))

    def forward(self, x: Tensor) -> Tensor:
        key, value = (nn.functional.max_pool2d(layer(x), 2).flatten(2) for layer in (self.key, self.value))
        weights = torch.bmm(self.query(x).flatten(2).transpose(1, 2), key).softmax(dim=-1)
        attended = torch.bmm(value, weights.transpose(1, 2)).view(len(x), -1, *x.shape[2:])
        return self.gamma * self.out(attended) + x


@pytest.mark.parametrize(
    "build",
    [FastaiAttention, lambda channels: FastaiAttention(channels, bias=True), FastaiPooledAttention],
    ids=["SelfAttention", "with biases", "PooledSelfAttention2d"],
)
def test_weights_of_fastai_load_as_the_guide_says(build: Callable[[int], nn.Module]) -> None:
    """From a checkpoint, before any pass: the older hook has not yet computed the weight that it normalizes."""
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(DOCS / "migrating.md"):
        run(DOCS / "migrating.md", block, namespace)
    trained = build(16)
    x = torch.randn(2, 16, 6, 4)
    for _ in range(3):
        trained(x)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.5).add_(0.1 * torch.randn_like(parameter))
    expected = trained.eval()(x)
    loaded = build(16)
    loaded.load_state_dict(trained.state_dict())
    ours = namespace["from_fastai"](loaded, 16)
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-5)  # float32, in another order of summation
    assert (expected - x).abs().max() > 0.1  # not the identity


# --- what the pages say of the examples ----------------------------------------------------------------------------


def section(title: str) -> str:
    """What stands under a heading of the page of flags."""
    text = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def flag_table() -> dict[str, str]:
    """The rows of the table of flags: each flag with its default, as the page has them."""
    rows = re.findall(r"^\| (`--.+?) \| (.*?) ?\| .+ \|$", section("Flags"), re.MULTILINE)
    table = {}
    for flags, defaults in rows:
        named = re.findall(r"`(--[a-z0-9-]+)`", flags)
        given = defaults.split(", ") if len(named) > 1 else [defaults]
        table |= dict(zip(named, given, strict=True))
    return table


def test_the_table_has_every_flag_and_no_other() -> None:
    assert sorted(flag_table()) == sorted(
        [*(flag(setting.name) for setting in fields(Config)), "--resume", "--dry-run"]
    )


@pytest.mark.parametrize("setting", fields(Config), ids=lambda setting: setting.name)
def test_the_table_has_the_defaults(setting: Field[Any]) -> None:
    stated = flag_table()[flag(setting.name)]
    if isinstance(setting.default, bool):
        assert stated == ("yes" if setting.default else "no")
    elif isinstance(setting.default, int | float):
        assert float(stated) == setting.default
    elif setting.default:
        assert stated == f"`{setting.default}`"
    else:  # the page says what is done without it
        assert len(stated) > 5


def test_every_script_has_a_row() -> None:
    for folder in (EXAMPLES, BENCHMARKS):
        text = (folder / "README.md").read_text(encoding="utf-8")
        named = re.findall(rf"^\| `python {folder.name}/(\w+)\.py", text, re.MULTILINE)
        assert sorted(named) == sorted(path.stem for path in folder.glob("*.py") if path.stem != "examples_path")


def test_every_recipe_is_listed() -> None:
    text = (
        (ROOT / "docs" / "training.md").read_text(encoding="utf-8").partition("## Recipes\n")[2].partition("\n## ")[0]
    )
    named = re.findall(r"^\| `([a-z0-9-]+)` \|", text, re.MULTILINE)
    assert sorted(named) == sorted(path.stem for path in (EXAMPLES / "recipes").glob("*.txt"))


LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)")


def anchors(page: Path) -> set[str]:
    """The anchors of a page: its headings, as GitHub and MyST name them, and MyST's own labels."""
    text = page.read_text(encoding="utf-8")
    labels = set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return labels | {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: f"{page.parent.name}-{page.name}")
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}#{anchor}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "Makefile"], ids=lambda page: page.name)
def test_commands_name_files_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"(?<![\w/])(?:examples|benchmarks)/[\w/.-]*\w\.(?:py|txt|md)", text):
        assert (ROOT / path).is_file(), f"{page.name} names {path}"


def flags_of(script: Path) -> set[str]:
    """The flags that a script has, its own and, for the trainer's, those of the settings."""
    source = script.read_text(encoding="utf-8")
    known = set(re.findall(r'"(--[a-z][a-z0-9-]*)"', source)) | {"--help"}
    if "short_run_parser" in source:
        known |= {"--steps", "--out", "--seed"}
    if script.stem in ("train_celeba", "train_digits"):
        known |= {flag(setting.name) for setting in fields(Config)} | {"--resume", "--dry-run"}
    return known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.name}")
def test_commands_have_flags_that_exist(page: Path) -> None:
    for command in commands(page):
        script = next((ROOT / word for word in command if re.fullmatch(r"(examples|benchmarks)/\w+\.py", word)), None)
        if script is None:
            continue
        after = command[command.index(str(script.relative_to(ROOT))) :]
        given = {word.partition("=")[0].replace("--no-", "--") for word in after if re.match("--[a-z]", word)}
        known = {name.replace("--no-", "--") for name in flags_of(script)}
        assert given <= known, f"{page.name}: {script.name} has no {', '.join(sorted(given - known))}"


def test_the_readme_says_how_long_a_run_takes() -> None:
    """From the recipe's estimate for a GPU, and for a CPU from the measured speed of a step."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    recipe = (ROOT / "examples" / "recipes" / "celeba64.txt").read_text(encoding="utf-8")  # the trainer's defaults
    (minutes,) = re.findall(r"time: (\d+) min \(\w+\) on one GPU", recipe)
    assert f"an A100 is estimated to take {minutes} minutes" in readme
    performance = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    (rate,) = re.findall(r"^\| this library \| \d+ \| (\d+) \| [\d.–]+ \|$", performance, re.MULTILINE)
    assert f"at {rate} images/s, two days" in readme
    defaults = Config()
    for name, value in (("steps", "100000"), ("batch_size", "64"), ("base_channels", "64"), ("lr_d", "4e-4")):
        assert float(getattr(defaults, name)) == float(value)
        assert f"--{name.replace('_', '-')} {value}" in recipe
    assert round(defaults.steps * defaults.batch_size / int(rate) / 86_400, 1) == 2.0
