"""Folders that appear whole or not at all: written beside their place, forced onto the disk, then renamed.

What may go wrong is looked for before the first byte is written: something in the way, no permission, no space.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from megatron_align import faults
from megatron_align.errors import InputError


def sync(path: Path) -> None:
    """Force a file or a folder's entries onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fill(out: Tensor, path: Path, start: int) -> None:
    """Fill a contiguous tensor in CPU memory with a file's bytes from ``start`` on.

    Raises:
        EOFError: the file ends before.
    """
    view = memoryview(out.reshape(-1).view(torch.uint8).numpy())
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while view:
            if not (count := file.readinto(view)):
                raise EOFError(f"it ends {len(view):,} bytes too early")
            view = view[count:]


def advise(path: Path, start: int, count: int, advice: int) -> None:
    """Tell the kernel that a stretch of a file will be read soon, or not again: ``os.POSIX_FADV_...``."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), start, count, advice)


def put_in_place(partial: Path, folder: Path, step: int | None = None) -> None:
    """Make ``partial`` durable and give it the name ``folder``, beside it; ``step`` is for :mod:`faults`.

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
    faults.at("save.named", step)
    try:
        partial.rename(folder)
    except OSError:
        if aside.exists():
            aside.rename(folder)
        raise
    sync(folder.parent)
    faults.at("save.done", step)
    if aside.exists():
        shutil.rmtree(aside)


def partial_folder(folder: Path) -> Path:
    """Return where a folder is written before it is whole."""
    return folder.with_name(f".{folder.name}.partial")


def files_below(folder: Path, *parts: str) -> list[str]:
    """Return the paths, from ``folder``, of all files below it or a part of it."""
    found = folder.joinpath(*parts).rglob("*")
    return sorted(str(path.relative_to(folder)) for path in found if path.is_file())


def require_one_process() -> None:
    """Check that no launcher started several processes, which would all write the same folder.

    Raises:
        InputError: one did.
    """
    if (ranks := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise InputError(f"this needs one process, without torchrun; got {ranks} ranks")


def require_new(out: str | Path) -> Path:
    """Return ``out`` without links or dots, a folder that can be created or is empty.

    Raises:
        InputError: something is in the way, or its parent cannot be written.
    """
    path = Path(out).resolve()
    if path.exists() and not path.is_dir():
        raise InputError(f"a new or empty folder is needed, found a file at {path}")
    require_writable(path)
    if path.is_dir() and any(path.iterdir()):
        raise InputError(f"a new or empty folder is needed, found files in {path}")
    return path


def require_writable(path: Path) -> None:
    """Check, without a trace, that ``path`` can be created.

    Raises:
        InputError: its nearest parent that exists is no folder, or may not be written.
    """
    parent = _nearest_parent(path)
    if not parent.is_dir():
        raise InputError(f"{path} cannot be created: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{path} cannot be created: {parent} may not be written")


def require_space(path: Path, size: int) -> None:
    """Check that ``size`` bytes fit where ``path`` will be created, beside what a killed run has left of it.

    Raises:
        InputError: they do not, saying how many there are.
    """
    partial = partial_folder(path)
    left = sum(file.stat().st_blocks * 512 for file in partial.rglob("*")) if partial.is_dir() else 0
    if (free := shutil.disk_usage(_nearest_parent(path)).free + left) < size:
        raise InputError(f"{size / 1e9:,.1f} GB must be free, found {free / 1e9:,.1f} GB for {path}")


def _nearest_parent(path: Path) -> Path:
    parent = path.resolve().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    return parent
