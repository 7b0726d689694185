"""Columns of data files by the names of our fields (``data.columns``), and which fields of a file are used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_align.data.formats.recognise import FIELDS, Shape
from megatron_align.errors import InputError, listed, nearest

Columns = Mapping[str, str | None]
_SHOWN = 10  # names in one line
_KEPT = 100  # names in a manifest


@dataclass
class FieldUse:
    """Notes on the records that were read so far.

    Attributes:
        used, left: names of the fields that are used, and of those that are left alone.
        columns: the columns of ``data.columns`` that a record had.
        null_arguments: where a null was dropped from the arguments of a tool call in a file other than Parquet.
    """

    used: dict[str, None] = field(default_factory=dict)
    left: dict[str, None] = field(default_factory=dict)
    columns: set[str] = field(default_factory=set)
    null_arguments: str | None = None

    def note(self, shape: Shape, record: Mapping[str, Any], columns: Columns) -> None:
        """Note the fields of one record (by the names in the file, where they differ)."""
        reads = shape.reads
        for name, value in record.items():
            if value is not None:
                theirs = columns.get(name)
                shown = f"{name} (column {theirs})" if theirs in self.columns else name
                (self.used if name in reads else self.left)[shown] = None

    def missing(self, columns: Columns) -> list[str]:
        """Return the columns that no record had."""
        return [theirs for theirs in columns.values() if theirs is not None and theirs not in self.columns]

    def in_manifest(self) -> dict[str, list[str]]:
        """Return what a store's manifest holds of it."""
        return {"used": list(self.used), "left": list(self.left)[:_KEPT]}


def fields_text(manifest: Mapping[str, Any]) -> str:
    """Return ``"messages, tools used; id left alone"`` of a store's manifest."""
    if "fields" not in manifest:
        return "not noted, as an earlier version tokenised the data"
    used, left = manifest["fields"]["used"], manifest["fields"]["left"]
    return f"{', '.join(used)} used" + (f"; {listed(left, most=_SHOWN)} left alone" if left else "")


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
