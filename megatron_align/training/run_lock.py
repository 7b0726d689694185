"""The lock of ``checkpoint.dir``: two runs in one folder would destroy each other's checkpoints and rows."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

from megatron_align.errors import InputError
from megatron_align.model.parallel import RankInfo
from megatron_align.storage.folder_lock import FolderLock

LOCK = "run.lock"  # file in the run's folder


class RunLock:
    """The lock of a run's folder: rank 0 holds it, the others only check that no other launch does.

    Args:
        folder: ``checkpoint.dir``.
        rank_info: this process.
    """

    def __init__(self, folder: Path, rank_info: RankInfo):
        self._folder, self._rank = folder, rank_info.rank
        names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
        self._lock = FolderLock(
            folder / LOCK,
            f"checkpoint.dir '{folder}' is in use by another run",
            "wait until that run has ended or stop it, or give another checkpoint.dir",
            group=f"{rank_info.world_size} ranks, " + " ".join(os.environ.get(name, "") for name in names),
        )

    def acquire(self) -> None:
        """Take the lock, or on other ranks check it; wait for a run that is saving before it stops.

        Raises:
            InputError: another run uses the folder, or the lock cannot be written.
        """
        try:
            if self._rank == 0:
                self._lock.acquire()
            else:
                self._lock.wait_for_group()
        except OSError as error:
            raise InputError(
                f"checkpoint.dir cannot be written: {error.strerror} at '{self._folder}'"
            ) from error

    @property
    def is_held(self) -> bool:
        """Whether this process holds the lock."""
        return self._lock.is_held

    def taken_by(self) -> str | None:
        """Return which process took the lock from this one, which was paused; None: none has. It reads the file."""
        self._lock.beat()
        return self._lock.lost

    def mark_stopping(self) -> None:
        """Announce that this run saves and ends: the next one waits. A signal handler may call this."""
        self._lock.mark_stopping()

    def release(self) -> None:
        """Give the folder back; without effect on ranks that do not hold it."""
        self._lock.release()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
