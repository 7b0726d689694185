"""Run checks on many answers: several at once where they wait, in a process of their own where they may not end."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch.distributed as dist

from megatron_align.rollout.endpoint import concurrently
from megatron_align.rollout.verifiers.checks import CHECKS, Scores, extracted

CHECK_SECONDS = 30.0  # for one answer, in a process of its own
START_SECONDS = 300.0  # for the imports of such a process, on a busy machine
# Scores answers, each with what it is compared with.
Scoring = Callable[[Sequence[tuple[str, Any]]], list[Scores]]


@contextmanager
def checking(name: str, extract: str | None = None, programs: int | None = None) -> Iterator[Scoring]:
    """Yield the function that checks answers; a check that may run forever runs in a process that is replaced.

    Args:
        name: of the check.
        extract: see :class:`.GenerateTask`.
        programs: run at once; None: one per processor core.
    """
    check = CHECKS[name]
    if check.waits:
        workers = programs or len(os.sched_getaffinity(0))
        yield lambda pairs: list(concurrently(lambda pair: check.judge(*pair), pairs, workers))
        return
    if check.package is None:
        yield lambda pairs: [check.judge(extracted(answer, extract), expected) for answer, expected in pairs]
        return
    with _process(partial(check.judge, "1", ("1",))) as call:
        yield lambda pairs: [
            call(partial(check.judge, extracted(answer, extract), expected))
            or dict.fromkeys(check.metrics, 0.0)
            for answer, expected in pairs
        ]


def share_of_cores() -> int:
    """Return the number of processor cores that this rank may keep busy, at least 1. Collective.

    Ranks of one machine that may run on the same cores share them.
    """
    own = (socket.gethostname(), os.sched_getaffinity(0))
    ranks = [own] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    sharing = sum(host == own[0] and not cores.isdisjoint(own[1]) for host, cores in ranks)
    return max(1, len(own[1]) // sharing)


@contextmanager
def _process(first: Callable[[], Scores]) -> Iterator[Callable[[Callable[[], Scores]], Scores | None]]:
    """Yield a function that makes a call in another process; None: it took too long, or ended the process.

    ``first`` is called when a process starts, which may take longer: it imports.
    """
    pools: list[ProcessPoolExecutor] = []

    def call(function: Callable[[], Scores]) -> Scores | None:
        if not pools:
            pools.append(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
            pools[0].submit(first).result(timeout=START_SECONDS)
        try:
            return pools[0].submit(function).result(timeout=CHECK_SECONDS)
        except (FutureTimeout, BrokenProcessPool):  # an expression that expands without end
            _kill(pools.pop())
            return None

    try:
        yield call
    finally:
        for pool in pools:
            pool.shutdown()


def _kill(pool: ProcessPoolExecutor) -> None:
    for process in list((pool._processes or {}).values()):
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)
