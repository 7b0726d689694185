"""Adapters on a command line: ``PATH``, or several as ``NAME=PATH``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_align.errors import require

BASE = "base"  # in place of a name: the model without an adapter
ONLY = "adapter"  # the name of an adapter that is given without one
_NAME = r"[A-Za-z0-9_.-]+"
_NAMED = re.compile(rf"(?P<name>{_NAME})=(?P<path>.+)")


def require_name(name: str) -> None:
    """Refuse a name of an adapter that no file can have, and that of the model without one."""
    valid = re.fullmatch(_NAME, name) is not None and not name.startswith(".")
    require(
        valid and name != BASE,
        f"an adapter must not be named '{name}': letters, digits, _, . and - make a name, not '{BASE}', no . first",
    )


def parse_adapters(texts: Sequence[str]) -> dict[str, str]:
    """Return the paths of adapters by name, from ``PATH`` or ``NAME=PATH``.

    Raises:
        InputError: several without names, or a name twice.
    """
    paths: dict[str, str] = {}
    for text in texts:
        named = None if Path(text).exists() else _NAMED.fullmatch(text)
        require(
            named is not None or len(texts) == 1,
            f"several adapters need names, --adapter NAME=PATH NAME=PATH, got {text}",
        )
        name, path = (named["name"], named["path"]) if named else (ONLY, text)
        require(name not in paths, f"each adapter needs a name of its own, got '{name}' twice")
        require_name(name)
        paths[name] = str(Path(path).expanduser())
    return paths
