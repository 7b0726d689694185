"""Watchdog: aborts a run that makes no progress and names the rank that the others wait for."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from megatron_align.config import ParallelConfig
from megatron_align.errors import InputError, TrainingFault
from megatron_align.model import parallel
from megatron_align.model.parallel import PATIENCE, RankInfo, list_ranks

MISSED_BEATS = 10  # heartbeats that a rank must miss to count as stopped

# The words of gloo and nccl for a closed connection; their exceptions are plain RuntimeErrors.
_CONNECTION_LOST = re.compile(
    r"[Cc]onnection (closed|reset) by (remote )?peer|[Bb]roken pipe|remote process exited"
)


class RankLost(RuntimeError):
    """Another rank died: its connection closed during a collective."""


class AlreadyReported(RuntimeError):
    """Another rank failed first and printed the reason; this rank's error only follows from it."""


class Watchdog:
    """Aborts the run when a rank makes no progress for too long, and names the rank that the others wait for.

    Every rank reports the phase it enters (``report``) and its progress within it (``detail``). A thread of each
    rank publishes both in the store of all ranks and sends a heartbeat: a rank without heartbeats was stopped or
    killed. Works the same for gloo and nccl, whose own errors name a socket or a collective, not a rank.

    Args:
        store: the key-value store that all ranks share, as ``parallel.join`` returns it.
        rank_info: this process.
        timeout_seconds: time without progress after which the run is aborted.
    """

    def __init__(self, store: dist.Store, rank_info: RankInfo, timeout_seconds: float):
        self._store = dist.PrefixStore("watchdog", store)
        self._rank_info = rank_info
        self._timeout = timeout_seconds
        self._pause = min(1.0, timeout_seconds / 10)
        self._number = self._details = 0
        self._last = time.monotonic()
        self._limit = timeout_seconds
        self._stop = threading.Event()
        self.before_end: Callable[[], None] = lambda: None  # called last before this rank of a hung run exits
        self.report("start")
        self._beat()

    def report(self, doing: str) -> None:
        """Enter a phase, for example ``step 17``; every rank reports the same phases in the same order."""
        self._number, self._details = self._number + 1, 0
        self._doing = self._within = doing
        self._last = time.monotonic()
        self._publish()

    def detail(self, within: str) -> None:
        """Record progress within the phase, for example ``micro-batch 3 of 8``; cheap: nothing is sent here."""
        self._details += 1
        self._within = f"{self._doing}, {within}"
        self._last = time.monotonic()

    def _publish(self) -> None:
        self._store.set(f"rank/{self._rank_info.rank}", f"{self._number}:{self._details}:{self._within}")

    def _beat(self) -> None:
        self._store.add(f"beat/{self._rank_info.rank}", 1)
        self._publish()

    @property
    def doing(self) -> str:
        """The phase that this rank reported last."""
        return self._doing

    @contextmanager
    def patient(self, doing: str) -> Iterator[None]:
        """Enter a phase with PATIENCE times the timeout, as reading or writing a large model takes longer than a step.

        A rank that finishes early waits in its next phase under the normal timeout, and names the late ranks.
        """
        self.report(doing)
        self._limit = PATIENCE * self._timeout
        try:
            yield
        finally:
            self._last, self._limit = time.monotonic(), self._timeout

    @contextmanager
    def watching(self) -> Iterator[Watchdog]:
        """Watch for the duration of a with-block; of all failing ranks only the first prints its error.

        Raises:
            RankLost: instead of the error of a broken connection.
            AlreadyReported: instead of an error that follows from another rank's.
        """
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield self
        except (InputError, TrainingFault):
            raise  # every rank raises the same error; rank 0 prints it
        except Exception as error:  # always re-raised: only decides which rank prints it
            if not self._first_to_report():
                raise AlreadyReported(str(error)) from error
            if _CONNECTION_LOST.search(str(error)):
                raise RankLost(
                    f"another rank died while rank {self._rank_info.rank} was in '{self._within}': its connection "
                    "closed; the launcher's report names it"
                ) from error
            raise
        finally:
            self._stop.set()
            thread.join()

    def _first_to_report(self) -> bool:
        try:
            return self._store.add("reported", 1) == 1
        except dist.DistError:  # the store died with the rank that hosted it, and that rank reported
            return False

    def _watch(self) -> None:
        while not self._stop.wait(self._pause):
            if time.monotonic() - self._last > self._limit:
                self._end()
            with suppress(dist.DistError):  # the store is gone: any rank in a collective fails by itself
                self._beat()

    def _end(self) -> None:
        try:
            line = self.diagnosis()
            if self._first_to_report():
                print(f"error: {line}", file=sys.stderr, flush=True)
            self.before_end()
        except dist.DistError:
            pass  # the store died with the rank that hosted it, and that rank reported
        finally:
            os._exit(1)

    def diagnosis(self) -> str:
        """Return one line that names the ranks that do not answer, or are least advanced, and their phases."""
        silent = self._silent()
        reports: dict[int, tuple[int, int, str]] = {}
        for rank in range(self._rank_info.world_size):
            number, details, within = self._store.get(f"rank/{rank}").decode().split(":", 2)
            reports[rank] = (int(number), int(details), within)
        wait = f"no progress for {self._limit:g} s"
        if silent:
            others = max((report for rank, report in reports.items() if rank not in silent), default=None)
            line = f"{wait}: rank {list_ranks(silent)} does not answer (stopped, killed, or its machine is gone), "
            line += f"last in '{reports[silent[0]][2]}'"
            return line if others is None else f"{line}, while others wait in '{others[2]}'"
        furthest, last = max(reports.values()), min(reports.values())
        late = [rank for rank, report in reports.items() if report[:2] == last[:2]]
        if furthest[:2] == last[:2]:
            return f"{wait}: every rank is in '{furthest[2]}' and none gets on"
        return f"{wait}: rank {list_ranks(late)} is still in '{last[2]}' while others wait in '{furthest[2]}'"

    def _silent(self) -> list[int]:
        """Return the ranks without heartbeats; returns early once all have sent one."""
        names = {
            rank: f"beat/{rank}" for rank in range(self._rank_info.world_size) if rank != self._rank_info.rank
        }
        before = {rank: self._store.add(name, 0) for rank, name in names.items()}
        deadline = time.monotonic() + min(30.0, max(MISSED_BEATS * self._pause, 8.0))
        silent = list(names)
        while silent and time.monotonic() < deadline:
            self._beat()  # other ranks may be checking this one
            time.sleep(self._pause / 2)
            silent = [rank for rank in silent if self._store.add(names[rank], 0) == before[rank]]
        return silent


def join_watched(rank_info: RankInfo, config: ParallelConfig) -> Watchdog:
    """Join the other ranks (``parallel.join``) and return a watchdog over them, not started yet."""
    return Watchdog(parallel.join(rank_info, config), rank_info, config.timeout_seconds)
