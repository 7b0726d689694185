"""Ways in which a disk spoils a checkpoint, and ways in which a person edits one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_align.storage.atomic_write import files_below
from megatron_align.storage.checksums import NAME, hash_files, write_sums


def truncate(path: Path) -> None:
    """Lose the last byte."""
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    """Flip one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {"truncated": truncate, "flipped": flip, "missing": Path.unlink}


def sign(checkpoint: Path) -> None:
    """Write the hashes anew: what was changed by hand then counts as what was written."""
    names = [name for name in files_below(checkpoint) if name != NAME]
    write_sums(checkpoint, hash_files(checkpoint, names))
