"""Paths that users write: ``~`` stands for a home folder in every configuration, as it does in a shell.

A shell expands it only at the start of a word: not in YAML, nor after ``=``.
"""

from __future__ import annotations

import os
from typing import Any

from megatron_align.errors import InputError


def expand_home(path: str) -> str:
    """Replace ``~`` or ``~NAME`` at the start of a path by the home folder it stands for.

    Raises:
        InputError: there is no user of that name.
    """
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path:
        user = path.partition("/")[0]
        raise InputError(
            f"no home folder is known for '{user}', got the path '{path}'; write ./{path} if it is a name"
        )
    return expanded


def expand_fields(section: Any, *names: str) -> None:
    """Expand ``~`` in fields of a frozen dataclass, from its ``__post_init__``: paths, lists or mappings of some."""
    for name in names:
        object.__setattr__(section, name, _expanded(getattr(section, name)))


def _expanded(value: Any) -> Any:
    if isinstance(value, list):
        return [_expanded(item) for item in value]
    if isinstance(value, dict):
        return {name: _expanded(item) for name, item in value.items()}
    return expand_home(value) if isinstance(value, str) else value
