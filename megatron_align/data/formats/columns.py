"""Columns of data files by the names of our fields (``data.columns``), and which fields of a file are used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_align.data.formats.recognise import FIELDS, Shape
from megatron_align.errors import InputError, nearest

Columns = Mapping[str, str | None]
_SHOWN = 10  # names in one line


@dataclass
class FieldUse:
    """The names of the fields that are used, and of those that are left alone, of the records read so far."""

    used: dict[str, None] = field(default_factory=dict)
    left: dict[str, None] = field(default_factory=dict)

    def note(self, shape: Shape, record: Mapping[str, Any], columns: Columns) -> None:
        """Note the fields of one record (by the names in the file, where they differ)."""
        reads = shape.reads
        for name, value in record.items():
            if name in self.used or name in self.left or value is None:
                continue
            theirs = columns.get(name)
            shown = f"{name} (column {theirs})" if theirs else name
            (self.used if name in reads else self.left)[shown] = None

    def text(self) -> str:
        """Return ``"used messages, tools; left alone id"``."""
        left = f"; left alone {listed(self.left)}" if self.left else ""
        return f"used {listed(self.used)}{left}"


def listed(names: Mapping[str, Any] | list[str]) -> str:
    """Return names in one line, at most ten of them."""
    shown = list(names)
    more = f" and {len(shown) - _SHOWN:,} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more


def require_columns(columns: Columns) -> None:
    """Check ``data.columns``.

    Raises:
        InputError: if a key with a column is no field of a record, or two fields are read from one column.
    """
    sources = [theirs for theirs in columns.values() if theirs is not None]
    for ours, theirs in columns.items():
        if theirs is not None and ours not in FIELDS:
            raise InputError(
                f"data.columns must map a field of a record ({', '.join(FIELDS)}) to a column, or a column to null, "
                f"got '{ours}'{nearest(ours, list(FIELDS))}"
            )
        if theirs is not None and sources.count(theirs) > 1:
            raise InputError(f"data.columns must read each column once, got '{theirs}' twice")


def renamed(record: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """Return a record with the fields that ``columns`` gives, and without the columns that it leaves alone.

    A field whose column the record lacks stays as it is.
    """
    if not columns:
        return record
    given = {
        ours: record[theirs] for ours, theirs in columns.items() if theirs is not None and theirs in record
    }
    gone = {*given, *(columns[ours] for ours in given), *(name for name in columns if columns[name] is None)}
    return {**{name: value for name, value in record.items() if name not in gone}, **given}
