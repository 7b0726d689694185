"""One call at a time in another thread: what was read is written while the next is being read."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_align.checkpoint.files import sync

# The disk is set to work after so many bytes. Left alone, the kernel waits for gigabytes (a tenth of the memory), and
# the disk idles while there is still something to compute.
FLUSH_BYTES = 64 << 20


class Behind:
    """Runs calls in order, at most one behind the caller. A failed call raises at the next one, or at the end."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[Any] | None = None

    def __enter__(self) -> Behind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            self.wait()

    def run(self, call: Callable[[], Any]) -> None:
        """Wait for the last call and begin this one."""
        self.wait()
        self._pending = self._pool.submit(call)

    def wait(self) -> None:
        """Wait for the last call; raise what it raised."""
        if self._pending:
            pending, self._pending = self._pending, None
            pending.result()


class Flusher:
    """Brings a file to the disk behind its writer, whenever enough has gathered."""

    def __init__(self) -> None:
        self._behind, self._waiting = Behind(), 0

    def add(self, file: Path, nbytes: int) -> None:
        """Note that so many bytes were written.

        Raises:
            OSError: what was written before could not be brought to the disk.
        """
        self._waiting += nbytes
        if self._waiting >= FLUSH_BYTES:
            self._waiting = 0
            self._behind.run(partial(sync, file))

    def wait(self) -> None:
        """Wait until nothing is on its way; raises like :meth:`add`."""
        self._behind.wait()
