"""What rank 0 shows: a card at the start, then a progress line; a bar on a terminal, plain lines in a pipe."""

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

_OF_STEP = {
    "loss": "loss {:.4f}",
    "grad_norm": "grad_norm {:.3f}",
    "lr": "lr {:.2e}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
    "peak_memory_gb": "{:.1f} GB",
}
_OF_TIMING = {
    "data_seconds": "data {:.3f} s",
    "forward_backward_seconds": "forward-backward {:.3f} s",
    "wait_seconds": "wait {:.3f} s",
    "optimizer_seconds": "optimizer {:.3f} s",
    "straggler_rank": "the others wait for rank {}",
    "straggler_seconds": "{:.3f} s",
}
_OF_SAVE = {
    "save_pause_seconds": "training stood still for {:.2f} s",
    "save_seconds": "done after {:.2f} s",
}
_NAME_WIDTH = 10
_LEAST_NEEDED = ("lr", "peak_memory_gb", "mfu", "grad_norm")  # first to go where the terminal is narrow
_BAR = 10  # columns that it has at least


class Display:
    """The terminal of a run, or the file that stands in for it.

    Args:
        done: steps that the run stands on.
        steps: of the whole run.
    """

    def __init__(self, done: int, steps: int):
        # Asked of the stream itself: rich would also write colours into a pipe where FORCE_COLOR is set.
        self._console = Console(force_terminal=sys.stdout.isatty(), highlight=False, soft_wrap=True)
        self._steps, self._first, self._started = steps, done, time.monotonic()
        self._progress = None
        if self._console.is_terminal:
            whole = Column(no_wrap=True)
            columns = (
                TextColumn("step {task.completed:.0f}/{task.total:.0f}", table_column=whole),
                BarColumn(bar_width=None, table_column=Column(ratio=1)),
                TextColumn("{task.fields[shown]}", table_column=whole),
            )
            self._progress = Progress(*columns, console=self._console, expand=True)
            self._task = self._progress.add_task("train", total=steps, completed=done, shown="")

    def start(self) -> None:
        """Begin to count time, and show the bar."""
        self._started = time.monotonic()
        if self._progress:
            self._progress.start()

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self._progress:
            self._progress.stop()

    def say(self, line: str) -> None:
        """Print a line for people."""
        self._console.print(line, markup=False)

    def card(self, title: str, facts: Sequence[tuple[str, str]]) -> None:
        """Show what the run is: a panel on a terminal, a line per fact elsewhere."""
        if not self._console.is_terminal:
            for name, fact in facts:
                self.say(f"{name:{_NAME_WIDTH}} {fact}")
            return
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, fact in facts:
            table.add_row(name, Text(fact))
        self._console.print(Panel(table, title=title, title_align="left", expand=False))

    def row(self, row: Mapping[str, Any], measured: Mapping[str, float]) -> None:
        """Show a row of metrics, and what was measured of it besides."""
        step, split = row["step"], row.get("split", "train")
        forms = {"timing": _OF_TIMING, "save": _OF_SAVE}.get(split, _OF_STEP)
        values = {**row, **measured}
        shown = {key: form.format(values[key]) for key, form in forms.items() if values.get(key) is not None}
        if split != "train":
            self.say("  ".join([f"step {step}/{self._steps}", split, *shown.values()]))
            return
        shown["eta"] = f"ETA {self._remaining(step)}"
        if self._progress:
            self._progress.update(self._task, completed=step, shown=self._fitting(shown))
        else:
            self.say("  ".join([f"step {step}/{self._steps}", *shown.values()]))

    def _fitting(self, shown: dict[str, str]) -> str:
        """Return the texts in one line, without the least needed ones where there is no room for all."""
        room = self._console.width - len(f"step {self._steps}/{self._steps}") - _BAR - 4
        for name in _LEAST_NEEDED:
            if len("  ".join(shown.values())) > room:
                shown.pop(name, None)
        return "  ".join(shown.values())

    def _remaining(self, step: int) -> timedelta:
        """Return the time to the last step, at the pace of this start; validation and saving count in."""
        pace = (time.monotonic() - self._started) / max(step - self._first, 1)
        return timedelta(seconds=round(pace * (self._steps - step)))
