"""metrics.jsonl: exactly one row per step, across resumed runs and full disks."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_align import faults
from megatron_align.storage.atomic_write import write_file
from megatron_align.storage.fsync import fsync_open

METRICS = "metrics.jsonl"


def keep_until(file: Path, step: int) -> None:
    """Drop the rows after ``step``, which a resumed run writes again. The file is replaced atomically."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").split("\n"):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # a kill during a write leaves an incomplete last line
        if row["step"] <= step:
            kept.append(line + "\n")
    write_file(file, "".join(kept))


def last_rows(file: Path, step: int) -> dict[str, dict[str, Any]]:
    """Return the rows of a step by split: ``train``, ``validation`` and others; none if there is no file."""
    rows: dict[str, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").split("\n") if file.is_file() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # a kill during a write leaves an incomplete last line
        if row["step"] == step:
            rows[row.get("split", "train")] = row
    return rows


class MetricsFile:
    """An append-only file of rows. Rows that a full disk refuses are kept and written with the next one."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("ab", buffering=0)
        self._size = path.stat().st_size
        self._unwritten = b""

    def add(self, row: Mapping[str, Any]) -> str | None:
        """Append a row; return the error text if the disk is full, None if it was written."""
        self._unwritten += json.dumps(row, allow_nan=False).encode() + b"\n"
        try:
            self.flush(row["step"])
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return error.strerror
        return None

    def flush(self, step: int | None = None) -> None:
        """Write the rows not yet written; ``step`` is for :mod:`faults`.

        Raises:
            OSError: the disk refuses them. No incomplete row is left in the file.
        """
        if not self._unwritten:
            return
        try:
            faults.at("row.write", step)
            rest = self._unwritten
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(self._size)
            raise
        self._size, self._unwritten = self._size + len(self._unwritten), b""

    def sync(self) -> None:
        """Write all rows and flush them to the disk.

        Raises:
            OSError: some could not be written.
        """
        self.flush()
        fsync_open(self._file.fileno(), self._path)

    def close(self, discard: bool = False) -> None:
        """Write the remaining rows and close; ``discard`` drops them, as the file is another run's by now.

        Raises:
            OSError: it could not be written.
        """
        with self._file:
            if not discard:
                self.flush()
