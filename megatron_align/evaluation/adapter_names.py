"""Adapters on a command line: ``PATH``, or several as ``NAME=PATH``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_align.errors import require

BASE = "base"  # in place of a name: the model without an adapter
ONLY = "adapter"  # the name of an adapter that is given without one
_NAMED = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)=(?P<path>.+)")


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
        require(name != BASE and not name.startswith("."), f"an adapter must not be named '{name}'")
        paths[name] = str(Path(path).expanduser())
    return paths
