"""Delete folders as far as the file system allows, without ending a run over what cannot be deleted."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path
from typing import Any

from megatron_align.errors import warn_once
from megatron_align.storage.mounts import mounts_within

HIDDEN_SUFFIX = ".deleted"  # of a folder that is being deleted


def why_undeletable(folder: Path) -> str | None:
    """Return why a folder must not be deleted, or None.

    What a link or a mount leads to is not the run's own: an archive, perhaps.
    """
    if folder.is_symlink():
        return f"it is a link to {folder.resolve()}"
    if mounts := mounts_within(folder):
        return f"a file system is mounted at {mounts[0]}"
    return None


def hide(folder: Path) -> Path:
    """Rename a folder to a new hidden name next to it, so that no kill leaves a folder that looks complete.

    Raises:
        OSError: it cannot be renamed.
    """
    hidden = folder.with_name(f".{folder.name.removeprefix('.')}.{uuid.uuid4().hex[:8]}{HIDDEN_SUFFIX}")
    return folder.rename(hidden)


def delete_folder(folder: Path) -> str | None:
    """Delete as much of a folder as possible, never through a link; return the first reason why something is left."""
    if reason := why_undeletable(folder):
        return reason
    reasons: list[str] = []

    def note(function: Any, path: str, raised: Any) -> None:
        error = raised[1]
        if not isinstance(error, FileNotFoundError):  # another process deletes it too
            reasons.append(f"{error.strerror or error}: {path}")

    shutil.rmtree(folder, onerror=note)
    return reasons[0] if reasons else None


def discard(folder: Path) -> None:
    """Delete a folder that nobody needs any more, or the link in its place; what must stay only gives up its name."""
    stays = folder
    try:
        if folder.is_symlink():
            folder.unlink()
            return
        reason = delete_folder(folder)
        if reason and not folder.name.endswith(HIDDEN_SUFFIX):
            stays = hide(folder)
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        warn_once(
            f"a folder that is no longer needed cannot be deleted and stays at {stays}: {reason}",
            key=f"undeletable {folder}",
        )
