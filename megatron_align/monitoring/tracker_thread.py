"""Run a tracker on a thread of its own: training never waits for it, and no fault of it ends a run.

Rows wait in memory while a tracker fails, and are sent again when it works. metrics.jsonl has all of them in any case.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

from megatron_align.errors import one_line

RETRY_SECONDS = 60.0
OPEN_SECONDS = 30.0  # for which the first step waits, so that a login prompt or an error comes before it
CLOSE_SECONDS = 60.0  # for which the end of the run waits
MAX_ROWS = 10_000  # that wait; the oldest are dropped first


class Tracker(Protocol):
    """Records a row's numbers; on rank 0 only."""

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Record finite numbers, named ``split/metric``."""
        ...

    def close(self, failed: bool) -> None:
        """Close the tracker, whether the run succeeded or failed."""
        ...


class TrackerThread:
    """A tracker that may fail at any call; the first fault is reported, further ones are only retried.

    Args:
        name: of the tracker, for people.
        open_tracker: returns it; called on the thread, as some trackers belong to the thread that opened them.
        message: prints a line.
    """

    def __init__(self, name: str, open_tracker: Callable[[], Tracker], message: Callable[[str], None]):
        self._name, self._open_tracker, self._message = name, open_tracker, message
        self._tracker: Tracker | None = None
        self._rows: deque[tuple[Mapping[str, float], int]] = deque()
        self._dropped = 0
        self._changed = threading.Condition()
        self._closing: bool | None = None  # True, False: close, as failed or not
        self._failing = self._warned = False
        self._opened = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        if not self._opened.wait(OPEN_SECONDS):
            self._message(
                f"warning: {name} has not answered in {OPEN_SECONDS:g} s; training starts without it"
            )

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Have a row sent; returns at once."""
        with self._changed:
            self._rows.append((numbers, step))
            if len(self._rows) > MAX_ROWS:
                self._rows.popleft()
                self._dropped += 1
            self._changed.notify()

    def close(self, failed: bool) -> None:
        """Send what waits, close the tracker and wait for both, but not for long."""
        with self._changed:
            self._closing = failed
            self._changed.notify()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._message(
                f"warning: {self._name} has not finished in {CLOSE_SECONDS:g} s; the run ends without it"
            )
        elif lost := len(self._rows) + self._dropped:
            self._message(f"warning: {self._name} lacks {lost} rows; metrics.jsonl has them")

    def _run(self) -> None:
        while self._closing is None:
            self._try_to_send()
            self._opened.set()
            with self._changed:
                if self._failing:
                    self._changed.wait_for(lambda: self._closing is not None, RETRY_SECONDS)
                else:
                    self._changed.wait_for(lambda: self._rows or self._closing is not None)
        self._try_to_send()
        if self._tracker is not None:
            try:
                self._tracker.close(failed=self._closing)
            except (Exception, SystemExit) as error:  # of a foreign package: of any type
                self._warn(error, " when the run ended; metrics.jsonl has all rows")

    def _try_to_send(self) -> None:
        """Send what waits; report the first fault, and when the tracker works again."""
        try:
            self._send()
        except (Exception, SystemExit) as error:  # of a foreign package: of any type
            self._failing = True
            self._warn(
                error,
                f"; training continues, its rows are sent again every {RETRY_SECONDS:g} s, and metrics.jsonl has "
                "them all",
            )
            return
        if self._failing:
            self._failing = False
            self._message(f"{self._name} works again")

    def _warn(self, error: BaseException, then: str) -> None:
        if not self._warned:
            self._warned = True
            reason = one_line(error, 300)
            self._message(f"warning: {self._name} failed ({type(error).__name__}: {reason}){then}")

    def _send(self) -> None:
        """Open the tracker if necessary, and send the rows in order; a row that fails stays the first."""
        if self._tracker is None:
            self._tracker = self._open_tracker()
        while self._rows:
            row = self._rows[0]
            self._tracker.log(*row)
            with self._changed:
                if self._rows and self._rows[0] is row:  # not dropped meanwhile
                    self._rows.popleft()
