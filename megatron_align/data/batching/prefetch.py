"""Make the next steps' data in a background thread while the current step computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T], Iterator[T]):
    """Iterate over ``make(step)`` for each step, in order, made up to ``depth`` steps ahead by one thread.

    What ``make`` raises is raised by the ``next`` that asks for that step, with its traceback; nothing comes
    after it. Use it in a ``with`` block, or call :meth:`close`: it waits for the step being made and drops the
    others.

    Args:
        steps: which steps; read as far ahead.
        make: makes one; runs in the thread, one at a time.
        depth: steps made before they are asked for, at least 1.
    """

    def __init__(self, steps: Iterable[int], make: Callable[[int], T], depth: int = 2):
        if depth < 1:
            raise ValueError(f"Prefetcher needs a depth of at least 1, got {depth}")
        self._steps, self._make, self._depth = iter(steps), make, depth
        self._ahead: deque[Future[T]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._fill(depth)

    def __next__(self) -> T:
        if not self._ahead:
            self.close()
            raise StopIteration
        try:
            made = self._ahead.popleft().result()
        except BaseException:
            self.close()
            raise
        self._fill(self._depth)
        return made

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the thread; what was made ahead is dropped. May be called again."""
        self._steps = iter(())
        self._ahead.clear()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _fill(self, depth: int) -> None:
        while len(self._ahead) < depth and (step := next(self._steps, None)) is not None:
            self._ahead.append(self._thread.submit(self._make, step))
