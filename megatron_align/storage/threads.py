"""Computations on several threads: torch on one thread in each, results in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from typing import TypeVar

import torch

Result = TypeVar("Result")
_MOST_WORKERS = 4


def in_order(calls: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """Yield the results of calls in their order, a few computed on threads while the last is used.

    At least two threads, so that one reads while the other computes. A call's error is raised at its place.
    """
    workers = max(2, min(_MOST_WORKERS, len(os.sched_getaffinity(0))))
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for call in calls:
                # in the caller's context, where torch keeps some options
                pending.append(pool.submit(copy_context().run, call))
                if len(pending) > workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def single_threaded() -> Iterator[None]:
    """Run torch's operations on the calling thread only, also on threads that are started in the with-block.

    Operations on a block are short and frequent: in between, OpenMP's idle threads spin on the cores that read, hash
    and write. Of 11 s of processor time for an export of 4.3 GB, they took three.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
