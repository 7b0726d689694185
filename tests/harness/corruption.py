"""Corrupt a checkpoint's files as a disk would, or edit them as a person would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_align.storage.atomic_write import files_below
from megatron_align.storage.checksums import CHECKSUMS, hash_files, write_checksums


def truncate(path: Path) -> None:
    """Lose the last byte."""
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    """Flip one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


CORRUPTIONS: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "flipped": flip,
    "missing": Path.unlink,
}


def rewrite_checksums(checkpoint: Path) -> None:
    """Write the checksums again, so that files changed by hand count as intact."""
    names = [name for name in files_below(checkpoint) if name != CHECKSUMS]
    write_checksums(checkpoint, hash_files(checkpoint, names))
