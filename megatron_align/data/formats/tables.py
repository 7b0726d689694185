"""Read the rows of tables as a stream: Parquet, and CSV or TSV with a header.

A Parquet column that cannot be turned into Python values (dates beyond the year 9999, a time zone nobody knows) is an
error only where it is used.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_align.data.formats.fields import decoded_json
from megatron_align.data.formats.open_file import open_file
from megatron_align.errors import InputError, one_line

if TYPE_CHECKING:
    import pyarrow

_ROWS = 64  # Parquet rows decoded at a time
_READ_SIZE = 1 << 18  # bytes of a Parquet column read at a time
# Cells of CSV are text; these fields of a record are something else, or may be. (The texts of messages,
# conversations and tools are decoded where they are read: Parquet files have them too.)
_NUMBERS = ("weight", "margin", "chosen_score", "rejected_score", "score_chosen", "score_rejected")
_LABELS = ("label", "kto_tag")
_LISTS = ("completions", "history")
_TEXT_OR_TURNS = ("prompt", "completion", "chosen", "rejected", "reference")
_TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


class Unreadable:
    """Stands for a cell of a table that has no Python value; any use of it is a bad field."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __repr__(self) -> str:
        return f"an unreadable cell ({self._reason})"


def read_parquet(path: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a Parquet file, a few at a time. An absent field of a message or tool is a null there."""
    import pyarrow as pa  # imported here: it takes longer than reading a small JSON file
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, buffer_size=_READ_SIZE) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS):
                names = batch.schema.names
                repeated = {name for name, count in Counter(names).items() if count > 1}
                columns = {
                    name: [Unreadable("several columns have this name")] * len(batch)
                    if name in repeated
                    else _cells(column)
                    for name, column in zip(names, batch.columns, strict=True)
                }
                for i in range(len(batch)):
                    number += 1
                    yield f"{path}: row {number}", {name: cells[i] for name, cells in columns.items()}
    except pa.ArrowException as error:
        raise InputError(f"{path}: could not be read: {one_line(error)}") from error


def _cells(column: pyarrow.Array) -> list[Any]:
    try:
        return column.to_pylist()
    except _NO_VALUE:
        return [_cell(column, i) for i in range(len(column))]


def _cell(column: pyarrow.Array, i: int) -> Any:
    try:
        return column[i].as_py()
    except _NO_VALUE as error:
        return Unreadable(one_line(error))


# What Arrow raises for a value out of Python's range, text that is not UTF-8, an unknown time zone, deep nesting, ...
_NO_VALUE = (ValueError, OverflowError, NotImplementedError, KeyError, TypeError, RecursionError, ImportError)


def read_csv(path: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a CSV or TSV file with a header: all cells are text.

    Columns are separated by tabs in ``.tsv``; in ``.csv`` by commas, or by semicolons if the header has no comma.
    """
    csv.field_size_limit(sys.maxsize)  # a cell may be as long as a record
    with io.TextIOWrapper(open_file(path), encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=_delimiter(path), strict=True)
        line = 1
        try:
            names = _header(path, next(rows, []))
            line = rows.line_num + 1
            for row in rows:
                where, line = f"{path}:{line}", rows.line_num + 1
                if not any(cell.strip() for cell in row):
                    continue
                if len(row) != len(names):
                    yield (
                        where,
                        InputError(
                            f"{where}: must have {len(names)} cells like the header, got {len(row)} (a cell with "
                            'commas, quotes or line breaks stands in "quotes", quotes in it are doubled)'
                        ),
                    )
                    continue
                yield where, {name: cell for name, cell in zip(names, row, strict=True) if name}
        except csv.Error as error:
            raise InputError(
                f"{path}:{line}: must be CSV, got {error} (a cell with commas, quotes or line breaks stands in "
                '"quotes", quotes in it are doubled)'
            ) from error


def cells_as_values(record: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a row of a CSV file with the cells of fields that are not text as numbers, labels and lists.

    A cell that is no such value stays text, which is an error where the field is read.
    """
    return {name: _value(name, cell, where) for name, cell in record.items()}


def _value(name: str, cell: str, where: str) -> Any:
    if name in (*_NUMBERS, *_LABELS, *_LISTS) and not cell.strip():
        return None
    if name in _LABELS:
        return _TRUTH.get(cell.strip().lower(), cell)
    if name in _NUMBERS:
        try:
            return float(cell)
        except ValueError:
            return cell
    if name in _LISTS or (name in _TEXT_OR_TURNS and _are_turns(cell)):
        return decoded_json(cell, where, name)
    return cell


def _are_turns(cell: str) -> bool:
    """Return whether a cell is the JSON text of a list of turns, rather than text to train on."""
    if not cell.lstrip().startswith("["):
        return False
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return False
    return bool(value) and all(
        isinstance(item, dict) and ("role" in item or "from" in item) for item in value
    )


def _header(path: str, names: list[str]) -> list[str]:
    names = [name.strip() for name in names]
    repeated = sorted(name for name, count in Counter(names).items() if name and count > 1)
    if repeated:
        raise InputError(f"{path}:1: the header must not repeat a name, got {', '.join(repeated)} twice")
    return names


def _delimiter(path: str) -> str:
    if ".tsv" in Path(path).suffixes[-2:]:
        return "\t"
    with io.TextIOWrapper(open_file(path), encoding="utf-8-sig", newline="") as file:
        header = file.readline()
    return ";" if ";" in header and "," not in header else ","
