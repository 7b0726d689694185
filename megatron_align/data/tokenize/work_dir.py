"""The folder of a preparation under way: locked by its living owner, taken up by the next one if that dies."""

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

SILENT_SECONDS = 900.0  # another machine's work is taken for dead after this long without a part
UNLOCKABLE_SECONDS = 86400.0  # the same where the file system has no locks
_LOCK = "lock"


class Work:
    """A locked folder ``.KEY.XXXXXXXX.tmp`` beside the store to be: ``parts/`` and ``store/``.

    Finds the work on this store that a dead process left, or starts anew; removes what dead processes left of
    other stores.

    Args:
        store: path of the store to be.
    """

    def __init__(self, store: Path) -> None:
        store.parent.mkdir(parents=True, exist_ok=True)
        found: tuple[Path, IO[str]] | None = None
        for folder in sorted(store.parent.glob(".*.tmp")):
            lock = _take(folder)
            if lock is None:
                continue
            if found is None and folder.name.startswith(f".{store.name}."):
                found = folder, lock
            else:
                shutil.rmtree(folder, ignore_errors=True)
                lock.close()
        self.folder, self._lock = found or _start(store)
        self.parts, self.store = self.folder / "parts", self.folder / "store"
        self.parts.mkdir(exist_ok=True)
        shutil.rmtree(self.store, ignore_errors=True)

    def still_alive(self) -> None:
        """Tell other machines that this work goes on."""
        os.utime(self.parts)

    def leave(self) -> None:
        """Leave the folder for the next preparation of this store."""
        self._lock.close()

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()


def _start(store: Path) -> tuple[Path, IO[str]]:
    folder = store.with_name(f".{store.name}.{uuid.uuid4().hex[:8]}.tmp")
    folder.mkdir()
    lock = open(folder / _LOCK, "w+", encoding="utf-8")  # noqa: SIM115  held as long as the folder is
    with suppress(OSError):  # without locks, age tells
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lock.write(socket.gethostname())
    lock.flush()
    return folder, lock


def _take(folder: Path) -> IO[str] | None:
    """Lock the folder of a dead process; None: its owner lives, or may live."""
    silent = _silent_seconds(folder)
    try:
        lock = open(folder / _LOCK, "r+", encoding="utf-8")  # noqa: SIM115  held as long as the folder is
    except OSError:  # being made or removed at this moment, or left half so
        if silent > SILENT_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        needed = 0.0 if lock.read() == socket.gethostname() else SILENT_SECONDS
    except OSError as error:
        needed = float("inf") if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else UNLOCKABLE_SECONDS
    if silent < needed or not _same(folder / _LOCK, lock):
        lock.close()
        return None
    lock.seek(0)
    lock.truncate()
    lock.write(socket.gethostname())
    lock.flush()
    return lock


def _silent_seconds(folder: Path) -> float:
    times = [0.0]
    for path in (folder, folder / "parts", folder / "store"):
        with suppress(OSError):
            times.append(path.stat().st_mtime)
    return time.time() - max(times)


def _same(path: Path, lock: IO[str]) -> bool:
    """Tell whether the locked file still has its name: its folder may have been removed meanwhile."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(lock.fileno()))
    except OSError:
        return False
