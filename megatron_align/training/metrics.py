"""Where a run's numbers go: metrics.jsonl always; TensorBoard and Weights & Biases on request; the terminal.

Only rank 0 has a sink that writes; the others get one that does nothing.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from megatron_align import faults
from megatron_align.config import LoggingConfig
from megatron_align.errors import InputError

METRICS = "metrics.jsonl"
_SHOWN = {
    "loss": "loss {:.4f}",
    "grad_norm": "grad_norm {:.3f}",
    "lr": "lr {:.2e}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "save_pause_seconds": "training stood still for {:.2f} s",
    "save_seconds": "done after {:.2f} s",
}


def check_logging(config: LoggingConfig) -> None:
    """Check, before anything starts, that what is asked for is installed.

    Raises:
        InputError: naming the package that is missing.
    """
    if config.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise InputError("logging.wandb needs the package wandb, which is not installed: pip install wandb")


def keep_until(file: Path, step: int) -> None:
    """Drop the rows after ``step``: a resumed run writes them again. The file is replaced whole."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # a kill in the middle of a write leaves half a line, always the last
        if row["step"] <= step:
            kept.append(line + "\n")
    replacement = file.with_name(f".{file.name}.partial")
    replacement.write_text("".join(kept), encoding="utf-8")
    os.replace(replacement, file)


class Rows:
    """A file of rows that only grows. What a full disk refuses waits for the next row: no step is lost for it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._size = path.stat().st_size
        self._waiting = b""

    def add(self, row: Mapping[str, Any]) -> str | None:
        """Write a row; return what the disk says if it is full."""
        self._waiting += json.dumps(row).encode() + b"\n"
        try:
            self.flush(row["step"])
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return error.strerror
        return None

    def flush(self, step: int | None = None) -> None:
        """Write the rows that wait; ``step`` is for :mod:`faults`.

        Raises:
            OSError: the disk refuses them. No half row is left of them.
        """
        if not self._waiting:
            return
        try:
            faults.at("row.write", step)
            rest = self._waiting
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(self._size)
            raise
        self._size, self._waiting = self._size + len(self._waiting), b""

    def sync(self) -> None:
        """Force all rows onto the disk.

        Raises:
            OSError: some could not be written.
        """
        self.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what waits and close.

        Raises:
            OSError: it could not be written.
        """
        with self._file:
            self.flush()


class Sinks:
    """Rank 0's outputs, open for the length of a with-block."""

    def __init__(
        self, folder: Path, config: LoggingConfig, settings: Mapping[str, Any], done: int, steps: int
    ):
        keep_until(folder / METRICS, done)
        self._rows = Rows(folder / METRICS)
        self._board = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        self._wandb = None
        if config.wandb is not None:
            import wandb

            # One id per folder, so that a resumed run goes on in its own page.
            page = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
            self._wandb = wandb.init(
                project=config.wandb, dir=str(folder), config=dict(settings), id=page, resume="allow"
            )
        self.console = Console(highlight=False, soft_wrap=True)
        self._steps, self._newest = steps, done
        # A bar on a terminal, a plain line per step in a pipe or a file.
        self._progress = None
        if self.console.is_terminal:
            whole = Column(no_wrap=True)
            columns = (
                TextColumn("step {task.completed:.0f}/{task.total:.0f}", table_column=whole),
                BarColumn(bar_width=None, table_column=Column(ratio=1)),
                TextColumn("{task.fields[shown]}", table_column=whole),
                TimeRemainingColumn(table_column=whole),
            )
            self._progress = Progress(*columns, console=self.console, expand=True)
            self._task = self._progress.add_task("train", total=steps, completed=done, shown="")

    def __enter__(self) -> Sinks:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress:
            self._progress.stop()
        self._rows.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish(exit_code=0 if error[0] is None else 1)

    def say(self, line: str) -> None:
        """Print a line for people."""
        self.console.print(line, markup=False)

    def sync(self) -> None:
        """Force the rows onto the disk: a checkpoint must not outlive the rows before it.

        Raises:
            OSError: the disk refuses them.
        """
        self._rows.sync()

    def write(self, row: Mapping[str, Any]) -> None:
        """Record one row: of a training step, or of a validation or a checkpoint (``split``)."""
        if refusal := self._rows.add(row):
            self.say(f"warning: {METRICS}: {refusal}; its rows wait in memory")
        split = row.get("split", "train")
        numbers = {
            f"{split}/{k}": v
            for k, v in row.items()
            if k not in ("step", "split") and not isinstance(v, dict)
        }
        if self._board:
            try:
                for name, value in numbers.items():
                    self._board.add_scalar(name, value, row["step"])
            except OSError as error:  # a full disk, of which its own thread tells once
                self.say(f"warning: TensorBoard's file ends here: {error.strerror}")
                self._board = None
        if self._wandb:
            # It wants steps in order; a checkpoint is done some steps after its own.
            self._newest = max(self._newest, row["step"])
            self._wandb.log(numbers, step=self._newest)
        shown = "  ".join(form.format(row[key]) for key, form in _SHOWN.items() if key in row)
        if split != "train":
            self.say(f"step {row['step']}/{self._steps}  {split}  {shown}")
        elif self._progress:
            self._progress.update(self._task, completed=row["step"], shown=shown)
        else:
            self.say(f"step {row['step']}/{self._steps}  {shown}")


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

    def write(self, row: Mapping[str, Any]) -> None:
        """Do nothing."""
