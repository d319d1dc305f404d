"""How scripts read a command line and end: settings as flags, recipes, errors of one line, streams that may be closed.

The trainer's own flags are in flags.py.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import shlex
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import Field, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from training.runs.standard_streams import unfailing_streams

Settings = TypeVar("Settings")


def line(message: object) -> str:
    """A message as one line that begins with the name of the script that runs."""
    return f"{Path(sys.argv[0]).name}: " + " ".join(str(message).split())


def fail(message: object) -> NoReturn:
    """End with one line on stderr and a non-zero status."""
    raise SystemExit(line(message))


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def option(
    default: Any,
    group: str,
    text: str,
    *,
    least: float | None = None,
    fixed: bool = False,
    choices: tuple[str, ...] = (),
    path: bool = False,
) -> Any:
    """A setting: its default, its heading in --help, and its help text, which is also its comment in the code.

    `least` is the smallest allowed value. A `fixed` setting, like those of the networks, cannot change when a run is
    resumed. A `path` may begin with ~, which a shell does not expand in --data=~/images, and nobody in a recipe.
    """
    more = {"group": group, "help": text, "least": least, "fixed": fixed or group == "networks", "choices": choices}
    return field(default=default, metadata=more | {"path": path})


path_option = partial(option, path=True)


def script(main: Callable[[], int | None]) -> NoReturn:
    """Run the main function of a script and end with its status: 1 after an error of one line, 130 after Ctrl-C.

    Characters unknown to the terminal, and those that would control it, are escaped. A script goes on and has the same
    status when nobody reads what it prints.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with unfailing_streams():
        try:
            status: Any = main()
        except KeyboardInterrupt:
            status = 130
        except SystemExit as end:
            status = end.code
            if isinstance(status, str):
                print(status, file=sys.stderr)
                status = 1
    sys.exit(status)


def interpreter() -> str:
    """Python as one types it here: one in a virtual environment below this folder runs without being activated."""
    executable, here = Path(sys.executable), Path.cwd()
    return str(executable.relative_to(here)) if executable.is_relative_to(here) else "python"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line. `@file` stands for the flags in that file, a recipe."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Read the arguments, each recipe replaced by what it holds."""
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([word for argument in given for word in self._words(argument)], namespace)

    def _words(self, argument: str, including: tuple[Path, ...] = ()) -> list[str]:
        """An argument, or the flags and values of a recipe; in one a # begins a comment."""
        if not argument.startswith("@"):
            return [argument]
        recipe = given_path(argument[1:])
        if recipe.resolve() in including:
            self.error(f"{argument}: the recipe includes itself")
        try:
            lines = recipe.read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            self.error(f"{argument}: {error.strerror}")
        except UnicodeDecodeError:
            self.error(f"{argument}: expected a recipe, a text file of flags; this is no text in UTF-8")
        words = []
        for number, text in enumerate(lines, start=1):
            try:
                words += shlex.split(text, comments=True)
            except ValueError as error:
                self.error(f"{argument}, line {number}: {error} (a \\ before an apostrophe or space makes it a letter)")
        return [found for word in words for found in self._words(word, (*including, recipe.resolve()))]

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (--help lists all settings)")


def given_path(text: str) -> Path:
    """A path of the command line, which may begin with ~."""
    return Path(os.path.expanduser(text))


