"""The folder that a run writes into: can it be created and written, and replaced at the end? Before the ranks meet."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_align.checkpoint.folder import ADAPTER, CRITIC, HF
from megatron_align.config import RunConfig
from megatron_align.data.tokenize.cache_key import CACHE_IN_RUN
from megatron_align.errors import InputError
from megatron_align.model.families.adapter import Adapter
from megatron_align.storage.mounts import require_replaceable
from megatron_align.training.critic_start import CriticStart
from megatron_align.training.run_lock import RunLock


def require_replaceable_outputs(
    config: RunConfig, folder: Path, adapter: Adapter | None, critic: CriticStart | None
) -> None:
    """Check that the folders that the run writes at its end can be renamed into place."""
    for name in (HF, *([CRITIC] if critic is not None else [])) if config.checkpoint.export_hf else ():
        require_replaceable(
            folder / name, f"checkpoint.dir/{name}", "set checkpoint.export_hf: false and use convert export"
        )
    if adapter is not None:
        require_replaceable(folder / ADAPTER, "checkpoint.dir/adapter", "give another checkpoint.dir")


@contextmanager
def remove_empty_folders_after_bad_input(folder: Path, lock: RunLock | None) -> Iterator[None]:
    """Remove the folders that this run created, where they are still empty."""
    absent = [path for path in (folder / CACHE_IN_RUN, folder, *folder.parents) if not path.exists()]
    try:
        yield
    except InputError:
        if lock is not None:
            if not lock.is_held:  # another run's folder, or rank 0's
                raise
            lock.release()
        for path in absent:
            with suppress(OSError):
                path.rmdir()
        raise


def require_writable(folder: Path, create: bool, lock: RunLock | None) -> None:
    """Check that ``checkpoint.dir`` is, or can become, a folder with write permission; lock it before writing there."""
    if not create:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
            raise InputError(
                f"checkpoint.dir cannot be created or written: '{folder}' (no permission in {existing})"
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if lock is not None:
            lock.acquire()
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"checkpoint.dir cannot be written: {error.strerror} at '{folder}'") from error
