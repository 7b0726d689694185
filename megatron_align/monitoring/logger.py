"""Where a run's numbers go: metrics.jsonl always; trackers on request; the terminal.

Only rank 0 has sinks that write; the others get one that does nothing. What the numbers mean: ``metric_names``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_align.config import LoggingConfig
from megatron_align.monitoring.console import Display
from megatron_align.monitoring.jsonl import METRICS, Rows, keep_until
from megatron_align.monitoring.trackers import open_trackers


class Sinks:
    """Rank 0's outputs, open for the length of a with-block."""

    def __init__(
        self, folder: Path, config: LoggingConfig, settings: Mapping[str, Any], done: int, steps: int
    ):
        keep_until(folder / METRICS, done)
        self._rows = Rows(folder / METRICS)
        self._trackers = open_trackers(folder, config, settings, done)
        self._display = Display(done, steps)

    def __enter__(self) -> Sinks:
        self._display.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._display.stop()
        self._rows.close()
        for tracker in self._trackers:
            tracker.close(failed=error[0] is not None)

    def say(self, line: str) -> None:
        """Print a line for people."""
        self._display.say(line)

    def sync(self) -> None:
        """Force the rows onto the disk: a checkpoint must not outlive the rows before it.

        Raises:
            OSError: the disk refuses them.
        """
        self._rows.sync()

    def card(self, title: str, facts: Sequence[tuple[str, str]]) -> None:
        """Show what the run is."""
        self._display.card(title, facts)

    def write(self, row: Mapping[str, Any], measured: Mapping[str, float] | None = None) -> None:
        """Record one row: of a training step, or of a validation, a timing or a checkpoint (``split``).

        Args:
            row: JSON values; a number that is not finite is recorded as null, which JSON has.
            measured: shown beside it, and not recorded.
        """
        row = {name: _plain(value) for name, value in row.items()}
        if refusal := self._rows.add(row):
            self.say(f"warning: {METRICS}: {refusal}; its rows wait in memory")
        split = row.get("split", "train")
        numbers = {f"{split}/{k}": v for k, v in row.items() if k != "step" and isinstance(v, (int, float))}
        for tracker in list(self._trackers):
            try:
                tracker.log(numbers, row["step"])
            except OSError as error:  # a full disk, say: the rows have it all, so training goes on
                self.say(f"warning: {type(tracker).__name__} ends here: {error.strerror or error}")
                self._trackers.remove(tracker)
        self._display.row(row, measured or {})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class NoSinks:
    """What the other ranks write: nothing."""

    def __enter__(self) -> NoSinks:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def say(self, line: str) -> None:
        """Do nothing."""

    def sync(self) -> None:
        """Do nothing."""

    def card(self, title: str, facts: Sequence[tuple[str, str]]) -> None:
        """Do nothing."""

    def write(self, row: Mapping[str, Any], measured: Mapping[str, float] | None = None) -> None:
        """Do nothing."""