def short_run_parser(description: str, steps: int, out: str) -> Parser:
    """The command line of an example that trains for minutes: `--steps`, `--out` and `--seed`."""
    parser = Parser(description=description)
    parser.add_argument("--steps", type=at_least_one, default=steps, help="of each network (default: %(default)s)")
    parser.add_argument("--out", type=given_path, default=Path(out), help="of its images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="fixes everything (default: %(default)s)")
    return parser


def at_least_one(text: str) -> int:
    """A positive integer of the command line."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def read_arguments(settings: type[Any], arguments: Sequence[str] | None, description: str) -> dict[str, Any]:
    """The settings given on the command line, and only those: the rest comes from the defaults or from a checkpoint."""
    usage = "%(prog)s [@recipe] [settings]"
    parser = Parser(usage=usage, description=description, argument_default=argparse.SUPPRESS)
    groups: dict[str, Any] = {}
    kinds = typing.get_type_hints(settings)
    for setting in fields(settings):
        if setting.metadata["group"] not in groups:
            groups[setting.metadata["group"]] = parser.add_argument_group(setting.metadata["group"])
        groups[setting.metadata["group"]].add_argument(flag(setting.name), **_how(setting, kinds[setting.name]))
    resuming = parser.add_argument_group("resuming")
    resuming.add_argument(
        "--resume", metavar="PATH", type=os.path.expanduser, default=None,
        help="continue from this checkpoint, or from the newest in this folder, with its settings; auto: from the "
        "newest in --out, or begin if there is none",
    )  # fmt: skip
    resuming.add_argument(
        "--dry-run", action="store_true", default=False, help="three steps, written to dry-run/ in --out"
    )
    return vars(parser.parse_args(arguments))


def _how(setting: Field[Any], kind: type) -> dict[str, Any]:
    text, choices = setting.metadata["help"], setting.metadata["choices"]
    if kind is bool:
        return {
            "action": argparse.BooleanOptionalAction,
            "help": f"{text} (default: {'yes' if setting.default else 'no'})",
        }
    text += f" (default: {setting.default})" if setting.default != "" else ""
    how: Callable[[str], Any] = os.path.expanduser if setting.metadata["path"] else kind
    return {"type": how, "help": text} | ({"choices": choices} if choices else {"metavar": kind.__name__.upper()})


def resolve_config(settings: type[Settings], given: dict[str, Any], stored: dict[str, Any] | None) -> Settings:
    """The settings of a run: those given, else those stored in its checkpoint, else the defaults."""
    metadata = {setting.name: setting.metadata for setting in fields(settings)}  # type: ignore[arg-type]
    if unknown := sorted(map(str, set(stored or ()) - set(metadata))):
        fail(f"the checkpoint is of another version, with settings that this version lacks: {', '.join(unknown)}")
    before = settings(**(stored or {}))
    changed = {name: value for name, value in given.items() if name != "out" and value != getattr(before, name)}
    if stored is not None and changed:
        told = {name: f"{flag(name)} {value} (it has {getattr(before, name)})" for name, value in changed.items()}
        if fixed := [told[name] for name in changed if metadata[name]["fixed"]]:
            fail(f"the checkpoint's networks were built with other settings: {', '.join(fixed)}")
        print(f"changed   {', '.join(told.values())}")
    settled = settings(**((stored or {}) | given))
    kinds = typing.get_type_hints(settings)
    for name, more in metadata.items():
        value, kind = getattr(settled, name), kinds[name]
        if type(value) not in ((float, int) if kind is float else (kind,)):  # from a checkpoint: argparse converts
            fail(f"{flag(name)} must be of type {kind.__name__}, got {value!r}")
        if more["choices"] and value not in more["choices"]:
            fail(f"{flag(name)} must be one of {', '.join(more['choices'])}, got {value}")
        if more["least"] is not None and not value >= more["least"]:  # nor is nan
            fail(f"{flag(name)} must be at least {more['least']}, got {value}")
        if value == math.inf:
            fail(f"{flag(name)} must be finite, got {value}")
    return settled


def resolutions(name: str, text: str) -> list[int] | None:
    """Turn 16,32 into [16, 32], none into [], and auto into None, which leaves the choice to the network."""
    return [] if text == "none" else numbers(name, text, "sizes of feature maps such as 16 or 16,32, or auto, or none")


def widths(name: str, text: str, base_channels: int) -> dict[str, Any]:
    """The argument for the channels of a network."""
    given = numbers(name, text, "numbers of channels such as 256,256,256,256, or auto")
    return {"base_channels": base_channels} if given is None else {"widths": given}


def numbers(name: str, text: str, expected: str) -> list[int] | None:
    """Turn 16,32 into [16, 32], and auto into None."""
    if text == "auto":
        return None
    if not all(number.strip().isdecimal() for number in text.split(",")):
        raise ValueError(f"{flag(name)} {text}: expected {expected}")
    return [int(number) for number in text.split(",")]
