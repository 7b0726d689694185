"""Results of a check: rows in ``results.jsonl``, the same as text in ``report.txt``, each on disk when it is known."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_PLACES = {"step", "kind"}  # columns that a line of text begins with


class Results:
    """The results in a folder; every process of a check appends to the same files.

    Args:
        folder: of ``results.jsonl``, ``report.txt`` and ``log.txt``.
    """

    def __init__(self, folder: Path):
        self.rows_file, self.text_file = folder / "results.jsonl", folder / "report.txt"
        self.log_file = folder / "log.txt"

    def row(self, step: str, kind: str, **figures: Any) -> None:
        """Append a row, and its text; both are on disk when this returns.

        Args:
            step: of the check.
            kind: what the row describes: a gate, a figure, the end of the step, ...
            figures: the row's columns; ``passed`` marks it as a gate.
        """
        _append(self.rows_file, json.dumps({"step": step, "kind": kind, **figures}))
        self.say(line_of({"step": step, "kind": kind, **figures}))

    def say(self, text: str) -> None:
        """Append a line to the report and print it."""
        _append(self.text_file, text)
        print(text, flush=True)

    @contextmanager
    def printing_what_others_write(self) -> Iterator[None]:
        """Print at the end of the with-block what other processes have added to the report in it."""
        before = self.text_file.stat().st_size
        yield
        added = self.text_file.read_bytes()[before:].decode()
        print(added, end="", flush=True)

    def rows(self, step: str) -> list[dict[str, Any]]:
        """Return the rows of a step so far."""
        if not self.rows_file.exists():
            return []
        rows = [json.loads(line) for line in self.rows_file.read_text(encoding="utf-8").splitlines()]
        return [row for row in rows if row["step"] == step]


def line_of(row: dict[str, Any]) -> str:
    """Return a row as a line of text."""
    verdict = {True: "passed  ", False: "FAILED  "}.get(row.get("passed"), "")
    figures = "  ".join(
        f"{name} {_short(value)}" for name, value in row.items() if name not in _PLACES and name != "passed"
    )
    return f"  {row['kind']:10} {verdict}{figures}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _append(file: Path, line: str) -> None:
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(line + "\n")
        stream.flush()
        os.fsync(stream.fileno())
