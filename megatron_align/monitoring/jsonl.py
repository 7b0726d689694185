"""metrics.jsonl: a row for each step, each once, through resumed runs and full disks."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_align import faults

METRICS = "metrics.jsonl"


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
        self._waiting += json.dumps(row, allow_nan=False).encode() + b"\n"
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
