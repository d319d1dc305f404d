"""The files around the code agree with it, and with one another: workflows, metadata, the citation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml

import torch_sagan

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
METADATA = (ROOT / "pyproject.toml").read_text(encoding="utf-8")  # as text: Python 3.10 has no tomllib


def workflow(name: str) -> dict[str, Any]:
    """A workflow's jobs by name."""
    jobs: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))["jobs"]
    return jobs


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_commit(path: Path) -> None:
    """A tag can be moved to other code; the version stands beside the commit for the reader and for dependabot."""
    used = re.findall(r"uses: (.+)", path.read_text(encoding="utf-8"))
    assert used
    for action in used:
        assert action.startswith("./") or re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


def test_one_commit_of_each_action() -> None:
    used = {line for path in WORKFLOWS for line in re.findall(r"uses: (\S+@\S+)", path.read_text(encoding="utf-8"))}
    assert len(used) == len({line.split("@")[0] for line in used})


def test_ci_covers_what_the_metadata_promise() -> None:
    matrix = workflow("ci.yml")["wheel"]["strategy"]["matrix"]["include"]
    versions = re.findall(r"Python :: (3\.\d+)", METADATA)
    assert sorted({entry["python"] for entry in matrix}) == sorted(versions)
    assert {entry["system"] for entry in matrix} == {"Linux", "macOS", "Windows"}
    assert {"oldest", "pinned", "newest"} == {entry["torch"] for entry in matrix}
    (oldest,) = [entry for entry in matrix if entry["torch"] == "oldest"]
    assert f'requires-python = ">={oldest["python"]}"' in METADATA
    (torch,) = re.findall(r"torch>=(\d+\.\d+)", re.findall(r"^dependencies = .*", METADATA, re.MULTILINE)[0])
    assert f"torch=={torch}." in (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")


def test_ci_selects_by_markers_that_exist() -> None:
    """Not by lists of files, which miss new ones."""
    markers = set(re.findall(r'^    "(\w+): ', METADATA, re.MULTILINE))
    for entry in workflow("ci.yml")["wheel"]["strategy"]["matrix"]["include"]:
        assert not re.search(r"\.py\b", entry["tests"])
        assert set(re.findall(r"\w+", entry["tests"])) - {"tests", "m", "not", "and", "or"} <= markers


def test_the_night_has_examples_of_its_own() -> None:
    """In CI they are the same in every run, so that a change is what makes a test fail."""
    profile = workflow("nightly.yml")["examples"]["env"]["HYPOTHESIS_PROFILE"]
    assert not hypothesis.settings.get_profile(profile).derandomize
    assert hypothesis.settings.get_profile("sagan").derandomize


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_jobs_end_and_may_only_read(path: Path) -> None:
    """But for those that publish, which say what they may."""
    text = path.read_text(encoding="utf-8")
    assert re.search(r"^permissions:\n  contents: read\n", text, re.MULTILINE)
    for name, job in workflow(path.name).items():
        assert "uses" in job or job["timeout-minutes"] <= 60, name
    assert text.count("actions/checkout@") == text.count("persist-credentials: false")


def test_a_release_publishes_what_has_passed() -> None:
    jobs = workflow("release.yml")
    assert jobs["ci"]["uses"] == "./.github/workflows/ci.yml"
    assert jobs["publish"]["needs"] == "ci"
    assert jobs["release"]["needs"] == "publish"
    for job in ("publish", "release"):  # the files that CI has built, no others
        commands = [step.get("run", "") + step.get("uses", "") for step in jobs[job]["steps"]]
        assert any("actions/download-artifact@" in command for command in commands)
        assert not any("build" in command for command in commands)


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == torch_sagan.__version__


LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_the_readme_works_wherever_the_repository_is() -> None:
    """Its links to files, pages and images are relative: they need no published site, and lead where the pages' do."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ours = [target for target in LINK.findall(readme) if "torch-sagan" in target.lower()]
    assert ours == []
    assert len([target for target in LINK.findall(readme) if not target.startswith("https://")]) > 20


def test_an_index_shows_the_readme_with_absolute_links() -> None:
    """By the substitutions of the build; `make package` looks at what it has built."""
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    hook = tomllib.loads(METADATA)["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for substitution in hook["substitutions"]:
        text = re.sub(substitution["pattern"], substitution["replacement"], text)
    assert not [target for target in LINK.findall(text) if not target.startswith("https://")]
    site = "https://torch-sagan.github.io/torch-sagan"
    assert f"({site}/dcgan.html)" in text
    assert f"({site}/performance.html#the-training-step)" in text
    assert "(https://raw.githubusercontent.com/torch-sagan/torch-sagan/main/docs/images/demo.png)" in text


def test_extras_are_for_those_who_have_the_package_alone() -> None:
    """What scripts, pages and tests of a checkout need is in files of requirements there."""
    (section,) = re.findall(r"^\[project\.optional-dependencies\]\n(.*?)\n\n", METADATA, re.MULTILINE | re.DOTALL)
    extras = set(re.findall(r"^(\w+) = ", section, re.MULTILINE))
    assert not extras & {"examples", "evaluation", "docs", "dev", "test", "tests"}
    named = set()
    for page in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob(".github/workflows/*.yml"), ROOT / "Makefile"]:
        named |= set(re.findall(r"torch-sagan\[(\w+)\]|'\.\[(\w+)\]'", page.read_text(encoding="utf-8")))
    assert {one or other for one, other in named} == extras


def test_each_file_of_requirements_is_installed_somewhere() -> None:
    texts = "".join(
        path.read_text(encoding="utf-8")
        for path in [ROOT / "Makefile", *WORKFLOWS, ROOT / "docs" / "evaluation.md", ROOT / "docs" / "training.md"]
    )
    files = [
        path.relative_to(ROOT).as_posix() for path in ROOT.glob("*/**/requirements.txt") if ".venv" not in path.parts
    ]
    assert len(files) >= 4
    assert all(file in texts for file in files)
    for file in files:  # those that they include
        for included in re.findall(r"^-r (.+)", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE):
            assert ((ROOT / file).parent / included).is_file()


def test_the_steps_of_a_release_exist() -> None:
    text = (ROOT / "RELEASING.md").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"\bmake ([a-z]+)", text)) <= set(targets)
    assert {"check", "exhaustive", "rehearsal"} <= set(re.findall(r"\bmake ([a-z]+)", text))
    release = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    assert "environment `release`" in text
    assert "environment: release" in release
    for name in re.findall(r"workflows? \*(\w+)\*", text):
        assert any(f"name: {name}\n" in path.read_text(encoding="utf-8") for path in WORKFLOWS), name
