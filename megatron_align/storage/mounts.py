"""Recognise mount points: they cannot be renamed or replaced, as a folder that is written atomically must be.

A container's volume is mounted at the very path at which a program writes its result. Renaming the complete result to
that path would fail with EBUSY after all the work, so this is checked before the first byte is written.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from megatron_align.errors import InputError

_MOUNTS = Path("/proc/self/mountinfo")


def mounts_within(folder: Path) -> list[Path]:
    """Return the mount points at ``folder`` or below it."""
    folder = folder.resolve()
    found = [path for path in _mount_points() if path.is_relative_to(folder)]
    if not found and os.path.ismount(folder):  # no list of mounts: not Linux
        found.append(folder)
    return found


def require_replaceable(folder: Path, what: str, remedy: str = "write to a folder within it") -> None:
    """Check that ``folder``, if it exists, can be renamed and replaced.

    Args:
        folder: that will be written atomically.
        what: it is, for the error: ``checkpoint.dir/hf``.
        remedy: another way out than mounting the folder above it.

    Raises:
        InputError: a file system is mounted at it or below it.
    """
    if mounts := mounts_within(folder):
        raise InputError(
            f"{what} must not be a mount point or contain one, as it is written by renaming; found a file system "
            f"mounted at {mounts[0]}; mount its parent folder instead, or {remedy}"
        )


def _mount_points() -> list[Path]:
    try:
        text = os.fsdecode(_MOUNTS.read_bytes())
    except OSError:
        return []
    # The fifth field; spaces, tabs and line ends are written as octal numbers, other separators of lines are not.
    fields = [line.split(" ")[4] for line in text.split("\n") if line]
    return [Path(re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), field)) for field in fields]
