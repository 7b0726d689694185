"""The work folder of a running preparation: locked by its owner, taken over by the next one if that dies."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import IO

STALE_SECONDS = 900.0  # a work folder of another machine is abandoned after this long without a new part
STALE_SECONDS_WITHOUT_LOCKS = 86400.0  # the same where the file system has no locks
_LOCK = "lock"


class WorkDir:
    """A locked folder ``.KEY.XXXXXXXX.tmp`` next to the future store, with ``parts/`` and ``store/``.

    Takes over the folder that a dead process left of this store, or creates one; removes those that dead processes
    left of other stores.

    Args:
        store: path of the future store.
    """

    def __init__(self, store: Path) -> None:
        store.parent.mkdir(parents=True, exist_ok=True)
        taken_over: tuple[Path, IO[str]] | None = None
        for folder in sorted(store.parent.glob(".*.tmp")):
            lock = _take(folder)
            if lock is None:
                continue
            if taken_over is None and folder.name.startswith(f".{store.name}."):
                taken_over = folder, lock
            else:
                shutil.rmtree(folder, ignore_errors=True)
                lock.close()
        self.folder, self._lock = taken_over or _start(store)
        self.parts, self.store = self.folder / "parts", self.folder / "store"
        self.parts.mkdir(exist_ok=True)
        shutil.rmtree(self.store, ignore_errors=True)

    def touch(self) -> None:
        """Renew the folder's time: other machines see that its owner is alive."""
        os.utime(self.parts)

    def leave(self) -> None:
        """Unlock the folder and keep it for the next preparation of this store."""
        self._lock.close()

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()


def _start(store: Path) -> tuple[Path, IO[str]]:
    folder = store.with_name(f".{store.name}.{uuid.uuid4().hex[:8]}.tmp")
    folder.mkdir()
    lock = open(folder / _LOCK, "w+", encoding="utf-8")  # noqa: SIM115  held as long as the folder is
    with suppress(OSError):  # without locks, age decides
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lock.write(socket.gethostname())
    lock.flush()
    return folder, lock


def _take(folder: Path) -> IO[str] | None:
    """Lock the folder of a dead process; None: its owner is alive, or may be."""
    idle = _idle_seconds(folder)
    try:
        lock = open(folder / _LOCK, "r+", encoding="utf-8")  # noqa: SIM115  held as long as the folder is
    except OSError:  # being created or removed at this moment, or left incomplete
        if idle > STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        required = 0.0 if lock.read() == socket.gethostname() else STALE_SECONDS
    except OSError as error:
        required = (
            float("inf") if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else STALE_SECONDS_WITHOUT_LOCKS
        )
    if idle < required or not _same(folder / _LOCK, lock):
        lock.close()
        return None
    lock.seek(0)
    lock.truncate()
    lock.write(socket.gethostname())
    lock.flush()
    return lock


def _idle_seconds(folder: Path) -> float:
    times = [0.0]
    for path in (folder, folder / "parts", folder / "store"):
        with suppress(OSError):
            times.append(path.stat().st_mtime)
    return time.time() - max(times)


def _same(path: Path, lock: IO[str]) -> bool:
    """Return whether the locked file still has its name: its folder may have been removed meanwhile."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(lock.fileno()))
    except OSError:
        return False
