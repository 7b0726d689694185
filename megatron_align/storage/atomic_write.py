"""Write a folder or a file atomically: under a hidden name next to it, forced onto the disk, then renamed.

What can go wrong is checked before the first byte is written: a path that is taken, permissions, space.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from megatron_align import faults
from megatron_align.errors import InputError
from megatron_align.storage.deletion import discard
from megatron_align.storage.fsync import fsync
from megatron_align.storage.mounts import require_replaceable


class CommitFailed(OSError):
    """A complete folder could not be renamed to its final name; it stays under its hidden one."""


def read_into(out: Tensor, path: Path, start: int) -> None:
    """Fill a contiguous CPU tensor with a file's bytes from offset ``start`` on.

    Raises:
        EOFError: the file ends before the tensor is full.
    """
    view = memoryview(out.reshape(-1).view(torch.uint8).numpy())
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while view:
            if not (count := file.readinto(view)):
                raise EOFError(f"it ends {len(view):,} bytes too early")
            view = view[count:]


def advise_page_cache(path: Path, start: int, count: int, advice: int) -> None:
    """Announce to the kernel that a range of a file will be read soon, or not again (``os.POSIX_FADV_...``)."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), start, count, advice)


@contextmanager
def naming_file(what: str, path: Path) -> Iterator[None]:
    """Re-raise an error of the with-block (a full disk, for example) with what was being written, and where.

    Raises:
        OSError: for an OSError, or for safetensors' own error, which is none.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"writing the {what} failed at {path}: {error}") from error


def commit_folder(partial: Path, folder: Path, step: int | None = None) -> None:
    """Force ``partial`` onto the disk and rename it to ``folder``, in the same parent; ``step`` is for :mod:`faults`.

    An existing ``folder`` is first renamed and deleted last, so that a kill at any moment leaves one of the two.

    Raises:
        CommitFailed: it cannot be renamed.
        OSError: it cannot be forced onto the disk.
    """
    for path in sorted(partial.rglob("*")):
        fsync(path)
    fsync(partial)
    replaced = folder.with_name(f".{folder.name}.replaced")
    try:
        if os.path.lexists(replaced):
            discard(replaced)
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()  # a container's image layers allow this, and refuse to rename the folder
        elif folder.exists():
            folder.rename(replaced)
        faults.at("save.named", step)
        partial.rename(folder)
    except OSError as error:
        if os.path.lexists(replaced) and not folder.exists():
            replaced.rename(folder)
        raise CommitFailed(
            f"{folder} is complete and cannot be renamed to its final name, so it stays at {partial}: "
            f"{error.strerror or error}"
        ) from error
    fsync(folder.parent)
    faults.at("save.done", step)
    if os.path.lexists(replaced):
        discard(replaced)


def replace_file(partial: Path, file: Path) -> None:
    """Give a complete file its final name, so that a power failure leaves what was there before, or all of it.

    Args:
        partial: the file under a name of its own, in the same folder.
        file: its final name, which may be taken: that file is replaced.

    Raises:
        OSError: the disk refuses it.
    """
    fsync(partial)
    os.replace(partial, file)
    fsync(file.parent)


def write_file(file: Path, text: str) -> None:
    """Write a text file as :func:`replace_file` does, first under a hidden name.

    Raises:
        OSError: the disk refuses it.
    """
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    replace_file(partial, file)


def partial_folder(folder: Path) -> Path:
    """Return the hidden folder in which ``folder`` is written until it is complete."""
    return folder.with_name(f".{folder.name}.partial")


def resolve_output(folder: str | Path) -> Path:
    """Return the absolute path of a folder to be written: a link to an empty or new place is followed.

    A link to a folder with content is itself replaced, as what it leads to may be an archive.
    """
    path = Path(folder)
    target = path.resolve()
    if path.is_symlink() and target.is_dir() and any(target.iterdir()):
        return path.parent.resolve() / path.name
    return target


def files_below(folder: Path, *parts: str) -> list[str]:
    """Return the sorted paths, relative to ``folder``, of all files below it or below one of its subfolders."""
    paths = folder.joinpath(*parts).rglob("*")
    return sorted(str(path.relative_to(folder)) for path in paths if path.is_file())


def require_one_process() -> None:
    """Check that no launcher started several processes, which would all write the same folder.

    Raises:
        InputError: ``WORLD_SIZE`` is not 1.
    """
    if (ranks := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise InputError(f"run this as one process, without torchrun; got WORLD_SIZE={ranks}")


def require_new(out: str | Path) -> Path:
    """Return the absolute path of ``out``, a folder that is empty or can be created.

    Raises:
        InputError: ``out`` is a file, holds files or is a mount point, or its parent is not writable.
    """
    path = Path(out).resolve()
    if path.exists() and not path.is_dir():
        raise InputError(f"output must be a new or empty folder, found a file at {path}")
    require_replaceable(path, "output")
    require_writable(path)
    if path.is_dir() and any(path.iterdir()):
        raise InputError(f"output must be a new or empty folder, found files in {path}")
    return path


def require_writable(path: Path) -> None:
    """Check, without creating anything, that ``path`` can be created.

    Raises:
        InputError: its nearest existing parent is not a folder or not writable.
    """
    parent = _nearest_parent(path)
    if not parent.is_dir():
        raise InputError(f"cannot create {path}: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot create {path}: no permission to write in {parent}")


def require_space(path: Path, size: int) -> None:
    """Check that ``size`` bytes fit at ``path``; what a killed run has left of it counts as free.

    Raises:
        InputError: the disk has less free space.
    """
    partial = partial_folder(path)
    left = sum(file.stat().st_blocks * 512 for file in partial.rglob("*")) if partial.is_dir() else 0
    if (free := shutil.disk_usage(_nearest_parent(path)).free + left) < size:
        raise InputError(
            f"not enough disk space for {path}: {size / 1e9:,.1f} GB needed, {free / 1e9:,.1f} GB free"
        )


def _nearest_parent(path: Path) -> Path:
    parent = path.resolve().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    return parent
