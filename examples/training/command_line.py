"""A dataclass of settings as a command line: --help in groups, and errors of one line."""

from __future__ import annotations

import argparse
import io
import math
import shlex
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import Field, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

Settings = TypeVar("Settings")


def line(message: object) -> str:
    """A message as one line that begins with the script's name."""
    return "train_celeba.py: " + " ".join(str(message).split())


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
) -> Any:
    """A setting: its default, its heading in --help, and its help text, which is also its comment in the code.

    `least` is the smallest allowed value. A `fixed` setting, like those of the networks, cannot change when a run is
    resumed.
    """
    more = {"group": group, "help": text, "least": least, "fixed": fixed or group == "networks", "choices": choices}
    return field(default=default, metadata=more)


def script(main: Callable[[], int | None]) -> NoReturn:
    """Run the main function of a script. Characters unknown to the terminal are escaped; Ctrl-C gives status 130."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)


def interpreter() -> str:
    """Python as one types it here: one in a virtual environment below this folder runs without being activated."""
    executable, here = Path(sys.executable), Path.cwd()
    return str(executable.relative_to(here)) if executable.is_relative_to(here) else "python"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line that begins with `prog`. `@file` stands for the flags in that file."""

    def __init__(self, prog: str, usage: str | None = None, **more: Any) -> None:
        super().__init__(prog, usage, fromfile_prefix_chars="@", **more)

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """Split a line of a recipe into flags and values; a # begins a comment."""
        return shlex.split(arg_line, comments=True)

    def error(self, message: str) -> NoReturn:
        raise SystemExit(f"{self.prog}: {message} (--help lists all settings)")


def short_run_parser(prog: str, description: str, steps: int) -> Parser:
    """The command line of an example that trains for minutes: `--steps`, `--out` and `--seed`."""
    out = Path("runs") / prog.removesuffix(".py").replace("_", "-")
    parser = Parser(prog, description=description)
    parser.add_argument("--steps", type=at_least_one, default=steps, help="of each network (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=out, help="folder for its images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="fixes everything (default: %(default)s)")
    return parser


def at_least_one(text: str) -> int:
    """A positive integer of the command line."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def read_arguments(settings: type[Any], arguments: Sequence[str] | None, description: str) -> dict[str, Any]:
    """The settings given on the command line, and only those: the rest comes from the defaults or from a checkpoint."""
    parser = Parser(
        "train_celeba.py", "%(prog)s [@recipe] [settings]", description=description, argument_default=argparse.SUPPRESS
    )
    groups: dict[str, Any] = {}
    kinds = typing.get_type_hints(settings)
    for setting in fields(settings):
        if setting.metadata["group"] not in groups:
            groups[setting.metadata["group"]] = parser.add_argument_group(setting.metadata["group"])
        groups[setting.metadata["group"]].add_argument(flag(setting.name), **_how(setting, kinds[setting.name]))
    resuming = parser.add_argument_group("resuming")
    resuming.add_argument(
        "--resume", metavar="PATH", default=None,
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
    return {"type": kind, "help": text} | ({"choices": choices} if choices else {"metavar": kind.__name__.upper()})


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
    if text in ("auto", "none"):
        return None if text == "auto" else []
    if not all(size.strip().isdecimal() for size in text.split(",")):
        fail(f"{flag(name)} {text}: expected sizes of feature maps such as 16 or 16,32, or auto, or none")
    return [int(size) for size in text.split(",")]
