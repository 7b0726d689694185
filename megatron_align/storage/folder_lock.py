"""Lock a folder by a file that names its holder and carries a heartbeat: across nodes, and without ``flock``.

The file is created with O_EXCL, which is atomic over NFS too, and its holder changes it every few seconds. A lock whose
holder is dead (:mod:`.lock_holder`) is replaced by renaming, under a second O_EXCL file: of several processes that find
it dead, one gets it. A holder that was paused for so long that another process took its lock sees that in ``lost``.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType

from megatron_align.errors import InputError
from megatron_align.storage.lock_holder import (
    BEAT_SECONDS,
    STALE_SECONDS,
    Holder,
    HolderWatch,
    State,
    read_text,
)

STOP_SECONDS = 900.0  # the longest wait for a holder that is saving before it stops
_POLL_SECONDS = 0.2
_GUARD_SUFFIX = ".takeover"


class FolderLock:
    """A lock file, held from :meth:`acquire` to :meth:`release`, the end of the with-block, object or process.

    Args:
        path: of the file.
        refusal: first words of the error if it is held: ``checkpoint.dir runs/sft is in use by another run``.
        remedy: its last words.
        group: of the processes that work together, see :meth:`wait_for_group`.
    """

    def __init__(self, path: Path, refusal: str, remedy: str, group: str = ""):
        self.path, self._refusal, self._remedy, self._group = path, refusal, remedy, group
        self._held: _HeldLock | None = None

    def acquire(self) -> None:
        """Take the lock; wait for a holder that is stopping, and until one on another machine counts as dead.

        Raises:
            InputError: a process holds it.
            OSError: the file cannot be written.
        """
        mine = Holder.this_process(self.path, self._group)
        self._wait(lambda dead: _create(self.path, mine) if dead is None else _replace(self.path, dead, mine))
        self._held = _HeldLock(self.path, mine)
        weakref.finalize(self, self._held.release)  # also when the process exits

    def wait_for_group(self) -> None:
        """Return once the lock is free or this group's: for processes that work under a lock that another one takes.

        Raises:
            InputError: a process of another group holds it.
        """
        self._wait(lambda dead: True, share=True)

    @property
    def is_held(self) -> bool:
        """Whether this process acquired the lock and has not released it."""
        return self._held is not None

    @property
    def lost(self) -> str | None:
        """The process that took the lock while this one was paused; None: there is none."""
        return self._held.lost if self._held else None

    def beat(self) -> None:
        """Send a heartbeat, and so find out whether the lock was lost; without effect if it is not held."""
        if self._held:
            self._held.beat()

    def require_held(self) -> None:
        """Check that the lock was not lost; without effect if it was never acquired.

        Raises:
            InputError: naming the process that took it.
        """
        self.beat()
        if self.lost:
            raise InputError(
                f"{self._refusal}: {self.lost} took the lock {self.path} while this one was paused"
            )

    def mark_stopping(self) -> None:
        """Announce that this process is about to end: the next one waits for it instead of giving up."""
        if self._held:
            self._held.mark_stopping()

    def release(self) -> None:
        """Remove the file; without effect if the lock is not held."""
        if self._held:
            self._held.release()
            self._held = None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _wait(self, take: Callable[[str | None], bool], share: bool = False) -> None:
        """Call ``take`` with the content of the dead lock (None: there is no file) until it returns True."""
        watch, started, announced = HolderWatch(self.path), time.monotonic(), False
        while True:
            state = watch.look()
            if share and watch.holder is not None and watch.holder.group == self._group:
                return
            if state in (State.FREE, State.DEAD):
                if take(watch.text):
                    return
            elif state is State.ALIVE or time.monotonic() - started > STOP_SECONDS:
                raise InputError(f"{self._refusal}: {watch.holder} (lock {self.path}); {self._remedy}")
            elif not announced and (line := watch.waiting_line(state)):
                print(line, file=sys.stderr, flush=True)
                announced = True
            time.sleep(_POLL_SECONDS)


class _HeldLock:
    """A lock that this process holds, and the thread that sends its heartbeat."""

    def __init__(self, path: Path, mine: Holder):
        self._path, self._mine = path, mine
        self.lost: str | None = None
        self._beat_at = time.monotonic()  # when the last heartbeat that reached the file began
        self._is_stopping = self._ended = False
        self._beating = threading.Lock()
        self._wake: SimpleQueue[None] = SimpleQueue()
        threading.Thread(target=self._beat_until_end, name="lock", daemon=True).start()

    def beat(self) -> None:
        """Change the file, unless another process has taken the lock. Whoever writes the folder reports a bad disk."""
        with self._beating:
            if self.lost is not None or self._ended:
                return
            self._mine = replace(self._mine, beat=self._mine.beat + 1, stopping=self._is_stopping)
            now = time.monotonic()
            try:
                with self._path.open("r+", encoding="utf-8") as file:
                    holder = Holder.from_text(file.read())
                    if holder is not None and holder.token != self._mine.token:
                        self.lost = str(holder)
                        return
                    file.seek(0)
                    file.write(self._mine.to_text())
                    file.truncate()
                self._beat_at = now
            except FileNotFoundError:
                # Others may have held the lock meanwhile, and released it.
                if now - self._beat_at > STALE_SECONDS:
                    self.lost = "another process"
                    return
                with suppress(OSError):  # somebody deleted the file
                    if _create(self._path, self._mine):
                        self._beat_at = now
            except OSError:
                pass

    def mark_stopping(self) -> None:
        """Have the next heartbeat, sent immediately, say so. A signal handler may call this."""
        self._is_stopping = True
        self._wake.put(None)

    def release(self) -> None:
        """Remove the file, unless it is another process's by now. A forked process leaves it to its parent."""
        if self._ended or self._mine.pid != os.getpid():
            return
        with self._beating:
            self._ended = True
            with suppress(OSError):
                holder = Holder.from_text(read_text(self._path) or "")
                if holder is not None and holder.token == self._mine.token:
                    self._path.unlink()
        self._wake.put(None)

    def _beat_until_end(self) -> None:
        while not self._ended:
            with suppress(Empty):
                self._wake.get(timeout=BEAT_SECONDS)
            self.beat()


def _create(path: Path, mine: Holder) -> bool:
    """Create the file; return False if another process was faster."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(mine.to_text())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def _replace(path: Path, dead: str, mine: Holder) -> bool:
    """Replace a dead lock with this content; return False if another process was faster."""
    guard = path.with_name(path.name + _GUARD_SUFFIX)
    try:
        os.close(os.open(guard, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        _await_takeover(guard)
        return False
    unfinished = path.with_name(f"{path.name}.{mine.token[:8]}")
    try:
        if read_text(path) != dead:
            return False
        unfinished.write_text(mine.to_text(), encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
        guard.unlink(missing_ok=True)
    return True


def _await_takeover(guard: Path) -> None:
    """Wait until another process has taken over, which takes milliseconds; remove what a killed one has left."""
    deadline = time.monotonic() + STALE_SECONDS
    with suppress(FileNotFoundError):
        inode = guard.stat().st_ino
        while guard.stat().st_ino == inode:
            if time.monotonic() > deadline:
                guard.unlink()
                return
            time.sleep(_POLL_SECONDS)
