"""How every script reads its command line and ends: recipes, paths, errors of one line, and streams nobody reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from training.flags import Config
from training.script import Parser, fail, given_path, read_arguments

EXAMPLES = Path(__file__).parents[3] / "examples"


def read(*arguments: str) -> dict[str, object]:
    given = read_arguments(Config, arguments, "")
    return {name: given[name] for name in given.keys() - {"resume", "dry_run"}}


# --- errors --------------------------------------------------------------------------------------------------------


def test_an_error_begins_with_the_script_that_runs_and_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["some/where/any_script.py"])
    with pytest.raises(SystemExit, match=r"^any_script\.py: two lines$"):
        fail("two\nlines")
    parser = Parser()
    parser.add_argument("--steps", type=int)
    with pytest.raises(SystemExit, match=r"^any_script\.py: argument --steps: invalid int value: 'x' \(--help"):
        parser.parse_args(["--steps", "x"])


# --- recipes -------------------------------------------------------------------------------------------------------


def test_a_recipe_is_its_flags_without_comments(tmp_path: Path) -> None:
    inner, outer = tmp_path / "inner.txt", tmp_path / "outer.txt"
    inner.write_bytes(b"\xef\xbb\xbf--steps 7  # don't worry\r\n")  # as an editor on Windows writes it
    outer.write_text(f"# a recipe\n@{inner}\n--data 'a b'\n@{inner}\n")  # twice is no circle
    assert read(f"@{outer}", "--seed", "3") == {"steps": 7, "data": "a b", "seed": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"--steps 3\n--data it's\n", r"line 2: No closing quotation"),
        (b"\x7fELF\xff\xfe\x00", r"expected a recipe, a text file of flags; this is no text in UTF-8"),
        (b"--steps 3\n@{recipe}\n", r"the recipe includes itself"),
        (None, r"No such file or directory"),
    ],
    ids=["apostrophe", "binary", "itself", "missing"],
)
def test_what_is_no_recipe_is_one_line(content: bytes | None, message: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.txt"
    if content is not None:
        recipe.write_bytes(content.replace(b"{recipe}", str(recipe).encode()))
    with pytest.raises(SystemExit, match=rf"^train_celeba\.py: @{recipe}.*{message}") as error:
        read(f"@{recipe}")
    assert "\n" not in str(error.value)


def test_recipes_that_include_each_other(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text(f"@{other}")
    other.write_text(f"@{one}")
    with pytest.raises(SystemExit, match=r"the recipe includes itself"):
        read(f"@{one}")


# --- paths ---------------------------------------------------------------------------------------------------------


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell expands it in --data=~/x, nor does anybody in a recipe."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    recipe = tmp_path / "recipe.txt"
    recipe.write_text("--data ~/x\n--cache-dir ~/y\n")
    assert read("@~/recipe.txt", "--out=~/z", "--inception=~/w", "--attributes=~/v") == {
        "data": f"{tmp_path}/x", "cache_dir": f"{tmp_path}/y", "out": f"{tmp_path}/z", "inception": f"{tmp_path}/w",
        "attributes": f"{tmp_path}/v",
    }  # fmt: skip
    assert read_arguments(Config, ["--resume=~/runs"], "")["resume"] == f"{tmp_path}/runs"
    assert given_path("~/model.pt") == tmp_path / "model.pt"
    assert given_path("a~b") == Path("a~b")
    assert read("--data", "faces:200")["data"] == "faces:200"


# --- streams -------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from training.script import fail, script
def main():
    for i in range(20_000):
        print("line", i)
    open(sys.argv[1], "w").write("all of it")
    if len(sys.argv) > 2:
        fail(sys.argv[2])
script(main)
"""


def shell(line: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    (tmp_path / "tool.py").write_text(SCRIPT)
    command = line.format(tool=f"'{sys.executable}' '{tmp_path}/tool.py' '{tmp_path}/written'")
    environment = {"PYTHONPATH": str(EXAMPLES), "PATH": "/usr/bin:/bin"}
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    "line",
    ["{tool} | head -n 1; exit ${{PIPESTATUS[0]}}", "{tool} >&-", "{tool} >&- 2>&-", "{tool} > /dev/full"],
    ids=["a pipe that closes", "no stdout", "no streams", "a full disk"],
)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_script_ends_well_when_nobody_reads_what_it_prints(line: str, tmp_path: Path) -> None:
    ended = shell(line, tmp_path)
    assert (tmp_path / "written").read_text() == "all of it"
    assert ended.returncode == 0
    assert ended.stderr == ""


def test_an_error_has_its_status_with_stderr_closed_and_its_controls_escaped(tmp_path: Path) -> None:
    ended = shell("{tool} $'name\\e]0;title\\a' > /dev/null", tmp_path)
    assert (ended.returncode, ended.stderr) == (1, "tool.py: name\\x1b]0;title\\x07\n")
    assert shell("{tool} name > /dev/null 2>&-", tmp_path).returncode == 1
