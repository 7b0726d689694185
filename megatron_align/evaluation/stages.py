"""Files of a stage that a later start takes over: only if what the stage read is still the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_align.errors import InputError, warn_once
from megatron_align.storage.atomic_write import write_file
from megatron_align.storage.resumable_lines import describe_differences


def is_complete(file: Path, key: Mapping[str, Any]) -> bool:
    """Return whether a stage has written its file; if not, note the key with which it is going to be written.

    A file without a key was not written by a stage: it is used as it is, and a warning says so.

    Args:
        file: of the stage.
        key: what determines the file.

    Raises:
        InputError: the file was written with another key; names the difference.
    """
    stored = noted_key(file)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(_key_file(file), json.dumps(key))
        return False
    if stored is None:
        warn_once(f"{file} is used as it is: nothing says with which options it was written")
    elif found := describe_differences(json.loads(json.dumps(key)), stored):
        raise InputError(
            f"{file} was written with other options ({found}): delete it, and it is written again, or name another "
            "folder"
        )
    return True


def noted_key(file: Path) -> dict[str, Any] | None:
    """Return the key that was noted for a stage's file; None: there is none."""
    try:
        key = json.loads(_key_file(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return key if isinstance(key, dict) else None


def _key_file(file: Path) -> Path:
    return file.with_name(f".{file.name}.key")
