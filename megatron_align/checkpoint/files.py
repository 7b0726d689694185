"""Folders that appear whole or not at all: written beside their place, forced onto the disk, then renamed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def sync(path: Path) -> None:
    """Force a file or a folder's entries onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def put_in_place(partial: Path, folder: Path) -> None:
    """Make ``partial`` durable and give it the name ``folder``, beside it.

    A folder in the way is moved aside first and removed last, so that no kill can lose both.
    """
    for path in sorted(partial.rglob("*")):
        sync(path)
    sync(partial)
    aside = folder.with_name(f".{folder.name}.replaced")
    if folder.exists():
        if aside.exists():
            shutil.rmtree(aside)
        folder.rename(aside)
    partial.rename(folder)
    sync(folder.parent)
    if aside.exists():
        shutil.rmtree(aside)
