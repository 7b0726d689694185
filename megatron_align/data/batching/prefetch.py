"""Prefetch: prepare the data of the next steps in a background thread while the current step computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T], Iterator[T]):
    """Iterate over ``make(step)`` for each step, in order, with up to ``depth`` steps prefetched by one thread.

    An exception in ``make`` is raised by the ``next`` for that step, with its traceback, and ends the iteration. Use
    it in a ``with`` block, or call :meth:`close`: it waits for the step in preparation and drops the others.

    Args:
        steps: step numbers; read ``depth`` in advance.
        make: prepares one step; called in the thread, one at a time.
        depth: number of prefetched steps, at least 1.
    """

    def __init__(self, steps: Iterable[int], make: Callable[[int], T], depth: int = 2):
        if depth < 1:
            raise ValueError(f"Prefetcher needs a depth of at least 1, got {depth}")
        self._steps, self._make, self._depth = iter(steps), make, depth
        self._pending: deque[Future[T]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._fill(depth)

    def __next__(self) -> T:
        if not self._pending:
            self.close()
            raise StopIteration
        try:
            result = self._pending.popleft().result()
        except BaseException:
            self.close()
            raise
        self._fill(self._depth)
        return result

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread and drop prefetched steps. May be called again."""
        self._steps = iter(())
        self._pending.clear()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _fill(self, depth: int) -> None:
        while len(self._pending) < depth and (step := next(self._steps, None)) is not None:
            self._pending.append(self._thread.submit(self._make, step))
