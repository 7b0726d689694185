"""Run calls in order on one background thread, so that what was read is written while the next block is read."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from types import TracebackType
from typing import Any


class BackgroundWorker:
    """Runs calls in order on one thread, at most one in flight; an error is raised at the next call or at the end."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[Any] | None = None

    def __enter__(self) -> BackgroundWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if kind is None:
            self.wait()

    def run(self, call: Callable[[], Any]) -> None:
        """Wait for the last call, then start this one in the caller's context, where torch keeps some options."""
        self.wait()
        self._pending = self._pool.submit(copy_context().run, call)

    def wait(self) -> None:
        """Wait for the last call and raise its error, if any."""
        if self._pending:
            pending, self._pending = self._pending, None
            pending.result()

    def stop(self) -> None:
        """Wait for the last call and end the thread; its error is raised by :meth:`wait` only."""
        self._pool.shutdown(wait=True)
