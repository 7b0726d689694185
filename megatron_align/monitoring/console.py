"""Terminal output of rank 0: a summary at the start, then progress; a bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

_STEP_FORMATS = {
    "loss": "loss {:.4f}",
    "accuracy": "accuracy {:.1%}",
    "reward_margin": "margin {:.3f}",
    "grad_norm": "grad_norm {:.3f}",
    "lr": "lr {:.2e}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
    "peak_memory_gb": "{:.1f} GB",
}
_TIMING_FORMATS = {
    "data_seconds": "data {:.3f} s",
    "forward_backward_seconds": "forward-backward {:.3f} s",
    "wait_seconds": "wait {:.3f} s",
    "optimizer_seconds": "optimizer {:.3f} s",
    "straggler_rank": "slowest rank {}",
    "straggler_seconds": "costs the others {:.3f} s",
}
_SAVE_FORMATS = {
    "save_pause_seconds": "blocked training {:.2f} s",
    "save_seconds": "finished in {:.2f} s",
}
_NAME_WIDTH = 10
_DROPPED_FIRST = ("lr", "peak_memory_gb", "mfu", "grad_norm")  # where the terminal is narrow
_MIN_BAR_COLUMNS = 10


class ConsoleDisplay:
    """The terminal of a run, or the file that standard output is redirected to.

    Args:
        done: steps already made.
        steps: of the complete run.
    """

    def __init__(self, done: int, steps: int):
        # Decided by the stream itself: rich would also write colours into a pipe where FORCE_COLOR is set.
        self._console = Console(force_terminal=sys.stdout.isatty(), highlight=False, soft_wrap=True)
        self._steps, self._first, self._started = steps, done, time.monotonic()
        self._progress = None
        if self._console.is_terminal:
            unwrapped = Column(no_wrap=True)
            columns = (
                TextColumn("step {task.completed:.0f}/{task.total:.0f}", table_column=unwrapped),
                BarColumn(bar_width=None, table_column=Column(ratio=1)),
                TextColumn("{task.fields[shown]}", table_column=unwrapped),
            )
            self._progress = Progress(*columns, console=self._console, expand=True)
            self._task = self._progress.add_task("train", total=steps, completed=done, shown="")

    def start(self) -> None:
        """Start the clock of the ETA and show the bar."""
        self._started = time.monotonic()
        if self._progress:
            self._progress.start()

    def stop(self) -> None:
        """Remove the bar."""
        if self._progress:
            self._progress.stop()

    def message(self, line: str) -> None:
        """Print a line."""
        self._console.print(line, markup=False)

    def summary(self, title: str, entries: Sequence[tuple[str, str]]) -> None:
        """Show ``(name, value)`` entries: a panel on a terminal, one line each elsewhere."""
        if not self._console.is_terminal:
            for name, value in entries:
                self.message(f"{name:{_NAME_WIDTH}} {value}")
            return
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in entries:
            table.add_row(name, Text(value))
        self._console.print(Panel(table, title=title, title_align="left", expand=False))

    def row(self, row: Mapping[str, Any], unrecorded: Mapping[str, float]) -> None:
        """Show a row of metrics and the numbers that are only shown."""
        step, split = row["step"], row.get("split", "train")
        formats = {"timing": _TIMING_FORMATS, "save": _SAVE_FORMATS}.get(split, _STEP_FORMATS)
        values = {**row, **unrecorded}
        shown = {
            key: text.format(values[key]) for key, text in formats.items() if values.get(key) is not None
        }
        if split == "validation":  # of tasks: TASK/METRIC
            shown |= {k: f"{k} {v:.4f}" for k, v in values.items() if "/" in k and isinstance(v, float)}
        if split != "train":
            self.message("  ".join([f"step {step}/{self._steps}", split, *shown.values()]))
            return
        shown["eta"] = f"ETA {self._remaining(step)}"
        if self._progress:
            self._progress.update(self._task, completed=step, shown=self._fitting(shown))
        else:
            self.message("  ".join([f"step {step}/{self._steps}", *shown.values()]))

    def _fitting(self, shown: dict[str, str]) -> str:
        """Join the texts into one line, dropping the least important ones where the terminal is too narrow."""
        room = self._console.width - len(f"step {self._steps}/{self._steps}") - _MIN_BAR_COLUMNS - 4
        for name in _DROPPED_FIRST:
            if len("  ".join(shown.values())) > room:
                shown.pop(name, None)
        return "  ".join(shown.values())

    def _remaining(self, step: int) -> timedelta:
        """Estimate the time to the last step from the pace since the start, validation and saving included."""
        pace = (time.monotonic() - self._started) / max(step - self._first, 1)
        return timedelta(seconds=round(pace * (self._steps - step)))
