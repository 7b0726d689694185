"""The log of a run: metrics.jsonl always, trackers on request, the terminal. What the numbers mean: ``metric_names``.

Only rank 0 writes. The other ranks hold a :class:`RunLog` without any output, so callers need not know their rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_align.config import LoggingConfig
from megatron_align.monitoring.console import ConsoleDisplay
from megatron_align.monitoring.metrics_file import METRICS, MetricsFile, keep_until
from megatron_align.monitoring.tracker_thread import TrackerThread
from megatron_align.monitoring.trackers import open_trackers


class RunLog:
    """Lines and rows of a run, written to every output until :meth:`close`.

    Args:
        rows: metrics.jsonl; None: not written.
        console: the terminal; None: nothing is shown.
        trackers: TensorBoard, Weights & Biases, MLflow.
        taken_by: returns which process took the run's folder from this one; None: none has. Nothing more is recorded
            then, as the other run records the same steps.
    """

    def __init__(
        self,
        rows: MetricsFile | None = None,
        console: ConsoleDisplay | None = None,
        trackers: Sequence[TrackerThread] = (),
        taken_by: Callable[[], str | None] = lambda: None,
    ):
        self._rows, self._console, self._trackers = rows, console, list(trackers)
        self._taken_by = taken_by

    @classmethod
    def open(
        cls,
        folder: Path,
        config: LoggingConfig,
        settings: Mapping[str, Any],
        done: int,
        steps: int,
        taken_by: Callable[[], str | None] = lambda: None,
    ) -> RunLog:
        """Open rank 0's outputs.

        Args:
            folder: of the run.
            config: which trackers are wanted.
            settings: the run's resolved configuration, for the trackers.
            done: steps already made; rows after them are dropped, as a resumed run writes them again.
            steps: of the complete run.
            taken_by: see :class:`RunLog`.
        """
        keep_until(folder / METRICS, done)
        rows = MetricsFile(folder / METRICS)
        console = ConsoleDisplay(done, steps)
        trackers = open_trackers(folder, config, settings, done, console.message)
        return cls(rows, console, trackers, taken_by)

    def __enter__(self) -> RunLog:
        if self._console:
            self._console.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._console:
            self._console.stop()
        try:
            if self._rows:
                self._rows.close(discard=self._taken_by() is not None)
        finally:
            for tracker in self._trackers:
                tracker.close(failed=error[0] is not None)

    def message(self, line: str) -> None:
        """Print a line."""
        if self._console:
            self._console.message(line)

    def summary(self, title: str, entries: Sequence[tuple[str, str]]) -> None:
        """Show what the run is: ``(name, value)`` of each property."""
        if self._console:
            self._console.summary(title, entries)

    def sync(self) -> None:
        """Flush the rows to the disk: a checkpoint must not outlive the rows of its steps.

        Raises:
            OSError: the disk refuses them.
        """
        if self._rows:
            self._rows.sync()

    def write(self, row: Mapping[str, Any], unrecorded: Mapping[str, float] | None = None) -> None:
        """Record one row: of a training step, or of a validation, a timing or a checkpoint (``split``).

        Without effect once another process has taken the run's folder: the run ends after this step.

        Args:
            row: JSON values; a number that is not finite is recorded as null, as JSON has no NaN.
            unrecorded: numbers that are only shown on the terminal.
        """
        if self._taken_by():
            return
        row = {name: _finite_or_null(value) for name, value in row.items()}
        if self._rows and (refusal := self._rows.add(row)):
            self.message(f"warning: {METRICS}: {refusal}; its rows wait in memory")
        split = row.get("split", "train")
        numbers = {f"{split}/{k}": v for k, v in row.items() if k != "step" and isinstance(v, (int, float))}
        for tracker in self._trackers:
            tracker.log(numbers, row["step"])
        if self._console:
            self._console.row(row, unrecorded or {})


def _finite_or_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite_or_null(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite_or_null(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
