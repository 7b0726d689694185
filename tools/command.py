"""What every tool's command line shares: choosing a sub-command, and options whose mistakes are one line."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from megatron_align.errors import InputError, nearest


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is an :class:`InputError`, and an unknown option names the nearest known one."""

    def __init__(self, program: str, about: str):
        self._known: list[str] = []
        super().__init__(
            prog=program,
            description=about,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Add an argument, as argparse does."""
        self._known += names
        return super().add_argument(*names, **options)

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        """Return the options.

        Raises:
            InputError: for an unknown, missing or malformed one.
        """
        # Looked at first: argparse would only report that the misspelt one is missing.
        for name in (argument.partition("=")[0] for argument in arguments if argument.startswith("--")):
            if name not in self._known:
                raise InputError(f"{self.prog} has no option {name}{nearest(name, self._known)}")
        return self.parse_args(arguments)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found wrong."""
        raise InputError(f"{self.prog}: {message} (see {self.prog} --help)")


def choose(program: str, about: str, commands: dict[str, str], arguments: list[str]) -> tuple[str, list[str]]:
    """Split ``arguments`` into a command's name and what follows; print the commands if help is asked for.

    Args:
        program: as typed so far.
        about: one line about it.
        commands: names and one line about each.
        arguments: of the command line.

    Raises:
        InputError: no command was named, or an unknown one.
    """
    known = list(commands)
    if not arguments:
        raise InputError(f"{program} needs a command, one of {', '.join(known)} (see {program} --help)")
    name, *rest = arguments
    if name in ("-h", "--help"):
        width = max(map(len, known))
        lines = "\n".join(f"  {command:{width}}  {summary}" for command, summary in commands.items())
        print(f"usage: {program} COMMAND ...\n\n{about}\n\ncommands:\n{lines}\n")
        print(f"{program} COMMAND --help tells more of each.")
        sys.exit(0)
    if name not in commands:
        raise InputError(
            f"{program} has no command '{name}', it has {', '.join(known)}{nearest(name, known)}"
        )
    return name, rest
