"""Standard output and error that nothing depends on: whoever reads them may be gone, or was never there."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

# What moves a terminal's cursor, changes its title, and worse. A name may contain it. Newline and tab do no harm, and
# the progress bar needs the carriage return.
CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def escaped(text: str) -> str:
    r"""The text with its terminal controls as \x and two digits."""
    return CONTROLS.sub(lambda control: f"\\x{ord(control[0]):02x}", text)


class UnfailingStream:
    """A text stream that loses what cannot be written: to a closed pipe or terminal, or onto a full disk."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write the text, its terminal controls escaped."""
        with self._whatever_happens():
            self.stream.write(escaped(text))
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        with self._whatever_happens():
            self.stream.flush()

    @contextmanager
    def _whatever_happens(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            pass
        except ValueError:
            if not self.stream.closed:  # such as a character that the encoding lacks
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def unfailing_streams() -> Iterator[None]:
    """Inside, printing never fails, and after it Python can end without an error of a stream."""
    for number in range(3):  # a closed one's number would be given to the next file, with what is printed in it
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr  # None if they were closed when Python started
    there = [stream for stream in before if stream and not stream.closed]
    with open(os.devnull, "w") as nowhere:
        sys.stdout, sys.stderr = (UnfailingStream(stream if stream in there else nowhere) for stream in before)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
            for stream in there:
                _let_go(stream, nowhere)


def _let_go(stream: TextIO, nowhere: TextIO) -> None:
    """Flush it now. If that fails, Python's own attempt would end the process with status 120: lose what is left."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(nowhere.fileno(), stream.fileno())
