"""Progress of a long pass over weights: a bar with GB/s on a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

SECONDS_PER_LINE = 30


class Progress:
    """Count bytes within a with-block and report to stderr; without a terminal, nothing in the first half minute.

    Args:
        title: of the operation, for example "importing".
        total: number of bytes expected.
    """

    def __init__(self, title: str, total: int):
        self.title, self.total, self.done = title, total, 0
        console = Console(stderr=True)
        self._bar: Bar | None = None
        if console.is_terminal:
            speed, left = TransferSpeedColumn(), TimeRemainingColumn()
            columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), speed, left
            self._bar = Bar(*columns, console=console, transient=True)
        self._task: TaskID | None = None
        self._started = self._reported = time.monotonic()

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def add(self, size: int) -> None:
        """Count ``size`` more bytes."""
        self.done += size
        if self._bar:
            assert self._task is not None, "count within the with-block"
            self._bar.update(self._task, completed=self.done)
        elif (now := time.monotonic()) - self._reported >= SECONDS_PER_LINE:
            self._reported = now
            speed = self.done / (now - self._started)
            Console(stderr=True).print(
                f"{self.title}: {self.done / 1e9:,.1f} of {self.total / 1e9:,.1f} GB, {speed / 1e9:.2f} GB/s",
                highlight=False,
                soft_wrap=True,
            )
