"""Law 13 as a machine: every declared option has one entry, which says how it is seen that the option is used.

Options are those that dataclasses and parsers declare, so one that is added fails until it has an entry.
"""

from __future__ import annotations

import ast
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def options_of(kind: type, at: str) -> Iterator[str]:
    """Yield ``at.option`` of every field of a dataclass, and those of the dataclasses that are its values."""
    hints = typing.get_type_hints(kind)
    for option in fields(kind):
        yield f"{at}.{option.name}"
        for inner in _dataclasses_in(hints[option.name]):
            yield from options_of(inner, f"{at}.{option.name}")


def _dataclasses_in(hint: Any) -> Iterator[type]:
    if isinstance(hint, type) and is_dataclass(hint):
        yield hint
    for argument in typing.get_args(hint):
        yield from _dataclasses_in(argument)


def without_one_entry(declared: Iterable[str], *entries: Mapping[str, Any]) -> list[str]:
    """Return a line for each declared option that is in none or several of the tables, and each entry of no option."""
    declared = set(declared)
    places = [name for table in entries for name in table]
    lines = [f"{name} needs an entry" for name in sorted(declared - set(places))]
    lines += [f"{name} has several entries" for name in sorted(set(places)) if places.count(name) > 1]
    return lines + [f"{name} is no option" for name in sorted(set(places) - declared)]


def wrong_test(option: str, test: str) -> str | None:
    """Return what is wrong with naming a test as the proof of an option; None: nothing.

    Args:
        option: its last part must be a word of the test or of what its file defines outside of functions.
        test: ``tests/room/test_file.py::test_name``, one that runs on every commit.
    """
    file, _, name = test.partition("::")
    if not (ROOT / file).is_file():
        return f"there is no {file}"
    text = (ROOT / file).read_text(encoding="utf-8")
    body = ast.parse(text).body
    found = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == name]
    if not found:
        return f"{file} has no {name}"
    if any(ast.unparse(mark).startswith("pytest.mark.slow") for mark in found[0].decorator_list):
        return f"{test} runs in make test-all only"
    shared = [
        node for node in body if not (isinstance(node, ast.FunctionDef) and node.name.startswith("test"))
    ]
    words = re.split(r"\W|__", "\n".join(ast.unparse(node) for node in [*found, *shared]))
    last = option.rpartition(".")[2]
    return None if last in words else f"{test} does not name {last}"
