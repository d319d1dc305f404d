"""Training does not depend on who reads what it prints, and names cannot control the terminal."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from processes import started
from tiny_runs import SCRIPT, checkpoint, train
from training.runs.standard_streams import UnfailingStream, escaped, unfailing_streams
from training.script import script

RUN = [sys.executable, *SCRIPT, "--data", "digits", "--steps", "3", "--log-every", "1"]

pytestmark = pytest.mark.usefixtures("small_figures")


class Refusing(io.StringIO):
    """A stream whose reader has gone, or whose disk is full."""

    error: Exception = BrokenPipeError(32, "Broken pipe")

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


class Full(Refusing):
    error = OSError(28, "No space left on device")


class HungUp(Refusing):
    error = OSError(5, "Input/output error")


@pytest.mark.parametrize("kind", [Refusing, Full, HungUp, "closed", None], ids=str)
def test_a_run_without_anyone_who_listens_is_complete(
    kind: type[Refusing] | str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [io.StringIO() if kind == "closed" else kind() if isinstance(kind, type) else None for _ in range(2)]
    for name, stream in zip(("stdout", "stderr"), streams, strict=True):
        if kind == "closed" and stream:
            stream.close()
        monkeypatch.setattr(sys, name, stream)
    (tmp_path / "images").mkdir()
    with pytest.raises(SystemExit, match=r"^0$"):
        script(lambda: train(tmp_path, "--steps", "2", "--log-every", "1"))
    assert [sys.stdout, sys.stderr] == streams
    monkeypatch.undo()
    assert checkpoint(tmp_path)["step"] == 2


@pytest.mark.exhaustive
@pytest.mark.slow  # starts processes
def test_in_a_shell(tmp_path: Path) -> None:
    """The status is that of a run that is complete, and no file took the numbers of the closed streams."""
    ways = ("{run} >&- 2>&-", "{run} 2>&1 | head -1", "{run} >/dev/full 2>/dev/full")
    with ExitStack() as stack:  # all at once, since each takes seconds to start
        running = []
        for i, how in enumerate(ways):
            run = " ".join([*RUN, "--out", str(tmp_path / str(i))])
            command = ["bash", "-c", "set -o pipefail; " + how.format(run=run)]
            running.append(stack.enter_context(started(command)))
        for i, process in enumerate(running):
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0, (ways[i], out, err)
            assert "Traceback" not in out + err
            assert checkpoint(tmp_path / str(i))["step"] == 3
            assert len((tmp_path / str(i) / "log.jsonl").read_text().splitlines()) == 3


def test_closed_descriptors_are_not_given_to_files(tmp_path: Path) -> None:
    """In a process of its own, since it closes its streams."""
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); os.close(1); os.close(2)\n"
        "from training.runs.standard_streams import unfailing_streams\n"
        "with unfailing_streams():\n"
        "    file = open(sys.argv[2], 'wb'); os.write(2, b'of a library')\n"
        "sys.exit(3 if file.fileno() > 2 else 4)"
    )
    examples = str(Path(SCRIPT[0]).parent)
    done = subprocess.run([sys.executable, "-c", code, examples, str(tmp_path / "log")], timeout=60)
    assert done.returncode == 3
    assert (tmp_path / "log").read_bytes() == b""


def test_what_is_left_in_a_buffer_is_no_error_at_the_end(capfd: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with unfailing_streams():
            print("nobody reads this")
        stream.flush()  # as Python does at its end


def test_terminal_controls_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "\x1b]0;title\x07 \x9b2J \x7f"
    assert escaped(f"é字\t{name}\r\n") == "é字\t\\x1b]0;title\\x07 \\x9b2J \\x7f\r\n"
    with unfailing_streams():
        print(name)
        print(name, file=sys.stderr)
    assert capsys.readouterr() == (f"{escaped(name)}\n",) * 2
    with unfailing_streams():
        assert train(tmp_path / name, "--steps", "1") == 0
    out, err = capsys.readouterr()
    assert escaped(str(tmp_path / name)) in out
    assert not {"\x1b", "\x9b", "\x07", "\x7f"} & set(out + err)


def test_other_errors_pass() -> None:
    stream = UnfailingStream(io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(UnicodeEncodeError):
        stream.write("é")
    assert stream.encoding == "ascii"
