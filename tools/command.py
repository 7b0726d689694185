"""Command lines of the tools: sub-commands, and options whose errors are one line."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from megatron_align.errors import InputError, nearest

# metavars of options that are paths
PATHS = ("DIR", "CKPT", "PATH", "FILE", "FILE.jsonl", "REPORT", "RUN.yaml")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are :class:`InputError`; an unknown option names the nearest valid one."""

    def __init__(self, program: str, about: str):
        self._names: list[str] = []
        super().__init__(
            prog=program,
            description=about,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Add an argument as argparse does; in one whose ``metavar`` is of :data:`PATHS`, ``~`` is expanded."""
        self._names += names
        if options.get("metavar") in PATHS:
            options["type"] = _path
        return super().add_argument(*names, **options)

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        """Parse the arguments.

        Raises:
            InputError: for an unknown, missing or malformed one.
        """
        # Checked first: argparse would only report that the correctly spelt option is missing.
        for name in (argument.partition("=")[0] for argument in arguments if argument.startswith("--")):
            if name not in self._names:
                raise InputError(f"{self.prog} has no option {name}{nearest(name, self._names)}")
        return self.parse_args(arguments)

    def error(self, message: str) -> NoReturn:
        """Raise argparse's error as :class:`InputError`."""
        raise InputError(f"{self.prog}: {message} (see {self.prog} --help)")


def _path(text: str) -> str:
    from megatron_align.config.paths import expand_home

    try:
        return expand_home(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def choose(program: str, about: str, commands: dict[str, str], arguments: list[str]) -> tuple[str, list[str]]:
    """Split ``arguments`` into the name of a command and its arguments; print all commands for ``--help``.

    Args:
        program: the command line up to here.
        about: one line about the program.
        commands: names and one line about each.
        arguments: the rest of the command line.

    Raises:
        InputError: no command was named, or an unknown one.
    """
    names = list(commands)
    if not arguments:
        raise InputError(f"{program} needs a command, one of {', '.join(names)} (see {program} --help)")
    name, *rest = arguments
    if name in ("-h", "--help"):
        width = max(map(len, names))
        lines = "\n".join(f"  {command:{width}}  {summary}" for command, summary in commands.items())
        print(f"usage: {program} COMMAND ...\n\n{about}\n\ncommands:\n{lines}\n")
        print(f"{program} COMMAND --help describes a command.")
        sys.exit(0)
    if name not in commands:
        raise InputError(
            f"{program} has no command '{name}', it has {', '.join(names)}{nearest(name, names)}"
        )
    return name, rest
