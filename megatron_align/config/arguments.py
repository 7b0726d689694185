"""Split a command line of ``--config FILE`` and ``--section.key value`` into sections of options."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from megatron_align.config.yaml_text import parse_yaml, read_yaml
from megatron_align.errors import InputError

# Sections of options, or one option of one, in the order of the command line; later ones win.
Part = dict[str, Any]


def read_arguments(arguments: Sequence[str]) -> list[Part]:
    """Return the content of the configuration files and the options, in order; each file is read once.

    Raises:
        InputError: an option without a value, or a value without an option.
    """
    parts: list[Part] = []
    remaining = list(arguments)
    before = ""
    while remaining:
        argument = remaining.pop(0)
        flag, joined, value = argument.partition("=")
        if not flag.startswith("--") or flag == "--":
            raise InputError(_stray(argument, before))
        if not joined:
            if not remaining or remaining[0].startswith("--"):
                kind = "a YAML file, got none" if flag == "--config" else f"a value: {flag[:80]} VALUE"
                raise InputError(f"{flag[:80]} needs {kind}")
            value = remaining.pop(0)
        parts.append(read_yaml(value) if flag == "--config" else {flag[2:]: value})
        before = flag
    return parts


def section_of_text(section: str, text: str) -> Any:
    """Return the options of ``--section '{key: value}'`` or ``--section FILE.yaml``; the text if it is neither."""
    content = read_yaml(text) if os.path.isfile(text) else parse_yaml(text, f"--{section}")
    return content if isinstance(content, dict) else text


def content_of_text(value: Any, key: str) -> Any:
    """Return the list or mapping that a text of a command line holds; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        content = parse_yaml(value, key)
    except InputError:  # reported where the value is converted
        return value
    return content if isinstance(content, (list, dict)) else value


def _stray(argument: str, before: str) -> str:
    """Return one line about an argument that belongs to no option."""
    line = f"unrecognized argument '{argument[:80]}'"
    key, joined, value = argument.partition("=")
    if argument.lower().endswith((".yaml", ".yml")):
        return f"{line}: a configuration is given as --config {argument}"
    if argument.startswith("-") and len(argument) > 1:
        return f"{line}: options begin with two dashes, --section.key VALUE (--help lists all)"
    if joined and "." in key:
        return f"{line}: write --{key} {value}"
    if before:
        return f"{line}: {before} takes one value; several are a list, {before} '[a, b]'"
    return f"{line}: options are given as --section.key VALUE (--help lists all)"
