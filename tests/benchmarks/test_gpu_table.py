"""The tables of `make gpu`: that nothing that goes wrong in one row takes the others away."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import pytest
import torch

import gpu_table
from gpu_table import SECTIONS, Machine, Row, Section

TINY = ["--device", "cpu", "--tiny"]

REPORT = """<testsuites><testsuite><testcase name="one"/><testcase name="two"><skipped message="no"/></testcase>
<testcase name="three[a|b]"><failure message="assert 1 &lt; 0&#10;more">trace</failure></testcase>
<testcase name="four"><error message="CUDA error: busy"/></testcase></testsuite></testsuites>"""


def rows(printed: str) -> list[list[str]]:
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@pytest.mark.exhaustive  # each row's parts have tests of their own
@pytest.mark.slow  # everything, in tiny sizes
def test_the_rehearsal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # which would take a minute
    gpu_table.main(TINY)
    printed = capsys.readouterr().out
    assert all(f"**{section.title}**" in printed for section in SECTIONS)
    assert "Error" not in printed
    assert len(rows(printed)) >= 3 * len(SECTIONS)  # each with a header, and at least one row


def test_without_time_every_row_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    gpu_table.main([*TINY, "--budget", "0"])
    printed = capsys.readouterr().out
    assert all(f"**{section.title}**" in printed for section in SECTIONS)
    assert printed.count("no time left") >= len(SECTIONS)


def test_a_failure_is_one_row(capsys: pytest.CaptureFixture[str]) -> None:
    def measured(machine: Machine) -> Iterator[Row]:
        yield "bad", lambda: [torch.ones(2) @ torch.ones(3)]
        yield "good", lambda: [12345.0, math.nan]
        raise RuntimeError("no more\nof this")

    gpu_table.show(Section("Both", ("a", "b"), measured), Machine(torch.device("cpu"), tiny=True), math.inf)
    printed = capsys.readouterr().out
    _, _, bad, good = rows(printed)
    assert bad[0] == "bad"
    assert bad[1].startswith("RuntimeError: ")
    assert good == ["good", "12,345", "–"]
    assert printed.endswith("\nRuntimeError: no more\n")


def test_the_tests_that_failed_are_named(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    section = Section("Tests", ("",), partial(gpu_table.tests, tmp_path / "report.xml"))
    gpu_table.show(section, Machine(torch.device("cpu"), tiny=True), math.inf)
    printed = capsys.readouterr().out
    assert "| 1 passed, 2 failed, 1 skipped |" in printed
    assert "| three[a\\|b] | assert 1 < 0 |" in printed
    assert "| four | CUDA error: busy |" in printed


def test_tests_that_did_not_end(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_table.main([*TINY, "--budget", "0", "--tests", str(tmp_path / "report.xml")])
    assert "they did not end" in capsys.readouterr().out
